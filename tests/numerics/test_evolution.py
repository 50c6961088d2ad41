"""Antithetic estimates and their variances, against sums written out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.evolution import (
    antithetic_gradients,
    persistent_variance,
    single_noise_variance,
)


@given(dim=st.integers(1, 6), seed=st.integers(0, 50))
def test_a_pair_measures_a_quadratic_s_slope_along_its_noise(dim, seed):
    """L(θ ± ε) of a quadratic differ by 2 ε·∇L, whatever its curvature."""
    generator = torch.Generator().manual_seed(seed)
    H, g, theta = (
        torch.randn(*s, generator=generator).double() for s in ((dim, dim), (dim,), (dim,))
    )
    eps = 0.3 * torch.randn(5, dim, generator=generator).double()

    def loss(v):
        return (v @ (H + H.T) * v).sum(-1) / 2 + v @ g

    found = antithetic_gradients(eps, loss(theta + eps), loss(theta - eps), sigma=0.3)
    slope = (H + H.T) @ theta + g
    torch.testing.assert_close(found, eps * (eps @ slope)[:, None] / 0.3**2)


@given(dim=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 20))
def test_the_variance_of_pes_is_the_sum_over_pairs_of_truncations(dim, n, seed):
    G = torch.randn(n, n, dim, generator=torch.Generator().manual_seed(seed)).double()
    total = torch.zeros(()).double()
    H = {}
    for s in range(n):
        for tau in range(n):
            later = range(max(s, tau), n)
            H[s, tau] = sum((G[t, tau] for t in later), torch.zeros(dim).double())
    for s in range(n):
        for tau in range(n):
            own = dim * H[s, tau] @ H[s, tau] + H[s, tau] @ H[tau, s]
            total += (dim + 1) * H[s, s] @ H[s, s] if s == tau else own
    torch.testing.assert_close(persistent_variance(G), total)


def test_with_one_truncation_pes_and_es_single_are_one():
    g = torch.tensor([1.0, -2.0, 0.5]).double()
    torch.testing.assert_close(persistent_variance(g[None, None]), single_noise_variance(g))
    assert single_noise_variance(g).item() == 4 * 5.25
