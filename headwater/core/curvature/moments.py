"""Accumulators for the second moments behind layerwise curvature."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headwater.core.capture import Accumulator, BatchInfo, Rows
from headwater.core.layers import Layer
from headwater.numerics import kronecker


def _weighted(x: Tensor, weight: Tensor | None, pos: int) -> Tensor | None:
    """Weights of examples as weights of their positions."""
    return None if weight is None else weight.to(x).repeat_interleave(pos)


class SecondMoments(Accumulator):
    r"""Sums of $a a^\top$ for each shared input and of $g g^\top$ for each layer, over positions.

    A side longer than `max_factor` keeps the diagonal only. The relative standard error of each factor is followed
    without a second copy: for a fixed Gaussian vector z, the spread over batches of $A_b z$ estimates
    $\lVert\hat A - A\rVert_F$.

    Args:
        layers: The followed layers.
        reduce: Sum over positions before the product (K-FAC-reduce) instead of after (K-FAC-expand).
        max_factor: Longest side that gets a full factor.
        seed: Seed of the probe vectors.
    """

    def __init__(self, layers: Iterable[Layer], *, reduce: bool = False, max_factor: int = 8192, seed: int = 0):
        self.layers = {layer.name: layer for layer in layers}
        self.reduce, self.max_factor, self.seed = reduce, max_factor, seed
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.n_examples = 0.0
        self._probe: dict[int, Tensor] = {}
        self._spread: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._seen: set[str] = set()

    def update(self, rows: Rows) -> None:
        batch, layer = rows.batch, rows.layer
        a, g, count = rows.a, rows.g, rows.n_positions
        if self.reduce:
            each = rows.pos if rows.mask is None else rows.mask.sum(-1).clamp(min=1)[:, None, None].to(a)
            a, g, count = a.sum(-2, keepdim=True) / each, g.sum(-2, keepdim=True), batch.n_examples
        if layer.input_group not in self._seen:
            self._seen.add(layer.input_group)
            self._add(f"A:{layer.input_group}", a, batch.share, count)
        self._add(f"G:{layer.name}", g, batch.weights, count)

    def _add(self, name: str, x: Tensor, weight: Tensor | None, count: float) -> None:
        flat = x.flatten(-3, -2)
        weight = _weighted(flat, weight, x.shape[-2])
        if flat.shape[-1] > self.max_factor:
            square = flat.square()
            moment = (square if weight is None else square * weight[:, None]).sum(-2)
        else:
            moment = kronecker.second_moment(flat, weight)
            self._watch(name, moment, count)
        if name in self.sums:
            self.sums[name] += moment
        else:
            self.sums[name] = moment
        self.counts[name] = self.counts.get(name, 0.0) + count

    def _watch(self, name: str, moment: Tensor, count: float) -> None:
        dim = moment.shape[-1]
        if dim not in self._probe:
            generator = torch.Generator().manual_seed(self.seed + dim)
            self._probe[dim] = torch.randn(dim, generator=generator)
        z = self._probe[dim].to(moment)
        seen = (moment @ z) / max(count, 1.0)
        total, square, n = self._spread.get(name, (torch.zeros_like(seen), torch.zeros_like(seen), 0))
        self._spread[name] = (total + seen, square + seen.square(), n + 1)

    def end_batch(self, batch: BatchInfo) -> None:
        self._seen.clear()
        self.n_examples += batch.n_examples

    def relative_error(self) -> float:
        """Largest relative standard error (Frobenius norm) over the factors; infinite before 4 batches."""
        worst = 0.0
        for total, square, n in self._spread.values():
            if n < 4:
                return float("inf")
            mean = total / n
            variance = (square / n - mean.square()).clamp(min=0) / (n - 1)
            norm = float(mean.norm())
            if norm > 0:
                worst = max(worst, float(variance.sum().sqrt()) / norm)
        return worst

    def merge(self, other: "SecondMoments") -> None:
        for name, moment in other.sums.items():
            self.sums[name] = self.sums[name] + moment if name in self.sums else moment
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]
        for name, (total, square, n) in other._spread.items():
            mine = self._spread.get(name)
            if mine is not None:
                total, square, n = total + mine[0], square + mine[1], n + mine[2]
            self._spread[name] = (total, square, n)
        self.n_examples += other.n_examples

    def finish(self) -> dict[str, Tensor]:
        """Mean second moments, named "A:group" and "G:layer"."""
        return {name: moment / max(self.counts[name], 1e-30) for name, moment in self.sums.items()}

    def tensors(self) -> dict[str, Tensor]:
        state = {f"s:{name}": moment for name, moment in self.sums.items()}
        state |= {f"c:{name}": torch.tensor(c, dtype=torch.float64) for name, c in self.counts.items()}
        for name, (total, square, n) in self._spread.items():
            state |= {f"t:{name}": total, f"q:{name}": square, f"n:{name}": torch.tensor(n)}
        return state | {"n_examples": torch.tensor(self.n_examples, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.n_examples = float(tensors["n_examples"])
        self.sums = {k[2:]: v for k, v in tensors.items() if k.startswith("s:")}
        self.counts = {k[2:]: float(v) for k, v in tensors.items() if k.startswith("c:")}
        self._spread = {
            k[2:]: (v, tensors[f"q:{k[2:]}"], int(tensors[f"n:{k[2:]}"]))
            for k, v in tensors.items()
            if k.startswith("t:")
        }


Basis = tuple[Tensor | None, Tensor | None]


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
        self._rotated: dict[str, Tensor] = {}
        self._shared = {
            name: sum(x.input_group == layer.input_group for x in self.layers.values()) > 1
            for name, layer in self.layers.items()
        }

    def update(self, rows: Rows) -> None:
        name, fold, weights = rows.layer.name, rows.batch.fold, rows.batch.weights
        a, g = rows.a, rows.g
        Q_A, Q_G = (None if q is None else q.to(a) for q in self.bases[name])
        if self._shared[name] and Q_A is not None and _rotates_first(rows):
            group = rows.layer.input_group
            if group not in self._rotated:
                self._rotated[group] = kronecker.rotate(a, Q_A)
            a, g, Q_A, Q_G = self._rotated[group], kronecker.rotate(g, Q_G), None, None
        square = kronecker.squared_sum(a, g, Q_A, Q_G, None if weights is None else weights.to(a))
        if name not in self.sums:
            self.sums[name] = square.new_zeros(self.folds, *square.shape)
        self.sums[name][fold] += square

    def end_batch(self, batch: BatchInfo) -> None:
        self._rotated.clear()
        self.n_examples[batch.fold] += batch.n_examples

    def relative_error(self) -> float:
        """Relative standard error of the whole spectrum, from the folds; infinite while one is empty."""
        if self.folds < 2 or bool((self.n_examples == 0).any()):
            return float("inf")
        worst = 0.0
        for sums in self.sums.values():
            means = sums / self.n_examples.to(sums).view(-1, *[1] * (sums.ndim - 1))
            error = float(means.std(0).norm()) / self.folds**0.5
            worst = max(worst, error / max(float(means.mean(0).norm()), 1e-30))
        return worst

    def merge(self, other: "EigenvalueSums") -> None:
        for name, sums in other.sums.items():
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.n_examples += other.n_examples

    def finish(self) -> dict[str, Tensor]:
        """Sums by fold, (fold, *block) for each layer; divide by `n_examples` of the folds."""
        return self.sums

    def tensors(self) -> dict[str, Tensor]:
        return {f"s:{k}": v for k, v in self.sums.items()} | {"n_examples": self.n_examples}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.n_examples = tensors["n_examples"]
        self.sums = {k[2:]: v for k, v in tensors.items() if k.startswith("s:")}


def _rotates_first(rows: Rows) -> bool:
    """Whether rotating tokens before the sum is the cheaper order, as in `kronecker.squared_sum`."""
    d_in, d_out = rows.a.shape[-1], rows.g.shape[-1]
    return rows.pos == 1 or rows.pos * (d_in**2 + d_out**2) <= d_in * d_out * (d_in + d_out)


def layer_numel(layers: Sequence[Layer]) -> int:
    return sum(layer.numel for layer in layers)
