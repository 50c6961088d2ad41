"""How well a number tells positives from negatives: area under the ROC curve, average precision, intervals."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.numerics.ranks import average_ranks
from headwater.numerics.resampling import Estimate, bootstrap

Area = Callable[[Float[Tensor, " n"], Bool[Tensor, " n"]], Float[Tensor, ""]]


def auroc(values: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """Chance that a positive has a higher value than a negative, equal ones counting half; NaN without both.

    Example:
        >>> auroc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False])).item()
        1.0
    """
    n = positive.sum().double()
    wins = average_ranks(values)[positive].sum() - n * (n + 1) / 2
    return wins / (n * (~positive).sum())


def average_precision(
    values: Float[Tensor, " n"], positive: Bool[Tensor, " n"]
) -> Float[Tensor, ""]:
    r"""Mean over the positives of the precision among the examples whose value is at least theirs.

    $$\mathrm{AP} = \frac1P \sum_{i \in +} \frac{\#\{j \in + : v_j \ge v_i\}}{\#\{j : v_j \ge v_i\}}$$

    Equal values are taken together, so that their order decides nothing; NaN without positives.

    Example:
        >>> average_precision(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, False])).item()
        0.8333333333333333
    """
    values = values.double()
    chosen = values[positive].contiguous()
    above = [
        len(v) - torch.searchsorted(v.sort().values.contiguous(), chosen, right=False)
        for v in (chosen, values)
    ]
    return (above[0].double() / above[1]).mean()


def detection_estimate(
    area: Area,
    values: Float[Tensor, " n"],
    positive: Bool[Tensor, " n"],
    *,
    n_samples: int = 500,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`auroc` or `average_precision` with an interval over positives and negatives drawn anew.

    Args:
        area: The function.
        values: Higher where an example is held to be positive.
        positive: Which examples are.
        n_samples: Bootstrap draws; the numbers of positives and of negatives stay as they are.
        confidence_level: Coverage that the interval aims at.
        seed: Seed of the draws.

    Raises:
        ValueError: All examples are positive, or none is, or a value is NaN.
    """
    if not 0 < int(positive.sum()) < len(positive) or values.isnan().any():
        raise ValueError(
            f"Expected positives and negatives, and numbers for all; got {int(positive.sum())} positives of "
            f"{len(positive)} and {int(values.isnan().sum())} values that are NaN."
        )
    groups = values[positive], values[~positive]
    which = torch.cat([torch.full((len(g),), k == 0) for k, g in enumerate(groups)])

    def drawn(*index: Tensor) -> float:
        parts = [g[i] for g, i in zip(groups, index, strict=True)]
        return float(area(torch.cat(parts), which))

    sizes = (len(groups[0]), len(groups[1]))
    options = {"n_samples": n_samples, "confidence_level": confidence_level, "seed": seed}
    return bootstrap(drawn, sizes, n=len(values), **options)
