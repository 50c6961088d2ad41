"""Boltzmann influence equals refitting where it should, and has the symmetries that it claims."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headwater
from headwater.calibrate import Complexity, IFComp, TemperatureScaling, complexity
from headwater.calibrate.ifcomp import choose_strength, expected_influence, hedged_logits
from headwater.core.curvature import EKFAC, Dense
from headwater.core.examples import TensorExamples
from headwater.core.task import Classification, Regression
from headwater.core.tempering import fit_at_temperature
from headwater.numerics.calibration import log_losses
from headwater.numerics.ranks import spearman
from tests.cases import CLASSES, Net, mlp, mlp_data

RIDGE = 0.02


def solved(x, y, tau, extra=None, start=None):
    """Weights (class, feature) of softmax regression at a temperature with a ridge, by Newton's method.

    `extra` is (point, label, weight) added to the mean loss, the weight in units of 1/N.
    """
    n, d = x.shape
    points, labels, weights = x, y, torch.full((n,), 1 / n).double()
    if extra is not None:
        point, label, weight = extra
        points = torch.cat([x, point[None]])
        labels = torch.cat([y, torch.tensor([label])])
        weights = torch.cat([weights, torch.tensor([weight / n]).double()])
    theta = torch.zeros(CLASSES * d).double() if start is None else start.flatten()

    def objective(t):
        z = points @ t.view(CLASSES, d).T / tau
        loss = nn.functional.cross_entropy(z, labels, reduction="none")
        return (weights * loss).sum() + RIDGE / 2 * t.square().sum()

    for _ in range(12 if start is None else 3):
        g = torch.func.grad(objective)(theta)
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), g)
    assert float(torch.func.grad(objective)(theta).abs().max()) < 1e-13
    return theta.view(CLASSES, d)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_norms_are_the_change_of_the_log_probability_after_refitting(tau):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (25,), generator=generator)
    queries = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, CLASSES, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(start := solved(x, y, tau))
    fit = headwater.fit(model, (x, y), Classification(), curvature="identity")
    soft = fit_at_temperature(fit, tau, curvature=Dense())
    # gradients are scaled by τ, so that a ridge is by τ²
    found = complexity(
        soft, (queries, torch.zeros(3, dtype=torch.int64)), damping=RIDGE * tau**2
    ).norms / len(x)
    step = 1e-4
    for i, query in enumerate(queries):
        for label in range(CLASSES):
            ends = []
            for weight in (step, -step):  # central differences: an error of O(step²)
                theta = solved(x, y, tau, (query, label, weight), start)
                ends.append(float((theta @ query / tau).log_softmax(0)[label]))
            actual = (ends[0] - ends[1]) / (2 * step)
            assert float(found[i, label]) == pytest.approx(actual, rel=1e-4)


def fitted(n=40, seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, classes)).double()
    data = (torch.randn(n, 5).double(), torch.randint(classes, (n,)))
    return headwater.fit(model, data, Classification(), curvature="identity")


def asked(n=15, seed=1, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return TensorExamples(x, torch.randint(classes, (n,), generator=generator))


def test_a_constant_added_to_all_logits_changes_nothing():
    fit, queries = fitted(), asked()
    shifted = Net(lambda self, x: self.body(x) + 5.0, body=fit.model)
    other = headwater.fit(shifted, fit.train, Classification(), curvature="identity")
    for tau in (1.0, 3.0, 1000.0):
        found, again = (
            complexity(fit_at_temperature(f, tau, curvature=EKFAC(fisher="exact")), queries)
            for f in (fit, other)
        )
        torch.testing.assert_close(found.norms, again.norms, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found.unlabelled, again.unlabelled, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found.labelled(), again.labelled(), rtol=1e-7, atol=1e-9)
        assert bool((found.norms >= 0).all())


def test_two_classes_have_norms_in_the_ratio_of_their_odds_squared():
    fit, queries = fitted(classes=2), asked(classes=2)
    for tau in (1.0, 1e6):
        found = complexity(fit_at_temperature(fit, tau, curvature=Dense()), queries)
        odds = ((found.logits[:, 1] - found.logits[:, 0]) / tau).exp()
        torch.testing.assert_close(
            found.norms[:, 0], odds.square() * found.norms[:, 1], rtol=1e-8, atol=1e-12
        )
    torch.testing.assert_close(found.norms[:, 0], found.norms[:, 1], rtol=1e-4, atol=1e-9)


def test_high_temperatures_rank_alike():
    fit, queries = fitted(), asked(60)
    low, high = (
        complexity(fit_at_temperature(fit, tau, curvature=EKFAC(fisher="exact")), queries)
        for tau in (1e3, 1e4)
    )
    assert float(spearman(low.unlabelled, high.unlabelled)) > 0.9999
    torch.testing.assert_close(low.norms, high.norms, rtol=0.02, atol=0)


def test_gradients_and_fisher_may_have_temperatures_of_their_own():
    fit, queries = fitted(), asked()
    plain = fit_at_temperature(fit, 1.0, curvature=Dense())
    found = complexity(plain, queries, temperature=4.0, damping=1e-3)
    x = queries.tensors[0]
    p = (fit.model(x).detach() / 4).softmax(1)
    F = plain.curvature.matrix + 1e-3 * torch.eye(len(plain.curvature.matrix)).double()
    named = list(fit.model.parameters())
    for i in range(3):
        for y in range(CLASSES):
            loss = -(fit.model(x[i : i + 1]) / 4).log_softmax(1)[0, y]
            grads = dict(
                zip(
                    dict(fit.model.named_parameters()),
                    torch.autograd.grad(loss, named),
                    strict=True,
                )
            )
            g = torch.cat(
                [
                    layer.from_parameters({k: grads[k][None] for k in layer.parameters}).flatten()
                    for layer in plain.followed
                ]
            )
            expected = g @ torch.linalg.solve(F, g)
            torch.testing.assert_close(found.norms[i, y], expected, rtol=1e-6, atol=1e-12)
    expected = expected_influence(p, found.norms) / 40
    torch.testing.assert_close(found.unlabelled, expected)


def test_complexities_are_their_formulas():
    found = complexity(fit_at_temperature(fitted(), 3.0), asked())
    p = (found.logits / 3).softmax(1)
    h = (p * found.norms).sum(1) / 40
    torch.testing.assert_close(found.unlabelled, h)
    own = found.logits.log_softmax(1).gather(1, found.labels[:, None])[:, 0]
    torch.testing.assert_close(found.labelled(), -own + h.log1p())
    torch.testing.assert_close(found.labelled(first_order=True), -own + h)
    soft = (found.logits / 7).log_softmax(1).gather(1, found.labels[:, None])[:, 0]
    torch.testing.assert_close(found.labelled(error_temperature=7.0), -soft + h.log1p())
    torch.testing.assert_close(found.label_score(), own.exp() / (1 + h))
    entropy = -(found.logits.softmax(1) * found.logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(found.confidence(), -entropy - h.log1p())
    torch.testing.assert_close(found.confidence("complexity"), -h)
    torch.testing.assert_close(found.confidence("entropy"), -(p * (p * found.norms).log()).sum(1))


def test_the_log_normalizer_is_the_complexity_to_first_order():
    found = complexity(fit_at_temperature(fitted(), 3.0), asked(), damping=1e6)
    torch.testing.assert_close(found.log_normalizer, found.unlabelled, rtol=1e-4, atol=1e-12)


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    strength=st.floats(0, 100),
    temperature=st.floats(0.2, 5),
    space=st.sampled_from(["logit", "probability"]),
)
def test_hedging_keeps_the_predicted_class_and_adds_up(seed, strength, temperature, space):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(8, 4, generator=generator, dtype=torch.float64) * 3
    n = torch.rand(8, 4, generator=generator, dtype=torch.float64) * 50
    found = hedged_logits(z, n, 10, strength, temperature, space=space)
    top = found.gather(1, z.argmax(1, keepdim=True))
    assert bool((found <= top).all())
    free = hedged_logits(z, n, 10, strength, temperature, space=space, keep_predicted=False)
    if space == "logit":
        torch.testing.assert_close(free, (z + strength * n / 10) / temperature)
    else:
        p = (z / temperature).softmax(1) * (1 + strength * n / 10)
        torch.testing.assert_close(free.softmax(1), p / p.sum(1, keepdim=True))
    torch.testing.assert_close(
        hedged_logits(z, n, 10, 0.0, temperature, space=space).softmax(1),
        (z / temperature).softmax(1),
    )


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_the_strength_is_that_of_the_least_loss_or_the_greatest_within_its_error(space):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300, 4, generator=generator, dtype=torch.float64) * 3
    n = torch.rand(300, 4, generator=generator, dtype=torch.float64) * 30
    truth = hedged_logits(z, n, 10, 1.0, 1.0, space=space)
    y = torch.multinomial(truth.softmax(1), 1, generator=generator)[:, 0]
    options = {"space": space}

    def losses(strength, temperature):
        return log_losses(hedged_logits(z, n, 10, strength, temperature, **options).softmax(1), y)

    best = choose_strength(z, n, y, 10, prudent=False, **options)
    for strength in (0.0, 0.3, 3.0):
        for temperature in (0.7, 1.0, 1.5):
            # T is exact for logits and on a grid of 1/20 decades for probabilities
            assert float(losses(*best).mean()) <= float(losses(strength, temperature).mean()) + 1e-3
    prudent = choose_strength(z, n, y, 10, **options)
    assert prudent[0] >= best[0]
    excess = losses(*prudent) - losses(*best)
    assert float(excess.mean()) <= float(excess.std()) / 300**0.5


def test_without_hedging_it_is_temperature_scaling():
    fit, validation, queries = fitted(), asked(50, seed=3), asked()
    scaled = TemperatureScaling().calibrate(fit, validation)
    method = IFComp(strength=0.0, output_temperature=scaled.temperature)
    found = method.calibrate(fit, validation).predict(queries)
    torch.testing.assert_close(found.probabilities, scaled.predict(queries).probabilities)


def test_a_predictor_is_the_steps_by_hand_and_keeps_predictions():
    fit, validation, queries = fitted(), asked(50, seed=3), asked()
    method = IFComp()
    predictor = method.calibrate(fit, validation)
    found = predictor.predict(queries)
    soft = fit_at_temperature(fit, 3.0, curvature=EKFAC(folds=1))
    strength, temperature = method.choose(complexity(soft, validation, damping="0.001 relative"))
    assert (predictor.strength, predictor.temperature) == (strength, temperature)
    again = complexity(soft, queries, damping="0.001 relative")
    hedged = hedged_logits(again.logits, again.norms, 40, strength, temperature)
    torch.testing.assert_close(found.probabilities, hedged.softmax(1))
    assert found.predicted.tolist() == again.logits.argmax(1).tolist()
    assert found.facts["passes_beyond_fit"] == 2
    assert method.soften(soft) is soft
    assert "ng2024measuring" in headwater.cite(found)


def test_an_ordinary_fit_is_read_without_another_pass():
    fit = fitted()
    plain = headwater.fit(fit.model, fit.train, Classification(), curvature=EKFAC())
    assert complexity(plain, asked()).facts["passes_beyond_fit"] == 0
    assert IFComp(temperature=1.0).soften(plain) is plain


def test_the_most_probable_classes_alone_may_be_examined():
    soft, queries = fit_at_temperature(fitted(), 3.0), asked()
    whole, part = complexity(soft, queries), complexity(soft, queries, top=2)
    assert whole.examined is None
    assert part.examined is not None
    assert part.examined.sum(1).tolist() == [2] * len(queries)
    torch.testing.assert_close(part.norms[part.examined], whole.norms[part.examined])
    mean = (whole.norms * part.examined).sum(1) / 2
    torch.testing.assert_close(part.norms[~part.examined], mean)
    assert "2 classes examined" in repr(part)


def test_a_complexity_is_saved_and_read(tmp_path):
    found = complexity(fit_at_temperature(fitted(), 3.0), asked(), top=2)
    found.save(tmp_path / "complexity")
    again = Complexity.load(tmp_path / "complexity")
    torch.testing.assert_close(again.norms, found.norms)
    assert again.table() == found.table()
    assert torch.equal(again.examined, found.examined)
    assert again.facts == found.facts
    assert set(found.table()) == {
        "id",
        "given_label",
        "predicted_label",
        "complexity",
        "label_score",
        "ood_score",
    }


def test_many_classes_are_warned_of():
    torch.manual_seed(0)
    model = nn.Linear(3, 201).double()
    data = (torch.randn(4, 3).double(), torch.randint(201, (4,)))
    soft = fit_at_temperature(
        headwater.fit(model, data, Classification(), curvature="identity"), 3.0
    )
    with pytest.warns(UserWarning, match="pass top=20"):
        complexity(soft, data)
    assert complexity(soft, data, top=20).facts["gradients_an_example"] == 20


def test_what_cannot_be_asked_is_refused():
    fit, queries = fitted(), asked()
    with pytest.raises(ValueError, match="drawn from the model"):
        complexity(fit, queries)
    given = headwater.fit(
        fit.model, fit.train, Classification(), curvature=EKFAC(fisher="empirical")
    )
    with pytest.raises(ValueError, match="drawn from the model"):
        complexity(given, queries)
    x, _ = mlp_data(9).tensors
    numbers = headwater.fit(mlp(), (x, torch.zeros(9, 3).double()), Regression())
    with pytest.raises(ValueError, match="Expected a classifier"):
        complexity(numbers, numbers.train)
    single = headwater.fit(
        nn.Linear(5, 1).double(), (x, torch.zeros(9, dtype=torch.int64)), Classification()
    )
    with pytest.raises(ValueError, match="two or more classes"):
        complexity(single, single.train)
    broken = TensorExamples(torch.full((1, 5), math.nan).double(), torch.tensor([0]), ids=["odd"])
    with pytest.raises(FloatingPointError, match="'odd'"):
        complexity(fit_at_temperature(fit, 3.0), broken)
    with pytest.raises(ValueError, match="one class or more"):
        complexity(fit_at_temperature(fit, 3.0), queries, top=0)
    with pytest.raises(ValueError, match="belong together"):
        IFComp(strength=1.0)
    with pytest.raises(ValueError, match="strength must be"):
        IFComp(strength=-1.0, output_temperature=1.0)
