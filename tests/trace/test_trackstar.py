"""TrackStar equals its definition, built from whole gradients."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.core.projection import TwoSided
from headwater.trace import GradientCosine, TrackStar
from headwater.trace.moments import moment_of, moments_of
from headwater.trace.trackstar import factored_scale, unit, whitened
from tests.curvature_cases import EVERY, autograd_rows, case, shared
from tests.method_cases import moments_like


def root_of_inverse(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("corrected", [False, True])
def test_equals_the_definition(name, corrected):
    found = shared(name)
    fitted = found.fitted(Identity())
    moments = moments_like(fitted) if corrected else None
    projection, phi = TwoSided(2, seed=3), {"query": [], "train": []}
    whole = {
        "query": autograd_rows(fitted, fitted.task.loss, found.query),
        "train": autograd_rows(fitted, fitted.task.loss, found.train),
    }
    for layer in fitted.followed:
        V = torch.ones(layer.block).double()
        if moments is not None:
            V = moment_of(layer, moments, "square")
            V = V.mean(-1, keepdim=True) * V.mean(-2, keepdim=True) / V.mean((-1, -2), keepdim=True)
        P_out, P_in = (None if p is None else p.double() for p in projection.sides(layer))
        rows = {}
        for role, each in whole.items():
            G = each[layer.name].unflatten(1, layer.block) / V.sqrt()
            G = G if P_out is None else P_out @ G
            rows[role] = (G if P_in is None else G @ P_in.mT).flatten(1)
        R = sum(
            share * rows[role].mT @ rows[role] / len(rows[role])
            for role, share in (("query", 0.25), ("train", 0.75))
        )
        R = R + 0.01 * R.diagonal().mean() * torch.eye(len(R)).double()
        for role in phi:
            phi[role].append(rows[role] @ root_of_inverse(R))
    x, y = (torch.cat(phi[role], dim=1) for role in ("query", "train"))
    expected = -(x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).mT
    method = TrackStar(rank=2, mixing=0.25, damping=0.01, seed=3)
    scores = method.attribute(fitted, found.query, moments=moments)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-4, atol=1e-6)
    assert scores.facts["second_moment"] == ("factored" if corrected else "none")


def test_heavy_damping_without_projection_is_the_cosine():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    scores = TrackStar(rank=1000, damping=1e8).attribute(fitted, found.query)
    # each layer is divided by the root of its own damping, so one layer alone is compared
    one = found.fit(Identity(), layers="2")
    scores = TrackStar(rank=1000, damping=1e8).attribute(one, found.query)
    expected = GradientCosine().attribute(one, found.query)
    torch.testing.assert_close(scores.values, expected.values, rtol=1e-4, atol=1e-6)


def test_whitened_training_features_have_unit_second_moment():
    torch.manual_seed(0)
    rows = torch.randn(50, 4).double() @ torch.randn(4, 4).double()
    white = whitened(rows, rows.mT @ rows / 50, 1e-12)
    torch.testing.assert_close(white.mT @ white / 50, torch.eye(4).double())


def test_rows_of_length_one_and_rows_of_zeros():
    assert unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        pytest.approx([0.6, 0.8]),
        [0, 0],
    ]


def test_a_weight_that_never_had_a_gradient_counts_for_nothing():
    out, in_ = factored_scale(torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert out.tolist() == [0, pytest.approx(2**-0.5)]
    assert in_.tolist() == [0, pytest.approx(2**-0.5)]


def test_moments_of_a_live_optimizer():
    found = case("mlp")
    optimizer = torch.optim.AdamW(found.model.parameters())
    found.task.loss(found.model, found.train.batch(range(18))).mean().backward()
    expected = {n: p.grad.clone() for n, p in found.model.named_parameters()}
    optimizer.step()
    moments = moments_of(optimizer, found.model)
    for name, g in expected.items():
        torch.testing.assert_close(moments["mean"][name], 0.1 * g)
        torch.testing.assert_close(moments["square"][name], 0.001 * g.square())


def test_missing_moments_and_silly_settings_are_refused():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    with pytest.raises(ValueError, match="'square' is missing for 0"):
        TrackStar().attribute(fitted, found.query, moments={"square": {}})
    with pytest.raises(ValueError, match="mixing must lie"):
        TrackStar(mixing=2.0)
