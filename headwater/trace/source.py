r"""SOURCE: influence through the whole of training, from a few checkpoints.

Bae, Lin, Lorraine and Grosse (2024), "Training Data Attribution via Approximate Unrolled Differentiation",
arXiv:2405.12186.

Training is cut into L segments. Within one of $K_l$ steps at rates $\eta_k$ the Hessian $H_l$ and each example's
gradient $g_l$ are held at their means over the segment's checkpoints. With the horizon
$h_l = \sum_k \eta_k / (1 - \mu)$,

$$\tau(q, n) = -\frac1N \nabla f_q^\top \sum_l e^{-h_L H_L} \cdots e^{-h_{l+1} H_{l+1}}\;
(I - e^{-h_l H_l})\, H_l^{-1} g_l(n),$$

the change of a measurement at the end, expected over orders of the examples, when example n counts once more. Nothing
is damped: flat directions answer with $h_l$, sharp ones with $1/\lambda$. H is the Hessian of what the steps descended:
the mean loss of the segment's stage, plus weight decay. Examples that a stage did not hold get nothing from it.

Adam descends plainly in the coordinates $P^{-1/2} \theta$ with $P = 1 / (\sqrt{\hat v} + \epsilon)$, held at the mean
of $\hat v$ over the checkpoints. The curvature is measured there, of gradients $P^{1/2} g$. For Kronecker forms
$\hat v$ is taken as a product of rows and columns; dense and dual curvature take it as it is.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Capture, Progress, sweep
from headwater.core.curvature import (
    EKFAC,
    KFAC,
    METHODS,
    Curvature,
    CurvatureMethod,
    FitContext,
    Identity,
    Preconditioned,
)
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit, fits_at
from headwater.core.gradients import Gradients
from headwater.core.scaling import (
    Scale,
    ScaledCapture,
    exact_scale,
    scaled,
    separable_scale,
)
from headwater.core.scores import Scores
from headwater.core.scoring import PairScores
from headwater.core.target import Loss
from headwater.core.task import Measurement
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import query_gradients
from headwater.training.trajectory import Segment, StageRecord, Trajectory

_SAME = 1e-3  # of the parameters' norm: between the fit's model and the end of the run
_GONE = 1e-6  # what is left of a direction that a segment has forgotten


def propagation(eigenvalues: Float[Tensor, "*layer"], horizon: float) -> Float[Tensor, "*layer"]:
    r"""What a segment leaves of an earlier change of the parameters, $e^{-h\lambda}$."""
    return torch.exp(-horizon * eigenvalues.clamp(min=0))


def response(eigenvalues: Float[Tensor, "*layer"], horizon: float) -> Float[Tensor, "*layer"]:
    r"""How far a segment moves under a unit of constant gradient, $(1 - e^{-h\lambda}) / \lambda$, which is h at 0."""
    x = horizon * eigenvalues.clamp(min=0)
    safe = torch.where(x > 0, x, 1.0)
    return horizon * torch.where(x > 0, -torch.expm1(-x) / safe, 1.0)


Rates = tuple[tuple[float, int], ...]  # learning rates, and the steps made at each


def discrete_propagation(
    eigenvalues: Float[Tensor, "*layer"], rates: Rates
) -> Float[Tensor, "*layer"]:
    r"""The same for single steps, $\prod_k (1 - \eta_k \lambda)$."""
    sign, log = _log_product(eigenvalues.clamp(min=0), rates)
    return sign * log.exp()


def discrete_response(
    eigenvalues: Float[Tensor, "*layer"], rates: Rates
) -> Float[Tensor, "*layer"]:
    r"""The same for single steps, $\sum_k \eta_k \prod_{j>k} (1 - \eta_j \lambda)$: one minus the product, over λ."""
    eigenvalues = eigenvalues.clamp(min=0)
    sign, log = _log_product(eigenvalues, rates)
    moved = torch.where(sign > 0, -torch.expm1(log), 1 + log.exp())
    safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
    return torch.where(eigenvalues > 0, moved / safe, sum(rate * n for rate, n in rates))


def _log_product(eigenvalues: Tensor, rates: Rates) -> tuple[Tensor, Tensor]:
    r"""Sign and logarithm of $\prod_k (1 - \eta_k \lambda)$, exact to the last digit near zero."""
    sign, log = torch.ones_like(eigenvalues), torch.zeros_like(eigenvalues)
    for rate, n in rates:
        x = rate * eigenvalues
        log = log + n * torch.where(x < 1, torch.log1p(-x.clamp(max=1)), (x - 1).abs().log())
        sign = torch.where((x > 1) & (n % 2 == 1), -sign, sign)
    return sign, log


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What a segment of training does to a change of the parameters along an eigendirection of the mean loss.

    Args:
        horizon: Sum of its learning rates over one minus the momentum.
        weight: Weight of the mean loss in what the steps descended: 1 where they divided by their examples.
        decay: Weight decay, which adds to every eigenvalue.
        rates: Learning rates, to follow single steps; none for the exponential of their sum.
    """

    horizon: float
    weight: float = 1.0
    decay: float = 0.0
    rates: Rates = ()

    def eigenvalues(self, s: Tensor) -> Tensor:
        """Eigenvalues of what the steps descended, from those of the mean loss."""
        return self.weight * s.clamp(min=0) + self.decay


class Propagation(Dynamics):
    """What the segment leaves of what came before."""

    def __call__(self, s: Tensor, mean: float) -> Tensor:
        if self.rates:
            return discrete_propagation(self.eigenvalues(s), self.rates)
        return propagation(self.eigenvalues(s), self.horizon)


class Response(Dynamics):
    """What the segment makes of an example's gradient."""

    def __call__(self, s: Tensor, mean: float) -> Tensor:
        if self.rates:
            return discrete_response(self.eigenvalues(s), self.rates)
        return response(self.eigenvalues(s), self.horizon)


@dataclass(frozen=True, kw_only=True)
class Source(Attributor):
    """Differentiate through training, one stationary segment at a time.

    Args:
        segments: Stretches of training that are treated as stationary; no fewer than the run's stages.
        curvature: Form of each segment's curvature: that of the fit, with its options ("fit"), or a name such as
            "ekfac" or "dual".
        fast: Take a segment's curvature and gradients once, at the mean of its checkpoints' parameters (FAST-SOURCE),
            and not their means over the checkpoints.
        form: "continuous" as in the paper, or "discrete": single steps of plain gradient descent, (1 - ηλ)^K.
    """

    paper: ClassVar[str] = "arXiv:2405.12186"

    segments: int = 3
    curvature: str = "fit"
    fast: bool = False
    form: Literal["continuous", "discrete"] = "continuous"

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        trajectory: Trajectory | str | Path,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example, the expectation over orders of the examples.

        Args:
            fit: The model at the end of the run, and the data of all its stages.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            trajectory: The record of the run with its checkpoints, or its folder; for Adam with the optimizer's state.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: The record does not lead to the fit's model, or has too few checkpoints.
        """
        examples, record = as_examples(queries), _read(fit, trajectory)
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        total, told = torch.zeros(len(gradients), len(fit.train), dtype=torch.float64), []
        for values, facts in self._backwards(fit, gradients, record, progress):
            total += values
            told.append(facts)
        return to_scores(
            self,
            fit,
            examples,
            total,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
            facts={"curvature": self.told_curvature(fit), "segments": told[::-1]},
        )

    def by_segment(
        self,
        fit: Fit,
        queries: Any,
        *,
        trajectory: Trajectory | str | Path,
        measurement: Measurement | None = None,
        progress: Progress | None = None,
    ) -> Float[Tensor, "segment query train"]:
        """What each segment of training, first to last, adds to the scores."""
        told = self.told_by_segment(
            fit, queries, trajectory=trajectory, measurement=measurement, progress=progress
        )
        return told[0]

    def told_by_segment(
        self,
        fit: Fit,
        queries: Any,
        *,
        trajectory: Trajectory | str | Path,
        measurement: Measurement | None = None,
        progress: Progress | None = None,
    ) -> tuple[Float[Tensor, "segment query train"], list[dict[str, Any]]]:
        """What each segment adds to the scores, and what is worth telling of it."""
        record = _read(fit, trajectory)
        gradients = query_gradients(fit, as_examples(queries), measurement, None, progress)
        parts = list(self._backwards(fit, gradients, record, progress))[::-1]
        return torch.stack([values for values, _ in parts]), [facts for _, facts in parts]

    def _backwards(
        self, fit: Fit, v: Gradients, record: Trajectory, progress: Progress | None
    ) -> Iterator[tuple[Float[Tensor, "query train"], dict[str, Any]]]:
        """What each segment adds, last first, and what is worth telling of it."""
        method, number = self._method(fit), {name: i for i, name in enumerate(fit.train.ids)}
        segments = record.segments(self.segments)
        for k, segment in reversed(list(enumerate(segments))):
            stage = record.stages[segment.stage]
            seen = sorted(number[name] for name in record.examples(stage.start, stage.stop))
            data = fit.train if len(seen) == len(fit.train) else fit.train.subset(seen)
            captures, scales = self._captures(fit, record, segment, method)
            context = FitContext(
                captures[0], data, fit.batches(data), progress, others=captures[1:]
            )
            curvature = method.fit(context)
            dynamics = self._dynamics(record, segment, stage)
            asked = scaled(v, scales)
            n_rows = sum(data.lengths) if data.lengths else len(data)
            prepared = curvature.prepare(asked, Response(**vars(dynamics)), n_rows)
            facts = _watch(curvature, dynamics, record, segment, before=k)
            values = torch.zeros(len(v), len(fit.train), dtype=torch.float64)
            products = _mean_products(fit, captures, prepared, data, progress)
            values[:, seen] = -dynamics.weight / len(seen) * products
            yield values, facts
            if k:
                propagated = curvature.apply(asked, Propagation(**vars(dynamics)))
                v = scaled(propagated, scales, inverse=True)

    def told_curvature(self, fit: Fit) -> dict[str, Any]:
        """The form of each segment's curvature with its options."""
        method = self._method(fit)
        return {"kind": method.kind} | vars(method)

    def _method(self, fit: Fit) -> CurvatureMethod:
        """The form of the curvature, without what only intervals need."""
        options: dict[str, Any] = {"kind": self.curvature}
        if self.curvature == "fit":
            options = dict(fit.facts["options"]["curvature"])
        kind = options.pop("kind")
        if kind not in METHODS or METHODS[kind] is Identity:
            raise ValueError(
                f"SOURCE needs the curvature of each segment, and has {kind!r}; pass curvature='ekfac' or 'dual', "
                f"or a fit with one of {', '.join(sorted(METHODS.keys() - {'identity'}))}."
            )
        if hasattr(METHODS[kind], "tolerance"):
            options["tolerance"] = None
        return METHODS[kind](**options | ({"folds": 1} if kind != "dense" else {}))

    def _captures(
        self, fit: Fit, record: Trajectory, segment: Segment, method: CurvatureMethod
    ) -> tuple[list[Capture], dict[str, Scale]]:
        """The model at the segment's checkpoints, or at their mean, and the scales of an adaptive optimizer."""
        checkpoints = [record.load_checkpoint(i) for i in segment.checkpoints]
        if self.fast:
            checkpoints = [_mean(checkpoints)]
        captures: list[Capture] = [each.capture() for each in fits_at(fit, checkpoints)]
        scales = _scales(fit, record, segment, separable=isinstance(method, KFAC | EKFAC))
        if scales:
            captures = [ScaledCapture(capture, scales) for capture in captures]
        return captures, scales

    def _dynamics(self, record: Trajectory, segment: Segment, stage: StageRecord) -> Dynamics:
        rates = record.lr[segment.start : segment.stop]
        if self.form == "discrete" and stage.momentum:
            raise ValueError(
                f"The discrete form follows single steps without momentum; the run's is {stage.momentum}. Use "
                "form='continuous', which folds it into the learning rate."
            )
        steps = zip(
            rates,
            record.batches[segment.start : segment.stop],
            record.normalizers[segment.start : segment.stop],
            strict=True,
        )
        weight = sum(rate * len(batch) / n for rate, batch, n in steps) / max(sum(rates), 1e-30)
        decay = stage.weight_decay
        if decay and stage.betas and not _decoupled(stage):
            warnings.warn(
                f"{stage.optimizer} adds its weight decay to the gradient it scales; SOURCE leaves it out there.",
                stacklevel=2,
            )
            decay = 0.0
        return Dynamics(
            horizon=segment.horizon,
            weight=weight,
            decay=decay,
            rates=tuple(Counter(rates).items()) if self.form == "discrete" else (),
        )


def _read(fit: Fit, trajectory: Trajectory | str | Path) -> Trajectory:
    """The record of a run, if the run leads to the fit's model.

    Raises:
        ValueError: It does not; the message says what differs.
    """
    given = isinstance(trajectory, Trajectory)
    record: Trajectory = trajectory if given else Trajectory.load(trajectory)  # type: ignore
    steps = [each.step for each in record.checkpoints]
    if steps != sorted(set(steps)) or not steps:
        raise ValueError(
            f"SOURCE needs checkpoints in the order of their steps; the record has them at {steps}."
        )
    if unknown := record.examples() - set(fit.train.ids):
        raise ValueError(
            f"The run saw {len(unknown)} examples that the fit does not have, such as {min(unknown)!r}; fit on the "
            "data of all its stages, under the same ids."
        )
    last, named = record.load_checkpoint(-1), dict(fit.model.named_parameters())
    followed = {name for layer in fit.followed for name in layer.parameters}
    if fixed := sorted(followed - last.keys()):
        raise ValueError(
            f"The fit follows {fixed[0]!r}, which the run did not train; fit with skip={fixed[:1]}."
        )
    if steps[-1] == record.steps:
        gap = sum(
            float((named[n].detach().cpu() - last[n]).double().square().sum()) for n in followed
        )
        norm = sum(float(last[n].double().square().sum()) for n in followed)
        if gap > _SAME**2 * norm:
            raise ValueError(
                f"The run's last checkpoint is {(gap / norm) ** 0.5:.2g} of its norm away from the fit's model; pass "
                "the record of the run that made this model."
            )
    return record


def _mean(checkpoints: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([c[n] for c in checkpoints]).mean(0) for n in checkpoints[0]}


def _decoupled(stage: StageRecord) -> bool:
    return stage.optimizer.lower().startswith("adamw")


def _scales(fit: Fit, record: Trajectory, segment: Segment, *, separable: bool) -> dict[str, Scale]:
    r"""$P^{1/2}$ of Adam for every layer, from second moments with their bias corrected; none for gradient descent."""
    stage = record.stages[segment.stage]
    if stage.optimizer.lower().startswith("sgd"):
        return {}
    if not stage.optimizer.lower().startswith("adam") or len(stage.betas) != 2:
        raise ValueError(
            f"SOURCE knows gradient descent with momentum, Adam and AdamW; the run used {stage.optimizer}."
        )
    squares = []
    for i in segment.checkpoints:
        count = record.checkpoints[i].step - stage.start
        moment = record.load_optimizer(i)["square"]
        squares.append({n: v / (1 - stage.betas[1] ** count) for n, v in moment.items()})
    mean, scales = _mean(squares), {}
    for layer in fit.followed:
        each = layer.from_parameters({n: mean[n][None] for n in layer.parameters})[0]
        each = each + stage.eps_root
        if separable:
            scales[layer.name] = separable_scale(each, stage.eps)
        else:
            scales[layer.name] = exact_scale((each.sqrt() + stage.eps).rsqrt())
    return scales


def _mean_products(
    fit: Fit,
    captures: Sequence[Capture],
    prepared: Preconditioned,
    data: Examples,
    progress: Progress | None,
) -> Float[Tensor, "query train"]:
    """Inner products with the mean of each example's gradients over the checkpoints."""
    total = torch.zeros(prepared.n, len(data), dtype=torch.float64)
    for capture in captures:
        pairs = PairScores(prepared, len(data))
        batches = fit.batches(data)
        sweep(capture, data, [pairs], Loss(), batches=batches, progress=progress, note="scores")
        total += pairs.finish()
    return total / len(captures)


def _watch(
    curvature: Curvature, dynamics: Dynamics, record: Trajectory, segment: Segment, *, before: int
) -> dict[str, Any]:
    """Numbers worth telling of a segment; warns where the approximation has nothing to stand on."""
    spectrum = torch.cat([s.flatten().double() for s in curvature.spectra().values()])
    left = Propagation(**vars(dynamics))(spectrum, 0.0)
    gone = float((left.abs() < _GONE).double().mean())
    largest = float(dynamics.eigenvalues(spectrum).max())
    step = max(record.lr[segment.start : segment.stop], default=0.0) * largest
    if step > _limit(record.stages[segment.stage]):
        warnings.warn(
            f"Steps {segment.start} to {segment.stop} have a learning rate times largest eigenvalue of {step:.3g}, "
            "where descent is unstable: is the curvature that of the loss, as the record's steps divided it? "
            "Scores of earlier segments are not to be trusted.",
            stacklevel=2,
        )
    if before and gone > 0.99:
        warnings.warn(
            f"Steps {segment.start} to {segment.stop} forget {100 * gone:.1f} % of all directions: what came before "
            "them adds next to nothing to the scores.",
            stacklevel=2,
        )
    return {
        "start": segment.start,
        "stop": segment.stop,
        "stage": segment.stage,
        "checkpoints": [record.checkpoints[i].step for i in segment.checkpoints],
        "largest_step": step,
        "forgotten": gone,
    } | {name: value for name, value in vars(dynamics).items() if name != "rates"}


def _limit(stage: StageRecord) -> float:
    """Learning rate times eigenvalue above which descent along a velocity or a running mean is unstable."""
    if not stage.betas:
        return 2 * (1 + stage.momentum)
    return 2 * (1 + stage.betas[0]) / (1 - stage.betas[0])
