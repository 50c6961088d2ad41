"""Gated linear networks: moments against formulas written out and against every pattern of gates."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.gated import (
    DISTANCES,
    PairMoments,
    covariance_root,
    expected_squared_distance,
    kl_distance,
    softmax_distance,
    squared_distance,
    through_affine,
    through_gates,
)


def affine(W, b):
    return lambda rows: rows @ W.mT + b


def layers(sizes, generator):
    made = []
    for n_in, n_out in itertools.pairwise(sizes):
        pair = torch.randn(2, n_out, n_in + 1, generator=generator, dtype=torch.float64)
        made.append([(w[:, :-1] / n_in**0.5, w[:, -1]) for w in pair])
    return made


def moments_of(x):
    mean = x.mean(0)
    return PairMoments.of_inputs(mean, (x - mean).mT @ (x - mean) / len(x))


def carried(net, rates, x, *, released=False):
    moments = moments_of(x)
    for (first, second), rate in zip(net, [*rates, None], strict=True):
        moments = through_affine(moments, affine(*first), affine(*second), released=released)
        if rate is not None:
            moments = through_gates(moments, rate, released=released)
    return expected_squared_distance(moments)


def enumerated(net, rates, x):
    """The same expectation over every input and every pattern of gates."""
    total, n_gates = 0.0, sum(len(r) for r in rates)
    for pattern in itertools.product((0.0, 1.0), repeat=n_gates):
        flat = torch.tensor(pattern, dtype=torch.float64)
        gates = list(flat.split([len(r) for r in rates]))
        p = torch.cat(list(rates))
        probability = (flat * p + (1 - flat) * (1 - p)).prod()
        a0 = a1 = x
        for (first, second), gate in zip(net, [*gates, torch.ones(1)], strict=True):
            a0, a1 = affine(*first)(a0) * gate, affine(*second)(a1) * gate
        total += probability * squared_distance(a0, a1).mean()
    return total


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("sizes", [(5, 4, 3), (5, 6, 4, 3), (4, 5, 5, 5, 2)])
def test_a_deep_linear_net_is_exact(sizes, generator):
    net, x = (
        layers(sizes, generator),
        torch.randn(40, sizes[0], generator=generator).double() + 0.5,
    )
    rates = [torch.ones(n, dtype=torch.float64) for n in sizes[1:-1]]
    a0 = a1 = x
    for first, second in net:
        a0, a1 = affine(*first)(a0), affine(*second)(a1)
    exact = squared_distance(a0, a1).mean()
    torch.testing.assert_close(carried(net, rates, x), exact, rtol=1e-10, atol=1e-10)


def test_the_released_recursion_agrees_only_where_a_single_layer_differs(generator):
    sizes = (5, 6, 4, 3)
    net, x = layers(sizes, generator), torch.randn(40, 5, generator=generator).double()
    rates = [torch.ones(n, dtype=torch.float64) for n in sizes[1:-1]]
    full, released = (carried(net, rates, x, released=r) for r in (False, True))
    assert abs(released / full - 1) > 0.05
    for alone in range(3):
        single = [(first, second if k == alone else first) for k, (first, second) in enumerate(net)]
        pair = [carried(single, rates, x, released=r) for r in (False, True)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [(4, 8, 3), (4, 4, 3, 2), (3, 2, 3, 3, 2)])
def test_carried_moments_equal_the_mean_over_every_pattern_of_gates(sizes, generator):
    net, x = layers(sizes, generator), torch.randn(12, sizes[0], generator=generator).double()
    rates = [torch.rand(n, generator=generator, dtype=torch.float64) for n in sizes[1:-1]]
    exact = enumerated(net, rates, x)
    torch.testing.assert_close(carried(net, rates, x), exact, rtol=1e-10, atol=1e-10)
    # Squared rates on the diagonal leave out what the coins add.
    assert carried(net, rates, x, released=True) < 0.95 * exact


def test_the_short_cut_on_the_diagonal_misses_what_the_coins_add(generator):
    net, x = layers((3, 6, 2), generator), torch.randn(30, 3, generator=generator).double()
    shared = [
        net[0][0],
        net[0][0],
    ]  # one layer differs, so that nothing but the diagonal is left out
    net, rates = [shared, net[1]], [torch.full((6,), 0.5, dtype=torch.float64)]
    s = affine(*net[0][0])(x)
    D, difference = net[1][1][0] - net[1][0][0], net[1][1][1] - net[1][0][1]
    coins = 0.5 * (0.25 * s.square().mean(0) * D.square().sum(0)).sum()
    full, released = (carried(net, rates, x, released=r) for r in (False, True))
    torch.testing.assert_close(full - released, coins, rtol=1e-10, atol=1e-10)
    assert difference.norm() > 0


def test_slopes_that_are_not_drawn_scale_what_passes(generator):
    net, x = layers((3, 4, 2), generator), torch.randn(10, 3, generator=generator).double()
    slope = torch.rand(4, generator=generator, dtype=torch.float64)
    moments = through_affine(moments_of(x), affine(*net[0][0]), affine(*net[0][1]))
    moments = through_gates(moments, slope, random=False)
    moments = through_affine(moments, affine(*net[1][0]), affine(*net[1][1]))
    a0, a1 = (affine(*net[1][k])(affine(*net[0][k])(x) * slope) for k in (0, 1))
    torch.testing.assert_close(
        expected_squared_distance(moments), squared_distance(a0, a1).mean(), rtol=1e-10, atol=1e-12
    )


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=3), st.floats(-5, 5))
def test_distances_of_probabilities_are_never_negative_and_ignore_a_shift(logits, shift):
    a = torch.tensor([logits], dtype=torch.float64)
    b = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    for name in ("kl", "softmax"):
        distance = DISTANCES[name]
        assert float(distance(a, b)) >= -1e-12 and float(distance(a, a)) == 0
        torch.testing.assert_close(distance(a, b), distance(a + shift, b), rtol=1e-9, atol=1e-9)


def test_the_divergence_has_the_earlier_network_first():
    a, b = torch.tensor([[2.0, 0.0, 1.0]]).double(), torch.tensor([[0.0, 1.0, 0.0]]).double()
    p, q = a.softmax(-1), b.softmax(-1)
    torch.testing.assert_close(kl_distance(a, b), (p * (p.log() - q.log())).sum(-1))
    torch.testing.assert_close(softmax_distance(a, b), 0.5 * (p - q).square().sum(-1))


def test_the_root_of_a_covariance_gives_it_back(generator):
    half = torch.randn(4, 4, generator=generator).double()
    C = half @ half.mT
    root = covariance_root(C, jitter=0.0)
    torch.testing.assert_close(root @ root.mT, C)
    torch.testing.assert_close(covariance_root(C.diagonal(), jitter=0.0).square(), C.diagonal())
    jittered = covariance_root(C, jitter=0.1)
    expected = C + 0.1 * C.diagonal().mean() * torch.eye(4)
    torch.testing.assert_close(jittered @ jittered.mT, expected)


def test_inputs_that_are_all_alike_have_a_root_of_zeros():
    for covariance in (torch.zeros(3, 3), torch.zeros(3)):
        assert torch.equal(covariance_root(covariance), covariance)


def test_a_covariance_that_is_none_is_refused_with_advice():
    with pytest.raises(ValueError, match="Raise the jitter"):
        covariance_root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
