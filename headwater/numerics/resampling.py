"""Estimates with intervals: bootstrap, jackknife, and the best score that noise allows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.numerics.ranks import average_ranks, redrawn_spearman, spearman, subset_predictions


@dataclass(frozen=True)
class Estimate:
    """A value, its confidence interval, and the number of examples or queries behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


def bootstrap(
    statistic: Callable[..., float],
    sizes: tuple[int, ...],
    *,
    n: int,
    n_samples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap over one or several axes at once, each drawn with replacement.

    Args:
        statistic: Called with one index tensor for each axis; draws on which it is NaN are left
            out.
        sizes: Lengths of the axes, such as (queries, subsets).
        n: The count that the estimate reports.
        n_samples: Bootstrap draws.
        confidence_level: Share of the draws inside the interval.
        seed: Seed of the draws.

    Returns:
        The statistic of the axes as they are, with the interval of its draws.

    References:
        Efron and Tibshirani (1993), "An Introduction to the Bootstrap".
    """
    generator = torch.Generator().manual_seed(seed)
    value = statistic(*(torch.arange(size) for size in sizes))
    draws = torch.tensor(
        [
            statistic(*(torch.randint(size, (size,), generator=generator) for size in sizes))
            for _ in range(n_samples)
        ],
        dtype=torch.float64,
    )
    tail = (1 - confidence_level) / 2
    low, high = draws.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, n)


def bootstrap_lds(
    scores: Float[Tensor, "query n_train"],
    masks: Bool[Tensor, "subset n_train"],
    outcomes: Float[Tensor, "subset query"],
    *,
    n_samples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean linear datamodeling score with an interval over other queries and other subsets.

    Queries and subsets are drawn anew together: with few subsets it is they, and not the queries,
    that make the score uncertain.

    Args:
        scores: Positive where adding the example raises the measurement.
        masks: True where a subset holds an example.
        outcomes: The measurement after training on each subset.
        n_samples: Bootstrap draws.
        confidence_level: Coverage that the interval aims at.
        seed: Seed of the draws.

    Returns:
        The mean over queries; `n` counts the queries whose score is defined (see `ranks.lds`).

    Raises:
        ValueError: No query has a defined score.
    """
    predictions, actual = subset_predictions(scores, masks), outcomes.T
    defined = ~spearman(predictions, actual).isnan()
    n = int(defined.sum())
    if n == 0:
        raise ValueError(
            f"None of {len(defined)} queries has a linear datamodeling score: predictions or "
            "outcomes are constant over subsets, or NaN."
        )
    predictions, actual = average_ranks(predictions[defined]), average_ranks(actual[defined])

    def mean_score(query: Int[Tensor, " query"], subset: Int[Tensor, " subset"]) -> float:
        counts = subset.bincount(minlength=len(masks))
        return redrawn_spearman(predictions, actual, counts)[query].nanmean().item()

    return bootstrap(
        mean_score,
        (n, len(masks)),
        n=n,
        n_samples=n_samples,
        confidence_level=confidence_level,
        seed=seed,
    )


def bootstrap_lds_difference(
    scores: Float[Tensor, "query n_train"],
    others: Float[Tensor, "query n_train"],
    masks: Bool[Tensor, "subset n_train"],
    outcomes: Float[Tensor, "subset query"],
    *,
    n_samples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """By how much the linear datamodeling score of one method is above another's.

    Both are judged on the same queries and subsets in every draw, so that what makes a draw easy
    or hard for both cancels; see `bootstrap_lds`.

    Args:
        scores: Those of the first method.
        others: Those of the second.
        masks: True where a subset holds an example.
        outcomes: The measurement after training on each subset.
        n_samples: Bootstrap draws.
        confidence_level: Coverage that the interval aims at.
        seed: Seed of the draws.
    """
    predictions = torch.stack([subset_predictions(each, masks) for each in (scores, others)])
    defined = ~spearman(predictions, outcomes.T.expand_as(predictions)).isnan().any(0)
    predictions, actual = average_ranks(predictions[:, defined]), average_ranks(outcomes.T[defined])

    def difference(query: Int[Tensor, " query"], subset: Int[Tensor, " subset"]) -> float:
        counts = subset.bincount(minlength=len(masks))
        first, second = redrawn_spearman(predictions, actual.expand_as(predictions), counts)
        return (first - second)[query].nanmean().item()

    n = int(defined.sum())
    sizes = (n, len(masks))
    options = {"n_samples": n_samples, "confidence_level": confidence_level, "seed": seed}
    return bootstrap(difference, sizes, n=n, **options)


def spearman_brown(reliability: float, n: int) -> float:
    r"""Reliability of a mean of `n` repeats when one has `reliability` $\rho$.

    $$\rho_n = \frac{n \rho}{1 + (n - 1) \rho}$$

    Example:
        >>> round(spearman_brown(0.31, 3), 2)
        0.57
    """
    return n * reliability / (1 + (n - 1) * reliability)


def seed_reliability(
    outcomes: Float[Tensor, "subset repeat query"],
) -> Float[Tensor, " query"]:
    """How far one retraining agrees with another: mean rank correlation over pairs of repeats."""
    by_repeat = outcomes.permute(1, 2, 0)
    first, second = torch.triu_indices(len(by_repeat), len(by_repeat), offset=1)
    return spearman(by_repeat[first], by_repeat[second]).nanmean(0)


def noise_ceiling(
    outcomes: Float[Tensor, "subset repeat query"],
    *,
    n_samples: int = 200,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    r"""The score that a perfect prediction of the expected outcome would reach: √reliability.

    With $\rho$ the correlation of two single retrainings over subsets, mean over queries, the mean
    of $R$ retrainings has reliability $R\rho / (1 + (R - 1)\rho)$ (Spearman and Brown), and its
    correlation with the outcome that $R \to \infty$ would give is the root of that. A correlation
    of one half of the repeats with the other is not a ceiling.

    Args:
        outcomes: A measurement after every retraining.
        n_samples: Bootstrap draws, over queries and subsets together.
        confidence_level: Coverage that the interval aims at.
        seed: Seed of the draws.

    Returns:
        The ceiling of a score against the mean of these repeats; 0 where ρ is not positive. `n`
        counts the queries whose outcomes are not constant.

    Raises:
        ValueError: Fewer than two repeats, or outcomes that are missing.
    """
    n_subsets, n_repeats, n_queries = outcomes.shape
    if n_repeats < 2:
        raise ValueError(
            "A noise ceiling needs two or more retrainings of each subset with different seeds; "
            f"got {n_repeats}."
        )
    if outcomes.isnan().any():
        missing = int(outcomes.isnan().any(-1).sum())
        raise ValueError(
            f"{missing} of {n_subsets * n_repeats} retrainings have no outcome; pass the repeats "
            "that are complete."
        )

    ranks = average_ranks(outcomes.permute(1, 2, 0))
    first, second = torch.triu_indices(n_repeats, n_repeats, offset=1)

    def ceiling(query: Int[Tensor, " query"], subset: Int[Tensor, " subset"]) -> float:
        counts = subset.bincount(minlength=n_subsets)
        rho = redrawn_spearman(ranks[first], ranks[second], counts).nanmean(0)[query].nanmean()
        return math.sqrt(spearman_brown(rho.clamp(min=0).item(), n_repeats))

    return bootstrap(
        ceiling,
        (n_queries, n_subsets),
        n=int((~seed_reliability(outcomes).isnan()).sum()),
        n_samples=n_samples,
        confidence_level=confidence_level,
        seed=seed,
    )


def jackknife_variance(replicates: Float[Tensor, "fold *shape"]) -> Float[Tensor, "*shape"]:
    r"""Variance of an estimate from its values with one of F equal folds of the data left out.

    $$\frac{F - 1}{F} \sum_f \big(\hat\theta_{(f)} - \bar\theta_{(\cdot)}\big)^2$$

    References:
        Quenouille (1956), "Notes on Bias in Estimation", and Tukey (1958).
    """
    n_folds = len(replicates)
    if n_folds < 2:
        raise ValueError(f"A jackknife needs two or more folds; got {n_folds}.")
    replicates = replicates.double()
    return (n_folds - 1) * (replicates - replicates.mean(0)).square().mean(0)


def jackknife_interval(
    value: Float[Tensor, "*shape"],
    replicates: Float[Tensor, "fold *shape"],
    *,
    confidence_level: float = 0.95,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Student's interval around an estimate: value ± t · √(jackknife variance), F - 1 degrees.

    Args:
        value: The estimate from all data.
        replicates: The estimate with each fold left out in turn.
        confidence_level: Coverage that the interval aims at.

    Returns:
        The lower and the upper end.
    """
    t = student_quantile((1 + confidence_level) / 2, dof=len(replicates) - 1)
    half = t * jackknife_variance(replicates).sqrt()
    return value - half, value + half


def mean_interval(values: Float[Tensor, " n"], *, confidence_level: float = 0.95) -> Estimate:
    """The mean of independent values, such as one a seed, with Student's interval.

    Example:
        >>> mean_interval(torch.tensor([1.0, 2.0, 3.0])).value
        2.0
    """
    values = values.double()
    n, mean = len(values), float(values.mean())
    t = student_quantile((1 + confidence_level) / 2, dof=n - 1)
    half = t * float(values.std()) / n**0.5
    return Estimate(mean, mean - half, mean + half, n)


def student_quantile(level: float, *, dof: int) -> float:
    r"""Quantile of Student's t distribution.

    With $t = \sqrt{\nu} \tan\varphi$ the density is $\cos^{\nu-1}\varphi$ up to a constant; it is
    summed on a grid of $\varphi$ (relative error below 1e-6 for 1 to 10,000 degrees of freedom and
    levels to 0.999).

    Example:
        >>> round(student_quantile(0.975, dof=9), 3)
        2.262
    """
    if not 0 < level < 1 or dof < 1:
        raise ValueError(f"Expected a level in (0, 1) and dof of 1 or more; got {level}, {dof}.")
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    density = angle.cos() ** (dof - 1)
    area = torch.cumulative_trapezoid(density, angle)
    cdf = torch.cat([area.new_zeros(1), area]) / area[-1]
    target = abs(2 * level - 1)
    right = int(torch.searchsorted(cdf, target))
    left = max(right - 1, 0)
    share = (target - cdf[left]) / (cdf[right] - cdf[left]) if right > left else 0.0
    phi = angle[left] + share * (angle[right] - angle[left])
    return math.copysign(math.sqrt(dof) * math.tan(float(phi)), level - 0.5)
