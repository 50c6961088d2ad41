r"""Projected per-example gradients: what is left of a gradient when it is written down as a few numbers.

Two-sided projection (LoGra; Choe et al. 2024, "What is Your Data Worth to GPT?", arXiv:2405.13954) never forms a
gradient: with $G = \sum_t g_t a_t^\top$,

$$P_\text{out}\, G\, P_\text{in}^\top = \sum_t (P_\text{out}\, g_t)(P_\text{in}\, a_t)^\top .$$

The matrices are random and made again from their seed, or orthonormal ones such as the eigenvectors of a curvature.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import (
    Accumulator,
    BatchPlan,
    Capture,
    Kept,
    Progress,
    Rows,
    sweep,
)
from headwater.core.examples import Examples
from headwater.core.gradients import Block, Factored, Gradients
from headwater.core.layers import Layer
from headwater.core.target import Target
from headwater.numerics import kronecker, noise
from headwater.numerics.projection import Kind, project, random_matrix

Sides = tuple[Tensor | None, Tensor | None]
Transform = Callable[[Layer, Block], Block]
TOGETHER = "all layers"
_CHUNK = 1 << 24  # numbers of whole gradients held at a time


class Projection(ABC):
    """Turns the gradients of a layer into rows of a few numbers.

    Attributes:
        together: Whether the rows of all layers have one width and add up to one.
    """

    together: bool = False

    @abstractmethod
    def width(self, layer: Layer) -> int:
        """How many numbers are kept of a layer's gradient."""

    @abstractmethod
    def __call__(self, layer: Layer, block: Block) -> Float[Tensor, "n k"]:
        """Projected gradients of one layer."""

    def clear(self) -> None:  # noqa: B027
        """Forget what belongs to one batch."""


class TwoSided(Projection):
    """A projection of each side of a gradient (LoGra).

    A side that is not longer than its rank is kept whole, so a large rank loses nothing. Layers that read the same
    tensor share its projection.

    Args:
        rank: Numbers kept on each side.
        ranks: (out, in) of single layers, by name.
        seed: Seed of the random matrices.
        kind: "rademacher" or "gaussian".
        sides: (P_out, P_in) of some layers, rows orthonormal, such as leading eigenvectors; None is the identity. The
            others get random ones.
    """

    def __init__(
        self,
        rank: int = 16,
        *,
        ranks: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
        kind: Kind = "rademacher",
        sides: Mapping[str, Sides] | None = None,
    ):
        for name, pair in {"rank": (rank, rank), **(ranks or {})}.items():
            if min(pair) < 1:
                raise ValueError(f"A projection keeps 1 or more numbers a side; {name} is {pair}.")
        self.rank, self.ranks, self.seed = rank, dict(ranks or {}), seed
        self.kind: Kind = kind
        self.given = dict(sides or {})
        self._made: dict[tuple[str, int, int, int], Tensor] = {}
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    def width(self, layer: Layer) -> int:
        out, in_ = self.kept(layer)
        return layer.shape[0] * out * in_

    def kept(self, layer: Layer) -> tuple[int, int]:
        """Numbers kept on each side of a layer."""
        if layer.name in self.given:
            sizes = zip(self.given[layer.name], layer.shape[1:], strict=True)
            return tuple(d if p is None else p.shape[-2] for p, d in sizes)  # type: ignore[return-value]
        out, in_ = self.ranks.get(layer.name, (self.rank, self.rank))
        return min(out, layer.shape[1]), min(in_, layer.shape[2])

    def sides(self, layer: Layer) -> Sides:
        """(P_out, P_in) of a layer, (groups?, kept, whole) each; None is the identity."""
        if layer.name in self.given:
            return self.given[layer.name]
        kept, (groups, *whole) = self.kept(layer), layer.shape
        names = (f"out:{layer.name}", f"in:{layer.input_group}")
        out, in_ = (
            None if k == d else self._random(name, groups, k, d)
            for name, k, d in zip(names, kept, whole, strict=True)
        )
        return out, in_

    def _random(self, name: str, groups: int, kept: int, whole: int) -> Tensor:
        shape = (name, groups, kept, whole)
        if shape not in self._made:
            key = int(noise.keys([name])[0])
            P = random_matrix(groups * kept, range(whole), seed=self.seed, key=key, kind=self.kind)
            P = P / kept**0.5
            self._made[shape] = P if groups == 1 else P.unflatten(0, (groups, kept))
        return self._made[shape]

    def __call__(self, layer: Layer, block: Block) -> Float[Tensor, "n k"]:
        P_out, P_in = self.sides(layer)
        if not isinstance(block, Factored):
            out, in_ = (None if p is None else p.to(block).mT for p in (P_out, P_in))
            return kronecker.change_basis(block, in_, out).flatten(1)
        g = kronecker.rotate(block.g, None if P_out is None else P_out.to(block.g).mT)
        return kronecker.gradient(self._read(block.a, P_in), g).movedim(-3, 0).flatten(1)

    def _read(self, a: Tensor, P_in: Tensor | None) -> Tensor:
        """The projected input, made once for layers that read the same tensor one after the other."""
        if self._last is None or self._last[0] is not a or self._last[1] is not P_in:
            self._last = a, P_in, kronecker.rotate(a, None if P_in is None else P_in.to(a).mT)
        return self._last[2]

    def clear(self) -> None:
        self._last = None


class Joint(Projection):
    """One random matrix over the parameters of all layers, as in TRAK; a block of it exists at a time.

    Costs `dim` products for each parameter and example. `TwoSided` is far cheaper.

    Args:
        dim: Numbers kept of the whole gradient.
        seed: Seed of the random matrix.
        kind: "rademacher" or "gaussian".
    """

    together = True

    def __init__(self, dim: int, *, seed: int = 0, kind: Kind = "rademacher"):
        if dim < 1:
            raise ValueError(f"A projection keeps 1 or more numbers; dim is {dim}.")
        self.dim, self.seed = dim, seed
        self.kind: Kind = kind

    def width(self, layer: Layer) -> int:
        return self.dim

    def __call__(self, layer: Layer, block: Block) -> Float[Tensor, "n k"]:
        key = int(noise.keys([layer.name])[0])
        if isinstance(block, Factored) and block.a.ndim > 3:
            block = block.dense()
        inside = prod(layer.block) // layer.block[0]
        step, total = max(1, _CHUNK // (len(block) * inside)), 0.0
        for start in range(0, layer.block[0], step):
            rows = slice(start, start + step)
            if isinstance(block, Factored):
                part = kronecker.gradient(block.a, block.g[..., rows])
            else:
                part = block[:, rows]
            total = total + project(
                part.flatten(1),
                self.dim,
                seed=self.seed,
                key=key,
                kind=self.kind,
                start=start * inside,
            )
        return total  # type: ignore[return-value]


class ProjectGradients(Accumulator):
    """The projected gradient of each example, layer by layer; full gradients are not formed.

    Args:
        layers: The followed layers.
        projection: What is kept of them.
        n: Number of examples.
        transform: Applied to a layer's gradients before they are projected.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(
        self,
        layers: Iterable[Layer],
        projection: Projection,
        n: int,
        *,
        transform: Transform | None = None,
    ):
        self.layers, self.projection, self.n = list(layers), projection, n
        self.transform = transform
        self._rows: dict[str, Tensor] = {}

    def update(self, rows: Rows) -> None:
        wide = torch.promote_types(rows.a.dtype, torch.float32)
        block = Factored(rows.a, rows.g).to(wide)
        part = self._project(rows.layer, block).cpu()
        name = TOGETHER if self.projection.together else rows.layer.name
        if name not in self._rows:
            self._rows[name] = part.new_zeros(self.n, part.shape[1])
        self._rows[name].index_add_(0, rows.batch.indices, part)

    def _project(self, layer: Layer, block: Factored) -> Tensor:
        if self.transform is None:
            return self.projection(layer, block)
        step = max(1, _CHUNK // layer.numel)  # a transformation may form whole gradients
        parts = (self.transform(layer, block[s : s + step]) for s in range(0, len(block), step))
        return torch.cat([self.projection(layer, part) for part in parts])

    def end_batch(self, batch) -> None:
        self.projection.clear()

    def forget(self, indices: Tensor) -> bool:
        self.projection.clear()
        for rows in self._rows.values():
            rows[indices] = 0
        return True

    def merge(self, other: "ProjectGradients") -> None:
        for name, rows in other._rows.items():
            self._rows[name] = self._rows[name] + rows if name in self._rows else rows

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._rows)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._rows = dict(tensors)

    def finish(self) -> dict[str, Float[Tensor, "n k"]]:
        """Rows of each layer, in the order of the layers, or of all layers together."""
        if self.projection.together:
            return self._rows
        return {layer.name: self._rows[layer.name] for layer in self.layers}


def project_examples(
    capture: Capture,
    examples: Examples,
    projection: Projection,
    target: Target,
    *,
    batches: Sequence[BatchPlan],
    transform: Transform | None = None,
    progress: Progress | None = None,
    note: str = "projected gradients",
) -> dict[str, Float[Tensor, "n k"]]:
    """Projected gradients of a dataset, in one sweep: rows of each layer, or of all layers together."""
    layers = capture.layers.values()
    found = ProjectGradients(layers, projection, len(examples), transform=transform)
    options = {"batches": batches, "progress": progress, "note": note}
    sweep(capture, examples, [found], target, **options)
    return found.finish()


def project_gradients(
    gradients: Gradients,
    layers: Iterable[Layer],
    projection: Projection,
    *,
    transform: Transform | None = None,
) -> dict[str, Float[Tensor, "n k"]]:
    """What `ProjectGradients` keeps, of gradients that are already at hand: queries, and groups of them."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        block = gradients.blocks[layer.name]
        block = block if transform is None else transform(layer, block)
        part = projection(layer, block).cpu()
        if projection.together:
            found[TOGETHER] = found[TOGETHER] + part if found else part
        else:
            found[layer.name] = part
    projection.clear()
    return found
