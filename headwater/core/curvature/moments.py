"""Accumulators for the second moments behind layerwise curvature."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.core.capture import Accumulator, BatchInfo, Rows
from headwater.core.layers import Layer
from headwater.core.target import Target
from headwater.numerics import kronecker


def _weighted(x: Tensor, weight: Tensor | None, pos: int) -> Tensor | None:
    """Weights of examples as weights of their positions."""
    return None if weight is None else weight.to(x).repeat_interleave(pos)


class SecondMoments(Accumulator):
    r"""Sums of $a a^\top$ for each shared input and of $g g^\top$ for each layer, over positions.

    A side longer than `max_factor` keeps the diagonal only. The standard error of each factor is followed without a
    second copy: with $S_b$ the sum and $c_b$ the count of batch b, the ratio $\hat A = \sum_b S_b / \sum_b c_b$ has

    $$\lVert \hat A - A \rVert_F^2 \approx \frac{B}{B - 1}\,
    \frac{\sum_b \lVert S_b - c_b \hat A \rVert_F^2}{(\sum_b c_b)^2},$$

    and a Frobenius norm is the mean of $\lVert M z \rVert^2$ over Gaussian vectors z, of which a few are kept.

    Args:
        layers: The followed layers.
        reduce: Sum over positions before the product (K-FAC-reduce) instead of after (K-FAC-expand).
        max_factor: Longest side that gets a full factor.
        seed: Seed of the probe vectors.
        n_probes: Number of probe vectors.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        *,
        reduce: bool = False,
        max_factor: int = 8192,
        seed: int = 0,
        n_probes: int = 16,
    ):
        self.layers = {layer.name: layer for layer in layers}
        self.reduce, self.max_factor, self.seed, self.n_probes = reduce, max_factor, seed, n_probes
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.n_examples = 0.0
        self._probe: dict[int, Tensor] = {}
        self._spread: dict[str, _Spread] = {}
        self._seen: set[str] = set()

    def is_full(self, name: str) -> bool:
        """Whether a factor is a whole matrix, not a diagonal."""
        return self.sums[name].shape[-1] <= self.max_factor

    def update(self, rows: Rows) -> None:
        batch, layer = rows.batch, rows.layer
        a, g, count = rows.a, rows.g, rows.n_positions
        if self.reduce:
            each = (
                rows.pos
                if rows.mask is None
                else rows.mask.sum(-1).clamp(min=1)[:, None, None].to(a)
            )
            a, g, count = a.sum(-2, keepdim=True) / each, g.sum(-2, keepdim=True), batch.n_examples
        if layer.input_group not in self._seen:
            self._seen.add(layer.input_group)
            self._add(f"A:{layer.input_group}", a, batch.share, count)
        self._add(f"G:{layer.name}", g, batch.weights, count)

    def _add(self, name: str, x: Tensor, weight: Tensor | None, count: float) -> None:
        flat = x.flatten(-3, -2)
        weight = _weighted(flat, weight, x.shape[-2])
        if full := flat.shape[-1] <= self.max_factor:
            moment = kronecker.second_moment(flat, weight)
        else:
            square = flat.square()
            moment = (square if weight is None else square * weight[:, None]).sum(-2)
        moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
        spread = _Spread.of(moment @ self._probes(moment) if full else moment[..., None], count)
        if name in self.sums:
            self.sums[name] = self.sums[name].to(moment.device).add_(moment)
            self._spread[name] += spread
        else:
            self.sums[name], self._spread[name] = moment, spread
        self.counts[name] = self.counts.get(name, 0.0) + count

    def _probes(self, moment: Tensor) -> Tensor:
        dim = moment.shape[-1]
        if dim not in self._probe:
            generator = torch.Generator().manual_seed(self.seed + dim)
            z = torch.randn(dim, self.n_probes, generator=generator) / self.n_probes**0.5
            self._probe[dim] = z.to(moment)
        return self._probe[dim]

    def end_batch(self, batch: BatchInfo) -> None:
        self._seen.clear()
        self.n_examples += batch.n_examples

    def relative_error(self) -> float:
        """Largest relative standard error (Frobenius norm) over the factors; infinite before 4 batches."""
        worst = 0.0
        for name, spread in self._spread.items():
            if spread.n < 4:
                return float("inf")
            norm = float(self.sums[name].norm())
            if norm > 0:
                worst = max(worst, spread.error() / norm)
        return worst

    def merge(self, other: "SecondMoments") -> None:
        for name, moment in other.sums.items():
            mine = name in self.sums
            if mine:
                self.sums[name] = self.sums[name].to(moment.device).add_(moment)
            else:
                self.sums[name] = moment.clone()
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]
            self._spread[name] = (
                self._spread[name] + other._spread[name] if mine else other._spread[name]
            )
        self.n_examples += other.n_examples

    def finish(self) -> dict[str, Tensor]:
        """Mean second moments, named "A:group" and "G:layer"."""
        return {name: moment / max(self.counts[name], 1e-30) for name, moment in self.sums.items()}

    def tensors(self) -> dict[str, Tensor]:
        state = {f"s:{name}": moment for name, moment in self.sums.items()}
        state |= {
            f"c:{name}": torch.tensor(c, dtype=torch.float64) for name, c in self.counts.items()
        }
        for name, spread in self._spread.items():
            state |= {f"{k}:{name}": v for k, v in spread.tensors().items()}
        return state | {"n_examples": torch.tensor(self.n_examples, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.n_examples = float(tensors["n_examples"])
        self.sums = {k[2:]: v for k, v in tensors.items() if k.startswith("s:")}
        self.counts = {k[2:]: float(v) for k, v in tensors.items() if k.startswith("c:")}
        self._spread = {name: _Spread.load(tensors, name) for name in self.sums}


@dataclass(frozen=True)
class _Spread:
    """What the spread of batch sums $S_b$, seen through probes $S_b z$, needs: sums over batches."""

    total: Tensor  # of S_b z
    square: Tensor  # of |S_b z|²
    cross: Tensor  # of c_b S_b z
    counts: Tensor  # of 1, c_b, c_b²

    @classmethod
    def of(cls, seen: Tensor, count: float) -> "_Spread":
        seen = seen.to(
            torch.float64, copy=True
        )  # a diagonal's is the sum itself, which goes on changing
        counts = torch.tensor([1.0, count, count**2], dtype=torch.float64)
        return cls(seen, seen.square().sum(), seen * count, counts)

    @property
    def n(self) -> float:
        return float(self.counts[0])

    def error(self) -> float:
        """Standard error of the sum of all batches (Frobenius norm)."""
        n, count, squares = self.counts.tolist()
        mean = self.total / max(count, 1e-30)
        left = self.square - 2 * (self.cross * mean).sum() + squares * mean.square().sum()
        return float((left.clamp(min=0) * n / (n - 1)).sqrt())

    def __add__(self, other: "_Spread") -> "_Spread":
        mine, others = self.tensors(), other.tensors()
        return _Spread(*(mine[k].to(others[k].device) + others[k] for k in "tqxn"))

    def tensors(self) -> dict[str, Tensor]:
        return {"t": self.total, "q": self.square, "x": self.cross, "n": self.counts}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], name: str) -> "_Spread":
        return cls(*(tensors[f"{k}:{name}"] for k in "tqxn"))


Basis = tuple[Tensor | None, Tensor | None]


class SharedRotation:
    """Rotates the inputs of layers that read the same tensor once: only the last is kept."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._a: Tensor | None = None
        self._rotated: Tensor | None = None

    def __call__(self, a: Tensor, Q_A: Tensor | None) -> Tensor:
        if self._rotated is None or self._a is not a:
            self._a, self._rotated = a, kronecker.rotate(a, Q_A)
        return self._rotated


class EigenvalueSums(Accumulator):
    r"""Corrected eigenvalues: sums over examples of $(Q_G^\top \sum_t g_t a_t^\top Q_A)^{\circ 2}$, by fold.

    Args:
        layers: The followed layers.
        bases: (Q_A, Q_G) of each layer, None for the identity.
        folds: Folds of the data, kept apart so that the sampling error of the sum can be told.
    """

    def __init__(self, layers: Iterable[Layer], bases: dict[str, Basis], *, folds: int = 1):
        self.layers = {layer.name: layer for layer in layers}
        self.bases, self.folds = bases, folds
        self.sums: dict[str, Tensor] = {}
        self.n_examples = torch.zeros(folds, dtype=torch.float64)
        self._held = list(range(folds))  # the folds that `sums` has room for
        self._shared = SharedRotation()

    def empty(self) -> "EigenvalueSums":
        """Another one, with room for the folds that it will see."""
        new = EigenvalueSums(self.layers.values(), self.bases, folds=self.folds)
        new._held = []
        return new

    def _place(self, fold: int) -> int:
        """Where a fold's sums are."""
        if fold not in self._held:
            self._held.append(fold)
            for name, sums in self.sums.items():
                self.sums[name] = torch.cat([sums, sums.new_zeros(1, *sums.shape[1:])])
        return self._held.index(fold)

    def update(self, rows: Rows) -> None:
        name, place, weights = rows.layer.name, self._place(rows.batch.fold), rows.batch.weights
        a, g = rows.a, rows.g
        Q_A, Q_G = (None if q is None else q.to(a) for q in self.bases[name])
        if rotates_first(rows):
            a, g, Q_A, Q_G = self._shared(a, Q_A), kronecker.rotate(g, Q_G), None, None
        square = kronecker.squared_sum(a, g, Q_A, Q_G, None if weights is None else weights.to(a))
        self._add(name, place, square)

    def _add(self, name: str, place: int, square: Tensor) -> None:
        if name not in self.sums:
            wide = torch.promote_types(square.dtype, torch.float32)
            self.sums[name] = square.new_zeros(len(self._held), *square.shape, dtype=wide)
        self.sums[name] = self.sums[name].to(square.device)
        self.sums[name][place] += square

    def end_batch(self, batch: BatchInfo) -> None:
        self._shared.clear()
        self.n_examples[batch.fold] += batch.n_examples

    def relative_error(self) -> float:
        """Relative standard error of the whole spectrum, from the folds; infinite while one is empty."""
        if self.folds < 2 or bool((self.n_examples == 0).any()):
            return float("inf")
        worst = 0.0
        for sums in self.sums.values():
            means = sums / self.n_examples.to(sums).view(-1, *[1] * (sums.ndim - 1))
            mean = means.mean(0)
            spread = (
                float((means - mean).norm()) / (self.folds - 1) ** 0.5
            )  # std(0) takes 15 times as long
            worst = max(worst, spread / self.folds**0.5 / max(float(mean.norm()), 1e-30))
        return worst

    def merge(self, other: "EigenvalueSums") -> None:
        for fold in other._held:
            place, theirs = self._place(fold), other._place(fold)
            for name, sums in other.sums.items():
                self._add(name, place, sums[theirs])
        self.n_examples += other.n_examples

    def finish(self) -> dict[str, Tensor]:
        """Sums by fold, (fold, *block) for each layer; divide by `n_examples` of the folds."""
        return self.sums

    def tensors(self) -> dict[str, Tensor]:
        held = torch.tensor(self._held, dtype=torch.int64)
        state = {"n_examples": self.n_examples, "held": held}
        return state | {f"s:{k}": v for k, v in self.sums.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.n_examples, self._held = tensors["n_examples"], tensors["held"].tolist()
        self.sums = {k[2:]: v for k, v in tensors.items() if k.startswith("s:")}


def rotates_first(rows: Rows) -> bool:
    """Whether rotating tokens before the sum is the cheaper order, as in `kronecker.squared_sum`."""
    d_in, d_out = rows.a.shape[-1], rows.g.shape[-1]
    return rows.pos == 1 or rows.pos * (d_in**2 + d_out**2) <= d_in * d_out * (d_in + d_out)


class LostTrace(Accumulator):
    """What a target that enumerates labels dropped, kept with the state so that a resumed sweep tells all of it.

    Args:
        target: The sweep's target; others than `Enumerated` lose nothing.
    """

    def __init__(self, target: Target):
        self.target = target
        self._pending: list[tuple[float, float]] = getattr(target, "lost", [])
        self._total = torch.zeros(2, dtype=torch.float64)

    def empty(self) -> "LostTrace":
        self._pending.clear()  # of a batch that was not finished
        return LostTrace(self.target)

    def update(self, rows: Rows) -> None:
        """The target gathers what is lost itself."""

    def end_batch(self, batch: BatchInfo) -> None:
        for share, trace in self._pending:
            found = torch.tensor([share * trace, trace], dtype=torch.float64)
            self._total = self._total + found
        self._pending.clear()

    def merge(self, other: "LostTrace") -> None:
        self._total = self._total + other._total

    @property
    def share(self) -> float | None:
        """Share of the trace of the outputs' Fisher information that was dropped; None where all was drawn."""
        lost, weight = self._total.tolist()
        return lost / weight if weight > 0 else None

    def tensors(self) -> dict[str, Tensor]:
        return {"lost": self._total}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._total = tensors["lost"]
