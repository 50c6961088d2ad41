"""TracIn equals the sum of gradient products over checkpoints, by autograd."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.core.fit import fits_at
from headwater.trace import GradientDot, TracIn
from headwater.trace.tracin import tracin
from tests.curvature_cases import EVERY, case, loss_gradients, shared


def checkpoints(fitted, n=3):
    torch.manual_seed(1)
    state = fitted.model.state_dict()
    return [{k: v + 0.3 * torch.randn_like(v) for k, v in state.items()} for _ in range(n)]


@pytest.mark.parametrize("name", EVERY)
def test_equals_the_sum_over_checkpoints(name):
    fitted = shared(name).fitted(Identity())
    fits, rates = fits_at(fitted, checkpoints(fitted)), [0.3, 0.2, 0.1]
    expected = 0.0
    for one, rate in zip(fits, rates, strict=True):
        expected = (
            expected - rate * loss_gradients(one, shared(name).query) @ loss_gradients(one).mT
        )
    scores = TracIn().attribute(fitted, shared(name).query, fits=fits, rates=rates)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    assert scores.unit == "nats" and scores.facts["checkpoints"] == 3


def test_one_checkpoint_at_rate_one_is_the_gradient_product():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    scores = TracIn().attribute(fitted, found.query)
    assert torch.equal(scores.values, GradientDot().attribute(fitted, found.query).values)
    assert scores.unit == "" and "only their order" in repr(scores)


def test_the_ideal_form_predicts_a_step_to_first_order():
    """One step on a batch: the change of the measurement is the sum of the scores of its examples."""
    found = case("mlp")
    fitted, lr, batch = found.fit(Identity()), 1e-6, [1, 4, 7, 8]
    rates = torch.zeros(1, len(found.train)).double()
    rates[0, batch] = lr / len(batch)
    scores = TracIn().attribute(fitted, found.query, rates=rates, measurement="margin")
    step = loss_gradients(fitted)[batch].mean(0)
    named, start, moved = dict(found.model.named_parameters()), 0, {}
    for layer in fitted.followed:
        part = layer.to_parameters(step[start : start + layer.numel].reshape(1, *layer.block))
        moved |= {n: named[n].detach() - lr * g[0] for n, g in part.items()}
        start += layer.numel
    batch_of = found.query.batch(range(4))
    before, after = (
        found.task.predict(model, batch_of).margin()
        for model in (found.model, fits_at(fitted, [moved])[0].model)
    )
    change = (after - before).detach()
    torch.testing.assert_close(scores.values.double().sum(1), change, rtol=1e-4, atol=1e-12)
    outside = [i for i in range(len(found.train)) if i not in batch]
    assert not scores.values[:, outside].any()


def test_what_does_not_fit_together_is_refused():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    with pytest.raises(ValueError, match="one learning rate for each of 1 checkpoints; got 2"):
        TracIn().attribute(fitted, found.query, rates=[1.0, 2.0])
    n = len(found.train)
    with pytest.raises(ValueError, match=rf"or \(1, {n}\), one for each .* got \(1, {n + 1}\)\."):
        TracIn().attribute(fitted, found.query, rates=torch.ones(1, n + 1))
    with pytest.raises(ValueError, match="one fit or more"):
        TracIn().attribute(fitted, found.query, fits=[])
    with pytest.raises(ValueError, match="same training examples"):
        TracIn().attribute(fitted, found.query, fits=[shared("lm").fitted(Identity())])
    with pytest.raises(ValueError):
        tracin([torch.zeros(1, 1)], [1.0, 1.0])
