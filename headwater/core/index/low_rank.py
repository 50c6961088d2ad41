r"""Rows kept as low-rank factors: each layer's matrix by its leading singular pairs.

The gradient of one position is an outer product, and a two-sided projection keeps it one: what T positions leave of a
layer has a rank of at most T. The best approximation of rank r of a projected gradient is
$G \approx \sum_{k \le r} (\sqrt{s_k} u_k)(\sqrt{s_k} v_k)^\top$ (Eckart and Young 1936), r (out + in) numbers in place
of out · in; with one position an example nothing is lost from the first pair on. Grosse et al. (2023,
arXiv:2308.03296, section 3.2.2) keep the gradients of queries so.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.numerics.kronecker import singular_pairs


@dataclass(frozen=True)
class LowRank:
    """How rows are split into matrices, and how many pairs are kept of each.

    A matrix that the pairs would not make smaller is kept whole.

    Args:
        rank: Pairs of each matrix.
        shapes: (matrices, out, in) of each layer, in the order of the row.

    Raises:
        ValueError: The rank is below 1.
    """

    rank: int
    shapes: tuple[tuple[int, int, int], ...]

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"An index keeps 1 or more factors of a layer; got {self.rank}.")

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """(matrices, out, in) of neighbouring matrices of one shape."""
        runs = groupby(self.shapes, key=lambda shape: shape[1:])
        return [(sum(s[0] for s in several), *shape) for shape, several in runs]

    def _width(self, out: int, in_: int) -> int:
        return min(self.rank * (out + in_), out * in_)

    @property
    def dim(self) -> int:
        """Numbers of a whole row."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def numbers(self) -> int:
        """Numbers of its factors."""
        return sum(n * self._width(out, in_) for n, out, in_ in self._runs)

    def pack(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n number"]:
        """The factors of rows."""
        parts = rows.float().split([prod(run) for run in self._runs], dim=1)
        return torch.cat(
            [self._packed(x, *run) for x, run in zip(parts, self._runs, strict=True)], dim=1
        )

    def _packed(self, x: Tensor, n: int, out: int, in_: int) -> Tensor:
        if self._width(out, in_) == out * in_:
            return x
        # a row that is not finite is told of when it is encoded; the decomposition would not end
        finite = x.isfinite().all(1, keepdim=True)
        matrices = x.where(finite, 0.0).view(-1, n, out, in_)
        factors = torch.cat(singular_pairs(matrices, self.rank), dim=-1).flatten(1)
        return factors.where(finite, torch.nan)

    def unpack(
        self, numbers: Float[Tensor, "n number"], out: Float[Tensor, "n dim"] | None = None
    ) -> Float[Tensor, "n dim"]:
        """Rows from their factors, in `out` where it is given."""
        rows = numbers.new_empty(len(numbers), self.dim) if out is None else out
        parts = numbers.split([n * self._width(o, i) for n, o, i in self._runs], dim=1)
        places = rows.split([prod(run) for run in self._runs], dim=1)
        for x, place, (n, out_, in_) in zip(parts, places, self._runs, strict=True):
            if self._width(out_, in_) == out_ * in_:
                place.copy_(x)
                continue
            left, right = x.view(-1, n, self.rank, out_ + in_).split([out_, in_], dim=-1)
            place.view(-1, n, out_, in_).copy_(left.mT @ right)
        return rows
