"""Curvature with one fold of the data left out, eigenbases and all: what honest intervals need.

Leaving a fold out of the eigenvalues alone, in the eigenbasis of all data, takes the basis for known. With few examples
it is not, and intervals come out too narrow. Here each replicate has its own basis. The factors are gathered by fold
and summed; the corrected eigenvalues of all replicates are gathered in one more sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from headwater.core.capture import Accumulator, BatchInfo, Rows
from headwater.core.curvature.moments import Basis, EigenvalueSums, SecondMoments
from headwater.core.layers import Layer


@dataclass(frozen=True)
class Member:
    """An accumulator and the folds it sees, with their numbers or as one."""

    accumulator: SecondMoments | EigenvalueSums
    folds: frozenset[int]
    as_one: bool = True


class ByFold(Accumulator):
    """Accumulators that share a sweep, each over some folds of the data.

    Args:
        members: The accumulators with their folds.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)

    def empty(self) -> "ByFold":
        return ByFold([replace(m, accumulator=m.accumulator.empty()) for m in self.members])

    def update(self, rows: Rows) -> None:
        whole = replace(rows, batch=replace(rows.batch, fold=0))
        for member in self.members:
            if rows.batch.fold in member.folds:
                member.accumulator.update(whole if member.as_one else rows)

    def end_batch(self, batch: BatchInfo) -> None:
        for member in self.members:
            if batch.fold in member.folds:
                member.accumulator.end_batch(replace(batch, fold=0) if member.as_one else batch)

    def merge(self, other: "ByFold") -> None:
        for mine, theirs in zip(self.members, other.members, strict=True):
            mine.accumulator.merge(theirs.accumulator)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{i}:{name}": tensor
            for i, member in enumerate(self.members)
            for name, tensor in member.accumulator.tensors().items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, member in enumerate(self.members):
            prefix = f"{i}:"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            member.accumulator.load(own)

    def relative_error(self) -> float:
        """That of the whole: of the first member where it sees every fold, else of all together."""
        return self.members[0].accumulator.relative_error()


class MomentsByFold(ByFold):
    """The factors of every fold apart.

    Args:
        layers: The followed layers.
        folds: Number of folds.
        options: Options of `SecondMoments`.
    """

    def __init__(self, layers: Sequence[Layer], folds: int, **options):
        self._new = lambda: SecondMoments(layers, **options)
        super().__init__([Member(self._new(), frozenset([k])) for k in range(folds)])

    def without(self, fold: int | None) -> SecondMoments:
        """The factors of all folds but one; None leaves none out."""
        total = self._new()
        for member in self.members:
            if fold not in member.folds:
                total.merge(member.accumulator)  # type: ignore[arg-type]
        return total

    def relative_error(self) -> float:
        return self.without(None).relative_error()


class EigenvaluesByFold(ByFold):
    """Corrected eigenvalues of all data in the first basis, by fold, and of all but fold k in basis k + 1.

    Args:
        layers: The followed layers.
        bases: The eigenbases, of all data and then without each fold.
        folds: Number of folds.
    """

    def __init__(self, layers: Sequence[Layer], bases: Sequence[dict[str, Basis]], folds: int):
        every = frozenset(range(folds))
        self.eigenvalues = [EigenvalueSums(layers, bases[0], folds=folds)]
        self.eigenvalues += [EigenvalueSums(layers, b) for b in bases[1:]]
        whole, *rest = self.eigenvalues
        seen = [Member(sums, every - {k}) for k, sums in enumerate(rest)]
        super().__init__([Member(whole, every, as_one=False), *seen])


def affordable(layers: Sequence[Layer], folds: int, limit: int = 300_000_000) -> bool:
    """Whether one more eigenbasis and spectrum for each fold fit into about a gigabyte."""
    numbers = sum(layer.numel + layer.shape[1] ** 2 + layer.shape[2] ** 2 for layer in layers)
    return folds > 1 and numbers * (folds + 1) <= limit
