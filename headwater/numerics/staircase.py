r"""The greatest products of two descending spectra, without forming all products.

Of all pairs (i, j) with products $\lambda_i \mu_j$ those above a threshold form a staircase: row i keeps its first
$k_i$ columns, and $k_i$ does not grow with i. So the pairs above a threshold are counted and summed with one binary
search a row, and the threshold itself is found by halving the floating-point numbers between zero and the greatest.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def staircase_by_mass(
    rows: Float[Tensor, " out"], columns: Float[Tensor, " in"], share: float
) -> Int[Tensor, " out"]:
    r"""The fewest pairs whose products, greatest first, sum to a share of all.

    Args:
        rows: $\lambda$, descending, none below zero.
        columns: $\mu$, likewise.
        share: Share of $\sum_i \lambda_i \sum_j \mu_j$, in (0, 1]; 1 keeps every pair, those of product zero too.

    Returns:
        $k_i$, how many columns each row keeps. Among equal products lower rows come first, then lower columns.

    Example:
        >>> staircase_by_mass(torch.tensor([4.0, 1.0]), torch.tensor([2.0, 1.0]), 0.8).tolist()
        [2, 0]
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share of the mass must be in (0, 1]; got {share}.")
    lam, mu = _checked(rows, "rows"), _checked(columns, "columns")
    total = float(lam.sum() * mu.sum())
    if total == 0:
        raise ValueError(
            "The products are all zero, so none is greater than another; leave this layer out."
        )
    if share == 1:
        return torch.full((len(lam),), len(mu))
    prefix = torch.cat([mu.new_zeros(1), mu.cumsum(0)])
    return _grown(lam, mu, lambda k: float((lam * prefix[k]).sum()), share * total, lambda p: p)


def staircase_by_count(
    rows: Float[Tensor, " out"], columns: Float[Tensor, " in"], n: int
) -> Int[Tensor, " out"]:
    """The n pairs with the greatest products, as `staircase_by_mass` returns them.

    Example:
        >>> staircase_by_count(torch.tensor([4.0, 1.0]), torch.tensor([2.0, 1.0]), 3).tolist()
        [2, 1]
    """
    lam, mu = _checked(rows, "rows"), _checked(columns, "columns")
    if not 0 <= n <= len(lam) * len(mu):
        raise ValueError(f"n must be 0 to {len(lam) * len(mu)}; got {n}.")
    k = _grown(lam, mu, lambda k: float(k.sum()), float(n), lambda p: 1.0)
    left = n - int(k.sum())  # what there is beyond the products above zero
    return k + _handed_out(left, len(mu) - k)


def staircase_mask(counts: Int[Tensor, " out"], n_columns: int) -> Bool[Tensor, "out in"]:
    """The first `counts[i]` columns of each row."""
    return torch.arange(n_columns, device=counts.device) < counts[:, None]


def _checked(spectrum: Tensor, name: str) -> Tensor:
    values = spectrum.double()
    if not bool(values.isfinite().all()):
        raise ValueError(f"The spectrum of the {name} holds NaN or infinity; fit again.")
    if bool((values < 0).any()) or bool((values[1:] > values[:-1]).any()):
        raise ValueError(f"The spectrum of the {name} must be descending and not below zero.")
    return values


def _grown(
    lam: Tensor,
    mu: Tensor,
    measure: Callable[[Tensor], float],
    target: float,
    of_one: Callable[[float], float],
) -> Int[Tensor, " out"]:
    """The smallest staircase with a measure of at least `target`, or all pairs above zero where there is none."""
    # Floating-point numbers above zero are ordered as the integers that their bits spell.
    low, high = 0, _bits(float(lam[0] * mu[0]))
    if measure(_above(lam, mu, 0.0)) < target:
        return _above(lam, mu, 0.0)
    while high - low > 1:
        middle = (low + high) // 2
        if measure(_above(lam, mu, _number(middle))) < target:
            high = middle
        else:
            low = middle
    if high == 0:
        return torch.zeros(len(lam), dtype=torch.int64, device=lam.device)
    # products of exactly this size are taken until the target is reached
    counts = _above(lam, mu, _number(high))
    ties = _above(lam, mu, _number(low)) - counts
    needed = math.ceil((target - measure(counts)) / of_one(_number(high)))
    return counts + _handed_out(needed, ties)


def _above(lam: Tensor, mu: Tensor, threshold: float) -> Int[Tensor, " out"]:
    """How many products of each row are above a threshold, by the products as they are rounded."""
    n = len(mu)
    quotient = threshold / lam.clamp(min=torch.finfo(lam.dtype).tiny)
    k = torch.searchsorted(-mu, -quotient)
    for _ in range(2):  # the quotient may be rounded to the wrong side
        more = (k < n) & (lam * mu[k.clamp(max=n - 1)] > threshold)
        less = (k > 0) & ~(lam * mu[(k - 1).clamp(min=0)] > threshold)
        k = k + more.long() - less.long()
    return k


def _handed_out(n: int, places: Int[Tensor, " out"]) -> Int[Tensor, " out"]:
    """So many pairs among rows with so many places, lower rows first."""
    before = places.cumsum(0) - places
    return (n - before).clamp(min=0).minimum(places)


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
