"""Confidence held against what is right: measures written by hand, planted overconfidence, texts."""

import math

import pytest
import torch
from torch import nn

import headwater
from headwater.audit import Overconfidence, Subject, audit, sureness_of
from headwater.audit.overconfidence import sureness
from headwater.core.curvature import EKFAC
from headwater.numerics.calibration import expected_calibration_error
from tests.curvature_cases import case


def odds(n: int, scale: float, seed: int = 0):
    """A model whose logits are `scale` times the ones that labels were drawn from, and n examples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial(x.softmax(1), 1, generator=generator)[:, 0]
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(scale * torch.eye(3))
    fit = headwater.fit(model, (x[:40], y[:40]), headwater.Classification(), curvature="identity")
    return fit, (x[40:], y[40:])


def test_what_is_answered_is_that_of_the_probabilities():
    fit, (x, y) = odds(140, 2.0)
    found = sureness(fit.model, fit, headwater.TensorExamples(x, y))
    p = (2 * x).softmax(1)
    torch.testing.assert_close(found.confidence, p.amax(1))
    assert torch.equal(found.right, p.argmax(1) == y)
    torch.testing.assert_close(found.own, p[torch.arange(100), y])
    assert found.reliability().error == pytest.approx(expected_calibration_error(p, y))
    gap = found.overconfidence
    assert gap.value == pytest.approx(float(p.amax(1).mean() - found.right.double().mean()))
    assert gap.low < gap.value < gap.high and gap.n == 100


@pytest.mark.parametrize(("scale", "said"), [(3.0, "too sure"), (0.3, "too modest")])
def test_logits_of_another_scale_are_found_with_the_temperature_that_undoes_it(scale, said):
    fit, heldout = odds(3040, scale)
    (section,) = Overconfidence().audit(fit, heldout=heldout).sections
    assert said in section.sentences[0] and "held-out labels" in section.sentences[0]
    found = sureness(fit.model, fit, headwater.TensorExamples(*heldout))
    # of 3,000 labels; the standard error of the scale is about two per cent
    assert found.temperature == pytest.approx(scale, rel=0.1)
    assert f"divided by {found.temperature:.2f}" in section.sentences[2]
    assert sum(section.tables[0].columns["answers"]) == 3000
    assert len(section.tables[0].rows()) == 20


def test_true_probabilities_are_neither_too_sure_nor_too_modest():
    fit, heldout = odds(3040, 1.0)
    (section,) = Overconfidence().audit(fit, heldout=heldout).sections
    assert "as sure as it may" in section.sentences[0]


def test_texts_are_counted_by_tokens_and_drawn_by_texts():
    found = case("lm")
    fit = found.fit(EKFAC())
    held = sureness(fit.model, fit, found.query)
    rows = []
    for i in range(len(found.query)):
        prediction = fit.task.predict(fit.model, found.query.batch([i]))
        p = prediction.logits.detach().double().softmax(-1)[0]
        for at in prediction.mask[0].nonzero().flatten().tolist():
            label = int(prediction.labels[0, at])
            rows.append((i, float(p[at].max()), int(p[at].argmax()) == label, float(p[at, label])))
    assert held.temperature is None
    order = held.example.argsort(stable=True)
    for k, (i, confidence, right, own) in zip(order.tolist(), rows, strict=True):
        assert int(held.example[k]) == i and bool(held.right[k]) == right
        assert float(held.confidence[k]) == pytest.approx(confidence, abs=1e-6)
        assert float(held.own[k]) == pytest.approx(own, abs=1e-6)
    gap = held.overconfidence
    assert gap.n == 2 and gap.value == pytest.approx(
        sum(c - r for _, c, r, _ in rows) / len(rows), abs=1e-6
    )
    (section,) = Overconfidence().audit(fit, heldout=found.query).sections
    loss = -sum(math.log(own) for *_, own in rows) / len(rows)
    assert f"{len(rows)} held-out tokens" in section.sentences[0]
    assert f"log loss {loss:.3f}" in section.sentences[1]


def test_out_of_fold_probabilities_stand_in_and_without_any_it_says_nothing():
    found = case("mlp")
    fit = found.fit(EKFAC())
    labels = found.train.tensors[1]
    p = torch.full((len(labels), 3), 0.05).double()
    p[torch.arange(len(labels)), (labels + 1) % 3] = 0.9  # always sure, always wrong
    (section,) = Overconfidence().of(Subject(fit, probabilities=p)).sections
    assert (
        "out-of-fold labels the model is too sure: mean confidence 0.900, accuracy 0.000"
        in (section.sentences[0])
    )
    assert "trained in the same way on other examples" in section.sentences[-1]
    torch.testing.assert_close(sureness_of(p, labels).own, torch.full((len(p),), 0.05).double())
    (nothing,) = Overconfidence().audit(fit).sections
    assert "there are no held-out data" in nothing.sentences[0] and nothing.tables == ()
    numbers = case("regression")
    (real,) = Overconfidence().audit(numbers.fit(EKFAC()), heldout=numbers.query).sections
    assert "real numbers" in real.sentences[0]


def test_the_whole_audit_takes_held_out_data():
    found = case("mlp")
    whole = audit(found.fit(EKFAC()), heldout=found.query)
    section = whole.section("overconfidence")
    assert f"On {len(found.query)} held-out labels" in section.sentences[0]
    assert section.passes == type(section.passes)()
