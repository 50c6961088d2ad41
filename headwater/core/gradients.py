r"""Per-example gradients of the followed layers: the currency between curvature and scores.

A layer's gradients are held dense, (n, \*block), or factored as $\sum_t g_t a_t^\top$, whichever is smaller. Low-rank
queries and combinations of other gradients have the same form.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from headwater.core.capture import Accumulator, Kept, Rows
from headwater.core.layers import Layer
from headwater.numerics import kronecker

_CHUNK = 1 << 25  # numbers held at a time by intermediate products
_WRITE = 8  # writing and reading a number takes about as long as this many multiplications


@dataclass(frozen=True)
class Factored:
    r"""Gradients of n examples, $\sum_t g_t a_t^\top$ each; groups, if any, are the first axis.

    Attributes:
        a: (n, pos, in).
        g: (n, pos, out).
    """

    a: Tensor
    g: Tensor

    def __len__(self) -> int:
        return self.a.shape[-3]

    @property
    def pos(self) -> int:
        return self.a.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the numbers."""
        return self.a.dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.a.device

    def to(self, dtype: torch.dtype) -> "Factored":
        """The same gradients in another precision."""
        return self if dtype == self.dtype else Factored(self.a.to(dtype), self.g.to(dtype))

    @property
    def matrix_numel(self) -> int:
        return self.a.shape[-1] * self.g.shape[-1]

    def dense(self) -> Tensor:
        return kronecker.gradient(self.a, self.g).movedim(-3, 0)

    def __getitem__(self, index) -> "Factored":
        return Factored(self.a[..., index, :, :], self.g[..., index, :, :])


Block = Tensor | Factored


def dense(block: Block) -> Tensor:
    """The gradients (n, *block) themselves."""
    return block.dense() if isinstance(block, Factored) else block


def inner(x: Block, y: Block) -> Float[Tensor, "n m"]:
    """Inner products of all pairs of gradients of one layer, in the cheapest order of contraction.

    Of bfloat16 and float32 the products are bfloat16 and their sums float32; otherwise the wider type serves.
    """
    x, y = _alike(x, y)
    if isinstance(x, Factored) and isinstance(y, Factored):
        pairs = len(x) * len(y)
        by_gram = pairs * x.pos * y.pos * (x.a.shape[-1] + x.g.shape[-1])
        by_dense = (pairs + len(x) * x.pos + len(y) * y.pos) * x.matrix_numel
        return _inner_gram(x, y) if by_gram <= by_dense else _inner_half(x.dense(), y)
    if isinstance(x, Factored):
        return _inner_half(dense(y), x).mT
    if isinstance(y, Factored):
        return _inner_half(x, y)
    return _products(x, y)


def _alike(x: Block, y: Block) -> tuple[Block, Block]:
    """Both in the precision of their product; whole matrices stay wide, since reading them is what they cost."""
    if {x.dtype, y.dtype} == {torch.bfloat16, torch.float32}:
        x, y = (b.to(torch.bfloat16) if isinstance(b, Factored) else b.float() for b in (x, y))
        return x, y
    wide = torch.promote_types(x.dtype, y.dtype)
    return x.to(wide), y.to(wide)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of whole gradients, in float32 at least."""
    common = torch.promote_types(kronecker.sum_dtype(x), y.dtype)
    return x.to(common).flatten(1) @ y.to(common).flatten(1).mT


def _inner_gram(x: Factored, y: Factored) -> Tensor:
    """Sum over positions of (a_t · a_s)(g_t · g_s)."""
    n, m, wide = len(x), len(y), kronecker.sum_dtype(x.a)
    total = x.a.new_zeros(n, m, dtype=wide)
    step = max(1, _CHUNK // (m * x.pos * y.pos))
    for start in range(0, n, step):
        part = x[start : start + step]
        gram = (part.a.flatten(-3, -2) @ y.a.flatten(-3, -2).mT).to(wide)
        gram = gram * (part.g.flatten(-3, -2) @ y.g.flatten(-3, -2).mT)
        if gram.ndim == 3:
            gram = gram.sum(0)
        if x.pos * y.pos > 1:
            gram = gram.unflatten(1, (m, y.pos)).sum(2).unflatten(0, (-1, x.pos)).sum(1)
        total[start : start + step] = gram
    return total


def _inner_half(x: Tensor, y: Factored) -> Tensor:
    """Dense x (n, *block) with factored y: contract the longer side of y first, or form y's gradients.

    Both take n · out · in multiplications for each y and position, or for each y; what decides is how many numbers
    are written in between: n · pos times the shorter side, or a whole gradient.
    """
    n, m, pos, sides = len(x), len(y), y.pos, sorted(x.shape[-2:])
    by_sides = n * pos * (1 + _WRITE / sides[1])
    if x.ndim > 3 or by_sides > n + pos + _WRITE:
        step = max(1, _CHUNK // x[0].numel())
        return torch.cat([_products(x, y[s : s + step].dense()) for s in range(0, m, step)], dim=1)
    long, short, weights = (y.a, y.g, x.mT) if y.a.shape[-1] >= y.g.shape[-1] else (y.g, y.a, x)
    long, short = long.flatten(0, 1), short.flatten(0, 1)
    rows = [
        (long @ matrix.to(long)).mul_(short).sum(-1, dtype=kronecker.sum_dtype(long))
        for matrix in weights
    ]
    return torch.stack(rows).view(n, m, pos).sum(-1)


def combined(block: Block, weights: Float[Tensor, "k n"]) -> Float[Tensor, "k ..."]:
    """Linear combinations of one layer's gradients, dense; factored ones are never formed one by one."""
    if not isinstance(block, Factored):
        return torch.tensordot(weights.to(block), block, dims=1)
    a, g = block.a.flatten(-3, -2), block.g.flatten(-3, -2)
    each = weights.to(a).repeat_interleave(block.pos, dim=1)[..., None]
    return torch.stack([(g * w).mT @ a for w in each])


class Gradients:
    """Gradients of n examples for several layers.

    Args:
        blocks: For each layer the gradients, dense or factored.
    """

    def __init__(self, blocks: dict[str, Block]):
        if not blocks:
            raise ValueError("Gradients need at least one layer.")
        self.blocks = blocks
        self.n = len(next(iter(blocks.values())))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> "Gradients":
        return Gradients({name: block[index] for name, block in self.blocks.items()})

    def dense(self) -> "Gradients":
        """The same gradients, none factored."""
        return Gradients({name: dense(block) for name, block in self.blocks.items()})

    def inner(self, other: "Gradients") -> Float[Tensor, "n m"]:
        """Inner products of all pairs, summed over layers."""
        total = torch.zeros(())
        for name, block in self.blocks.items():
            total = total + inner(block, other.blocks[name]).double()
        return total

    def norms(self) -> Float[Tensor, " n"]:
        """Euclidean norms over all layers."""
        squares = torch.zeros(self.n, dtype=torch.float64)
        for block in self.blocks.values():
            squares += squared_norms(block).double().cpu()
        return squares.sqrt()

    def combine(self, weights: Float[Tensor, "k n"]) -> "Gradients":
        """Linear combinations of the gradients, dense: groups of queries, and contrasts."""
        return Gradients({name: combined(block, weights) for name, block in self.blocks.items()})

    def to_matrix(self) -> Float[Tensor, "n p"]:
        """All layers flattened side by side."""
        return torch.cat([dense(block).flatten(1) for block in self.blocks.values()], dim=1)

    def from_matrix(self, matrix: Float[Tensor, "n p"]) -> "Gradients":
        """Inverse of `to_matrix`, with this object's layers and shapes."""
        sizes = [dense(block[:1]).shape[1:] for block in self.blocks.values()]
        parts = matrix.split([s.numel() for s in sizes], dim=1)
        return Gradients(
            {
                name: part.reshape(-1, *size)
                for name, part, size in zip(self.blocks, parts, sizes, strict=True)
            }
        )

    def low_rank(self, rank: int) -> "Gradients":
        """The best approximation of each matrix by `rank` outer products, held factored."""
        return Gradients(
            {name: _low_rank(dense(block), rank) for name, block in self.blocks.items()}
        )


def squared_norms(block: Block) -> Float[Tensor, " n"]:
    """Squared Euclidean norms of one layer's gradients, in the cheapest order of contraction."""
    if not isinstance(block, Factored):
        return block.flatten(1).square().sum(1)
    a, g, pos = block.a, block.g, block.pos
    if pos == 1:
        each = a.square().sum((-1, -2)) * g.square().sum((-1, -2))
    elif pos * (a.shape[-1] + g.shape[-1]) <= block.matrix_numel:
        each = ((a @ a.mT) * (g @ g.mT)).sum((-1, -2))
    else:
        step = max(1, _CHUNK // block.matrix_numel)
        parts = [block[s : s + step].dense().flatten(1) for s in range(0, len(block), step)]
        return torch.cat([part.square().sum(1) for part in parts])
    return each if each.ndim == 1 else each.sum(0)


def _low_rank(x: Tensor, rank: int) -> Block:
    if x.ndim != 3 or rank * (x.shape[1] + x.shape[2]) >= x.shape[1] * x.shape[2]:
        return x
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    return Factored(vh, (u * s[..., None, :]).mT)


class CollectGradients(Accumulator):
    """Keeps the gradient of every row, scaled by the root of its weight: queries, and the rows of a Fisher.

    Each is kept dense or factored, whichever is smaller, in float32 at least.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(self, layers: Iterable[Layer], *, factored: bool = True):
        self._parts: dict[str, list[Block]] = {layer.name: [] for layer in layers}
        self._indices: list[Tensor] = []
        self._folds: list[Tensor] = []
        self._factored = factored

    def update(self, rows: Rows) -> None:
        wide = kronecker.sum_dtype(rows.a)
        a, g = rows.a.to(wide), rows.g.to(wide)
        if rows.batch.weights is not None:
            g = g * rows.batch.weights.to(g).sqrt()[:, None, None]
        block = Factored(a, g)
        smaller = rows.pos * (a.shape[-1] + g.shape[-1]) < block.matrix_numel or rows.pos == 1
        keep = Factored(a.clone(), g.clone()) if self._factored and smaller else block.dense()
        self._parts[rows.layer.name].append(keep)

    def end_batch(self, batch) -> None:
        self._indices.append(batch.indices)
        self._folds.append(torch.full_like(batch.indices, batch.fold))

    def forget(self, indices: Tensor) -> bool:
        keep = [k for k, i in enumerate(self._indices) if not bool(torch.isin(i, indices).any())]
        for name, parts in self._parts.items():  # of an unfinished batch some layers have one more
            self._parts[name] = [parts[k] for k in keep]
        self._indices, self._folds = ([x[k] for k in keep] for x in (self._indices, self._folds))
        return True

    def merge(self, other: "CollectGradients") -> None:
        for name, parts in other._parts.items():
            self._parts[name].extend(parts)
        self._indices.extend(other._indices)
        self._folds.extend(other._folds)

    def tensors(self) -> dict[str, Tensor]:
        state = {"indices": _cat(self._indices), "folds": _cat(self._folds)}
        for name, parts in self._parts.items():
            block = _joined(parts) if parts else None
            if isinstance(block, Factored):
                state |= {f"a:{name}": block.a, f"g:{name}": block.g}
            elif block is not None:
                state[f"d:{name}"] = block
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._indices, self._folds = [tensors["indices"]], [tensors["folds"]]
        for name in self._parts:
            if f"d:{name}" in tensors:
                self._parts[name] = [tensors[f"d:{name}"]]
            elif f"a:{name}" in tensors:
                self._parts[name] = [Factored(tensors[f"a:{name}"], tensors[f"g:{name}"])]

    @property
    def n_rows(self) -> int:
        return sum(len(i) for i in self._indices)

    def finish(self) -> tuple[Gradients, Tensor, Tensor]:
        """The gradients, the example of each row, and its fold, in the order of the examples."""
        indices, folds = _cat(self._indices), _cat(self._folds)
        order = torch.argsort(indices, stable=True)
        blocks = {name: _joined(parts)[order] for name, parts in self._parts.items()}
        return Gradients(blocks), indices[order], folds[order]


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _joined(parts: list[Block]) -> Block:
    """Parts one after the other; factored ones get positions of zeros up to the longest."""
    factored = [p for p in parts if isinstance(p, Factored)]
    if len(factored) < len(parts):
        return torch.cat([dense(p).to(parts[-1].device) for p in parts])
    pos = max(p.pos for p in factored)
    a, g = (
        torch.cat(
            [pad(getattr(p, side).to(parts[-1].device), (0, 0, 0, pos - p.pos)) for p in factored],
            dim=-3,
        )
        for side in "ag"
    )
    return Factored(a, g)
