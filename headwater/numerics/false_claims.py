r"""How many false claims lie above a calibration score: bounds that hold at all thresholds at once.

Let $n$ verified and $m$ unverified examples be exchangeable, and let every example that is *not* what is claimed keep
its score, while the others get minus infinity. $V_b$ is the number of unverified examples above the $(b+1)$-th largest
of the $n$ scores so made: the false claims, if everything above that threshold is claimed. Going down through all
$n + m$ scores, verified and unverified ones come in a uniformly random order, and so

- each $V_b$ is beta-binomial (negative hypergeometric), whatever the scores are;
- the probability that no $V_b$ passes its cap is that of a random lattice path below a staircase, known exactly.

Caps that hold together with probability $1 - \alpha$ bound the false claims at every threshold, so that a threshold
may be chosen after the claims have been counted. The joint law is that of Gazin, Blanchard and Roquain (2024),
"Transductive Conformal Inference with Adaptive Scores", arXiv:2310.18108; a family of caps with one level to calibrate
is a template in the sense of Blanchard, Neuvial and Roquain (2020), "Post Hoc Confidence Bounds on False Positives
Using Reference Families", arXiv:1703.02307.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.numerics.batch_ranks import check_sizes

_LEVELS = 48  # tried, between alpha and the level that a sum over thresholds allows
_BLOCK = 1000  # thresholds whose passages are solved for at once
_SLACK = 1e-6  # more than float64 loses by logarithms of factorials of 10 million


def log_paths(right: Tensor, up: Tensor) -> Float[Tensor, "*shape"]:
    """Logarithm of the number of lattice paths with so many steps right and up; minus infinity below 0 steps."""
    right, up = torch.broadcast_tensors(right.double(), up.double())
    some = (right >= 0) & (up >= 0)
    count = (right + up + 1).lgamma() - (right + 1).lgamma() - (up + 1).lgamma()
    return torch.where(some, count, -torch.inf)


def crossing_probability(n: int, m: int, caps: Int[Tensor, " threshold"]) -> float:
    r"""$P(V_b > \text{cap}_b \text{ for some } b)$, for caps that do not fall.

    A path steps up at a verified example and right at an unverified one. It passes cap $b$ for the first time at the
    point $(\text{cap}_b + 1, b)$. Every path through such a point has passed a cap there or before, so that the first
    passages $q_b$ solve a triangular system,

    $$q_b = P(\text{through } b) - \sum_{b' < b} q_{b'} P(\text{through } b \mid \text{through } b'),$$

    whose size does not depend on $m$.

    Args:
        n: Verified examples.
        m: Unverified examples.
        caps: For $b = 0, 1, …$; those of m or more are no caps.

    Example:
        >>> round(crossing_probability(1, 1, torch.tensor([0])), 3)  # one above the other
        0.5
    """
    check_sizes(n, m)
    if len(caps) > n or (caps < 0).any() or (caps.diff() < 0).any():
        raise ValueError(
            f"Expected at most {n} caps of 0 or more that do not fall; got {len(caps)}."
        )
    across = caps[caps < m].double() + 1
    up = torch.arange(len(across), dtype=torch.float64)
    if not len(across):
        return 0.0
    rest = log_paths(m - across, n - up)
    through = (log_paths(across, up) + rest - log_paths(torch.tensor(m), torch.tensor(n))).exp()
    first = torch.zeros_like(through)
    for start in range(0, len(across), _BLOCK):
        rows, before = slice(start, start + _BLOCK), slice(0, start + _BLOCK)
        steps = across[rows, None] - across[before], up[rows, None] - up[before]
        onward = (log_paths(*steps) + rest[rows, None] - rest[before]).exp()
        known = through[rows] - onward[:, :start] @ first[:start]
        here = onward[:, start:]  # lower triangular, with ones on the diagonal
        first[rows] = torch.linalg.solve_triangular(here, known[:, None], upper=False)[:, 0]
    return min(1.0, max(0.0, float(first.sum())))


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Caps on the false claims above each calibration score, which hold together.

    Attributes:
        caps: For the largest calibration score, the second largest, …: how many false claims may lie above it.
        level: Probability that one of them is passed, in float64.
        first_level: Probability at which the first was taken alone; cap b has its (b + 1)-th part.
    """

    caps: Int[Tensor, " threshold"]
    level: float
    first_level: float


@lru_cache(maxsize=64)
def simultaneous_caps(n: int, m: int, alpha: float, *, most: int | None = None) -> Caps:
    r"""Caps as low as a probability of alpha that any is passed allows.

    Alone, cap $b$ would be passed with probability $\lambda / (b + 1)$: the shorter a list of claims, the more each
    false one weighs. $\lambda$ is as large as the joint probability allows, and never below
    $\alpha / (1 + 1/2 + … + 1/n)$. Caps depend on the four numbers alone, and on no score.

    Args:
        n: Verified examples.
        m: Unverified examples.
        alpha: Probability that some cap is passed.
        most: Thresholds whose cap cannot be so low are left out: no one asks about them, and the others gain.

    Example:
        >>> simultaneous_caps(100, 100, 0.05).caps[:4].tolist()
        [4, 8, 10, 13]
    """
    check_sizes(n, m, alpha)
    most = m if most is None else most
    least = 1 / (
        1.01 + math.log(n)
    )  # a little below the harmonic sum's inverse, which always holds
    levels = alpha * least ** torch.linspace(0, 1, _LEVELS, dtype=torch.float64)
    rows: list[Int[Tensor, " level"]] = []
    for b in range(n):
        caps = _single_caps(n, m, b, levels / (b + 1))
        if int(caps[0]) > most:
            break
        rows.append(caps)
    if not rows:
        none = torch.zeros(0, dtype=torch.long)
        return Caps(caps=none, level=0.0, first_level=0.0)
    table = torch.stack(rows, 1)  # (level, threshold)
    low, high = 0, _LEVELS - 1  # caps rise, and the probability falls, from one level to the next
    while low < high:
        middle = (low + high) // 2
        if crossing_probability(n, m, table[middle]) <= alpha - _SLACK:
            high = middle
        else:
            low = middle + 1
    level = crossing_probability(n, m, table[high])
    return Caps(caps=table[high], level=level, first_level=float(levels[high]))


def _single_caps(n: int, m: int, b: int, levels: Float[Tensor, " level"]) -> Int[Tensor, " level"]:
    r"""The smallest $v$ with $P(V_b > v) \le$ level, for each level."""
    mean = m * (b + 1) / (n + 1)
    deviation = math.sqrt(mean * (n - b) * (n + m + 1) / ((n + 1) * (n + 2)))  # beta-binomial
    low = max(0, math.floor(mean - 4 * deviation))
    high = min(m, math.ceil(mean + 8 * deviation + 25 * deviation / math.sqrt(b + 1)))
    # P(V_b = v): b of n and v of m come first, then a verified one, then the rest. From v to v + 1:
    v = torch.arange(low, high, dtype=torch.float64)
    ratios = (v + b + 1) * (m - v) / ((v + 1) * (n - b - 1 + m - v))
    first = torch.tensor(float(low)), torch.tensor(float(m - low))
    start = log_paths(first[0], torch.tensor(b)) + log_paths(first[1], torch.tensor(n - b - 1))
    start = start - log_paths(torch.tensor(m), torch.tensor(n))
    probability = torch.cat([start[None], start + ratios.log().cumsum(0)]).exp()
    above = probability.flip(0).cumsum(0).flip(0) - probability  # P(V_b > v)
    return low + torch.searchsorted(-above, -levels)
