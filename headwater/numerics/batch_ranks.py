r"""Ranks of a batch of scores among calibration scores: their exact distribution.

For $n$ calibration and $m$ test scores that are exchangeable and without ties let
$R_k = 1 + \#\{i : S_i < T_{(k)}\}$ be the rank of the $k$-th smallest test score, so that
$S_{(R_k - 1)} < T_{(k)} \le S_{(R_k)}$. The vector $(R_1, …, R_m)$ is uniform on the $\binom{n+m}{m}$ non-decreasing
vectors with values from 1 to $n + 1$. All that follows is counting: with whole numbers where these are of a size that a
computer multiplies in no time, in float64 beyond, where quantiles are taken a hair to the safe side.

Lee, Tchetgen Tchetgen and Dobriban (2024), "Batch Predictive Inference", arXiv:2409.13990.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Probability = Fraction | float

_EXACT_RANKS = 5_000  # calibration and test scores together
_EXACT_CELLS = 200_000  # of a table of ranks by test scores
_EXACT_WORK, _FLOAT_WORK = 5_000_000, 1_000_000_000  # additions for the distribution of a sum
_SLACK = 1e-6  # more than float64 loses by logarithms of factorials of 10 million


def decimal(value: float) -> Fraction:
    """A level as it was written: 0.1 is one tenth, and not the binary number next to it.

    Example:
        >>> decimal(0.3)
        Fraction(3, 10)
    """
    return Fraction(str(float(value)))


def reaches(probability: Probability, alpha: float, slack: float = _SLACK) -> bool:
    """Whether a probability is 1 - alpha or more; a float has to be so by more than its rounding."""
    if isinstance(probability, Fraction):
        return probability >= 1 - decimal(alpha)
    return probability >= 1 - alpha + slack


def check_sizes(n: int, m: int, alpha: float | None = None) -> None:
    """Refuse batches, calibration sets and levels that mean nothing."""
    for name, value in (("calibration", n), ("test", m)):
        if value < 1:
            raise ValueError(f"Expected one {name} score or more; got {value}.")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1; got {alpha}. 0.05 is 95 % confidence.")


def rank_cdf(n: int, m: int, k: int, r: int) -> Probability:
    r"""$P(R_k \le r)$, for the k-th smallest of m test scores among n calibration scores.

    $R_k \le r$ says that at least $k$ of the $s = r + k - 1$ smallest of all $n + m$ scores are test scores:

    $$P(R_k \le r) = \sum_{j \ge k} \binom{s}{j} \binom{n+m-s}{m-j} \Big/ \binom{n+m}{m}.$$

    Example:
        >>> rank_cdf(900, 100, 100, 900)  # a finite bound on the largest of 100
        Fraction(9, 10)
    """
    check_sizes(n, m)
    if not 1 <= k <= m:
        raise ValueError(f"A batch of {m} has no {k}-th smallest score; choose 1 to {m}.")
    if not 1 <= r <= n:
        return Fraction(int(r > n))
    s, total = r + k - 1, n + m
    first, last = max(k, s - n), min(m, s)
    if total <= _EXACT_RANKS:
        term = math.comb(s, first) * math.comb(total - s, m - first) if first <= last else 0
        summed = term
        for j in range(first, last):
            term = term * (s - j) * (m - j) // ((j + 1) * (n - s + j + 1))
            summed += term
        return Fraction(summed, math.comb(total, m))
    j = torch.arange(first, last + 1, dtype=torch.float64)
    terms = _log_comb(s, j) + _log_comb(total - s, m - j) - _log_comb(total, torch.tensor(float(m)))
    return min(1.0, float(terms.logsumexp(0).exp()))


def _log_comb(n: int, k: Tensor) -> Tensor:
    whole = torch.tensor(float(n), dtype=torch.float64)
    return (whole + 1).lgamma() - (k.double() + 1).lgamma() - (whole - k.double() + 1).lgamma()


def rank_quantile(n: int, m: int, k: int, alpha: float) -> tuple[int, Probability]:
    r"""The smallest $q$ with $P(R_k \le q) \ge 1 - \alpha$, and that probability.

    Example:
        >>> q, coverage = rank_quantile(200, 100, 90, 0.05)
        >>> q, round(float(coverage), 4)
        (190, 0.9507)
    """
    check_sizes(n, m, alpha)
    low, high = 1, n + 1  # n + 1 always reaches
    while low < high:
        middle = (low + high) // 2
        if reaches(rank_cdf(n, m, k, middle), alpha):
            high = middle
        else:
            low = middle + 1
    return high, rank_cdf(n, m, k, high)


def box_probability(n: int, m: int, boxes: Mapping[int, tuple[int, int]]) -> Probability:
    r"""$P(\text{low}_k \le R_k \le \text{high}_k \text{ for every } k \text{ named})$.

    Counts non-decreasing vectors element by element: how many end at rank r is a running sum over ranks.

    Args:
        n: Calibration scores.
        m: Test scores.
        boxes: From the number k of an order statistic to its lowest and highest rank.

    Example:
        >>> box_probability(2, 1, {1: (1, 2)})
        Fraction(2, 3)
    """
    check_sizes(n, m)
    if not all(1 <= k <= m for k in boxes):
        raise ValueError(f"A batch of {m} has the order statistics 1 to {m}; got {list(boxes)}.")
    exact = n * m <= _EXACT_CELLS
    ways = np.ones(n + 1, dtype=object if exact else np.float64)
    for k in range(1, m + 1):
        ways = ways if k == 1 else np.cumsum(ways)
        if not exact:
            ways = ways * (k / (n + k))  # divided by the number of vectors so far
        if k in boxes:
            low, high = boxes[k]
            ways[: max(low - 1, 0)] = 0
            ways[max(high, 0) :] = 0
    return Fraction(int(ways.sum()), math.comb(n + m, m)) if exact else float(ways.sum())


def rank_sum_counts(n: int, m: int, *, exact: bool = True) -> np.ndarray:
    r"""How many vectors have $\sum_k (R_k - 1) = u$, for $u$ from 0 to $nm$: Mann and Whitney's U.

    They are the coefficients of the Gaussian binomial $\prod_{i=1}^m (1 - x^{n+i}) / (1 - x^i)$, multiplied out factor
    by factor up to the middle, about which they are symmetric.

    Args:
        n: Calibration scores.
        m: Test scores.
        exact: Whole numbers of any size, else shares of all vectors in float64.

    Example:
        >>> rank_sum_counts(2, 2).tolist()
        [1, 1, 2, 1, 1]
    """
    check_sizes(n, m)
    n, m = max(n, m), min(n, m)
    half = n * m // 2
    counts = np.zeros(half + 1, dtype=object if exact else np.float64)
    counts[0] = 1
    for i in range(1, m + 1):
        if n + i <= half:
            counts[n + i :] = counts[n + i :] - counts[: half + 1 - n - i]
        whole = np.concatenate([counts, np.zeros(-len(counts) % i, dtype=counts.dtype)])
        counts = np.cumsum(whole.reshape(-1, i), axis=0).reshape(-1)[: half + 1]
        if not exact:
            counts = counts * (i / (n + i))
    return np.concatenate([counts, counts[: n * m - half][::-1]])


def rank_sum_quantile(n: int, m: int, alpha: float) -> tuple[int, Probability | None]:
    r"""The smallest $q$ with $P(\sum_k R_k \le q) \ge 1 - \alpha$, and that probability.

    Beyond some hundred million additions $q$ comes from the normal distribution with the fourth cumulant's correction,
    plus one rank, and the probability is None.

    Example:
        >>> rank_sum_quantile(40, 10, 0.05)[0]
        278
    """
    check_sizes(n, m, alpha)
    work = n * m * min(n, m)
    if work > _FLOAT_WORK:
        return min((n + 1) * m, m + _normal_quantile(n, m, alpha)), None
    if work > _EXACT_WORK:
        below = np.cumsum(rank_sum_counts(n, m, exact=False))
        u = int(np.searchsorted(below, 1 - alpha + _SLACK))
        u = min(u, n * m)
        return u + m, min(1.0, float(below[u]))
    below, total = np.cumsum(rank_sum_counts(n, m)), math.comb(n + m, m)
    u = int(np.searchsorted(below, math.ceil((1 - decimal(alpha)) * total)))
    return u + m, Fraction(int(below[u]), total)


def _normal_quantile(n: int, m: int, alpha: float) -> int:
    """Of Mann and Whitney's U, by Cornish and Fisher's expansion; U is symmetric."""
    z = NormalDist().inv_cdf(1 - alpha)
    deviation = math.sqrt(n * m * (n + m + 1) / 12)
    kurtosis = -1.2 * (n * n + m * m + n * m + n + m) / (n * m * (n + m + 1))
    corrected = z + (z**3 - 3 * z) * kurtosis / 24
    return math.ceil(n * m / 2 + deviation * corrected) + 1


def cost_quantile(
    n: int, m: int, costs: Int[Tensor, "m rank"], alpha: float
) -> tuple[int, Probability]:
    r"""The smallest $q$ with $P(\sum_k c_k(R_k) \le q) \ge 1 - \alpha$, for whole costs of ranks.

    Counts vectors by their last rank and their cost, in $O(n m Q)$ for a greatest cost of $Q$.

    Args:
        n: Calibration scores.
        m: Test scores.
        costs: Cost $c_k(r)$ of rank r of the k-th smallest test score, 0 or more, (m, n + 1).
        alpha: The level.
    """
    check_sizes(n, m, alpha)
    check_costs(n, m, costs)
    greatest = int(costs.amax(1).sum())
    exact = m * (n + 1) * (greatest + 1) <= _EXACT_WORK
    kind = object if exact else np.float64
    ways = np.zeros((n + 1, greatest + 1), dtype=kind)
    for k, row in enumerate(costs.tolist(), start=1):
        if k == 1:
            before = np.zeros_like(ways)
            before[:, 0] = 1
        else:
            before = np.cumsum(ways, axis=0)
        ways = np.zeros_like(ways)
        for r, cost in enumerate(row):
            ways[r, cost:] = before[r, : greatest + 1 - cost]
        if not exact:
            ways = ways * (k / (n + k))
    below = np.cumsum(ways.sum(0))
    if exact:
        total = math.comb(n + m, m)
        q = int(np.searchsorted(below, math.ceil((1 - decimal(alpha)) * total)))
        return q, Fraction(int(below[q]), total)
    q = min(greatest, int(np.searchsorted(below, 1 - alpha + _SLACK)))
    return q, min(1.0, float(below[q]))


def check_costs(n: int, m: int, costs: Int[Tensor, "m rank"]) -> None:
    """Refuse costs of other ranks, below zero, or that fall as ranks rise."""
    if costs.shape != (m, n + 1):
        raise ValueError(
            f"Expected costs of {m} test scores at {n + 1} ranks; got {tuple(costs.shape)}."
        )
    if (costs < 0).any() or (costs.diff(dim=1) < 0).any():
        raise ValueError("Costs must be 0 or more and must not fall as ranks rise.")


def sample_ranks(n: int, m: int, size: int, *, seed: int = 0) -> Int[Tensor, "size m"]:
    """Rank vectors as exchangeable scores give them: m of n + m places without replacement, less those before.

    Sorted draws *with* replacement are not distributed so: their sum varies too little.

    Example:
        >>> sample_ranks(5, 3, 2).shape
        torch.Size([2, 3])
    """
    check_sizes(n, m)
    keys = torch.rand(size, n + m, generator=torch.Generator().manual_seed(seed))
    places = keys.topk(m, dim=1).indices.sort(1).values
    return places - torch.arange(m) + 1
