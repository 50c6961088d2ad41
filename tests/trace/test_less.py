"""LESS equals its definition, built from whole gradients."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.core.fit import fits_at
from headwater.trace import LESS, GradientCosine
from headwater.trace.less import adam_direction
from tests.curvature_cases import EVERY, loss_gradients, shared
from tests.method_cases import moments_like
from tests.trace.test_tracin import checkpoints


def side(fitted, moments, name):
    values = {n: t[None] for n, t in moments[name].items()}
    return torch.cat([layer.from_parameters(values).flatten(1) for layer in fitted.followed], 1)[0]


@pytest.mark.parametrize("name", EVERY)
def test_equals_the_definition(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    fits = fits_at(fitted, checkpoints(fitted, 2))
    moments, rates = [moments_like(fitted, s) for s in (0.1, 0.01)], [3e-3, 1e-3]
    expected = 0.0
    for one, state, weight in zip(fits, moments, (0.75, 0.25), strict=True):
        x, g = loss_gradients(one, found.query), loss_gradients(one)
        m, v = (side(fitted, state, s) for s in ("mean", "square"))
        gamma = (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g.square() + 1e-8).sqrt()
        cosine = (x @ gamma.mT) / x.norm(dim=1)[:, None] / gamma.norm(dim=1)
        expected = expected - weight * cosine
    options = {"fits": fits, "moments": moments, "rates": rates}
    scores = LESS(rank=None).attribute(fitted, found.query, **options)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.full((1, len(found.query)), 1 / len(found.query))
    group = LESS(rank=None).attribute(fitted, found.query, weights=weights, **options)
    torch.testing.assert_close(group.values[0].double(), expected.mean(0), rtol=1e-5, atol=1e-6)


def test_without_moments_and_with_a_large_eps_it_is_the_cosine_of_gradients():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    scores = LESS(rank=None, eps=1e12).attribute(
        fitted, found.query, moments=[moments_like(fitted, 0.0)]
    )
    expected = GradientCosine().attribute(fitted, found.query)
    torch.testing.assert_close(scores.values, expected.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [LESS(rank=4), LESS(dim=64)], ids=["two-sided", "joint"])
def test_projections_come_near(method):
    found = shared("mlp")
    fitted = found.fitted(Identity())
    moments = [moments_like(fitted, 0.01)]
    whole = LESS(rank=None).attribute(fitted, found.query, moments=moments).values
    near = method.attribute(fitted, found.query, moments=moments).values
    assert 0 < float((near - whole).abs().mean()) < 0.25  # about 1 / √28 and 1 / √64


def test_one_step_of_adam_moves_along_the_direction():
    """From moments at zero bias, torch's own Adam steps by the learning rate along it."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5).double())
    optimizer = torch.optim.Adam([p], lr=1e-3, betas=(0.8, 0.9), eps=0.0)
    mean, square = torch.randn(5).double(), torch.rand(5).double()
    optimizer.state[p] = {"step": torch.tensor(1e6), "exp_avg": mean, "exp_avg_sq": square}
    start, g = p.detach().clone(), torch.randn(5).double()
    expected = adam_direction(g[None], mean.clone(), square.clone(), betas=(0.8, 0.9), eps=0.0)[0]
    p.grad = g
    optimizer.step()
    torch.testing.assert_close((start - p.detach()) / 1e-3, expected)


def test_missing_moments_are_refused():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    with pytest.raises(ValueError, match="keep_optimizer=True"):
        LESS().attribute(fitted, found.query)
    with pytest.raises(ValueError, match="each of 1 checkpoints"):
        LESS().attribute(fitted, found.query, moments=[])
    with pytest.raises(ValueError, match="'mean' is missing"):
        LESS().attribute(fitted, found.query, moments=[{"square": {}}])
