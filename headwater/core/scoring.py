"""Inner products of prepared queries with the gradients of training examples, streamed."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Accumulator, BatchInfo, Rows
from headwater.core.curvature.base import Preconditioned
from headwater.core.gradients import Factored, squared_norms
from headwater.numerics import kronecker


class PairScores(Accumulator):
    """Inner products (query, train), optionally by layer.

    Args:
        queries: Preconditioned queries.
        n: Number of training examples.
        by_layer: Also keep the part of each layer, (layer, query, train).
        layers: Names of the layers, for `by_layer`.
    """

    def __init__(self, queries: Preconditioned, n: int, *, by_layer: Iterable[str] = ()):
        self.queries = queries
        self.scores = torch.zeros(queries.n, n, dtype=torch.float64)
        self.by_layer = {name: torch.zeros(queries.n, n) for name in by_layer}

    def update(self, rows: Rows) -> None:
        part = self.queries.layer(rows.layer.name, Factored(rows.a, rows.g)).double().cpu()
        self.scores[:, rows.batch.indices] += part
        if rows.layer.name in self.by_layer:
            self.by_layer[rows.layer.name][:, rows.batch.indices] += part.float()

    def end_batch(self, batch: BatchInfo) -> None:
        rest = self.queries.finish_batch()
        if rest is not None:
            self.scores[:, batch.indices] += rest.double().cpu()

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


class TokenScores(Accumulator):
    """The parts of inner products carried by each position: (query, train, pos), for layers whose positions agree.

    A position's part is the sum over layers of $g_t^\\top M a_t$; layers without positions of their own (gains of
    norms, pooled heads) are gathered in `elsewhere`.

    Args:
        queries: Preconditioned queries.
        n: Number of training examples.
        width: Most positions of any example.
    """

    def __init__(self, queries: Preconditioned, n: int, width: int):
        self.queries = queries.dense()
        self.scores = torch.zeros(queries.n, n, width)
        self.elsewhere = torch.zeros(queries.n, n)
        self.width = width

    def update(self, rows: Rows) -> None:
        block = self.queries.blocks[rows.layer.name]
        a, g = rows.a, rows.g
        if isinstance(block, Factored):
            block = block.dense()
        index = rows.batch.indices
        if a.ndim != 3 or rows.pos == 1 or rows.pos > self.width:
            total = block.flatten(1) @ Factored(a, g).dense().flatten(1).mT
            self.elsewhere[:, index] += total.float().cpu()
            return
        for q, matrix in enumerate(block):
            part = ((a @ matrix.mT) * g).sum(-1)
            self.scores[q, index, : rows.pos] += part.float().cpu()

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

    def __init__(self, bases: dict, factors: dict[str, Tensor], n: int):
        self.bases, self.factors = bases, factors
        self.scores = torch.zeros(n, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        name, a, g = rows.layer.name, rows.a, rows.g
        Q_A, Q_G = (None if q is None else q.to(a) for q in self.bases[name])
        factor = self.factors[name].to(a)
        if rows.pos == 1:
            g2 = kronecker.rotate(g, Q_G).squeeze(-2).square()
            part = ((g2 @ factor) * kronecker.rotate(a, Q_A).squeeze(-2).square()).sum(-1)
        else:
            part = self._summed(a, g, Q_A, Q_G, factor)
        part = part if part.ndim == 1 else part.sum(0)
        self.scores.index_add_(0, rows.batch.indices, part.double().cpu())

    @staticmethod
    def _summed(a: Tensor, g: Tensor, Q_A, Q_G, factor: Tensor) -> Tensor:
        d_in, d_out, pos = a.shape[-1], g.shape[-1], a.shape[-2]
        if pos * (d_in**2 + d_out**2) <= d_in * d_out * (d_in + d_out):
            rotated = kronecker.gradient(kronecker.rotate(a, Q_A), kronecker.rotate(g, Q_G))
        else:
            matrices = kronecker.gradient(a, g).movedim(-3, 0)
            rotated = kronecker.change_basis(matrices, Q_A, Q_G).movedim(0, -3)
        return (rotated.square_() * factor[..., None, :, :]).sum((-1, -2))

    def merge(self, other: "SelfScores") -> None:
        self.scores += other.scores

    def finish(self) -> Float[Tensor, " train"]:
        return self.scores

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores = tensors["scores"]


class Norms(Accumulator):
    """Squared norms of the examples' gradients over all layers."""

    def __init__(self, n: int):
        self.squares = torch.zeros(n, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        part = squared_norms(Factored(rows.a, rows.g)).double().cpu()
        self.squares.index_add_(0, rows.batch.indices, part)

    def merge(self, other: "Norms") -> None:
        self.squares += other.squares

    def finish(self) -> Float[Tensor, " train"]:
        return self.squares.sqrt()

    def tensors(self) -> dict[str, Tensor]:
        return {"squares": self.squares}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.squares = tensors["squares"]
