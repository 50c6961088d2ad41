r"""How much of a top k lies outside of what was looked at, told from a sample of the outside.

Of $M$ examples outside $m$ are drawn at random and scored. If $x$ of them exceed some score, the number outside that do
is at most the largest for which so few would still be met with probability $\alpha$ (Clopper and Pearson 1934, for a
finite population). That holds for any scores, and is far off unless a good part of the outside was drawn. Guesses of
all scores tell more, where they are off alike.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

_DRAWS, _TINY = 200, 1e-30


@lru_cache(maxsize=65_536)
def most_marked(found: int, drawn: int, population: int, *, confidence_level: float = 0.95) -> int:
    """Most that can be marked in a population of which some were drawn at random without replacement.

    Args:
        found: Marked ones among the drawn.
        drawn: How many were drawn.
        population: Of how many.
        confidence_level: How often the number is large enough, at least, whatever the truth is.

    Example:
        >>> most_marked(0, 59, 10**9) / 10**9 < 0.05 < most_marked(0, 58, 10**9) / 10**9
        True
        >>> most_marked(2, 10, 10)
        2
    """
    if not 0 <= found <= drawn <= population:
        raise ValueError(
            f"Expected found <= drawn <= population; got {found}, {drawn} and {population}."
        )
    low, high = found, population - drawn + found
    while low < high:
        middle = (low + high + 1) // 2
        if _at_most(found, drawn, middle, population) > 1 - confidence_level:
            low = middle
        else:
            high = middle - 1
    return low


def _at_most(found: int, drawn: int, marked: int, population: int) -> float:
    """Probability of drawing no more than so many marked ones."""
    whole = _log_choices(population, drawn)
    return sum(
        math.exp(_log_choices(marked, x) + _log_choices(population - marked, drawn - x) - whole)
        for x in range(max(0, drawn - population + marked), min(found, marked) + 1)
    )


def _log_choices(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def places(inside: Float[Tensor, "row n"], k: int) -> Float[Tensor, "row k"]:
    r"""The k-th largest score, the one before it, and so on; $-\infty$ where there are fewer than k.

    As many as j outsiders belong to the top k if, and only if, that many exceed the j-th place.
    """
    top = inside.topk(min(k, inside.shape[1]), dim=1).values
    missing = top.new_full((len(top), k - top.shape[1]), -math.inf)
    return torch.cat([top, missing], dim=1).flip(1)


def pushed_out(counts: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead"]:
    r"""How many of a top k belong to outsiders, $\max_j \min(j, N_j)$ with $N_j$ outsiders above the j-th of `places`.

    Example:
        >>> float(pushed_out(torch.tensor([5.0, 2.0, 1.0])))  # two fit in; the third lacks a third outsider
        2.0
    """
    ranks = torch.arange(1, counts.shape[-1] + 1).to(counts)
    return torch.minimum(counts, ranks).amax(-1)


Guesses = tuple[Float[Tensor, "row block"], Float[Tensor, " block"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Stratum:
    """A part of the outside, and the scores of some of it that were drawn at random.

    Attributes:
        size: How many it holds.
        drawn: Scores of the drawn ones.
        guess: Their guessed scores.
        scale: How far off the guess of each may be, but for a factor that all share.
        others: The guesses and scales of all others in it, block by block.
    """

    size: int
    drawn: Float[Tensor, "row drawn"]
    guess: Float[Tensor, "row drawn"]
    scale: Float[Tensor, " drawn"]
    others: Callable[[], Iterable[Guesses]]

    @property
    def rest(self) -> int:
        """How many were not drawn."""
        return self.size - self.drawn.shape[1]

    def lifted(self, at: Float[Tensor, "row k"]) -> Float[Tensor, "row k drawn2"]:
        r"""How many others would exceed each place if all were as far off, in their scales, as each drawn one is.

        Scores are taken to be $\beta s_n + \sigma_n z$ for guesses s and scales σ, with β fitted to the drawn ones, of
        which each gives a z, and then, in a second half of the columns, -z.
        """
        scale = self.scale.clamp(min=_TINY)
        weight = scale.square().reciprocal()
        slope = (weight * self.drawn * self.guess).sum(1) / (weight * self.guess.square()).sum(1)
        slope = slope.nan_to_num(0).clamp(min=0)[:, None]
        z = (self.drawn - slope * self.guess) / scale
        z = torch.cat([z, -z], dim=1).contiguous()
        counts = torch.zeros(*at.shape, z.shape[1], dtype=torch.float64)
        for guess, scales in self.others():
            for j in range(at.shape[1]):
                needed = (at[:, j, None] - slope * guess.double()) / scales.double().clamp(
                    min=_TINY
                )
                counts[:, j] += torch.searchsorted(needed.sort(dim=1).values, z)
        return counts

    def most(self, at: Float[Tensor, "row k"], confidence_level: float) -> Float[Tensor, "row k"]:
        """How many of the whole stratum exceed each place, at most, whatever their scores."""
        n, above = self.drawn.shape[1], (self.drawn[:, None, :] > at[:, :, None]).sum(2)
        found = [
            [most_marked(x, n, self.size, confidence_level=confidence_level) for x in row]
            for row in above.tolist()
        ]
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Missed:
    """Share of a top k that lies outside of all that was scored, mean over rows.

    Attributes:
        k: How many the top holds.
        estimate: The share.
        high: Upper limit, if guesses are off outside as they are in the sample, to either side.
        at_most: Upper limit that supposes nothing about the outside.
        found: Drawn ones that are among a top k of the scored ones.
        drawn: How many were drawn.
        outside: Of how many.
        confidence_level: Of both limits.
    """

    k: int
    estimate: float
    high: float
    at_most: float
    found: int
    drawn: int
    outside: int
    confidence_level: float


def missed(
    inside: Float[Tensor, "row n"],
    strata: Sequence[Stratum],
    *,
    k: int,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Missed:
    """What of each row's k largest scores is neither inside nor drawn.

    The estimate supposes that guesses are off as those of the drawn ones are (`Stratum.lifted`). Its upper limit comes
    from drawing those anew (bootstrap), and then the number of outsiders (Poisson). The other limit needs no guesses:
    no more are missing than lie outside, drawn or not.

    Args:
        inside: Scores of what was looked at; negate them for the smallest.
        strata: The outside, with one drawn or more of each.
        k: How many.
        confidence_level: Of the limits.
        seed: Of the draws.
    """
    outside, drawn = sum(s.size for s in strata), sum(s.drawn.shape[1] for s in strata)
    partly = [s for s in strata if s.rest]
    looked = torch.cat([inside, *(s.drawn for s in strata)], dim=1)
    inside = torch.cat([inside, *(s.drawn for s in strata if not s.rest)], dim=1)
    at, rows = places(looked, k), len(inside)
    each = 1 - (1 - confidence_level) / max(1, rows * len(partly))
    generator = torch.Generator().manual_seed(seed)
    limit, estimate = torch.zeros(2, rows, k, dtype=torch.float64)
    mean = torch.zeros(_DRAWS, rows, k, dtype=torch.float64)
    for s in partly:
        n, lifted = s.drawn.shape[1], s.lifted(at)
        limit = limit + s.most(places(inside, k), each)
        estimate = estimate + lifted[..., :n].mean(2)
        again = torch.randint(n, (_DRAWS, n), generator=generator)
        shares = torch.zeros(_DRAWS, n, dtype=torch.float64)
        shares.scatter_add_(1, again, torch.ones_like(shares)).div_(n)
        either = (lifted[..., :n] + lifted[..., n:]) / 2
        mean = mean + torch.einsum("bd,rkd->brk", shares, either)
    # counts above lower places hold those above higher ones, so that what is drawn is their differences
    between = (mean - torch.nn.functional.pad(mean[..., 1:], (0, 1))).clamp(min=0)
    counts = torch.poisson(between, generator=generator).flip(2).cumsum(2).flip(2)
    high = (pushed_out(counts).mean(1) / k).quantile(confidence_level)
    top = looked.topk(min(k, looked.shape[1]), dim=1).indices
    return Missed(
        k=k,
        estimate=float(pushed_out(estimate).mean() / k),
        high=float(high),
        at_most=float(pushed_out(limit).mean() / k),
        found=int((top >= looked.shape[1] - drawn).sum()),
        drawn=drawn,
        outside=outside,
        confidence_level=confidence_level,
    )
