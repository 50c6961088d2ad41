r"""The greatest batch score that ranks within a budget allow.

Test scores with ranks $r$ are at most $S_{(r_1)}, …, S_{(r_m)}$. Among rank vectors whose cost is within a budget,
these functions find the one with the greatest sum, or the greatest value of a score that is put together in steps.

Lee, Tchetgen Tchetgen and Dobriban (2024), "Batch Predictive Inference", arXiv:2409.13990.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Step = Callable[[int, Tensor, Tensor], Tensor]
"""From the number of a test score (1 to m), the score of those below it, and its value, to the score with it."""

_STATES = 200_000_000  # of a table by test score, last rank and budget


def greatest_sum(
    values: Float[Tensor, " rank"], m: int, budget: int
) -> tuple[float, Int[Tensor, " m"]]:
    r"""$\max \sum_k S_{(r_k)}$ over ranks with $\sum_k (r_k - 1) \le$ budget, and ranks that reach it.

    Bellman's recursion over test scores and what is left of the budget. The order of the scores does not matter to a
    sum, so that ranks need not be non-decreasing on the way.

    Args:
        values: $S_{(1)}, …, S_{(n+1)}$, sorted and finite.
        m: Test scores.
        budget: What ranks above 1 may cost together.

    Example:
        >>> greatest_sum(torch.tensor([0.0, 1.0, 5.0]), 2, 3)
        (6.0, tensor([2, 3]))
    """
    scores = values.double().numpy()
    width = min(budget, m * (len(scores) - 1)) + 1
    best = np.zeros((m + 1, width))  # by scores placed and budget
    room = np.empty(width)
    for before, after in pairwise(best):
        np.add(before, scores[0], out=after)
        for r in range(1, min(len(scores), width)):
            candidate = np.add(before[: width - r], scores[r], out=room[r:])
            np.maximum(after[r:], candidate, out=after[r:])
    ranks, left = [], width - 1
    for before in best[m - 1 :: -1]:
        r = int((before[left::-1][: len(scores)] + scores[: left + 1]).argmax())
        ranks.append(r + 1)
        left -= r
    return float(best[m, -1]), torch.tensor(sorted(ranks))


def majorant_at(values: Float[Tensor, " rank"], place: float) -> float:
    r"""The least concave function above $(0, S_{(1)}), (1, S_{(2)}), …$ at a place, never falling.

    By Jensen's inequality $\frac1m \sum_k S_{(r_k)} \le \hat S\big(\frac1m \sum_k (r_k - 1)\big)$: a bound on the mean
    for any number of scores in one pass, above the greatest mean by no more than one score's step.

    Example:
        >>> majorant_at(torch.tensor([0.0, 1.0, 5.0]), 1.5)
        3.75
    """
    points = list(enumerate(values.double().tolist()))
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) > (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    for (x0, y0), (x1, y1) in pairwise(hull):
        if place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return hull[-1][1]


def greatest_composed(
    step: Step,
    values: Float[Tensor, " rank"],
    costs: Int[Tensor, "m rank"],
    budget: int,
    start: float = 0.0,
) -> tuple[float, Int[Tensor, " m"]]:
    r"""$\max g_m$ over non-decreasing ranks with $\sum_k c_k(r_k) \le$ budget.

    Here $g_k = \gamma_k(g_{k-1}, S_{(r_k)})$. The state is the last rank and what has been spent; $\gamma$ must not
    fall in either argument.

    Args:
        step: $\gamma$.
        values: $S_{(1)}, …, S_{(n+1)}$, sorted and finite.
        costs: Cost of each rank of each test score, (m, n + 1), not falling in ranks.
        budget: What ranks may cost together.
        start: $g_0$.

    Returns:
        The score and ranks that reach it; minus infinity and rank 0 where no ranks are within the budget.

    Raises:
        MemoryError: The table of states is too large.
    """
    m, n_ranks = costs.shape
    width = min(budget, int(costs.amax(1).sum())) + 1
    if m * n_ranks * max(width, 1) > _STATES:
        raise MemoryError(
            f"A composed score of {m} examples at {n_ranks} ranks with a budget of {budget} has "
            f"{m * n_ranks * width:,} states; give coarser costs, or fewer calibration scores."
        )
    if width < 1:
        return -torch.inf, torch.zeros(m, dtype=torch.long)
    values = values.double()
    # best[r, j]: greatest score with ranks up to r that spent j or less.
    best = torch.full((n_ranks, width), float(start), dtype=torch.float64)
    reachable = torch.ones(n_ranks, width, dtype=torch.bool)
    origins = []
    for k, row in enumerate(costs.tolist(), start=1):
        extended = torch.full_like(best, -torch.inf)
        reached = torch.zeros_like(reachable)
        for r, cost in enumerate(row):
            if cost >= width:
                break
            before, known = best[r, : width - cost], reachable[r, : width - cost]
            extended[r, cost:] = step(k, before, values[r]).masked_fill(~known, -torch.inf)
            reached[r, cost:] = known
        best, origin = extended.cummax(0)
        reachable = reached.cumsum(0) > 0
        origins.append(origin)
    if not reachable[-1, -1]:
        return -torch.inf, torch.zeros(m, dtype=torch.long)
    value, r, left, ranks = float(best[-1, -1]), n_ranks - 1, width - 1, []
    for k in reversed(range(m)):
        r = int(origins[k][r, left])
        ranks.append(r + 1)
        left -= int(costs[k, r])
    return value, torch.tensor(ranks[::-1])
