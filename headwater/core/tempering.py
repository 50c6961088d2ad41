r"""Classifiers at a temperature: softer labels for the Fisher information, and gradients that do not vanish.

A trained classifier is nearly certain, so gradients of $-\log \operatorname{softmax}(z)_y$ are nearly zero for the
class it predicts. At temperature τ labels are drawn from $p_\tau = \operatorname{softmax}(z / \tau)$ and the loss is

$$\ell_\tau(z, y) = -\tau \log \operatorname{softmax}(z / \tau)_y, \qquad
\frac{\partial \ell_\tau}{\partial z} = p_\tau - e_y .$$

The factor τ keeps the gradient of order one however high the temperature is, where that of the plain loss would fall
as $1/\tau$ and its square leave the range of half precision. The second moment of these gradients under labels drawn
from the model is $J^\top (\operatorname{diag} p_\tau - p_\tau p_\tau^\top) J$, which is $\tau^2$ times the Fisher
information of the distribution $p_\tau$: ratios of the two, such as self-influences, are those of the plain loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwater.core.capture import Capture, Progress, sweep
from headwater.core.curvature import CurvatureMethod
from headwater.core.curvature.base import SpectralFunction
from headwater.core.examples import Examples
from headwater.core.fingerprint import fingerprint_json, fingerprint_tensors
from headwater.core.fit import Fit
from headwater.core.fit import fit as fit_curvature
from headwater.core.prediction import Categorical, LabelRows, Prediction
from headwater.core.scoring import self_scores
from headwater.core.target import Loss
from headwater.core.task import Task


@dataclass(frozen=True)
class Tempered(Categorical):
    """A categorical distribution at a temperature, its loss multiplied by the temperature.

    Args:
        logits: Unnormalized log-probabilities at temperature 1.
        labels: Classes, -100 where a position is not scored.
        temperature: τ.
    """

    temperature: float = 1.0

    @property
    def softened(self) -> Categorical:
        """The same distribution, its logits divided by the temperature."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        return Categorical(logits / self.temperature, self.labels)

    def token_loss(self) -> Float[Tensor, "batch pos"]:
        return self.temperature * self.softened.token_loss()

    def margin(self) -> Float[Tensor, " batch"]:
        return self.softened.margin()

    def sample(self, keys: Int[Tensor, " batch"], seed: int) -> "Tempered":
        return self.with_target(self.softened.sample(keys, seed).labels)  # type: ignore[return-value]

    def rows(self, cut: float) -> LabelRows:
        return self.softened.rows(cut)

    def hessian_product(self, tangent: Tensor) -> Tensor:
        return self.softened.hessian_product(tangent)  # the gradients' second moment: τ times ∂²ℓ


@dataclass(frozen=True, kw_only=True)
class AtTemperature(Task):
    """Another task's classifier at a temperature.

    Args:
        base: The task the model was trained for.
        temperature: τ.

    Raises:
        ValueError: The temperature is not positive and finite.

    Example:
        >>> from headwater.core.task import Classification
        >>> AtTemperature(base=Classification(), temperature=1000.0).name
        'Classification at temperature 1000'
    """

    base: Task
    temperature: float

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"The temperature must be positive and finite; got {self.temperature}. High ones, such as 1000, soften."
            )

    def predict(self, model: nn.Module, batch: Any) -> Tempered:
        found = self.base.predict(model, batch)
        if not isinstance(found, Categorical):
            raise ValueError(
                f"Only a distribution over classes has a temperature; {self.base.name} predicts {type(found).__name__}."
            )
        return Tempered(found.logits, found.labels, self.temperature)

    def masks(self, batch: Any) -> dict[str, Tensor]:
        return self.base.masks(batch)

    @property
    def name(self) -> str:
        return f"{self.base.name} at temperature {self.temperature:g}"


def temperature_of(task: Task) -> float:
    """The temperature of a task: 1 unless it is `AtTemperature`."""
    return task.temperature if isinstance(task, AtTemperature) else 1.0


def untempered(task: Task) -> Task:
    """The task the model was trained for."""
    return task.base if isinstance(task, AtTemperature) else task


def passes_of(fit: Fit, n_classes: int) -> int:
    """Backward passes over the training data that a fit's curvature took (at most, where labels were cut)."""
    made = fit.facts["options"]["curvature"]
    sweeps = 2 if made["kind"] == "ekfac" else 1
    return sweeps * (n_classes if made.get("fisher") == "exact" else made.get("draws", 1))


def fit_at_temperature(
    fit: Fit,
    temperature: float,
    *,
    curvature: CurvatureMethod | str = "ekfac",
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """The fit of the same model, layers and data at a temperature.

    Its eigenvalues are those of the scaled gradients: damping that is relative to their mean does not depend on the
    temperature's scale, and an absolute damping ρ of the plain loss is τ²ρ here.

    Args:
        fit: A fit of the model, of any curvature.
        temperature: τ.
        curvature: A curvature whose labels come from the model ("mc" or "exact"); given labels are no Fisher.
        folder: Where to save it, as for `headwater.fit`; the saved fit remembers the temperature.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The task has no classes, or the curvature is that of the given labels.
    """
    if getattr(curvature, "fisher", None) == "empirical":
        raise ValueError(
            "A fit at a temperature needs labels drawn from the model; got fisher='empirical', the given labels. Use "
            "'mc' or 'exact'."
        )
    task = untempered(fit.task)
    fit.capture()  # refuses a model that was changed
    options: dict[str, Any] = fit.facts.get("options", {})
    return fit_curvature(
        fit.model,
        fit.train,
        AtTemperature(base=task, temperature=temperature),
        curvature=curvature,
        layers=options.get("layers", "trainable"),
        skip=options.get("skip", ()),
        folder=folder,
        batch_size=fit.batch_size,
        batch_tokens=fit.batch_tokens,
        progress=progress,
    )


class EveryLabel(Examples):
    """Each example under several labels: row i·k + j is example i with the j-th of its k labels.

    A batch is the pair of the base's batch and the labels, for `GivenLabels`.

    Args:
        base: The examples; their own labels are not looked at.
        labels: The labels of each example.
    """

    def __init__(self, base: Examples, labels: Int[Tensor, "n label"]):
        if len(labels) != len(base):
            raise ValueError(
                f"Expected labels of {len(base)} examples; got those of {len(labels)}."
            )
        self.base, self.labels, self.n_labels = base, labels, labels.shape[1]
        self.ids = [
            f"{name} as {label}"
            for name, row in zip(base.ids, labels.tolist(), strict=True)
            for label in row
        ]
        self.metadata = {}
        if base.lengths is not None:
            self.lengths = [n for n in base.lengths for _ in range(self.n_labels)]
        self._check()

    def batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        index = torch.as_tensor(indices)
        which, column = index // self.n_labels, index % self.n_labels
        return self.base.batch(which.tolist()), self.labels[which, column]

    def fingerprint(self) -> str:
        return fingerprint_json(
            [self.base.fingerprint(), fingerprint_tensors([("labels", self.labels)])]
        )


@dataclass(frozen=True, kw_only=True)
class GivenLabels(Task):
    """Another task on batches of `EveryLabel`: the prediction is scored on the labels that come with the batch.

    Args:
        base: The task.
    """

    base: Task

    def predict(self, model: nn.Module, batch: Any) -> Prediction:
        data, labels = batch
        return self.base.predict(model, data).with_target(labels[:, None])

    def masks(self, batch: Any) -> dict[str, Tensor]:
        return self.base.masks(batch[0])

    @property
    def name(self) -> str:
        return f"{self.base.name} on given labels"


def label_norms(
    fit: Fit,
    examples: Examples,
    labels: Int[Tensor, "n label"],
    function: SpectralFunction,
    *,
    temperature: float | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "n label"]:
    r"""$g_y^\top f(C)\,g_y$ for the gradient of each example's loss under each of several labels, in one sweep.

    Args:
        fit: The fitted model.
        examples: The examples.
        labels: The labels to try on each.
        function: f, a function of the curvature's eigenvalues.
        temperature: Of the loss, which is multiplied by it; that of the fit when left out.
        progress: Called with (done, total, note).
    """
    rows = EveryLabel(examples, labels)
    own = self_scores(fit.curvature, function, len(rows), fit.followed)
    tau = temperature_of(fit.task) if temperature is None else temperature
    task = GivenLabels(base=AtTemperature(base=untempered(fit.task), temperature=tau))
    bound = Capture(fit.capture().model, task, fit.followed)
    batches = fit.batches(rows)
    sweep(bound, rows, [own], Loss(), batches=batches, progress=progress, note="labels")
    return own.finish().view(labels.shape)
