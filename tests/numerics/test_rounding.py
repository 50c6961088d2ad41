"""Rounding held to its identities, to an independent OPTQ, to brute force and to the paper's counterexample."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwater.numerics.rounding import (
    by_weight,
    checked_moment,
    dampen,
    greedy,
    greedy_alone,
    lacks_rank,
    ldl,
    ldlq,
    ldlq_rg,
    proxy_loss,
    quantize,
    row_grids,
    symmetric_grid,
)


def moment(n: int, seed: int = 0, rows: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 3 * n, n, generator=generator, dtype=torch.float64)
    mixed = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return mixed.mT @ mixed / len(x)


def weights(m: int, n: int, width: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return width * torch.rand(m, n, generator=generator, dtype=torch.float64)


def optq(W: Tensor, H: Tensor, top: int | None = None) -> Tensor:
    """OPTQ as its authors write it: what is left of the weights moves by the inverse's Cholesky rows."""
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    left, codes = W.clone(), torch.empty_like(W)
    for i in range(W.shape[1]):
        codes[:, i] = torch.floor(left[:, i] + 0.5).clamp(0 if top else None, top or 1e9)
        error = (left[:, i] - codes[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    return codes


def test_the_factors_make_the_matrix_again():
    H = moment(9)
    U, D = ldl(H)
    assert torch.equal(U, U.triu(1)) and bool((D > 0).all())
    unit = U + torch.eye(9)
    torch.testing.assert_close(unit @ torch.diag(D) @ unit.mT, H, rtol=1e-12, atol=1e-12)


def test_the_loss_is_the_error_of_the_outputs():
    x = torch.randn(50, 6, dtype=torch.float64)
    W, rounded = weights(4, 6, 3.0), weights(4, 6, 3.0, seed=1).round()
    outputs = x @ (rounded - W).mT
    expected = float(outputs.square().sum(1).mean())
    assert proxy_loss(rounded, W, x.mT @ x / 50) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_loss_is_that_of_the_rounding_errors_alone(block):
    W, H = weights(5, 20, 100.0), moment(20)
    U, D = ldl(H)
    rounded = ldlq(W, U, block=block)
    eta = (rounded - W) @ (U + torch.eye(20))
    assert float(eta.abs().max()) <= 0.5 + 1e-9
    assert proxy_loss(rounded, W, H) == pytest.approx(float((eta.square() * D).sum()), rel=1e-8)


def test_ldlq_follows_its_recursion():
    W, H = weights(3, 11, 3.0), moment(11)
    U, _ = ldl(H)
    naive = torch.zeros_like(W)
    for k in range(11):
        fed = W[:, k] + (W[:, :k] - naive[:, :k]) @ U[:k, k]
        naive[:, k] = torch.clamp(torch.floor(fed + 0.5), 0, 3)
    assert torch.equal(ldlq(W, U, top=3, block=4), naive)


@pytest.mark.parametrize("top", [None, 15])
def test_ldlq_is_optq_element_by_element(top):
    W, H = weights(256, 48, 30.0 if top is None else 15.0), moment(48)
    found = ldlq(W, ldl(H)[0], top=top)
    assert torch.equal(found, optq(W, H, top))
    assert top is None or {0.0, 15.0} <= set(found.unique().tolist()) <= set(map(float, range(16)))


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_loss_of_wide_weights_is_as_the_theorem_says(stochastic):
    """m/12 tr(D) for the nearest integers, m/6 tr(D) for unbiased ones; the spread over rows is 1 to 2 %."""
    m, W, H = 512, weights(512, 48, 1000.0), moment(48)
    U, D = ldl(H)
    generator = torch.Generator().manual_seed(0) if stochastic else None
    loss = proxy_loss(ldlq(W, U, generator=generator), W, H)
    assert loss == pytest.approx(m / (6 if stochastic else 12) * float(D.sum()), rel=0.03)
    plain = proxy_loss(quantize(W, generator=generator), W, H)
    assert plain == pytest.approx(m / (6 if stochastic else 12) * float(H.trace()), rel=0.05)
    assert loss < plain


def test_stochastic_rounding_is_unbiased_and_repeats_itself():
    z = torch.full((200_000,), 1.3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    found = quantize(z, generator=generator)
    assert set(found.unique().tolist()) == {1.0, 2.0}
    assert float(found.mean()) == pytest.approx(1.3, abs=4 * 0.46 / 200_000**0.5)
    assert torch.equal(found, quantize(z, generator=torch.Generator().manual_seed(3)))


def counterexample(n: int, c: float = 0.01) -> tuple[Tensor, Tensor]:
    """Where LDLQ on a finite grid is far worse than plain rounding (the paper's supplement)."""
    H = torch.ones(n, n, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    H[-1, -1] = 1
    H[0, 1:-1] += 2 * c
    H[1:-1, 0] += 2 * c
    H[0, -1] += c
    H[-1, 0] += c
    H[0, 0] += 4 * c + n * c**2
    w = 0.499 + 0.002 * (torch.arange(n, dtype=torch.float64) % 2)
    return w.repeat(4, 1), H


@pytest.mark.parametrize(("n", "adaptive", "plain"), [(64, 3660.6, 62.8), (128, 15498, 126.5)])
def test_a_finite_grid_can_make_ldlq_worse_than_plain_rounding(n, adaptive, plain):
    W, H = counterexample(n)
    U, _ = ldl(H)
    assert proxy_loss(ldlq(W, U, top=3), W, H) == pytest.approx(adaptive, rel=1e-4)
    assert proxy_loss(quantize(W, 3), W, H) == pytest.approx(plain, rel=1e-3)
    # the greedy passes after it undo the harm
    assert proxy_loss(ldlq_rg(W, H, top=3), W, H) < 2 * plain


def naive_greedy(rounded: Tensor, W: Tensor, H: Tensor, top: int | None, clamp: str) -> Tensor:
    found = rounded.clone()
    for i in range(W.shape[1]):
        slope = (found - W) @ H[:, i] / H[i, i]
        found[:, i] = torch.floor(found[:, i] - slope + 0.5)
        if clamp == "step" and top is not None:
            found[:, i].clamp_(0, top)
    return found if top is None else found.clamp(0, top)


@pytest.mark.parametrize("clamp", ["step", "pass"])
@pytest.mark.parametrize("top", [None, 3])
def test_greedy_passes_follow_their_definition(top, clamp):
    W, H = weights(6, 21, 3.0), moment(21)
    start = quantize(W, top)
    expected = naive_greedy(start, W, H, top, clamp)
    assert torch.equal(greedy(start, W, H, top=top, passes=1, clamp=clamp, block=8), expected)


@given(seed=st.integers(0, 10_000), top=st.sampled_from([None, 3, 7]))
def test_no_greedy_pass_raises_the_loss(seed, top):
    W, H = weights(3, 8, 7.0, seed), moment(8, seed)
    found, before = quantize(W, top), float("inf")
    for _ in range(4):
        now = proxy_loss(found, W, H)
        assert now <= before * (1 + 1e-9)
        before, found = now, greedy(found, W, H, top=top, passes=1)


def test_greedy_stops_where_a_pass_changes_nothing():
    W, H = weights(4, 10, 3.0), moment(10)
    found = greedy(quantize(W, 3), W, H, top=3, passes=100)
    assert torch.equal(greedy(found, W, H, top=3, passes=1), found)


@pytest.mark.parametrize("seed", range(6))
def test_brute_force_bounds_what_is_found(seed):
    """All 4**5 codes of one row: nothing is better than the best, and greedy passes never lose to LDLQ."""
    n = 5
    W, H = weights(1, n, 3.0, seed), moment(n, seed)
    best = min(
        proxy_loss(torch.tensor([codes], dtype=torch.float64), W, H)
        for codes in product(range(4), repeat=n)
    )
    first = ldlq(W, ldl(H)[0], top=3)
    after = greedy(first, W, H, top=3)
    losses = [proxy_loss(x, W, H) for x in (first, after, ldlq_rg(W, H, top=3))]
    assert min(losses) >= best - 1e-12
    assert losses[1] <= losses[0] + 1e-12


def test_the_order_of_the_published_code_is_the_same():
    """Ascending by diag(H), lower factor, from the last column back."""
    W, H = weights(7, 12, 3.0), moment(12)
    order = H.diagonal().argsort()
    sorted_W, sorted_H = W[:, order], H[order][:, order]
    lower = torch.linalg.cholesky(sorted_H)
    lower = lower / lower.diagonal() - torch.eye(12)
    found = sorted_W.clone()
    for i in reversed(range(12)):
        fed = sorted_W[:, i] + (sorted_W[:, i:] - found[:, i:]) @ lower[i:, i]
        found[:, i] = torch.clamp(torch.floor(fed + 0.5), 0, 7)
    expected = found[:, order.argsort()]
    assert torch.equal(ldlq_rg(W, H, top=7, passes=0), expected)
    assert by_weight(H).tolist() == order.flip(0).tolist()


def test_methods_rank_as_they_should_on_correlated_inputs():
    H = moment(40, rows=60)
    W = weights(64, 40, 3.0)
    found = {
        "nearest": quantize(W, 3),
        "greedy": greedy_alone(W, H, top=3),
        "ldlq": ldlq(W, ldl(H)[0], top=3),
        "ldlq_rg": ldlq_rg(W, H, top=3),
    }
    loss = {name: proxy_loss(x, W, H) for name, x in found.items()}
    assert loss["ldlq_rg"] < loss["ldlq"] < loss["nearest"]
    assert loss["greedy"] < loss["nearest"]
    assert all(float(x.min()) >= 0 and float(x.max()) <= 3 for x in found.values())


def test_a_row_grid_holds_the_extremes_and_zero():
    W = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    grid = row_grids(W, 2)
    back = grid.weights(quantize(grid.units(W), 3))
    assert back[1].tolist() == [0.0, 0.0, 0.0]
    assert float(back[0, 0]) == -1.0 and float(back[0, 2]) == 2.0 and float(back[2, 2]) == 3.0


def test_the_symmetric_grid_costs_gaussian_weights_what_is_known():
    """Relative error of a grid of 2.4 root mean squares to either side: 0.215, 0.042, 0.0119 at 2, 3, 4 bits."""
    W = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.215), (3, 0.042), (4, 0.0119)):
        grid = symmetric_grid(W, bits)
        error = grid.weights(quantize(grid.units(W), 2**bits - 1)) - W
        assert float(error.square().sum() / W.square().sum()) == pytest.approx(expected, rel=0.03)


def test_dampening_takes_dead_inputs_out():
    H, W = torch.diag(torch.tensor([4.0, 0.0])), torch.ones(1, 2)
    damped_W, damped = dampen(W, H, 0.01)
    assert damped_W.tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(damped, torch.diag(torch.tensor([4.025, 1.025])))


@given(seed=st.integers(0, 200), rows=st.integers(1, 30))
def test_fewer_vectors_than_inputs_lack_rank_and_more_do_not(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    x[:, 3] = 0  # always zero, which is nothing to be warned of
    x[:, 1] *= 1e5
    assert lacks_rank(x.mT @ x / rows) == (rows < 7)
    x[:, 5] = 2 * x[:, 1] - x[:, 0]
    assert lacks_rank(x.mT @ x / rows)


def test_matrices_that_are_no_second_moments_are_refused():
    with pytest.raises(ValueError, match=r"of 3 inputs; got shape \(2, 2\)"):
        checked_moment(torch.eye(2), 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        checked_moment(torch.full((2, 2), torch.nan), 2)
    with pytest.raises(ValueError, match="not symmetric"):
        checked_moment(torch.tensor([[1.0, 0.5], [0.4, 1.0]]), 2)
    with pytest.raises(ValueError, match="has read nothing"):
        checked_moment(torch.zeros(2, 2), 2)
    with pytest.raises(ValueError, match="Add to its diagonal"):
        ldl(torch.zeros(2, 2))
