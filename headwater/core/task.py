"""Tasks bind a model to its loss and to the measurement that a query asks about."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwater.core.prediction import IGNORE, Categorical, Gaussian, Prediction

Measurement = str | Callable[[Prediction], Tensor]


def loss(prediction: Prediction) -> Float[Tensor, " batch"]:
    """Training loss of the example, summed over positions (nats)."""
    return prediction.loss()


def log_prob(prediction: Prediction) -> Float[Tensor, " batch"]:
    """Log-probability of the labels, summed over positions (nats)."""
    return -prediction.loss()


def margin(prediction: Prediction) -> Float[Tensor, " batch"]:
    """Log-odds of the labels against all others (nats)."""
    if not isinstance(prediction, Categorical):
        raise ValueError("The margin needs classes; this task predicts real numbers. Use 'loss'.")
    return prediction.margin()


MEASUREMENTS: dict[str, Callable[[Prediction], Tensor]] = {
    "loss": loss,
    "log_prob": log_prob,
    "margin": margin,
}


def measurement_function(measurement: Measurement) -> Callable[[Prediction], Tensor]:
    """The function behind a measurement's name.

    Raises:
        ValueError: There is no measurement of that name.
    """
    if callable(measurement):
        return measurement
    if measurement not in MEASUREMENTS:
        raise ValueError(
            f"Expected a measurement among {', '.join(MEASUREMENTS)}; got {measurement!r}."
        )
    return MEASUREMENTS[measurement]


def measurement_name(measurement: Measurement) -> str:
    """What a result calls a measurement."""
    if isinstance(measurement, str):
        return measurement
    return getattr(measurement, "__name__", "custom")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What was trained and what is asked.

    Args:
        measurement_of: What queries ask about: "loss", "log_prob", "margin", or a function from the
            batch's `Prediction` to one number an example.
    """

    measurement_of: Measurement = "loss"

    @abstractmethod
    def predict(self, model: nn.Module, batch: Any) -> Prediction:
        """Run the model on a batch."""

    def loss(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        """Training loss of each example, summed over its tokens (nats)."""
        return self.predict(model, batch).loss()

    def token_loss(self, model: nn.Module, batch: Any) -> Float[Tensor, "batch pos"]:
        """Training loss of each token (nats)."""
        return self.predict(model, batch).token_loss()

    def measurement(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        """What a query asks about, one number an example."""
        return measurement_function(self.measurement_of)(self.predict(model, batch))

    def masks(self, batch: Any) -> dict[str, Bool[Tensor, "batch pos"]]:
        """Real (unpadded) positions, by the prefix of the module names they hold for ("" for all)."""
        return {}

    @property
    def name(self) -> str:
        """What identifies the task in a manifest."""
        return type(self).__name__


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Cross-entropy over classes.

    Batches are `(inputs, labels)` tuples, or dictionaries with `labels` beside the model's arguments; the
    model returns logits (batch, class), or an object that carries them as `.logits`.

    Example:
        >>> model, x, y = nn.Linear(2, 3), torch.zeros(1, 2), torch.tensor([1])
        >>> Classification().loss(model, (x, y)).shape
        torch.Size([1])
    """

    def predict(self, model: nn.Module, batch: Any) -> Categorical:
        outputs, labels = _call(model, batch)
        if outputs.ndim != 2:
            raise ValueError(
                f"Expected logits (batch, class); the model returned {tuple(outputs.shape)}."
            )
        labels = labels.reshape(-1).long()
        check_labels(labels, outputs.shape[1])
        return Categorical(outputs[:, None], labels[:, None])


class LabelError(ValueError):
    """A label that the model has no output for.

    Args:
        row: Where it stands in the batch.
        label: The label.
        n_outputs: How many outputs the model has.
        name: What the example is called, where that is known.
    """

    def __init__(self, row: int, label: int, n_outputs: int, name: str | None = None):
        which = f"row {row} of the batch" if name is None else f"example {name}"
        super().__init__(
            f"The label of {which} is {label}, but the model has {n_outputs} outputs, for labels 0 to "
            f"{n_outputs - 1}. Number the classes from 0, leave out examples without a class, or give "
            "the model an output for every class."
        )
        self.row, self.label, self.n_outputs = row, label, n_outputs

    def named(self, name: str) -> "LabelError":
        """The same error with the name of its example."""
        return LabelError(self.row, self.label, self.n_outputs, name)


def check_labels(labels: Int[Tensor, " batch"], n_outputs: int) -> None:
    """Refuse a label without an output, which would be an index out of range far from here.

    Raises:
        LabelError: A label is negative, or not below the number of outputs.
    """
    wrong = (labels < 0) | (labels >= n_outputs)
    try:
        found = bool(wrong.any())
    except RuntimeError:  # inside vmap values cannot be looked at; the pass before it did
        return
    if found:
        row = int(wrong.nonzero()[0])
        raise LabelError(row, int(labels[row]), n_outputs)


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Half the squared error, the negative log-likelihood under unit variance.

    Batches are `(inputs, targets)`, or dictionaries with `labels`; the model returns (batch,) or (batch, dim).
    """

    def predict(self, model: nn.Module, batch: Any) -> Gaussian:
        outputs, targets = _call(model, batch)
        mean = outputs.reshape(len(outputs), 1, -1)
        target = targets.reshape(len(targets), 1, -1).to(mean)
        if mean.shape != target.shape:
            raise ValueError(
                f"The model's output {tuple(outputs.shape)} and the targets {tuple(targets.shape)} must hold "
                "as many numbers; reshape one of them."
            )
        return Gaussian(mean, target, torch.ones_like(mean[..., 0], dtype=torch.bool))


class _TokenTask(Task):
    def masks(self, batch: Any) -> dict[str, Bool[Tensor, "batch pos"]]:
        mask = _attention_mask(batch)
        return {} if mask is None else {"": mask}


@dataclass(frozen=True, kw_only=True)
class CausalLM(_TokenTask):
    """Next-token prediction: cross-entropy of each labelled token given those before it.

    Batches are dictionaries with `input_ids`, `attention_mask` and `labels` (-100 where not scored), all
    (batch, pos), the labels not shifted: the task shifts them. A token after padding is not scored, as a
    first token is not, so that padding may stand on either side.

    Args:
        last_position: Whether the last position of a text, at which nothing is predicted, counts among what layers
            read. Its gradients are zero either way; without it the activation covariance A of a K-FAC fit is a mean
            over the positions that predict, as the paper of `headwater.forget.CurvatureEdit` has it.
    """

    last_position: bool = True

    def masks(self, batch: Any) -> dict[str, Bool[Tensor, "batch pos"]]:
        found = super().masks(batch)
        if self.last_position:
            return found
        labels = batch["labels"] if isinstance(batch, Mapping) else batch[-1]
        mask = found.get("", torch.ones_like(labels, dtype=torch.bool))
        later = mask.long().flip(1).cumsum(1).flip(1)  # real positions from here on
        return {"": mask & (later > 1)}

    def predict(self, model: nn.Module, batch: Any) -> Categorical:
        logits, labels = _call(model, batch)
        mask, labels = _attention_mask(batch), labels[:, 1:]
        labels = labels if mask is None else labels.masked_fill(~mask[:, :-1], IGNORE)
        return Categorical(logits[:, :-1], labels)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(_TokenTask):
    """Prediction of masked tokens; `labels` are -100 at the tokens that are not masked."""

    def predict(self, model: nn.Module, batch: Any) -> Categorical:
        return Categorical(*_call(model, batch))


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """An encoder reads `input_ids`; a decoder predicts `labels` (-100 where padded).

    Without `decoder_input_ids` in the batch, the labels are handed to the model, which shifts them.

    Args:
        encoder: Prefix of the encoder's module names, which follow the input's mask.
    """

    encoder: str = "encoder"

    def predict(self, model: nn.Module, batch: Any) -> Categorical:
        arguments = {k: v for k, v in batch.items() if k != "labels"}
        if "decoder_input_ids" not in arguments:
            arguments["labels"] = batch["labels"]
        return Categorical(_logits(model(**arguments)), batch["labels"])

    def masks(self, batch: Any) -> dict[str, Bool[Tensor, "batch pos"]]:
        if batch.get("decoder_attention_mask") is not None:
            masks = {"": batch["decoder_attention_mask"].bool()}
        else:  # all up to the last scored label: those before it act on it
            scored = (batch["labels"] != IGNORE).long()
            masks = {"": scored.flip(1).cumsum(1).flip(1) > 0}
        source = _attention_mask(batch)
        if source is not None:
            masks |= {self.encoder: source, f"model.{self.encoder}": source}
        return masks


@dataclass(frozen=True, kw_only=True)
class FunctionTask(Task):
    """A task from the user's own functions.

    With `predict_with` everything works as for the ready-made tasks. With `loss_with` alone the curvature
    can only be the empirical one, from the given labels.

    Args:
        loss_with: (model, batch) to the loss of each example, summed over its parts.
        measure_with: (model, batch) to what queries ask about; the loss when left out.
        predict_with: (model, batch) to a `Prediction`.
        masks_with: batch to the masks of real positions.
        label: Name under which a manifest knows this task.
    """

    loss_with: Callable[[nn.Module, Any], Tensor] | None = None
    measure_with: Callable[[nn.Module, Any], Tensor] | None = None
    predict_with: Callable[[nn.Module, Any], Prediction] | None = None
    masks_with: Callable[[Any], dict[str, Tensor]] | None = None
    label: str = "custom"

    def __post_init__(self):
        if self.loss_with is None and self.predict_with is None:
            raise ValueError("FunctionTask needs `loss_with` or `predict_with`; got neither.")

    def predict(self, model: nn.Module, batch: Any) -> Prediction:
        if self.predict_with is None:
            raise ValueError(
                "This task only knows its loss, so labels cannot be drawn from the model. "
                "Give `predict_with`, or fit with fisher='empirical'."
            )
        return self.predict_with(model, batch)

    def loss(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        if self.loss_with is not None:
            return self.loss_with(model, batch)
        return super().loss(model, batch)

    def measurement(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        if self.measure_with is not None:
            return self.measure_with(model, batch)
        return (
            self.loss(model, batch)
            if self.measurement_of == "loss"
            else super().measurement(model, batch)
        )

    def masks(self, batch: Any) -> dict[str, Tensor]:
        return self.masks_with(batch) if self.masks_with is not None else {}

    @property
    def name(self) -> str:
        return f"FunctionTask[{self.label}]"


def _attention_mask(batch: Any) -> Bool[Tensor, "batch pos"] | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None else mask.bool()


def _logits(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Expected a tensor or an object with `.logits`; the model returned {type(output)}."
        )
    return output


def _call(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The model's logits and the labels of a batch."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"Expected `labels` in the batch; it has {', '.join(batch)}.")
        return _logits(model(**{k: v for k, v in batch.items() if k != "labels"})), batch["labels"]
    *inputs, labels = batch
    return _logits(model(*inputs)), labels
