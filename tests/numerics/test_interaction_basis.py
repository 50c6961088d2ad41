"""Bases on plain matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.numerics.interaction_basis import (
    integration_points,
    interaction_directions,
    kept_apart,
    neuron_directions,
    principal,
    principal_directions,
)


def moment(x: torch.Tensor) -> torch.Tensor:
    f = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return f.mT @ f / len(x)


def metric(d: int, rank: int, g: torch.Generator) -> torch.Tensor:
    J = torch.randn(rank, d + 1, generator=g, dtype=torch.float64)
    return J.mT @ J


@given(st.integers(0, 50), st.booleans())
@settings(max_examples=20, deadline=None)
def test_no_invertible_map_of_the_activations_changes_lambda_or_coordinates(seed, center):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=g, dtype=torch.float64) + 1
    T = torch.eye(5, dtype=torch.float64)
    T[:4, :4] += 0.3 * torch.randn(4, 4, generator=g, dtype=torch.float64)
    M, back = metric(4, 3, g), torch.linalg.inv(T)
    options = {"center": center, "cutoff": 1e-12}
    f = torch.cat([x, torch.ones(60, 1).double()], 1)
    one = interaction_directions(principal(moment(x), **options), M, cutoff=1e-9)
    # activations f T; gradients in them are T⁻¹ of those in f
    other = interaction_directions(
        principal(T.mT @ moment(x) @ T, **options), back @ M @ back.mT, cutoff=1e-9
    )
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-9)
    hats = (f @ one.C).abs(), (f @ T @ other.C).abs()
    gaps = one.weight[int(center) :].diff().abs()
    if float(gaps.min()) > 1e-3:  # where eigenvalues meet, any basis of their space will do
        torch.testing.assert_close(*hats, rtol=1e-4, atol=1e-5)


def test_no_more_directions_are_kept_than_the_next_layer_reads():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g, dtype=torch.float64)
    found = interaction_directions(principal(moment(x)), metric(5, 2, g))
    assert found.n_nodes == 2 and found.C.shape == (6, 3)


def test_the_neurons_are_a_basis_that_loses_nothing():
    x = torch.randn(60, 5, dtype=torch.float64) * torch.arange(1, 6) + 3
    found = neuron_directions(moment(x))
    torch.testing.assert_close(found.C @ found.C_pinv, torch.eye(6).double())
    assert found.weight[1:].tolist() == sorted(found.weight[1:].tolist(), reverse=True)


@pytest.mark.parametrize(("rule", "n", "degree"), [("gauss", 3, 5), ("trapezoid", 9, 1)])
def test_integrals_of_polynomials(rule, n, degree):
    points, weights = integration_points(n, rule)
    for k in range(degree + 1):
        value = sum(w * a**k for a, w in zip(points, weights, strict=True))
        # the trapezoid's ends lie a little inside
        assert value == pytest.approx(1 / (k + 1), abs=1e-12 if rule == "gauss" else 1e-3)


def test_a_metric_of_zeros_is_refused():
    x = torch.randn(60, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="No direction matters"):
        interaction_directions(principal(moment(x)), torch.zeros(4, 4).double())


@pytest.mark.parametrize("center", [True, False])
def test_activations_kept_apart_are_nodes_of_their_own_and_the_others_a_basis_of_their_own(center):
    g = torch.Generator().manual_seed(3)
    x = (
        torch.randn(80, 5, generator=g, dtype=torch.float64)
        @ torch.randn(5, 5, generator=g).double()
    )
    x, apart = x + 2, [1, 4]
    others = [0, 2, 3, 5]
    whole, gains = moment(x), torch.tensor([0.5, 3.0]).double()
    alone = principal_directions(principal(whole[others][:, others], center=center, cutoff=1e-12))
    made = kept_apart(alone, whole, apart, gains)
    f = torch.cat([x, torch.ones(80, 1).double()], 1)
    hat = f @ made.C
    torch.testing.assert_close(hat @ made.C_pinv, f)
    assert len(made.apart) == 2 and made.constant == center
    rest = [k for k in range(hat.shape[1]) if k not in made.apart]
    torch.testing.assert_close(hat[:, rest], f[:, others] @ alone.C)
    for node in made.apart:
        (i,) = (made.C[:5, node] != 0).nonzero().squeeze(1).tolist()
        gain = gains[apart.index(i)]
        expected = gain * (x[:, i] - (x[:, i].mean() if center else 0))
        torch.testing.assert_close(hat[:, node], expected)
        assert float(made.weight[node]) == pytest.approx(float(expected.square().mean()))
    assert bool((made.weight[int(center) :].diff() <= 0).all())


def test_an_activation_apart_that_counts_nothing_has_no_node():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = 1.0  # does not vary
    alone = principal_directions(principal(moment(x[:, :2])))
    made = kept_apart(alone, moment(x), [2], torch.ones(1).double())
    assert made.apart == () and made.n_nodes == 2
    back = torch.cat([x, torch.ones(50, 1).double()], 1) @ made.C @ made.C_pinv
    torch.testing.assert_close(back[:, 2], x[:, 2])  # the constant brings it back
