r"""Influence functions under any fitted curvature.

Koh and Liang (2017), "Understanding Black-box Predictions via Influence Functions", arXiv:1703.04730; at the scale of
language models Grosse et al. (2023), arXiv:2308.03296. For networks that are not at a minimum the damped
Gauss–Newton matrix takes the Hessian's place (Bae et al. 2022, arXiv:2209.05364).

Adding training example n once more changes a measurement f by

$$\tau(q, n) = -\frac1N\, \nabla f_q^\top (C + \rho I)^{-1} \nabla \ell_n ,$$

with C the curvature of the mean loss over N examples.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Accumulator, Precision, Progress, sweep
from headwater.core.cost import available_memory_bytes
from headwater.core.curvature import Curvature, Layerwise, Preconditioned
from headwater.core.damping import Damping, Inverse, mean_of
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit
from headwater.core.gauss_newton import GaussNewtonProduct
from headwater.core.gradients import CollectGradients, Gradients
from headwater.core.scores import GroupTotals, Scores, groups_of, significance
from headwater.core.scoring import (
    PairScores,
    ReplicateScores,
    StrongestScores,
    TokenScores,
    self_scores,
)
from headwater.core.target import Loss, Measured, Target
from headwater.core.task import Measurement, measurement_name
from headwater.numerics.linear_operator import conjugate_gradients
from headwater.numerics.resampling import jackknife_interval
from headwater.trace.base import Attributor

_AT_ONCE = 8  # training gradients that are held preconditioned
_LEAST = {"rank": 1, "terms": 1, "n_intervals": 0, "cg_steps": 0, "keep": 1}


def query_gradients(
    fit: Fit,
    queries: Examples,
    measurement: Measurement | None = None,
    weights: Float[Tensor, "group query"] | None = None,
    progress: Progress | None = None,
) -> Gradients:
    """Gradients of the measurement of each query, or of weighted groups of queries.

    Raises:
        ValueError: The weights are not of these queries.
    """
    if weights is not None and weights.shape[-1] != len(queries):
        raise ValueError(
            f"Expected weights (group, query) of {len(queries)} queries; got shape {tuple(weights.shape)}."
        )
    gradients = _collect(fit, queries, Measured(measurement), progress, "queries")
    return gradients if weights is None else gradients.combine(weights)


def _collect(
    fit: Fit, examples: Examples, target: Target, progress: Progress | None, note: str
) -> Gradients:
    """Each example's gradient of the target."""
    capture = fit.capture()
    collect = CollectGradients(capture.layers.values())
    batches = fit.batches(examples)
    sweep(capture, examples, [collect], target, batches=batches, progress=progress, note=note)
    return collect.finish()[0]


def inner_products(
    fit: Fit,
    prepared: Preconditioned,
    examples: Examples,
    *,
    by_layer: Sequence[str] = (),
    progress: Progress | None = None,
    note: str = "scores",
    precision: Precision = "model",
) -> PairScores:
    """Inner products of prepared queries with the gradients of every example, in one sweep."""
    pairs = PairScores(prepared, len(examples), by_layer=by_layer)
    _gather(fit, examples, [pairs], progress, note, precision)
    return pairs


def score(
    fit: Fit,
    prepared: Preconditioned,
    *,
    scale: float = -1.0,
    keep: int | None = None,
    group_by: str | None = None,
    by_layer: bool = False,
    among: Sequence[int] | None = None,
    precision: Precision = "model",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`scale` times the inner products of prepared queries with the training data, as fields of `Scores`.

    Args:
        fit: The fitted model.
        prepared: The queries.
        scale: Negative, as a loss gradient is what an example takes away.
        keep: Keep so many of the strongest on each side of each query while they stream by, and score those again
            for every query in the model's own precision; None keeps all.
        group_by: Metadata column to total by, over all examples.
        by_layer: Also tell layers apart.
        among: Numbers of the training examples to look among; the others are not touched, nor in the totals.
        precision: Of the products with the training data.
        progress: Called with (done, total, note).
    """
    layers = [layer.name for layer in fit.followed] if by_layer else []
    train = fit.train if among is None else fit.train.subset(_numbers(among, len(fit.train)))
    found: dict[str, Any] = {"n_train": len(fit.train), "layers": layers}
    names, group = groups_of(train.metadata, group_by) if group_by else ([], None)
    if keep is None:
        _check_size(prepared.n, len(train), len(layers))
        kept, found["kept"] = train, None if among is None else list(among)
    else:
        strongest = StrongestScores(prepared, keep, groups=group, by_layer=layers)
        _gather(fit, train, [strongest], progress, "scores", precision)
        found["kept"] = strongest.finish().tolist()
        kept, precision = train.subset(found["kept"]), "model"
        if among is not None:
            found["kept"] = [among[i] for i in found["kept"]]
        raised, lowered = (scale * strongest.totals + 0.0).flip(0).float()  # no -0.0
        if group is not None:
            counts = group.bincount(minlength=len(names)).tolist()
            found["totals"] = GroupTotals(
                column=str(group_by), names=names, counts=counts, raised=raised, lowered=lowered
            )
        if layers:
            totals = torch.stack([strongest.layer_totals[name] for name in layers])
            found["layer_totals"] = (abs(scale) * totals).float()
    pairs = inner_products(
        fit, prepared, kept, by_layer=layers, progress=progress, precision=precision
    )
    found |= {"values": scale * pairs.finish(), "train_ids": kept.ids, "metadata": kept.metadata}
    if layers:
        found["by_layer"] = scale * torch.stack([pairs.by_layer[name] for name in layers])
        found.setdefault("layer_totals", found["by_layer"].abs().sum(2))
    return found


def _numbers(among: Sequence[int], n: int) -> Sequence[int]:
    wrong = [i for i in among if not 0 <= i < n]
    if wrong or not len(among):
        what = f"there is no example {wrong[0]} among {n:,}" if wrong else "got none"
        raise ValueError(f"Expected numbers of training examples to score; {what}.")
    return among


def _check_size(n_queries: int, n_train: int, n_layers: int) -> None:
    need, free = 8 * n_queries * n_train * (2 + n_layers / 2), available_memory_bytes()
    if need > free:
        raise ValueError(
            f"All scores of {n_queries:,} queries and {n_train:,} training examples take {need / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free. Pass keep=100 to keep the strongest of each query while they stream by."
        )


def _gather(
    fit: Fit,
    examples: Examples,
    found: Sequence[Accumulator],
    progress: Progress | None,
    note: str,
    precision: Precision = "model",
    target: Target | None = None,
) -> None:
    """One sweep of the losses' gradients, or of another target's."""
    sweep(
        fit.capture().at(precision, examples),
        examples,
        found,
        target or Loss(),
        batches=fit.batches(examples),
        progress=progress,
        note=note,
    )


@dataclass(frozen=True, kw_only=True)
class Influence(Attributor):
    """Influence of training examples on a measurement, through a fit's curvature.

    Args:
        damping: A number (absolute), "0.1 relative" (to the mean eigenvalue of each layer), "weight_decay", or "auto".
        rank: Hold each query's matrices as this many outer products; None holds them whole.
        terms: Score with so many terms of a separable inverse, a cheap first stage for models with one position an
            example; None scores exactly.
        n_intervals: How many of the strongest examples on each side get an interval, for each query.
        confidence_level: Of the intervals, which reflect the sampling of labels and of the fit's examples: all of it
            for the dual form and for EK-FAC whose folds have eigenbases of their own, that of the eigenvalues
            alone for larger models.
        cg_steps: Refine the inverse by this many steps of conjugate gradients against the exact Gauss–Newton matrix.
        cg_tolerance: Relative residual at which that stops.
        keep: Keep so many of the strongest examples on each side of each query while scores stream by, in memory that
            does not grow with the training data; None keeps the whole matrix.
        precision: Of the products with training gradients: "bfloat16", about twice as fast where the hardware has it,
            "model" for that of the model, "auto" for whichever saves time.
    """

    paper: ClassVar[str] = "arXiv:2308.03296"

    damping: str | float | Damping = "auto"
    rank: int | None = None
    terms: int | None = None
    n_intervals: int = 10
    confidence_level: float = 0.95
    cg_steps: int = 0
    cg_tolerance: float = 1e-3
    keep: int | None = None
    precision: Precision = "auto"

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more; got {value}.")
        if not 0 < self.confidence_level < 1:
            raise ValueError(
                f"confidence_level must lie between 0 and 1; got {self.confidence_level}."
            )

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        control: Any = None,
        by_layer: bool = False,
        group_by: str | None = None,
        among: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example for every query, or of the strongest (`keep`).

        Args:
            fit: The fitted model.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about instead of single ones (group, query): sums for
                groups, +1 and -1 for a contrast.
            names: Names of those groups.
            control: Examples that were held out of training; the scores' significance is measured against theirs.
            by_layer: Also return each layer's part.
            group_by: Metadata column to total by; needed only with `keep`.
            among: Numbers of the training examples to score, without a look at the others; all when left out.
            progress: Called with (done, total, note).
        """
        started = time.perf_counter()
        examples = as_examples(queries)
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        damping = fit.damping(self.damping, exact=self.cg_steps > 0)
        prepared, refined = self._prepare(fit, fit.curvature, gradients, damping, progress)
        n = len(fit.train)
        found = score(
            fit,
            prepared,
            scale=-1 / n,
            keep=self.keep,
            group_by=group_by,
            by_layer=by_layer,
            among=among,
            precision=self.precision,
            progress=progress,
        )
        values = found.pop("values")
        facts = self._facts(fit, damping) | refined
        low, high = self._intervals(fit, gradients, damping, values, found.get("kept"), progress)
        held = None
        if control is not None:
            others = as_examples(control)
            pairs = inner_products(
                fit, prepared, others, progress=progress, note="held-out", precision=self.precision
            )
            held = -pairs.finish() / n
        facts["seconds"] = time.perf_counter() - started
        ids = examples.ids if weights is None else list(names or map(str, range(len(gradients))))
        return Scores(
            values=values.float(),
            query_ids=ids,
            measurement=measurement_name(
                fit.task.measurement_of if measurement is None else measurement
            ),
            low=low,
            high=high,
            significance=None if held is None else significance(values, held),
            control=None if held is None else held.float(),
            facts=facts,
            **found,
        )

    def _prepare(
        self,
        fit: Fit,
        curvature: Curvature,
        gradients: Gradients,
        damping: Damping,
        progress: Progress | None,
    ) -> tuple[Preconditioned, dict[str, Any]]:
        function = Inverse(damping)
        if self.cg_steps == 0:
            prepared = curvature.prepare(gradients, function, fit.n_rows, terms=self.terms)
            if self.rank is not None:
                prepared = Preconditioned(prepared.dense().low_rank(self.rank))
            return prepared, {}
        solved, facts = refine(
            fit,
            gradients,
            damping,
            curvature,
            steps=self.cg_steps,
            tolerance=self.cg_tolerance,
            progress=progress,
        )
        return Preconditioned(solved), facts

    def _intervals(
        self,
        fit: Fit,
        gradients: Gradients,
        damping: Damping,
        values: Tensor,
        kept: Sequence[int] | None,
        progress: Progress | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Jackknife intervals of the strongest examples: the curvature with one fold left out each time."""
        k = min(self.n_intervals, values.shape[1])
        if k == 0 or self.cg_steps or fit.curvature.n_replicates == 0:
            return None, None
        ends = torch.cat([values.topk(k).indices, values.topk(k, largest=False).indices], dim=1)
        chosen = ends.unique()
        some = fit.train.subset([c if kept is None else kept[c] for c in chosen.tolist()])
        scores = -_replicate_scores(fit, gradients, Inverse(damping), some, progress) / len(
            fit.train
        )
        low, high = jackknife_interval(
            values[:, chosen], scores, confidence_level=self.confidence_level
        )
        full = torch.full((2, *values.shape), float("nan"))
        wanted = torch.zeros_like(values, dtype=torch.bool).scatter_(1, ends, True)
        full[0][:, chosen], full[1][:, chosen] = low.float(), high.float()
        full[:, ~wanted] = float("nan")
        return full[0], full[1]

    def _facts(self, fit: Fit, damping: Damping) -> dict[str, Any]:
        return {
            "method": "influence",
            "papers": [self.paper, "arXiv:1703.04730"],
            "curvature": fit.facts["options"]["curvature"],
            "damping": vars(damping),
            "damping_ratio": fit.damping_ratio(damping),
            "precision": fit.capture().at(self.precision, fit.train).precision,
            "n_train": len(fit.train),
            "made_from": fit.made_from,
            "options": {k: v for k, v in vars(self).items() if k != "damping"},
        }

    def tokens(
        self,
        fit: Fit,
        queries: Any,
        chosen: Sequence[int],
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Float[Tensor, "asked chosen pos"], Float[Tensor, "asked chosen"]]:
        """What each position of some training examples carries of their scores, and what no position carries.

        A position's part is the sum over layers of its own outer product with the preconditioned query; the parts of
        all positions, and the rest, add up to the score.
        """
        gradients = query_gradients(fit, as_examples(queries), measurement, weights)
        prepared, _ = self._prepare(
            fit,
            fit.curvature,
            gradients,
            fit.damping(self.damping, exact=self.cg_steps > 0),
            progress,
        )
        some = fit.train.subset(chosen)
        width = max(some.lengths) if some.lengths else 1
        parts = TokenScores(prepared, len(some), width)
        _gather(fit, some, [parts], progress, "tokens")
        n = len(fit.train)
        return -parts.finish() / n, -parts.elsewhere / n

    def on_queries(
        self,
        fit: Fit,
        queries: Any,
        chosen: Sequence[int],
        *,
        measurement: Measurement | None = None,
        progress: Progress | None = None,
    ) -> Float[Tensor, "query chosen"]:
        """Scores of a few training examples for many queries: the examples' gradients are preconditioned here.

        The same numbers as `attribute` gives, since the inverse is symmetric; cheaper where the queries are many and
        short, such as the single tokens of a completion. Conjugate gradients have no part in it.
        """
        examples, n = as_examples(queries), len(fit.train)
        rows = sum(examples.lengths) if examples.lengths else len(examples)
        inverse, found = Inverse(fit.damping(self.damping)), []
        for start in range(0, len(chosen), _AT_ONCE):
            some = fit.train.subset(chosen[start : start + _AT_ONCE])
            gradients = _collect(fit, some, Loss(), progress, "effects")
            prepared = fit.curvature.prepare(gradients, inverse, rows)
            pairs = PairScores(prepared, len(examples))
            target = Measured(measurement)
            _gather(fit, examples, [pairs], progress, "effects", target=target)
            found.append(-pairs.finish().mT / n)
        return torch.cat(found, dim=1)

    def self_influence(
        self, fit: Fit, *, progress: Progress | None = None
    ) -> Float[Tensor, " train"]:
        r"""$\frac1N \nabla\ell_n^\top (C + \rho I)^{-1} \nabla\ell_n$: how far each example lowers its own loss.

        Never negative. Large for examples that nothing else in the data supports: mislabels, outliers, memorized text.
        """
        damping, n = fit.damping(self.damping), len(fit.train)
        own = self_scores(fit.curvature, Inverse(damping), n, fit.followed)
        _gather(fit, fit.train, [own], progress, "self", self.precision)
        return (own.finish() / n).float()


def _replicate_scores(
    fit: Fit, gradients: Gradients, function: Inverse, some: Examples, progress: Progress | None
) -> Float[Tensor, "replicate query some"]:
    """Inner products under the curvature with each fold left out in turn, in one sweep."""
    replicates = fit.curvature.replicates()
    if isinstance(fit.curvature, Layerwise) and not fit.curvature.others:
        spectra = {
            name: [r.spectra()[name] for r in replicates] for name in fit.curvature.eigenvalues
        }
        factors = {
            name: torch.stack([function(e, mean_of(e)) for e in each])
            for name, each in spectra.items()
        }
        found = [ReplicateScores(gradients, fit.curvature.bases, factors, len(some))]
    else:
        found = [
            PairScores(r.prepare(gradients, function, len(some)), len(some)) for r in replicates
        ]
    _gather(fit, some, found, progress, "intervals")
    return torch.cat([f.finish().reshape(-1, len(gradients), len(some)) for f in found])


def refine(
    fit: Fit,
    gradients: Gradients,
    damping: Damping,
    curvature: Curvature | None = None,
    *,
    steps: int = 20,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> tuple[Gradients, dict[str, Any]]:
    """Solve (C + ρ I) x = g with the exact Gauss–Newton matrix, preconditioned by a fitted curvature.

    Args:
        fit: The fitted model.
        gradients: Right-hand sides.
        damping: ρ; relative damping is taken of the mean over all layers.
        curvature: The preconditioner, the fit's own when left out.
        steps: Most products with the exact matrix; each is a pass over the data for every 16 vectors.
        tolerance: Relative residual at which a system is solved.
        progress: Called with (done, total, note).

    Returns:
        The solutions, and the facts: steps taken and largest residual.
    """
    curvature = fit.curvature if curvature is None else curvature
    shape = gradients.dense()
    mean = curvature.mean_eigenvalue
    rho = damping.absolute(mean)
    product = GaussNewtonProduct(fit.capture(), fit.train, fit.batches(fit.train))
    inverse = Inverse(Damping(rho))

    def exact(x: Tensor) -> Tensor:
        return product(shape.from_matrix(x)).to_matrix() + rho * x

    def precondition(x: Tensor) -> Tensor:
        return curvature.apply(shape.from_matrix(x), inverse).to_matrix()

    def report(step: int, residual: float) -> None:
        if progress is not None:
            progress(step, steps, f"conjugate gradients, residual {residual:.1e}")

    solution = conjugate_gradients(
        exact,
        shape.to_matrix(),
        precondition=precondition,
        steps=steps,
        tolerance=tolerance,
        progress=report,
    )
    facts = {"cg_steps": solution.steps, "cg_residual": float(solution.residual.max())}
    if facts["cg_residual"] > tolerance:
        warnings.warn(
            f"Conjugate gradients stopped after {solution.steps} steps with a relative residual of "
            f"{facts['cg_residual']:.2g} (asked: {tolerance:.2g}); half-solved systems can rank worse than none. "
            "Allow more steps, raise the damping, or use Dual(), which is exact.",
            stacklevel=2,
        )
    return shape.from_matrix(solution.x), facts
