r"""Batch predictive inference: bounds on a function of many unseen outcomes together.

Lee, Tchetgen Tchetgen and Dobriban (2024), "Batch Predictive Inference", arXiv:2409.13990.

Given $n$ calibration scores and a batch of $m$ test scores that are exchangeable with them, and nothing else, each
function bounds one property of the batch: an order statistic, several at once, the share of examples that prediction
intervals cover, the mean, or a score put together from the sorted ones. The ranks of the batch among the calibration
scores are uniform on all non-decreasing vectors, whatever the scores' distribution is (`numerics.batch_ranks`). So with

1. $q$ the smallest number with $P(h(R) \le q) \ge 1 - \alpha$, for a function $h$ of ranks, and
2. $B = \max \{ g(S_{(r_1)}, …, S_{(r_m)}) : h(r) \le q \}$,

$g(T_{(1)}, …, T_{(m)}) \le B$ with probability $1 - \alpha$ or more. The probability is over calibration scores and
batch together. Ties among scores leave bounds valid and make them a little conservative. The property, alpha and the
batch must be chosen before test scores are looked at.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.numerics.batch_ranks import (
    box_probability,
    check_costs,
    check_sizes,
    cost_quantile,
    decimal,
    rank_cdf,
    rank_quantile,
    rank_sum_quantile,
    reaches,
)
from headwater.numerics.rank_budget import Step, greatest_composed, greatest_sum, majorant_at

Side = Literal["upper", "lower", "both"]
Bounds = float | tuple[float, ...]

_EXACT_WORK = 1_000_000_000  # additions and comparisons for the greatest mean
_STEPS = 12  # halvings for the level of several quantiles
_ACCEPT = 0x6B656570  # tells this stream from others with the same seed
_AROUND = ("coverage", "mean")  # of which predictions can be the middle


@dataclass(frozen=True, kw_only=True)
class BatchBound:
    """A bound on a property of a batch.

    Attributes:
        kind: "quantile", "quantiles", "coverage", "mean" or "composed".
        n: Calibration scores.
        m: Test scores.
        alpha: Probability of a miss that was asked for.
        rank_quantile: Quantile q of the function of ranks; for several quantiles, each one's lowest and highest rank.
        ranks: Ranks of calibration scores at which the bounds are reached.
        lower: Lower bound, or one for each quantile.
        upper: Upper bound, or one for each quantile.
        exact_coverage: Probability with which the bound holds if no scores are tied; None where q was approximated.
            For bounds on means and composed scores it is a probability of ranks, and the bound may hold more often.
        ties: Calibration scores that equal another.
        order: Which order statistics of the batch are bounded.
        reason: Why a bound is infinite, or how it was simplified.
    """

    kind: str
    n: int
    m: int
    alpha: float
    rank_quantile: int | tuple[int, ...] | tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    lower: Bounds
    upper: Bounds
    exact_coverage: float | None
    ties: int
    order: tuple[int, ...] = ()
    reason: str = ""

    def around(self, predictions: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
        """Bounds about predictions, where scores are |outcome - prediction| (coverage) or outcome - prediction (mean).

        Returns:
            For coverage the ends of an interval for each example, for a mean those of the mean outcome.
        """
        if len(predictions) != self.m:
            raise ValueError(
                f"Expected predictions of the {self.m} examples; got {len(predictions)}."
            )
        lower, upper = self.lower, self.upper
        if isinstance(lower, tuple) or isinstance(upper, tuple) or self.kind not in _AROUND:
            raise ValueError(f"A bound on {self.kind} is no interval around predictions.")
        if self.kind == "coverage":
            return predictions - upper, predictions + upper
        return predictions.mean() + lower, predictions.mean() + upper

    def __repr__(self) -> str:
        name = f"{self.kind} {', '.join(map(str, self.order))}".strip()
        miss = self.alpha if self.exact_coverage is None else 1 - self.exact_coverage
        about = "about " if self.exact_coverage is None else ""
        level = about + (f"{1 - miss:.4f}" if miss >= 5e-5 or not miss else f"1 - {miss:.2g}")
        why = f"; {self.reason}" if self.reason else ""
        return (
            f"BatchBound({name} of {self.m}: {_shown(self.lower)} to {_shown(self.upper)} with probability {level}; "
            f"n = {self.n}{why})"
        )


def _shown(bounds: Bounds) -> str:
    if isinstance(bounds, tuple):
        return f"({', '.join(f'{b:.6g}' for b in bounds)})"
    return f"{bounds:.6g}"


def order_at(m: int, quantile: float) -> int:
    """Which of m sorted scores is their quantile: the smallest k with k/m ≥ quantile.

    Example:
        >>> order_at(40, 0.25), order_at(40, 0.5)
        (10, 20)
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"A quantile must lie above 0 and not above 1; got {quantile}.")
    return math.ceil(decimal(quantile) * m)


def quantile_bound(
    scores: Float[Tensor, " n"],
    m: int,
    order: int,
    *,
    alpha: float,
    side: Side = "upper",
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> BatchBound:
    """Bound the `order`-th smallest of m test scores; `order_at` gives the number of a quantile.

    Args:
        scores: Calibration scores.
        m: Test scores.
        order: 1 for the smallest, m for the largest.
        alpha: Probability of a miss.
        side: The upper bound, the lower one, or both together.
        lowest: What no score is below, where that is known.
        highest: What no score is above.

    Example:
        >>> scores = torch.arange(200.0)
        >>> quantile_bound(scores, 100, 90, alpha=0.05)
        BatchBound(quantile 90 of 100: -inf to 189 with probability 0.9507; n = 200)
    """
    if side == "both":
        found = quantiles_bound(scores, m, [order], alpha=alpha, lowest=lowest, highest=highest)
        assert isinstance(found.lower, tuple) and isinstance(found.upper, tuple)
        return replace(found, kind="quantile", lower=found.lower[0], upper=found.upper[0])
    padded, n = _padded(scores, m, alpha, lowest, highest), len(scores)
    if side == "upper":
        rank, coverage = rank_quantile(n, m, order, alpha)
        ends = {"lower": lowest, "upper": float(padded[rank])}
    else:  # the mirror image: from the top, of scores with their signs turned
        mirrored, coverage = rank_quantile(n, m, m + 1 - order, alpha)
        rank = n + 1 - mirrored
        ends = {"lower": float(padded[rank]), "upper": highest}
    return BatchBound(
        kind="quantile",
        n=n,
        m=m,
        alpha=alpha,
        rank_quantile=rank,
        ranks=(rank,),
        exact_coverage=float(coverage),
        ties=_ties(scores),
        order=(order,),
        reason=_outside(n, [rank]),
        **ends,
    )


def quantiles_bound(
    scores: Float[Tensor, " n"],
    m: int,
    orders: Sequence[int],
    *,
    alpha: float,
    side: Side | Literal["outer"] = "both",
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> BatchBound:
    """Bound several order statistics of a batch, all together with probability 1 - alpha.

    Each rank gets a window that it leaves on either side with one and the same small probability. That probability
    is as large as the exact joint probability of all windows allows, so that nothing is lost to a sum of errors.

    Args:
        scores: Calibration scores.
        m: Test scores.
        orders: Which order statistics, rising.
        alpha: Probability that any bound fails.
        side: Upper bounds, lower bounds, both, or "outer": a lower one for the first and an upper one for the last, as
            for a range between two quartiles.
        lowest: What no score is below, where that is known.
        highest: What no score is above.

    Example:
        >>> quartiles = quantiles_bound(torch.arange(200.0), 40, [10, 30], alpha=0.1, side="outer")
        >>> quartiles.lower[0], quartiles.upper[1]
        (26.0, 169.0)
    """
    padded, n = _padded(scores, m, alpha, lowest, highest), len(scores)
    orders = list(orders)
    if not orders or sorted(set(orders)) != orders:
        raise ValueError(f"Expected rising numbers of order statistics; got {orders}.")
    below = set(orders if side in ("lower", "both") else orders[:1] if side == "outer" else ())
    above = set(orders if side in ("upper", "both") else orders[-1:] if side == "outer" else ())

    def windows(level: float) -> dict[int, tuple[int, int]]:
        found = {}
        for k in orders:
            low = n + 2 - rank_quantile(n, m, m + 1 - k, level)[0] if k in below else 1
            high = rank_quantile(n, m, k, level)[0] if k in above else n + 1
            found[k] = (low, high)
        return found

    holds, fails = alpha / (len(below) + len(above)), alpha
    chosen = windows(holds)
    for _ in range(_STEPS):
        level = (holds + fails) / 2
        tried = windows(level)
        if tried == chosen or reaches(box_probability(n, m, tried), alpha):
            holds, chosen = level, tried
        else:
            fails = level
    ends = [rank for low, high in chosen.values() for rank in (low - 1, high)]
    named = [low - 1 for k, (low, _) in chosen.items() if k in below]
    named += [high for k, (_, high) in chosen.items() if k in above]
    return BatchBound(
        kind="quantiles",
        n=n,
        m=m,
        alpha=alpha,
        rank_quantile=tuple(chosen.values()),
        ranks=tuple(ends),
        lower=tuple(float(padded[low - 1]) for low, _ in chosen.values()),
        upper=tuple(float(padded[high]) for _, high in chosen.values()),
        exact_coverage=float(box_probability(n, m, chosen)),
        ties=_ties(scores),
        order=tuple(orders),
        reason=_outside(n, named),
    )


def coverage_bound(
    scores: Float[Tensor, " n"],
    m: int,
    *,
    delta: float,
    alpha: float,
    highest: float = math.inf,
) -> BatchBound:
    """A score that at least a share 1 - delta of the batch does not exceed: simultaneous coverage.

    With scores |outcome - prediction|, intervals of this half-width cover that share of the batch with probability
    1 - alpha, where split conformal prediction promises a share on average. A delta of 0 asks for all examples.

    Args:
        scores: Calibration scores.
        m: Test scores.
        delta: Share of the batch that may be missed.
        alpha: Probability that more is missed.
        highest: What no score is above, where that is known.

    Example:
        >>> bound = coverage_bound(torch.arange(200.0), 100, delta=0.1, alpha=0.05)
        >>> bound.upper, bound.around(torch.zeros(100))[1][0].item()
        (189.0, 189.0)
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be 0 or more and below 1; got {delta}.")
    check_sizes(len(scores), m, alpha)
    order = math.ceil((1 - decimal(delta)) * m)
    found = quantile_bound(scores, m, order, alpha=alpha, highest=highest)
    return replace(found, kind="coverage")


def split_conformal_coverage(n: int, m: int, delta: float) -> float:
    """The probability that split conformal intervals cover a share 1 - delta of the batch, exactly.

    They end at the calibration score of rank ⌈(1 - delta)(n + 1)⌉, which covers that share on average only.

    Example:
        >>> round(split_conformal_coverage(200, 100, 0.1), 3)
        0.588
    """
    share = 1 - decimal(delta)
    return float(rank_cdf(n, m, math.ceil(share * m), math.ceil(share * (n + 1))))


def mean_bound(
    scores: Float[Tensor, " n"],
    m: int,
    *,
    alpha: float,
    side: Side = "upper",
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> BatchBound:
    """Bound the mean of a batch.

    The sum of ranks has the distribution of Mann and Whitney's statistic; the greatest mean that its quantile allows
    comes from a dynamic program, or, where that takes long, from the concave majorant of the sorted scores, which is
    above it by less than one score's step.

    Args:
        scores: Calibration scores, finite.
        m: Test scores.
        alpha: Probability of a miss; for both bounds, of either.
        side: The upper bound, the lower one, or both.
        lowest: What no score can be below; without it there is rarely a lower bound.
        highest: What no score can be above; without it there is rarely an upper bound. The greatest score seen is no
            such number.

    Example:
        >>> scores = torch.linspace(0, 1, 100, dtype=torch.float64)
        >>> mean_bound(scores, 5, alpha=0.1, highest=1.0)
        BatchBound(mean of 5: -inf to 0.678788 with probability 0.9002; n = 100)
    """
    padded, n = _padded(scores, m, alpha, lowest, highest), len(scores)
    if not scores.isfinite().all():
        raise ValueError("The mean of a batch needs finite scores; got infinite ones.")
    q, coverage = rank_sum_quantile(n, m, alpha / 2 if side == "both" else alpha)
    lower, upper, reasons, ranks = lowest, highest, [], ()
    if side in ("upper", "both"):
        upper, ranks, why = _greatest_mean(padded[1:], m, q)
        reasons.append(why)
    if side in ("lower", "both"):
        least, mirrored, why = _greatest_mean(-padded[:-1].flip(0), m, q)
        lower = -least
        ranks = (*(n + 1 - r for r in reversed(mirrored)), *ranks)
        reasons.append(why.replace("highest", "lowest"))
    exact = coverage if side != "both" or coverage is None else 2 * coverage - 1
    return BatchBound(
        kind="mean",
        n=n,
        m=m,
        alpha=alpha,
        rank_quantile=q,
        ranks=ranks,
        exact_coverage=None if exact is None else float(exact),
        ties=_ties(scores),
        reason="; ".join(dict.fromkeys(filter(None, reasons))),
        lower=lower,
        upper=upper,
    )


def _greatest_mean(
    values: Float[Tensor, " rank"], m: int, q: int
) -> tuple[float, tuple[int, ...], str]:
    """The greatest mean with a sum of ranks of at most q, the ranks, and what there is to say about it."""
    n = len(values) - 1
    if q < n + m:
        values = values[:-1]  # no rank can be n + 1
    elif not values[-1].isfinite():
        needed = "the mean is bounded only if scores are: pass highest"
        return math.inf, (), f"ranks may reach {n + 1}; {needed}"
    if m * (q - m + 1) * len(values) > _EXACT_WORK:
        return majorant_at(values, (q - m) / m), (), "by the concave majorant of the sorted scores"
    greatest, ranks = greatest_sum(values, m, q - m)
    return greatest / m, tuple(ranks.tolist()), ""


def composed_bound(
    scores: Float[Tensor, " n"],
    m: int,
    step: Step,
    *,
    alpha: float,
    start: float = 0.0,
    costs: Int[Tensor, "m rank"] | None = None,
    highest: float = math.inf,
) -> BatchBound:
    r"""Bound a score that is put together from the sorted test scores: $g_k = \gamma_k(g_{k-1}, T_{(k)})$.

    Args:
        scores: Calibration scores, finite.
        m: Test scores.
        step: $\gamma$: from k (1 for the smallest test score), a tensor of $g_{k-1}$ and a score to $g_k$; it must not
            fall in either of the two.
        alpha: Probability of a miss.
        start: $g_0$.
        costs: What rank r of the k-th smallest test score adds to the function of ranks h, whole numbers that do not
            fall in r, (m, n + 1); r - 1 when left out. Any costs give a valid bound, and those that resemble the
            score's own dependence give a low one.
        highest: What no score can be above.

    Example:
        >>> scores = torch.linspace(0, 1, 30, dtype=torch.float64)
        >>> largest = composed_bound(scores, 4, lambda k, so_far, s: s.maximum(so_far), alpha=0.2, highest=1.0)
        >>> round(largest.upper, 3)
        1.0
    """
    padded, n = _padded(scores, m, alpha, -math.inf, highest), len(scores)
    if not scores.isfinite().all():
        raise ValueError("A composed score needs finite scores; got infinite ones.")
    costs = torch.arange(n + 1).expand(m, -1) if costs is None else costs
    check_costs(n, m, costs)
    q, coverage = cost_quantile(n, m, costs, alpha)
    values, reason, upper, ranks = padded[1:], "", math.inf, ()
    if not math.isfinite(highest):
        if int(costs[:-1, 0].sum() + costs[-1, n]) <= q:
            reason = (
                f"ranks may reach {n + 1}; the score is bounded only if scores are: pass highest"
            )
        values, costs = values[:-1], costs[:, :-1]
    if not reason:
        upper, found = greatest_composed(step, values, costs, q, start)
        ranks = tuple(found.tolist())
    return BatchBound(
        kind="composed",
        n=n,
        m=m,
        alpha=alpha,
        rank_quantile=q,
        ranks=ranks,
        lower=-math.inf,
        upper=upper,
        exact_coverage=float(coverage),
        ties=_ties(scores),
        reason=reason,
    )


def accept_shifted(
    ratios: Float[Tensor, " n"], *, bound: float, seed: int = 0
) -> Bool[Tensor, " n"]:
    r"""Calibration examples to keep, so that they are distributed as a batch from elsewhere is.

    Rejection sampling: an example is kept with probability $w(x) / \text{bound}$, where $w$ is the density of the batch
    over that of the calibration examples at $x$, up to a factor. Use the kept scores as calibration scores.

    Args:
        ratios: $w(x)$ of each calibration example. With a propensity $e(x)$ of being in the batch, $e / (1 - e)$.
        bound: The greatest value of $w$, known beforehand.
        seed: Seed of the draws.

    Returns:
        True for examples to keep. Bounds are exact when the ratio is known, and as good as it is when it is estimated.

    Warns:
        When ratios above the bound were clipped: the guarantee is then approximate.

    Example:
        >>> accept_shifted(torch.tensor([0.0, 2.0, 2.0]), bound=2.0).tolist()
        [False, True, True]
    """
    if not (ratios.isfinite().all() and (ratios >= 0).all() and math.isfinite(bound) and bound > 0):
        raise ValueError("Expected finite density ratios of 0 or more and a positive bound.")
    if clipped := int((ratios > bound).sum()):
        warnings.warn(
            f"{clipped} of {len(ratios)} density ratios are above the bound of {bound:g} and were clipped; the "
            "guarantee is approximate. Raise the bound.",
            stacklevel=2,
        )
    # A stream of its own: torch's would repeat what made the scores, were that seeded with the same number.
    draws = torch.from_numpy(np.random.default_rng([seed, _ACCEPT]).random(len(ratios)))
    return draws < (ratios.double().cpu() / bound)


def _padded(
    scores: Float[Tensor, " n"], m: int, alpha: float, lowest: float, highest: float
) -> Float[Tensor, " rank"]:
    """S_(0), …, S_(n+1), checked."""
    check_sizes(len(scores), m, alpha)
    if scores.isnan().any():
        missing = int(scores.isnan().sum())
        raise ValueError(f"{missing} of {len(scores)} calibration scores are NaN; leave them out.")
    ordered = scores.detach().double().cpu().sort().values
    if ordered[0] < lowest or ordered[-1] > highest:
        raise ValueError(
            f"Calibration scores run from {ordered[0]:g} to {ordered[-1]:g}, outside the given range of {lowest:g} to "
            f"{highest:g}; correct the range, or leave it out."
        )
    return torch.cat([ordered.new_tensor([lowest]), ordered, ordered.new_tensor([highest])])


def _ties(scores: Float[Tensor, " n"]) -> int:
    counts = scores.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _outside(n: int, ranks: Sequence[int]) -> str:
    """What to say where a bound is beyond all calibration scores."""
    if all(1 <= rank <= n for rank in ranks):
        return ""
    return f"{n} calibration scores are too few for this level: a bound is the range's end"
