"""Inner products of prepared queries with the gradients of training examples, streamed."""

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.core.capture import Accumulator, BatchInfo, Kept, Rows
from headwater.core.curvature.base import Curvature, Preconditioned, SpectralFunction
from headwater.core.curvature.layerwise import Layerwise
from headwater.core.curvature.moments import Basis, SharedRotation, rotates_first
from headwater.core.curvature.prepared import in_basis
from headwater.core.damping import mean_of
from headwater.core.gradients import (
    CollectGradients,
    Factored,
    Gradients,
    dense,
    inner,
    squared_norms,
)
from headwater.core.layers import Layer
from headwater.numerics import kronecker

_CHUNK = 1 << 25  # numbers of gradients held at a time


class _Products(Accumulator):
    """Inner products (query, row) of a batch, summed over layers, then handed to `_store`.

    Args:
        queries: Preconditioned queries.
        by_layer: Names of layers whose part is handed to `_store_layer` as well.
    """

    def __init__(self, queries: Preconditioned, by_layer: Iterable[str] = ()):
        self.layers = list(by_layer)
        apart = queries.layers_add_up or not self.layers
        self.queries = queries if apart else Preconditioned(queries.dense())
        self._batch: Tensor | None = None

    def update(self, rows: Rows) -> None:
        part = self.queries.layer(rows.layer.name, Factored(rows.a, rows.g)).double()
        self._batch = part if self._batch is None else self._batch.add_(part)
        if rows.layer.name in self.layers:
            self._store_layer(rows.layer.name, part.cpu(), rows.batch.indices)

    def end_batch(self, batch: BatchInfo) -> None:
        total, rest, self._batch = self._batch, self.queries.finish_batch(), None
        if total is not None:
            scores = (total if rest is None else total + rest).cpu()
            _check_finite(scores, batch)
            self._store(scores, batch.indices)

    def abandon(self) -> None:
        """Forget the parts of an unfinished batch."""
        self._batch = None
        self.queries.finish_batch()

    @abstractmethod
    def _store(self, scores: Float[Tensor, "query row"], index: Tensor) -> None:
        """Take the products of a batch; `index` names the examples."""

    @abstractmethod
    def _store_layer(self, name: str, part: Float[Tensor, "query row"], index: Tensor) -> None:
        """Take one layer's part of them."""


def _check_finite(scores: Float[Tensor, "query row"], batch: BatchInfo) -> None:
    """Refuse products that no ranking can be made of; what is wrong is a gradient, as losses were checked."""
    broken = (~scores.isfinite()).nonzero()
    if not len(broken):
        return
    query, row = broken[0].tolist()
    number = int(batch.indices[row])
    name = f"number {number}" if batch.ids is None else repr(batch.ids[number])
    raise FloatingPointError(
        f"The gradients of example {name} and of query {query} have the product {scores[query, row].item()}; look at "
        "both, or load the model with dtype='float32' if its weights are in half precision."
    )


class PairScores(_Products):
    """Inner products (query, train), optionally by layer.

    Args:
        queries: Preconditioned queries.
        n: Number of training examples.
        by_layer: Names of layers whose part is kept as well, (query, train) each.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(self, queries: Preconditioned, n: int, *, by_layer: Iterable[str] = ()):
        super().__init__(queries, by_layer)
        self.scores = torch.zeros(queries.n, n, dtype=torch.float64)
        self.by_layer = {name: torch.zeros(queries.n, n) for name in self.layers}

    def _store(self, scores: Tensor, index: Tensor) -> None:
        self.scores[:, index] = scores

    def _store_layer(self, name: str, part: Tensor, index: Tensor) -> None:
        self.by_layer[name][:, index] = part.float()

    def forget(self, indices: Tensor) -> bool:
        self.abandon()
        for scores in (self.scores, *self.by_layer.values()):
            scores[:, indices] = 0
        return True

    def merge(self, other: "PairScores") -> None:
        self.scores += other.scores
        for name, part in other.by_layer.items():
            self.by_layer[name] += part

    def finish(self) -> Float[Tensor, "query train"]:
        return self.scores

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores} | {f"l:{k}": v for k, v in self.by_layer.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores = tensors["scores"]
        self.by_layer = {k: tensors[f"l:{k}"] for k in self.by_layer}


class Strongest:
    r"""The k largest and the k smallest scores of each query while they stream by, and totals by group.

    Memory is of the order of queries times (k + groups), however many scores there are.

    Args:
        n_queries: Number of queries.
        keep: k.
        groups: Group of each example (train), or None for one group.

    Attributes:
        totals: Sums of what is positive and of what is negative (2, query, group).
        ends: The largest and the smallest, (query, kept) each, the strongest first.
        index: The examples they belong to.
    """

    def __init__(self, n_queries: int, keep: int, groups: Int[Tensor, " train"] | None = None):
        n_groups = 1 if groups is None else int(groups.max()) + 1
        self.keep, self.groups = keep, groups
        zeros = partial(torch.zeros, dtype=torch.float64)
        self.totals = zeros(2, n_queries, n_groups)
        self.ends = [zeros(n_queries, 0) for _ in range(2)]
        self.index = [torch.zeros(n_queries, 0, dtype=torch.int64) for _ in range(2)]

    def add(self, scores: Float[Tensor, "query row"], index: Int[Tensor, " row"]) -> None:
        """Take scores of some examples, named by `index`."""
        sides = (scores.clamp(min=0), scores.clamp(max=0))
        for total, part in zip(self.totals, sides, strict=True):
            if self.groups is None:
                total += part.sum(1, keepdim=True, dtype=torch.float64)
            else:
                total.index_add_(1, self.groups[index], part.double())
        whole = index.expand(len(scores), -1)
        for side in range(2):
            self._keep(side, scores, whole)

    def _keep(self, side: int, scores: Tensor, index: Tensor) -> None:
        if self.ends[side].shape[1] == self.keep > 0:  # most cannot be among the strongest any more
            last = self.ends[side][:, -1:]
            worse = scores <= last if side == 0 else scores >= last
            some = ~worse.all(0)
            scores, index = scores[:, some], index[:, some]
        scores = torch.cat([self.ends[side], scores.double()], dim=1)
        index = torch.cat([self.index[side], index], dim=1)
        k = min(self.keep, scores.shape[1])
        self.ends[side], place = scores.topk(k, dim=1, largest=side == 0)
        self.index[side] = index.gather(1, place)

    def merge(self, other: "Strongest") -> None:
        """Add what another one saw of other examples."""
        self.totals += other.totals
        for side in range(2):
            self._keep(side, other.ends[side], other.index[side])

    def kept(self) -> Int[Tensor, " kept"]:
        """Numbers of all examples that are among the ends of any query, ascending."""
        return torch.cat(self.index, dim=1).unique()

    def tensors(self) -> dict[str, Tensor]:
        """The state, to go on after an interruption."""
        state = {"totals": self.totals}
        state |= {f"v{i}": v for i, v in enumerate(self.ends)}
        return state | {f"i{i}": v for i, v in enumerate(self.index)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore `tensors()`."""
        self.totals = tensors["totals"]
        self.ends = [tensors[f"v{i}"] for i in range(2)]
        self.index = [tensors[f"i{i}"] for i in range(2)]


class StrongestScores(_Products):
    r"""The strongest inner products of each query while they stream by (see `Strongest`), and totals.

    Memory is of the order of queries times (k + groups + layers), however many examples there are.

    Args:
        queries: Preconditioned queries.
        keep: How many are kept on each side.
        groups: Group of each example (train), or None for one group.
        by_layer: Names of layers whose absolute parts are totalled.
    """

    def __init__(
        self,
        queries: Preconditioned,
        keep: int,
        *,
        groups: Int[Tensor, " train"] | None = None,
        by_layer: Iterable[str] = (),
    ):
        super().__init__(queries, by_layer)
        self.strongest = Strongest(queries.n, keep, groups)
        self.layer_totals = {
            name: torch.zeros(queries.n, dtype=torch.float64) for name in self.layers
        }

    @property
    def totals(self) -> Float[Tensor, "2 query group"]:
        """Sums of what is positive and of what is negative."""
        return self.strongest.totals

    @property
    def ends(self) -> list[Tensor]:
        """The largest and the smallest, (query, kept) each."""
        return self.strongest.ends

    @property
    def index(self) -> list[Tensor]:
        """The examples they belong to."""
        return self.strongest.index

    def _store(self, scores: Tensor, index: Tensor) -> None:
        self.strongest.add(scores, index)

    def _store_layer(self, name: str, part: Tensor, index: Tensor) -> None:
        self.layer_totals[name] += part.abs().sum(1)

    def merge(self, other: "StrongestScores") -> None:
        self.strongest.merge(other.strongest)
        for name, total in other.layer_totals.items():
            self.layer_totals[name] += total

    def finish(self) -> Int[Tensor, " kept"]:
        """Numbers of all examples that are among the ends of any query, ascending."""
        return self.strongest.kept()

    def tensors(self) -> dict[str, Tensor]:
        return self.strongest.tensors() | {f"l:{k}": v for k, v in self.layer_totals.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.strongest.load(tensors)
        self.layer_totals = {k: tensors[f"l:{k}"] for k in self.layer_totals}


class ReplicateScores(Accumulator):
    r"""Inner products under several functions that share one Kronecker eigenbasis, (replicate, query, train).

    Queries and gradients are rotated once, and each replicate is a product with its factors in between.

    Args:
        queries: The queries' gradients, not preconditioned.
        bases: (Q_A, Q_G) of each layer.
        factors: f of the eigenvalues, (replicate, \*block) for each layer.
        n: Number of training examples.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(
        self, queries: Gradients, bases: dict[str, Basis], factors: dict[str, Tensor], n: int
    ):
        self.rotated = {n: dense(in_basis(b, bases[n])) for n, b in queries.blocks.items()}
        self.bases, self.factors = bases, factors
        n_replicates = len(next(iter(factors.values())))
        self.scores = torch.zeros(n_replicates, len(queries), n, dtype=torch.float64)
        self._shared = SharedRotation()

    def update(self, rows: Rows) -> None:
        name, index = rows.layer.name, rows.batch.indices
        block = in_basis(Factored(rows.a, rows.g), self.bases[name], self._shared)
        queries = self.rotated[name]
        for replicate, factor in enumerate(self.factors[name]):
            part = inner(queries * factor.to(queries), block)
            self.scores[replicate][:, index] += part.double().cpu()

    def end_batch(self, batch: BatchInfo) -> None:
        self._shared.clear()

    def forget(self, indices: Tensor) -> bool:
        self._shared.clear()
        self.scores[..., indices] = 0
        return True

    def merge(self, other: "ReplicateScores") -> None:
        self.scores += other.scores

    def finish(self) -> Float[Tensor, "replicate query train"]:
        return self.scores

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores = tensors["scores"]


class TokenScores(Accumulator):
    r"""The parts of inner products carried by each position: (query, train, pos), for layers whose positions agree.

    A position's part is the sum over layers of $g_t^\top M a_t$; layers without positions of their own (gains of
    norms, pooled heads) are gathered in `elsewhere`.

    Args:
        queries: Preconditioned queries.
        n: Number of training examples.
        width: Most positions of any example.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(self, queries: Preconditioned, n: int, width: int):
        self.queries = queries.dense()
        self.scores = torch.zeros(queries.n, n, width)
        self.elsewhere = torch.zeros(queries.n, n)
        self.width = width

    def update(self, rows: Rows) -> None:
        block, index = self.queries.blocks[rows.layer.name], rows.batch.indices
        if rows.a.ndim != 3 or rows.pos == 1 or rows.pos > self.width:
            self.elsewhere[:, index] += inner(block, Factored(rows.a, rows.g)).float().cpu()
            return
        whole = dense(block)
        a, g = rows.a.to(whole), rows.g.to(whole)
        for q, matrix in enumerate(whole):
            part = ((a @ matrix.mT) * g).sum(-1)
            self.scores[q, index, : rows.pos] += part.float().cpu()

    def forget(self, indices: Tensor) -> bool:
        self.scores[:, indices] = 0
        self.elsewhere[:, indices] = 0
        return True

    def merge(self, other: "TokenScores") -> None:
        self.scores += other.scores
        self.elsewhere += other.elsewhere

    def finish(self) -> Float[Tensor, "query train pos"]:
        return self.scores

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores, "elsewhere": self.elsewhere}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores, self.elsewhere = tensors["scores"], tensors["elsewhere"]


class SelfScores(Accumulator):
    r"""Quadratic forms $g_n^\top f(C)\,g_n$ of each example with itself, for layerwise curvature.

    Args:
        bases: (Q_A, Q_G) of each layer.
        factors: f of the eigenvalues, (out, in) for each layer.
        n: Number of training examples.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(self, bases: dict[str, Basis], factors: dict[str, Tensor], n: int):
        self.bases, self.factors = bases, factors
        self.scores = torch.zeros(n, dtype=torch.float64)
        self._shared = SharedRotation()

    def update(self, rows: Rows) -> None:
        a, g = rows.a, rows.g
        Q_A, Q_G = (None if q is None else q.to(a) for q in self.bases[rows.layer.name])
        factor = self.factors[rows.layer.name].to(a)
        if rotates_first(rows):
            a, g, Q_A, Q_G = self._shared(a, Q_A), kronecker.rotate(g, Q_G), None, None
        if rows.pos == 1:
            a2, g2 = a.squeeze(-2).square(), g.squeeze(-2).square()
            part = ((g2 @ factor) * a2).sum(-1, dtype=kronecker.sum_dtype(a))
        else:
            step = max(1, _CHUNK // rows.layer.numel)
            part = torch.cat(
                [
                    _weighted_squares(
                        a[..., s : s + step, :, :], g[..., s : s + step, :, :], Q_A, Q_G, factor
                    )
                    for s in range(0, a.shape[-3], step)
                ],
                dim=-1,
            )
        part = part if part.ndim == 1 else part.sum(0)
        self.scores.index_add_(0, rows.batch.indices, part.double().cpu())

    def end_batch(self, batch: BatchInfo) -> None:
        self._shared.clear()

    def forget(self, indices: Tensor) -> bool:
        self._shared.clear()
        self.scores[indices] = 0
        return True

    def merge(self, other: "SelfScores") -> None:
        self.scores += other.scores

    def finish(self) -> Float[Tensor, " train"]:
        return self.scores

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores = tensors["scores"]


def _weighted_squares(
    a: Tensor, g: Tensor, Q_A: Tensor | None, Q_G: Tensor | None, factor: Tensor
) -> Tensor:
    """Sum of the squared coordinates of each gradient in a basis, times `factor` (groups, batch)."""
    matrices = kronecker.gradient(a, g).movedim(-3, 0)
    squares = kronecker.change_basis(matrices, Q_A, Q_G).square_()
    return (squares * factor).sum((-1, -2), dtype=kronecker.sum_dtype(a)).movedim(0, -1)


class SelfThrough(Accumulator):
    """Quadratic forms of whole gradients, a batch at a time, for curvature that is not layerwise.

    Args:
        curvature: The curvature C.
        function: f.
        n: Number of examples.
        layers: The followed layers.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(
        self, curvature: Curvature, function: SpectralFunction, n: int, layers: Iterable[Layer]
    ):
        self.curvature, self.function, self.layers = curvature, function, list(layers)
        self.scores = torch.zeros(n, dtype=torch.float64)
        self._batch = CollectGradients(self.layers)

    def update(self, rows) -> None:
        self._batch.update(rows)

    def end_batch(self, batch) -> None:
        self._batch.end_batch(batch)
        gradients, indices, _ = self._batch.finish()
        self.scores[indices] = self.curvature.quadratic(gradients, self.function).cpu()
        self._batch = CollectGradients(self.layers)

    def forget(self, indices: Tensor) -> bool:
        self._batch = CollectGradients(self.layers)
        self.scores[indices] = 0
        return True

    def merge(self, other: "SelfThrough") -> None:
        self.scores += other.scores

    def finish(self) -> Tensor:
        return self.scores

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores = tensors["scores"]


def self_scores(
    curvature: Curvature, function: SpectralFunction, n: int, layers: Iterable[Layer]
) -> SelfScores | SelfThrough:
    r"""Gathers $g_n^\top f(C)\,g_n$ of n examples, in the form that suits the curvature."""
    if not isinstance(curvature, Layerwise):
        return SelfThrough(curvature, function, n, layers)
    factors = {name: function(e, mean_of(e)) for name, e in curvature.eigenvalues.items()}
    return SelfScores(curvature.bases, factors, n)


class Norms(Accumulator):
    """Squared norms of the examples' gradients over all layers."""

    kept: ClassVar[Kept] = "rows"

    def __init__(self, n: int):
        self.squares = torch.zeros(n, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        part = squared_norms(Factored(rows.a, rows.g)).double().cpu()
        self.squares.index_add_(0, rows.batch.indices, part)

    def forget(self, indices: Tensor) -> bool:
        self.squares[indices] = 0
        return True

    def merge(self, other: "Norms") -> None:
        self.squares += other.squares

    def finish(self) -> Float[Tensor, " train"]:
        return self.squares.sqrt()

    def tensors(self) -> dict[str, Tensor]:
        return {"squares": self.squares}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.squares = tensors["squares"]
