r"""Curvature that treats layers as independent: identity, diagonal, K-FAC and EK-FAC.

All four are a Kronecker eigenbasis and an array of eigenvalues for each layer. K-FAC (Martens and Grosse 2015,
arXiv:1503.05671) takes the products of the factors' eigenvalues; EK-FAC (George et al. 2018, arXiv:1806.03884) takes
the second moment of the gradients in that basis, the diagonal nearest to the true block in Frobenius norm. Weight
sharing: Eschenhagen et al. 2023 (arXiv:2311.00636). Influence: Grosse et al. 2023 (arXiv:2308.03296).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import BatchPlan, Precision, sweep, units_of
from headwater.core.curvature.base import (
    Curvature,
    CurvatureMethod,
    FitContext,
    Preconditioned,
    SpectralFunction,
)
from headwater.core.curvature.folds import ByFold, EigenvaluesByFold, MomentsByFold, affordable
from headwater.core.curvature.moments import Basis, EigenvalueSums, LostTrace, SecondMoments
from headwater.core.curvature.prepared import InEigenbasis, in_basis
from headwater.core.damping import mean_of
from headwater.core.distributed import current, spread_out
from headwater.core.gradients import Gradients, dense
from headwater.core.layers import Layer
from headwater.core.target import Fisher, fisher_target
from headwater.numerics import kronecker, spectral


class Layerwise(Curvature):
    r"""One eigenbasis $Q_G \otimes Q_A$ and one array of eigenvalues (out, in) for each layer.

    Args:
        bases: (Q_A, Q_G) of each layer; None stands for the identity.
        sums: Eigenvalues by fold, (fold, \*block), summed over the examples of the fold.
        n_folds: Examples in each fold.
        facts: Numbers worth telling.
        others: The curvature with each fold left out, where these have eigenbases of their own.
        factor_eigenvalues: (D_A, D_G) of each layer's factors, in the order of the bases; empty where there are none.
    """

    kind: ClassVar[str] = "layerwise"

    def __init__(
        self,
        bases: dict[str, Basis],
        sums: dict[str, Tensor],
        n_folds: Tensor,
        facts: dict[str, Any] | None = None,
        others: Sequence["Layerwise"] = (),
        factor_eigenvalues: dict[str, tuple[Tensor, Tensor]] | None = None,
    ):
        self.others = list(others)
        self.factor_eigenvalues = factor_eigenvalues or {}
        self.bases, self.sums, self.n_folds, self.facts = bases, sums, n_folds.double(), facts or {}
        self.n_examples = float(n_folds.sum())
        self.eigenvalues = {
            name: s.sum(0) / max(self.n_examples, 1e-30) for name, s in sums.items()
        }

    def apply(self, gradients: Gradients, function: SpectralFunction) -> Gradients:
        applied = {}
        for name, block in gradients.blocks.items():
            eigenvalues = self.eigenvalues[name]
            x = dense(in_basis(block, self.bases[name]))
            Q_A, Q_G = (None if q is None else q.to(x) for q in self.bases[name])
            factor = function(eigenvalues, mean_of(eigenvalues)).to(x)
            applied[name] = kronecker.change_back(x * factor, Q_A, Q_G)
        return Gradients(applied)

    def prepare(
        self,
        queries: Gradients,
        function: SpectralFunction,
        n_rows: int,
        *,
        terms: int | None = None,
    ) -> Preconditioned:
        # rotate the data's rows, or the queries' matrices back: whichever multiplies less
        by_rows = by_queries = 0
        for name, e in self.eigenvalues.items():
            sides = [q.shape[-1] for q in self.bases[name] if q is not None]
            by_rows += n_rows * sum(side**2 for side in sides) * (e.ndim == 2 or len(e))
            by_queries += len(queries) * e.numel() * sum(sides)
        if terms is None and by_rows > by_queries:
            return Preconditioned(self.apply(queries, function))
        rotated = {n: in_basis(block, self.bases[n]) for n, block in queries.blocks.items()}
        factors = {n: function(e, mean_of(e)) for n, e in self.eigenvalues.items()}
        return InEigenbasis(Gradients(rotated), self.bases, factors, self.eigenvalues, terms)

    def spectra(self) -> dict[str, Tensor]:
        return self.eigenvalues

    @property
    def n_replicates(self) -> int:
        return len(self.n_folds) if int((self.n_folds > 0).sum()) > 1 else 0

    def replicates(self) -> list["Layerwise"]:
        if self.others:
            return self.others
        found = []
        for k in range(self.n_replicates):
            keep = torch.arange(len(self.n_folds)) != k
            sums = {name: s[keep] for name, s in self.sums.items()}
            found.append(Layerwise(self.bases, sums, self.n_folds[keep]))
        return found

    def activation_covariance(self, name: str) -> Float[Tensor, "*group in in"]:
        """A of a layer: the mean of its inputs' outer products over positions, undamped, a bias' one as last input.

        Raises:
            ValueError: It was not kept.
        """
        return self._factor(name, 0)

    def gradient_covariance(self, name: str) -> Float[Tensor, "*group out out"]:
        """G of a layer: the mean of its output gradients' outer products over positions, undamped.

        Raises:
            ValueError: It was not kept.
        """
        return self._factor(name, 1)

    def _factor(self, name: str, side: int) -> Tensor:
        if name not in self.factor_eigenvalues:
            what = ("activation", "gradient")[side]
            raise ValueError(
                f"The fit holds no {what} covariance of {name!r}; fit again with curvature='ekfac' or 'kfac'."
            )
        D, Q = self.factor_eigenvalues[name][side], self.bases[name][side]
        return torch.diag_embed(D) if Q is None else (Q * D[..., None, :]) @ Q.mT

    def tensors(self) -> dict[str, Tensor]:
        state = {"n_folds": self.n_folds}
        for name, (Q_A, Q_G) in self.bases.items():
            state |= {} if Q_A is None else {f"Q_A:{name}": Q_A}
            state |= {} if Q_G is None else {f"Q_G:{name}": Q_G}
            state[f"sums:{name}"] = self.sums[name]
        for name, (D_A, D_G) in self.factor_eigenvalues.items():
            state |= {f"D_A:{name}": D_A, f"D_G:{name}": D_G}
        for k, other in enumerate(self.others):
            state |= {f"without {k}:{name}": t for name, t in other.tensors().items()}
        return state

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Layerwise":
        names = [k.removeprefix("sums:") for k in tensors if k.startswith("sums:")]
        bases = {n: (tensors.get(f"Q_A:{n}"), tensors.get(f"Q_G:{n}")) for n in names}
        others = []
        while own := _under(tensors, f"without {len(others)}:"):
            others.append(cls.from_tensors(own, {}))
        sums = {n: tensors[f"sums:{n}"] for n in names}
        kept = {
            n: (tensors[f"D_A:{n}"], tensors[f"D_G:{n}"]) for n in names if f"D_A:{n}" in tensors
        }
        return cls(bases, sums, tensors["n_folds"], facts, others, kept)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class Identity(CurvatureMethod):
    """No curvature: influence becomes the inner product of gradients, divided by the damping plus one."""

    kind: ClassVar[str] = "identity"

    def fit(self, context: FitContext) -> Layerwise:
        n = torch.tensor([float(len(context.examples))])
        layers = context.capture.layers.values()
        ones = {layer.name: n[0] * torch.ones(1, *layer.block) for layer in layers}
        return Layerwise({layer.name: (None, None) for layer in layers}, ones, n)


@dataclass(frozen=True, kw_only=True)
class _Sampled(CurvatureMethod):
    """Fields shared by curvatures that are estimated over data.

    Args:
        fisher: Labels drawn from the model ("mc"), all of them weighted ("exact"), or the given ones ("empirical").
        draws: Draws an example for "mc".
        cut: Least probability of a label kept by "exact".
        folds: Folds of the data kept apart, for intervals; 1 keeps none.
        tolerance: Stop the passes once the relative standard error of every factor (and of the spectrum) is
            below this; None uses all data.
        seed: Seed of the draws.
    """

    fisher: Fisher = "mc"
    draws: int = 1
    cut: float = 1e-4
    folds: int = 5
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(
                f"tolerance must be positive; got {self.tolerance}. None uses all data."
            )
        if self.draws < 1 or self.folds < 1:
            raise ValueError(
                f"Expected draws and folds of 1 or more; got {self.draws} and {self.folds}."
            )

    def _check_folds(self) -> None:
        if self.tolerance is not None and self.folds < 2:
            raise ValueError(
                "A tolerance of the eigenvalues is measured on folds; pass folds=5, or no tolerance."
            )

    def _pass(
        self,
        context: FitContext,
        accumulator: SecondMoments | EigenvalueSums | ByFold,
        *,
        stage: str,
        seed: int,
        precision: Precision = "model",
    ) -> LostTrace:
        """One resumable sweep of the labels' gradients with each of the model's weights, stopped early where asked."""
        target = fisher_target(self.fisher, draws=self.draws, cut=self.cut, seed=seed)
        batches, tolerance = list(context.batches), self.tolerance
        if tolerance is not None and context.others:
            raise ValueError(
                "A mean curvature over several weights uses all data with each; pass tolerance=None."
            )
        if tolerance is not None:
            batches = _mixed(batches, seed)

        def enough() -> bool:
            return tolerance is not None and accumulator.relative_error() < tolerance

        lost = LostTrace(target)
        for number, capture in enumerate(context.captures):
            sweep(
                capture.at(precision, context.examples),
                context.examples,
                [accumulator, lost],
                target,
                batches=batches,
                checkpoint=context.checkpoint(stage, number),
                progress=context.progress,
                note=stage,
                stop=enough,
            )
        return lost


def _mixed(batches: list[BatchPlan], seed: int) -> list[BatchPlan]:
    """Batches are sorted by length: in an order of chance a part is like the whole, in units of one fold as before."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    units = units_of(sorted(drawn, key=lambda batch: batch.fold))
    order = torch.randperm(len(units), generator=generator).tolist()
    return [batch for i in order for batch in units[i]]


@dataclass(frozen=True, kw_only=True)
class Diagonal(_Sampled):
    """The second moment of each parameter's gradient alone."""

    kind: ClassVar[str] = "diagonal"

    def fit(self, context: FitContext) -> Layerwise:
        self._check_folds()
        layers = list(context.capture.layers.values())
        bases: dict[str, Basis] = {layer.name: (None, None) for layer in layers}
        sums = EigenvalueSums(layers, bases, folds=self.folds)
        lost = self._pass(context, sums, stage="diagonal", seed=self.seed)
        return Layerwise(bases, sums.finish(), sums.n_examples, _facts(lost, eigenvalues=sums))


@dataclass(frozen=True, kw_only=True)
class KFAC(_Sampled):
    r"""Kronecker-factored curvature, $F \approx A \otimes G$ for each layer.

    Args:
        approximation: For layers with several positions: "expand" treats positions as independent, "reduce" sums
            them first; the two agree where there is one position.
        max_factor: Longest side that gets a full factor; longer ones keep their diagonal.
    """

    kind: ClassVar[str] = "kfac"

    approximation: Literal["expand", "reduce"] = "expand"
    max_factor: int = 8192
    folds: int = 1

    @property
    def _moment_options(self) -> dict[str, Any]:
        reduce = self.approximation == "reduce"
        return {"reduce": reduce, "max_factor": self.max_factor, "seed": self.seed}

    def moments(self, context: FitContext) -> tuple[SecondMoments, LostTrace]:
        """The factors, from one sweep."""
        moments = SecondMoments(context.capture.layers.values(), **self._moment_options)
        return moments, self._pass(context, moments, stage="moments", seed=self.seed)

    def fit(self, context: FitContext) -> Layerwise:
        moments, lost = self.moments(context)
        values, bases = eigenbases(moments)
        sums = {}
        for name, layer in moments.layers.items():
            D_A, D_G = values[f"A:{layer.input_group}"], values[f"G:{name}"]
            # positions an example: the block of an example is a sum over as many independent terms
            positions = moments.counts[f"G:{name}"] / moments.n_examples
            eigenvalues = positions * D_G[..., :, None] * D_A[..., None, :]
            sums[name] = (moments.n_examples * eigenvalues)[None].to(moments.sums[f"G:{name}"])
        n, facts = torch.tensor([moments.n_examples]), _facts(lost, moments=moments)
        kept = self._kept(moments, values)
        return Layerwise(bases, sums, n, facts, factor_eigenvalues=kept)

    def _kept(
        self, moments: SecondMoments, values: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Eigenvalues of each layer's factors; of sums over positions there are none worth keeping."""
        if self.approximation == "reduce":
            return {}
        found = {}
        for name, layer in moments.layers.items():
            like = moments.sums[f"G:{name}"]
            found[name] = values[f"A:{layer.input_group}"].to(like), values[f"G:{name}"].to(like)
        return found


@dataclass(frozen=True, kw_only=True)
class EKFAC(KFAC):
    """K-FAC's eigenbasis with eigenvalues corrected to the gradients' second moment in it.

    Args:
        own_bases: Whether each fold's replicate, which the intervals come from, gets an eigenbasis of its own. It
            costs one more rotation a fold; without it the intervals take the basis for known and are too narrow where
            data are few. None decides by the size of the layers.
    """

    kind: ClassVar[str] = "ekfac"

    folds: int = 5
    own_bases: bool | None = None
    precision: Precision = "auto"

    def has_own_bases(self, layers: Sequence[Layer]) -> bool:
        """Whether each fold of these layers gets an eigenbasis of its own."""
        if self.own_bases is None:
            return affordable(layers, self.folds)
        return self.own_bases and self.folds > 1

    def fit(self, context: FitContext) -> Layerwise:
        self._check_folds()
        layers = list(context.capture.layers.values())
        if self.has_own_bases(layers) and len({batch.fold for batch in context.batches}) > 1:
            return self._fit_by_fold(context, layers)
        moments, _ = self.moments(context)
        values, bases = eigenbases(moments, values=False)
        sums = EigenvalueSums(context.capture.layers.values(), bases, folds=self.folds)
        lost = self.eigenvalues(context, sums)
        facts = _facts(lost, moments=moments, eigenvalues=sums)
        kept = self._kept(moments, values)
        return Layerwise(bases, sums.finish(), sums.n_examples, facts, factor_eigenvalues=kept)

    def eigenvalues(self, context: FitContext, sums: EigenvalueSums | ByFold) -> LostTrace:
        # fresh labels, so that the eigenvalues are not fitted to the draws that chose the basis
        seed = self.seed + 1
        return self._pass(context, sums, stage="eigenvalues", seed=seed, precision=self.precision)

    def _fit_by_fold(self, context: FitContext, layers: list[Layer]) -> Layerwise:
        """The same, with a replicate for each fold that has its own factors, basis and eigenvalues."""
        gathered = MomentsByFold(layers, self.folds, **self._moment_options)
        self._pass(context, gathered, stage="moments", seed=self.seed)
        left_out = [None, *range(self.folds)]
        found = [eigenbases(gathered.without(fold), values=False) for fold in left_out]
        bases = [basis for _, basis in found]
        sums = EigenvaluesByFold(layers, bases, self.folds)
        lost = self.eigenvalues(context, sums)
        whole, *rest = sums.eigenvalues
        moments = gathered.without(None)
        facts = _facts(lost, moments=moments, eigenvalues=whole)
        kept = self._kept(moments, found[0][0])
        others = [
            Layerwise(basis, other.finish(), other.n_examples)
            for basis, other in zip(bases[1:], rest, strict=True)
        ]
        return Layerwise(bases[0], whole.finish(), whole.n_examples, facts, others, kept)


def eigenbases(
    moments: SecondMoments, *, values: bool = True
) -> tuple[dict[str, Tensor], dict[str, Basis]]:
    """Eigenvalues of every factor, and the bases (Q_A, Q_G) of every layer, in the factors' own precision.

    Without `values` the factors are decomposed in their own precision, in half the time of float64: EK-FAC measures
    its eigenvalues in whatever orthonormal basis it is given. The ranks of a process group share the work, by its cost.
    """
    world, factors = current(), moments.finish()
    full = [name for name in factors if moments.is_full(name)]
    costs = [factors[name].numel() * float(factors[name].shape[-1]) for name in full]
    own: dict[str, Tensor] = {}
    with world.failing_together():
        for name, rank in zip(full, spread_out(costs, world.size), strict=True):
            if rank == world.rank:
                D, Q = spectral.eigh(factors[name], dtype=torch.float64 if values else None)
                # in one layout: products with another one round differently
                own |= {f"D:{name}": D, f"Q:{name}": Q.to(factors[name]).contiguous()}
        every = world.union(own)
    # a long side keeps its diagonal: its basis is the identity
    found = {name: every.get(f"D:{name}", factor) for name, factor in factors.items()}
    vectors = {name: every.get(f"Q:{name}") for name in factors}
    bases = {
        name: (vectors[f"A:{layer.input_group}"], vectors[f"G:{name}"])
        for name, layer in moments.layers.items()
    }
    return found, bases


def _facts(lost: LostTrace, **accumulators: SecondMoments | EigenvalueSums) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, accumulator in accumulators.items():
        error = accumulator.relative_error()
        facts[f"{name}_relative_error"] = error if error != float("inf") else None
        facts[f"{name}_examples"] = float(torch.as_tensor(accumulator.n_examples).sum())
        if isinstance(accumulator, SecondMoments):
            most = max(accumulator.counts.values(), default=0.0)
            counts = {n[2:]: c for n, c in accumulator.counts.items() if n.startswith("G:")}
            facts[f"{name}_positions"] = most
            if fewer := {
                n: c for n, c in counts.items() if c < most
            }:  # convolutions of fewer sites
                facts[f"{name}_layer_positions"] = fewer
    if lost.share is not None:
        facts["lost_trace"] = lost.share
    return facts


__all__ = ["EKFAC", "KFAC", "Diagonal", "Identity", "Layerwise", "eigenbases"]
