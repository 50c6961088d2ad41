r"""What a row of the index is: the coordinates in which an inner product of two rows is an influence.

**Whitened.** In the eigenbasis of a layerwise curvature the damped inverse is diagonal, so with $S = (\Lambda +
\rho)^{-1/2}$ and $\varphi(G) = S \circ (Q_G^\top G\, Q_A)$

$$\nabla_q^\top (C + \rho I)^{-1} \nabla_n = \langle \varphi(\nabla_q), \varphi(\nabla_n) \rangle .$$

A few coordinates are kept. One of the training gradients has the second moment $\lambda / (\lambda + \rho)$ (Choe et
al. 2024, arXiv:2405.13954, lemma 1), so the kept ones are those with the most of it, of all layers together. They make
no rectangle of leading columns: often a few columns of the inputs go with every column of the outputs.

Where influence is spread over far more coordinates than are kept, random mixtures of all may say more than a few
leading ones. With $1 / (\Lambda + \rho) \approx u v^\top$ the whitened gradient is about
$\sqrt u \circ Q_G^\top G\, Q_A \circ \sqrt v^\top$, so that its projection is again two-sided, $P_\text{out} G
P_\text{in}^\top$ with $P_\text{out} = R_\text{out} \operatorname{diag}(\sqrt u)\, Q_G^\top$: as cheap, and right on
average. Which of the two is better depends on the damping, and is measured.

**LoGra.** Both sides are projected at random, or onto leading eigenvectors, and the curvature is the dense second
moment of the projected gradients themselves, $F = \frac1N \sum_n p_n p_n^\top$ for each layer: no Kronecker form is
assumed, and no curvature has to be fitted. Rows are kept as they are and queries are multiplied by $(F + \rho I)^{-1}$.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headwater.core.capture import Capture
from headwater.core.curvature import Layerwise
from headwater.core.curvature.prepared import separable
from headwater.core.damping import Damping, mean_of, parse_damping
from headwater.core.files import ArtifactMismatch
from headwater.core.fingerprint import fingerprint_json, fingerprint_tensors
from headwater.core.fit import Fit
from headwater.core.gradients import Block, Factored
from headwater.core.layers import Layer
from headwater.core.projection import Projection, Sides, TwoSided
from headwater.numerics import kronecker, noise
from headwater.numerics.projection import Kind, random_matrix

Choice = Literal["influence", "eigenvalue"]
How = Literal["auto", "leading", "random"]


def effective(eigenvalues: Float[Tensor, "*block"], damping: float) -> Float[Tensor, "*block"]:
    r"""$\lambda / (\lambda + \rho)$: how much of an influence a coordinate carries on average.

    Example:
        >>> effective(torch.tensor([9.0, 1.0, 0.0]), 1.0).tolist()
        [0.8999999761581421, 0.5, 0.0]
    """
    return eigenvalues / (eigenvalues + damping)


def best_rectangle(
    weight: Float[Tensor, "out in"], k_out: int, k_in: int, *, rounds: int = 10
) -> tuple[Int[Tensor, " k_out"], Int[Tensor, " k_in"]]:
    """Rows and columns that together hold as much of a matrix of weights as possible, the heaviest first.

    Each side in turn takes its best given the other, until neither changes.

    Example:
        >>> best_rectangle(torch.tensor([[1.0, 0.0, 5.0], [0.0, 2.0, 0.0], [2.0, 0.0, 6.0]]), 2, 2)
        (tensor([2, 0]), tensor([2, 0]))
    """
    weight = weight.double()
    rows = torch.arange(weight.shape[0])
    columns = torch.arange(weight.shape[1])
    for _ in range(rounds):
        before = rows, columns
        columns = weight[rows].sum(0).topk(min(k_in, weight.shape[1])).indices
        rows = weight[:, columns].sum(1).topk(min(k_out, weight.shape[0])).indices
        if all(torch.equal(a, b) for a, b in zip(before, (rows, columns), strict=True)):
            break
    return rows, columns


class Space(Projection):
    """The coordinates of an index, all layers side by side in one row.

    Args:
        layers: The followed layers, in the order of the row.
    """

    kind: ClassVar[str]

    def __init__(self, layers: list[Layer]):
        self.layers = layers

    @property
    def widths(self) -> dict[str, int]:
        """Numbers of each layer in a row."""
        return {layer.name: self.width(layer) for layer in self.layers}

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return sum(self.widths.values())

    def shapes(self) -> dict[str, tuple[int, int, int]] | None:
        """(groups, out, in) of each layer's numbers where they are matrices projected on both sides, else None."""
        return None

    def capture(self, fit: Fit) -> Capture:
        """The engine over the layers of which something is kept; the fit is checked as it always is."""
        whole = fit.capture()
        return Capture(whole.model, whole.task, [x for x in self.layers if self.width(x)])

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What the index writes down to make the space again, with its fingerprint."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that the coordinates depend on beside the model's gradients."""
        return self.record()["fingerprint"]


@dataclass(frozen=True)
class Kept:
    """The coordinates that are kept of one layer.

    Attributes:
        out: Columns of the output side (group, kept), or None for all.
        in_: Columns of the input side, likewise.
        chosen: Numbers of the coordinates kept in the block of those columns, or None for all.
    """

    out: Int[Tensor, "group k_out"] | None = None
    in_: Int[Tensor, "group k_in"] | None = None
    chosen: Int[Tensor, " number"] | None = None

    def block(self, x: Shaped[Tensor, "group out in"]) -> Shaped[Tensor, " number"]:
        """The kept numbers of a layer's matrix."""
        block = _chosen(_chosen(x, self.out, -2), self.in_, -1).flatten()
        return block if self.chosen is None else block[self.chosen]

    def record(self) -> list[Any]:
        """What a journal says of it: columns, and stretches of numbers."""
        sides = [None if c is None else c.tolist() for c in (self.out, self.in_)]
        if self.chosen is None:
            return [*sides, None]
        gaps = (self.chosen.diff(prepend=torch.tensor([-2])) != 1).nonzero().flatten()
        ends = torch.cat([gaps[1:] - 1, torch.tensor([len(self.chosen) - 1])])[: len(gaps)]
        pairs = zip(self.chosen[gaps].tolist(), self.chosen[ends].tolist(), strict=True)
        return [*sides, [[a, b + 1] for a, b in pairs]]

    @classmethod
    def of(cls, record: Sequence[Any]) -> "Kept":
        """The inverse of `record`."""
        out, in_, stretches = record
        first, second = (
            None if c is None else torch.tensor(c, dtype=torch.int64) for c in (out, in_)
        )
        numbers = None
        if stretches is not None:
            parts = [torch.arange(a, b) for a, b in stretches]
            numbers = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        return cls(first, second, numbers)


class WhitenedSpace(Space):
    """Coordinates in a curvature's eigenbasis, scaled by the damped inverse root.

    Args:
        layers: The followed layers.
        curvature: Gives bases and eigenvalues.
        damping: Added to the eigenvalues.
        kept: The coordinates that are kept of each layer.
    """

    kind: ClassVar[str] = "whitened"

    def __init__(
        self,
        layers: list[Layer],
        curvature: Layerwise,
        damping: Damping,
        kept: Mapping[str, Kept],
    ):
        super().__init__(layers)
        self.damping, self.kept = damping, dict(kept)
        self._parts: dict[str, Parts] = {}
        self._scales: dict[str, Tensor] = {}
        used: dict[str, Tensor] = {}
        for layer in layers:
            eigenvalues = curvature.eigenvalues[layer.name].reshape(layer.shape)
            rho, mine = damping.absolute(mean_of(eigenvalues)), self.kept[layer.name]
            Q_A, Q_G = curvature.bases[layer.name]
            sides = _side(Q_G, mine.out, layer.shape[0]), _side(Q_A, mine.in_, layer.shape[0])
            block = mine.block(eigenvalues)
            used |= {f"{i}:{layer.name}": s for i, s in enumerate(sides) if s is not None}
            used[f"eigenvalues:{layer.name}"] = block
            self._parts[layer.name] = _parts(layer, mine, curvature.bases[layer.name], sides)
            self._scales[layer.name] = (block.double() + rho).rsqrt().to(block)
        self._digest = fingerprint_tensors((k, v.contiguous()) for k, v in used.items())

    def width(self, layer: Layer) -> int:
        return self._scales[layer.name].numel()

    def record(self) -> dict[str, Any]:
        facts = {
            "kind": self.kind,
            "damping": vars(self.damping),
            "kept": {name: kept.record() for name, kept in self.kept.items()},
        }
        return facts | {"fingerprint": fingerprint_json([facts, self._digest])}

    def __call__(self, layer: Layer, block: Block) -> Float[Tensor, "n k"]:
        scale, parts = self._scales[layer.name], self._parts[layer.name]
        if not len(scale):
            return torch.zeros(len(block), 0, dtype=block.dtype, device=block.device)
        found = [self._products(block, *sides).flatten(1) for sides in parts.sides]
        rows = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        if parts.order is not None:
            rows = rows.index_select(1, parts.order.to(rows.device))
        return rows.mul_(scale.to(rows))

    def _products(
        self, block: Block, out: Tensor | None, in_: Tensor | None
    ) -> Float[Tensor, "n *groups out in"]:
        r"""$P_\text{out}^\top G P_\text{in}$ in the order of contraction that needs the fewest multiplications.

        A side of few columns is projected first and the sum over positions taken; the other side is then projected
        once for each example instead of once for each position.
        """
        if not isinstance(block, Factored):
            return _read(_read(block, in_, 1).mT, out, 1).mT
        a, g, pos = block.a, block.g, block.pos
        both, in_first, out_first = _multiplications(pos, _sizes(out, g), _sizes(in_, a))
        if both <= min(in_first, out_first):
            return kronecker.gradient(_read(a, in_), _read(g, out)).movedim(-3, 0)
        if in_first <= out_first:
            half = kronecker.gradient(g, _read(a, in_))  # (in, whole out) of each example
            return _read(half, out).mT.movedim(-3, 0)
        half = kronecker.gradient(a, _read(g, out))
        return _read(half, in_).movedim(-3, 0)


def _sizes(side: Tensor | None, x: Tensor) -> tuple[int, int, int]:
    """Whole and kept size of a side, and the multiplications that projecting one vector of it takes."""
    whole = x.shape[-1]
    return (whole, whole, 0) if side is None else (whole, side.shape[-1], whole * side.shape[-1])


def _multiplications(
    pos: int, out: tuple[Any, Any, Any], in_: tuple[Any, Any, Any]
) -> tuple[Any, Any, Any]:
    """Multiplications of an example's projection: both sides before the sum over positions, or only one of them.

    Args:
        pos: Positions.
        out: Whole and kept size of the output side, and the multiplications of one vector.
        in_: The same of the input side.
    """
    (d_out, k_out, by_out), (d_in, k_in, by_in) = out, in_
    both = pos * (by_in + by_out + k_in * k_out)
    in_first = pos * (by_in + d_out * k_in) + k_in * by_out
    out_first = pos * (by_out + d_in * k_out) + k_out * by_in
    return both, in_first, out_first


@dataclass(frozen=True)
class Parts:
    """How a layer's kept coordinates are made.

    Attributes:
        sides: Output and input side of each of some rectangles.
        order: Where each coordinate lies among the rectangles' numbers, one rectangle after the other; None where
            they are the coordinates.
    """

    sides: list[Sides]
    order: Int[Tensor, " number"] | None


def _parts(
    layer: Layer, kept: Kept, bases: tuple[Tensor | None, Tensor | None], sides: Sides
) -> Parts:
    """The kept coordinates of a layer in rectangles that take few multiplications."""
    if layer.shape[0] > 1 or kept.chosen is None or not len(kept.chosen):
        return Parts([sides], kept.chosen)
    _, d_out, d_in = layer.shape
    Q_A, Q_G = bases
    number = torch.arange(d_out * d_in).view(1, d_out, d_in)
    mask = torch.zeros(d_out * d_in, dtype=torch.bool)
    mask[kept.block(number)] = True
    pieces = rectangles(mask.view(d_out, d_in))
    if len(pieces) == 1:
        return Parts([sides], kept.chosen)
    place = torch.full((d_out * d_in,), -1)
    found: list[Sides] = []
    n = 0
    for piece in pieces:
        rows, columns = piece.any(1).nonzero().flatten(), piece.any(0).nonzero().flatten()
        at = (rows[:, None] * d_in + columns).flatten()
        mine = piece.flatten()[at]
        place[at[mine]] = n + mine.nonzero().flatten()
        n += len(at)
        found.append((_some(Q_G, rows, d_out), _some(Q_A, columns, d_in)))
    return Parts(found, place[place >= 0])


def _some(basis: Tensor | None, columns: Tensor, whole: int) -> Tensor | None:
    return _side(basis, None if len(columns) == whole else columns[None], 1)


_POSITIONS = (
    128  # of an example, where rectangles are compared: the same for all data, so that rows are too
)
_WORTH = 0.9  # of the multiplications that are left by a cut that is worth another product


def rectangles(mask: Bool[Tensor, "out in"]) -> list[Bool[Tensor, "out in"]]:
    """The chosen coordinates in parts, each of few rows or few columns where that saves multiplications.

    Coordinates of the largest eigenvalues lie along both axes, as under a hyperbola: a few columns have nearly every
    row and the others have a few. A rectangle around them all is mostly empty, so it is cut in two, again and again,
    as long as the parts take clearly fewer multiplications.

    Example:
        >>> mask = torch.zeros(200, 200, dtype=torch.bool)
        >>> mask[0] = mask[:, 0] = True
        >>> [(int(part.any(1).sum()), int(part.any(0).sum())) for part in rectangles(mask)]
        [(1, 200), (199, 1)]
    """
    best, axis, first = _best_cut(mask)
    if best >= _WORTH * float(_cheapest(mask.shape, mask.any(1).sum(), mask.any(0).sum())):
        return [mask]
    lines = torch.zeros(mask.shape[axis], dtype=torch.bool)
    lines[first] = True
    here = mask & (lines[:, None] if axis == 0 else lines)
    return [*rectangles(here), *rectangles(mask & ~here)]


def _best_cut(mask: Tensor) -> tuple[float, int, Tensor]:
    """Multiplications of the two parts of the best cut, its axis, and the rows or columns of the first part."""
    found = (float("inf"), 0, torch.zeros(0, dtype=torch.int64))
    for axis in (0, 1):
        lines = mask if axis == 0 else mask.mT
        order = lines.sum(1).argsort(descending=True, stable=True)[: int(lines.any(1).sum())]
        if len(order) < 2:
            continue
        some = lines[order].int()
        before = some.cummax(0).values.sum(1)[:-1]  # lines across that the first ones meet
        after = some.flip(0).cummax(0).values.sum(1).flip(0)[1:]
        n = torch.arange(1, len(order))
        pairs = [(n, before), (len(order) - n, after)]
        costs = [_cheapest(mask.shape, *(pair if axis == 0 else pair[::-1])) for pair in pairs]
        total = costs[0] + costs[1]
        at = int(total.argmin())
        if float(total[at]) < found[0]:
            found = float(total[at]), axis, order[: at + 1]
    return found


def _cheapest(shape: Sequence[int], k_out: Tensor, k_in: Tensor) -> Tensor:
    """Multiplications of rectangles of so many rows and columns, in the best order."""
    d_out, d_in = shape
    ways = _multiplications(_POSITIONS, (d_out, k_out, d_out * k_out), (d_in, k_in, d_in * k_in))
    return torch.stack(ways).amin(0)


def _chosen(x: Tensor, columns: Tensor | None, axis: int) -> Tensor:
    """Some of an axis of x (groups, ...), other ones for each group."""
    if columns is None:
        return x
    index = columns[:, :, None] if axis == -2 else columns[:, None, :]
    shape = list(x.shape)
    shape[axis] = columns.shape[1]
    return x.gather(axis, index.expand(shape))


def _side(basis: Tensor | None, columns: Tensor | None, groups: int) -> Tensor | None:
    """What takes a side to its kept coordinates: a matrix (whole, kept), numbers of coordinates, or None for all."""
    if columns is None:
        return basis
    if basis is None:
        return columns[0] if groups == 1 else columns
    some = basis[:, columns[0]] if basis.ndim == 2 else _chosen(basis, columns, -1)
    # each column in one piece: products with few of them are three times as fast
    return some.mT.contiguous().mT


def _read(x: Tensor, side: Tensor | None, groups: int = 0) -> Tensor:
    """Coordinates of the last axis; `groups` is the axis of groups where each has coordinates of its own."""
    if side is None:
        return x
    if side.is_floating_point():
        return kronecker.rotate(x, side.to(x)) if groups == 0 else x @ side.to(x)
    side = side.to(x.device)
    if side.ndim == 1:
        return x.index_select(-1, side)
    shape = [1] * (x.ndim - 1) + [side.shape[1]]
    shape[groups] = side.shape[0]
    return x.gather(-1, side.view(shape).expand(*x.shape[:-1], side.shape[1]))


class MatrixSpace(Space):
    """Coordinates that a two-sided projection gives; `projection` is set before it is used."""

    projection: TwoSided

    def width(self, layer: Layer) -> int:
        return self.projection.width(layer)

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        return {x.name: (x.shape[0], *self.projection.kept(x)) for x in self.layers}

    def __call__(self, layer: Layer, block: Block) -> Float[Tensor, "n k"]:
        return self.projection(layer, block)

    def clear(self) -> None:
        self.projection.clear()


class SketchedSpace(MatrixSpace):
    """Random mixtures of all whitened coordinates, with a separable inverse.

    Args:
        layers: The followed layers.
        curvature: Gives bases and eigenvalues.
        facts: Damping, seed and ranks.
    """

    kind: ClassVar[str] = "sketched"

    def __init__(self, layers: list[Layer], curvature: Layerwise, facts: dict[str, Any]):
        super().__init__(layers)
        self.facts, self.damping = facts, Damping(**facts["damping"])
        used: dict[str, Tensor] = {}
        sides: dict[str, Sides] = {}
        for layer in layers:
            eigenvalues = curvature.eigenvalues[layer.name].reshape(layer.shape)
            Q_A, Q_G = curvature.bases[layer.name]
            rho = self.damping.absolute(mean_of(eigenvalues))
            u, v = separable(1 / (eigenvalues.double() + rho), eigenvalues, 1)
            out, in_ = facts["ranks"][layer.name]
            mix = partial(_mixture, seed=facts["seed"], groups=layer.shape[0])
            sides[layer.name] = (
                mix(f"out:{layer.name}", out, Q_G, u[0].abs().sqrt()),
                mix(f"in:{layer.name}", in_, Q_A, v[0].abs().sqrt()),
            )
            used[f"eigenvalues:{layer.name}"] = eigenvalues
            used |= {f"{i}:{layer.name}": q for i, q in enumerate((Q_A, Q_G)) if q is not None}
        self.projection = TwoSided(sides=sides)
        self._digest = fingerprint_tensors((k, v.contiguous()) for k, v in used.items())

    def record(self) -> dict[str, Any]:
        facts = {"kind": self.kind} | self.facts
        return facts | {"fingerprint": fingerprint_json([facts, self._digest])}


def _mixture(
    name: str, kept: int, basis: Tensor | None, scale: Tensor, *, seed: int, groups: int
) -> Tensor:
    """R diag(scale) Qᵀ, (groups?, kept, whole), with R random, or the identity where nothing is left out."""
    whole = scale.shape[-1]
    if kept < whole:
        key = int(noise.keys([name])[0])
        R = random_matrix(groups * kept, range(whole), seed=seed, key=key) / kept**0.5
    else:
        R = torch.eye(whole).repeat(groups, 1)
    mixed = R.unflatten(0, (groups, kept)).double() * scale.double()[:, None]
    basis = None if basis is None else basis.double().reshape(-1, whole, whole)
    mixed = mixed if basis is None else mixed @ basis.mT
    mixed = mixed.to(scale.dtype if scale.dtype == torch.float64 else torch.float32)
    return mixed[0] if groups == 1 else mixed


@dataclass(frozen=True, kw_only=True)
class Whitened:
    """Rows whose plain inner product is the influence through a fit's layerwise curvature, in few coordinates.

    Args:
        rank: The square root of how many coordinates are kept of a layer on average; None keeps all, and then nothing
            is lost.
        ranks: (out, in) of single layers, by name: as many as their product are kept.
        reach: Most columns of the narrower side of a layer that leading coordinates may lie in: it bounds the time.
        damping: As for `headwater.trace.Influence`.
        sides: The "leading" coordinates, "random" mixtures of all, or "auto": what is better on a sample.
        choose: Leading by the influence that coordinates carry, or by their eigenvalues.
        seed: Seed of random mixtures.
    """

    rank: int | None = 16
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reach: int = 64
    damping: str | float | Damping = "auto"
    sides: How = "auto"
    choose: Choice = "influence"
    seed: int = 0

    def __post_init__(self):
        _check_ranks(self.rank, self.ranks)
        if self.reach < 1:
            raise ValueError(f"reach must be 1 or more; got {self.reach}.")

    def spaces(self, fit: Fit) -> list[Space]:
        """The coordinates over a fit that come into question.

        Raises:
            ValueError: The fit's curvature has no eigenbasis for each layer, or no leading coordinates.
        """
        curvature, layers = _layerwise(fit, "Whitened"), list(fit.followed)
        ranks = {x.name: _ranks(x, self.rank, self.ranks) for x in layers}
        if all(ranks[x.name] == x.shape[1:] for x in layers):
            return [self._leading(fit, curvature, ranks)]
        if curvature_is_flat(curvature):
            raise ValueError(
                "All eigenvalues of the fit's curvature are alike, so that no coordinates lead; build with LoGra(), "
                "whose random sides keep a part of each, or fit with curvature='ekfac'."
            )
        found: list[Space] = []
        if self.sides in ("auto", "leading"):
            found.append(self._leading(fit, curvature, ranks))
        if self.sides in ("auto", "random"):
            facts = {
                "damping": vars(fit.damping(self.damping)),
                "seed": self.seed,
                "ranks": {name: list(pair) for name, pair in ranks.items()},
            }
            found.append(SketchedSpace(layers, curvature, facts))
        return found

    def _leading(
        self, fit: Fit, curvature: Layerwise, ranks: dict[str, tuple[int, int]]
    ) -> WhitenedSpace:
        layers, damping = list(fit.followed), fit.damping(self.damping)
        weights: dict[str, Tensor] = {}
        for layer in layers:
            eigenvalues = curvature.eigenvalues[layer.name].reshape(layer.shape)
            rho = damping.absolute(mean_of(eigenvalues))
            by_influence = self.choose == "influence"
            weights[layer.name] = effective(eigenvalues, rho) if by_influence else eigenvalues
        budgets = {x.name: x.shape[0] * prod(ranks[x.name]) for x in layers}
        alone = [[name] for name in self.ranks if name in weights]
        kept: dict[str, Kept] = {}
        for pool in [*alone, [name for name in weights if name not in self.ranks]]:
            own = {name: weights[name] for name in pool}
            kept |= heaviest(own, sum(budgets[name] for name in pool), reach=self.reach)
        return WhitenedSpace(layers, curvature, damping, kept)


_MOST = 16  # times its share of the numbers that one layer may keep


def heaviest(
    weights: Mapping[str, Float[Tensor, "group out in"]], n: int, *, reach: int
) -> dict[str, Kept]:
    """The n coordinates of the largest weights of several layers together, few of their columns on one side.

    Args:
        weights: Weight of each coordinate of each layer.
        n: How many are kept in all.
        reach: Most columns on the narrower side of a layer.
    """
    if not weights:
        return {}
    most = -(-_MOST * n // len(weights))
    rough = _largest(weights, n, most)
    narrow = {name: _narrowed(w, rough[name], reach) for name, w in weights.items()}
    chosen = _largest(narrow, n, most)
    return {name: _kept(w.shape, chosen[name]) for name, w in weights.items()}


def _largest(weights: Mapping[str, Tensor], n: int, most: int) -> dict[str, Tensor]:
    """Numbers of the n largest weights of several layers together, ascending; at most `most` of a layer."""
    some = {name: w.flatten().topk(min(most, w.numel())) for name, w in weights.items()}
    every = torch.cat([best.values for best in some.values()])
    mask = torch.zeros(len(every), dtype=torch.bool)
    mask[every.topk(min(n, len(every))).indices] = True
    parts = mask.split([len(best.values) for best in some.values()])
    return {
        name: best.indices[part].sort().values
        for (name, best), part in zip(some.items(), parts, strict=True)
    }


def _narrowed(weight: Tensor, chosen: Tensor, reach: int) -> Tensor:
    """Weights with all but `reach` columns of the narrower side taken away, where both sides have more."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[chosen] = True
    mask = mask.view(weight.shape)
    counts = [mask.sum(axis).double() for axis in (-1, -2)]  # of out columns, of in columns
    used = [int((c > 0).sum(-1).max()) for c in counts]
    if min(used) <= reach:
        return weight
    axis = 0 if used[0] <= used[1] else 1
    best = counts[axis].topk(reach, dim=-1).indices
    stays = torch.zeros_like(counts[axis], dtype=torch.bool).scatter_(-1, best, True)
    return weight * (stays[..., :, None] if axis == 0 else stays[..., None, :])


def _kept(shape: torch.Size, chosen: Tensor) -> Kept:
    """Columns that some coordinates use, and the coordinates' numbers in the block of these."""
    groups, out, in_ = shape
    if len(chosen) == groups * out * in_:
        return Kept()
    mask = torch.zeros(groups * out * in_, dtype=torch.bool)
    mask[chosen] = True
    mask = mask.view(shape)
    rows, columns = (_used(mask.any(axis)) for axis in (-1, -2))
    block = _chosen(_chosen(mask, rows, -2), columns, -1).flatten()
    return Kept(rows, columns, None if bool(block.all()) else block.nonzero().flatten())


def _used(mask: Tensor) -> Tensor | None:
    """Numbers of the used columns of each group, as many for each; None where all are used."""
    most = int(mask.sum(-1).max())
    if most == mask.shape[-1]:
        return None
    return mask.int().topk(most, dim=-1).indices.sort(-1).values


class LoGraSpace(MatrixSpace):
    """Two-sided projections of gradients; the curvature is that of the projected gradients.

    Args:
        layers: The followed layers.
        projection: The two-sided projection.
        facts: The options that made it.
    """

    kind: ClassVar[str] = "logra"

    def __init__(self, layers: list[Layer], projection: TwoSided, facts: dict[str, Any]):
        super().__init__(layers)
        self.projection, self.facts = projection, facts

    def record(self) -> dict[str, Any]:
        facts = {"kind": self.kind} | self.facts
        sides = {
            f"{i}:{name}": side.contiguous()
            for name, both in self.projection.given.items()
            for i, side in enumerate(both)
            if side is not None
        }
        digest = fingerprint_tensors(sides.items())
        return facts | {"fingerprint": fingerprint_json([facts, digest])}


@dataclass(frozen=True, kw_only=True)
class LoGra:
    """Projected gradients under the dense second moment of the projected gradients (LoGra).

    Args:
        rank: Numbers kept on each side; None keeps whole gradients, which only small layers bear.
        ranks: (out, in) of single layers, by name.
        init: "random" matrices, made again from their seed, or "pca": leading eigenvectors of a fit's curvature.
        seed: Seed of random matrices.
        matrix: "rademacher" or "gaussian".
        damping: Added to the second moment's eigenvalues; a tenth of each layer's mean when left out.
    """

    rank: int | None = 16
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    init: Literal["random", "pca"] = "random"
    seed: int = 0
    matrix: Kind = "rademacher"
    damping: str | float | Damping = "0.1 relative"

    def __post_init__(self):
        _check_ranks(self.rank, self.ranks)

    def spaces(self, fit: Fit) -> list[Space]:
        """The coordinates over a fit.

        Raises:
            ValueError: "pca" is asked of a fit without factors, or a damping that only its own curvature could give.
        """
        damping = parse_damping(self.damping)
        if not isinstance(damping, Damping):
            raise ValueError(
                f"LoGra has a curvature of its own, so its damping is a number or '0.1 relative'; got {damping!r}."
            )
        layers = list(fit.followed)
        facts = {
            "init": self.init,
            "seed": self.seed,
            "matrix": self.matrix,
            "damping": vars(damping),
            "ranks": {layer.name: list(_ranks(layer, self.rank, self.ranks)) for layer in layers},
        }
        return [logra_space(fit, facts)]


def logra_space(
    fit: Fit, facts: dict[str, Any], columns: Mapping[str, Any] | None = None
) -> LoGraSpace:
    """The space of the options, with the columns that a record names for "pca"."""
    layers = list(fit.followed)
    ranks = {name: (pair[0], pair[1]) for name, pair in facts["ranks"].items()}
    sides: dict[str, Sides] = {}
    if facts["init"] == "pca":
        curvature = _layerwise(fit, "LoGra(init='pca')")
        if columns is None:
            columns = {
                layer.name: _columns(
                    layer,
                    curvature.eigenvalues[layer.name].reshape(layer.shape),
                    *ranks[layer.name],
                )
                for layer in layers
            }
        for layer in layers:
            Q_A, Q_G = curvature.bases[layer.name]
            out, in_ = columns[layer.name]
            sides[layer.name] = (
                _as_matrix(Q_G, out, layer.shape[0], layer.shape[1]),
                _as_matrix(Q_A, in_, layer.shape[0], layer.shape[2]),
            )
        facts = facts | {
            "columns": {
                name: [None if c is None else c.tolist() for c in both]
                for name, both in columns.items()
            }
        }
    projection = TwoSided(ranks=ranks, seed=facts["seed"], kind=facts["matrix"], sides=sides)
    return LoGraSpace(layers, projection, facts)


def _as_matrix(basis: Tensor | None, columns: Tensor | None, groups: int, whole: int):
    """(kept, whole) matrix of a side, as `TwoSided` has it."""
    side = _side(basis, columns, groups)
    if side is None:
        return None
    if not side.is_floating_point():
        side = (
            torch.eye(whole)[:, side].movedim(1, 0) if side.ndim == 2 else torch.eye(whole)[side].mT
        )
    return side.mT.contiguous()


def space_of(record: Mapping[str, Any], fit: Fit, folder: Any) -> Space:
    """The space that an index names, over the fit at hand.

    Raises:
        ArtifactMismatch: The fit does not give that space again.
    """
    layers = list(fit.followed)
    names = (
        set(record.get("columns", {})) | set(record.get("kept", {})) | set(record.get("ranks", {}))
    )
    if names != {x.name for x in layers}:
        odd = sorted(names ^ {x.name for x in layers})
        raise ArtifactMismatch(
            f"The index in {folder} covers {len(names)} layers, the fit follows {len(layers)} (differing: "
            f"{', '.join(odd[:4])}); fit with the layers of the index, or build it again."
        )
    try:
        space = _named(record, fit, layers)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactMismatch(
            f"The fit does not give the coordinates of the index in {folder} ({error}); load the fit that it was "
            "built with, or build the index again."
        ) from error
    if space.fingerprint != record["fingerprint"]:
        raise ArtifactMismatch(
            f"The index in {folder} was made from another curvature (projection {record['fingerprint'][:12]}…, this "
            f"fit gives {space.fingerprint[:12]}…); load the fit that it was built with, or build the index again."
        )
    return space


def _named(record: Mapping[str, Any], fit: Fit, layers: list[Layer]) -> Space:
    """The space of a record, whose content is not trusted."""
    facts = {k: v for k, v in record.items() if k not in ("fingerprint", "kind")}
    for layer in layers:
        stretches = facts.get("kept", {}).get(layer.name, [None])[-1] or []
        if any(not 0 <= a < b <= layer.numel for a, b in stretches):
            raise ValueError(f"layer {layer.name!r} has {layer.numel} numbers")
    kept = {name: Kept.of(each) for name, each in facts.pop("kept", {}).items()}
    columns = {
        name: tuple(None if c is None else torch.tensor(c, dtype=torch.int64) for c in both)
        for name, both in facts.pop("columns", {}).items()
    }
    if record["kind"] == WhitenedSpace.kind:
        curvature = _layerwise(fit, "The index")
        return WhitenedSpace(layers, curvature, Damping(**facts["damping"]), kept)
    if record["kind"] == SketchedSpace.kind:
        return SketchedSpace(layers, _layerwise(fit, "The index"), facts)
    return logra_space(fit, facts, columns or None)


def factors_of(space: Space, rank: int | None) -> dict[str, Any] | None:
    """What an index says of low-rank factors of its rows; None where they are stored whole."""
    if rank is None:
        return None
    return {"rank": rank, "shapes": {k: list(v) for k, v in (space.shapes() or {}).items()}}


def kept_share(space: Space, fit: Fit) -> float | None:
    r"""Share of the whole $\sum \lambda / (\lambda + \rho)$ that leading coordinates hold; None for random sides."""
    if not isinstance(space, WhitenedSpace) or not isinstance(fit.curvature, Layerwise):
        return None
    kept = whole = 0.0
    for layer in space.layers:
        eigenvalues = fit.curvature.eigenvalues[layer.name].reshape(layer.shape).double()
        weight = effective(eigenvalues, space.damping.absolute(mean_of(eigenvalues)))
        kept += float(space.kept[layer.name].block(weight).sum())
        whole += float(weight.sum())
    return kept / max(whole, 1e-300)


def _columns(
    layer: Layer, weight: Tensor, out: int, in_: int
) -> tuple[Tensor | None, Tensor | None]:
    """Kept columns of both sides, for each group; None where a side is kept whole."""
    if out == layer.shape[1] and in_ == layer.shape[2]:
        return None, None
    pairs = [best_rectangle(group, out, in_) for group in weight]
    rows, columns = (torch.stack(side) for side in zip(*pairs, strict=True))
    return (
        None if out == layer.shape[1] else rows,
        None if in_ == layer.shape[2] else columns,
    )


def _ranks(layer: Layer, rank: int | None, ranks: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    whole = layer.shape[1:]
    out, in_ = ranks.get(layer.name, whole if rank is None else (rank, rank))
    return min(out, whole[0]), min(in_, whole[1])


def _check_ranks(rank: int | None, ranks: Mapping[str, tuple[int, int]]) -> None:
    for name, pair in {"rank": (rank or 1, 1 if rank is None else rank), **ranks}.items():
        if min(pair) < 1:
            raise ValueError(f"An index keeps 1 or more numbers a side; {name} is {pair}.")


def _layerwise(fit: Fit, what: str) -> Layerwise:
    curvature = fit.curvature
    if not isinstance(curvature, Layerwise):
        raise ValueError(
            f"{what} needs a curvature with an eigenbasis for each layer; the fit's is {curvature.kind!r}. Fit with "
            "curvature='ekfac', or build with LoGra(), which needs none."
        )
    return curvature


def curvature_is_flat(curvature: Layerwise) -> bool:
    """Whether no coordinate is before another, as for the identity."""
    spectra = curvature.eigenvalues.values()
    return all(e.numel() == 0 or bool(e.min() == e.max()) for e in spectra)


def numel(layers: list[Layer]) -> int:
    """Parameters of the layers."""
    return sum(prod(layer.shape) for layer in layers)
