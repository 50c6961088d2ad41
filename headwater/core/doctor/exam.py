"""The loss itself: one number an example, finite, repeatable, and free of what it is batched with."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.capture import Progress, evaluation_mode
from headwater.core.doctor.batches import (
    COARSE_ERROR,
    GRADIENT_ERROR,
    PAD,
    is_close,
    is_same,
    largest_gap,
    pad_more,
    relettered,
)
from headwater.core.doctor.diagnosis import Check, name_some
from headwater.core.examples import Examples, TensorExamples, take, to_device
from headwater.core.follow import coarsest_dtype
from headwater.core.task import Classification, LabelError, Task, check_labels


def check_loss(model: nn.Module, task: Task, batch: Any) -> Tensor:
    """The losses of a small batch, after proof that they are one an example and repeat.

    Raises:
        ValueError: The task returns no number an example, the loss of a batch is not made of its
            examples' losses, or two passes over a batch differ.
    """
    with evaluation_mode(model), torch.no_grad():
        losses = task.loss(model, batch)
        if losses.ndim != 1:
            raise ValueError(
                "Expected the loss of each example, shape (batch,); the task returned "
                f"{tuple(losses.shape)}. Use reduction='none' and sum over the example's own "
                "positions."
            )
        again = task.loss(model, batch)
        if not torch.equal(losses, again):
            raise ValueError(
                f"Two passes over the same batch differ by up to {largest_gap(losses, again):.3g} nats, "
                "though the model is in evaluation mode. Look for dropout or noise that is called "
                "as a function, and switch it off."
            )
        singles = [task.loss(model, take(batch, torch.tensor([i]))) for i in range(len(losses))]
        alone = torch.cat(singles)
    if not is_close(losses, alone, coarsest_dtype(model)):
        raise ValueError(
            "An example's loss depends on the batch it stands in: up to "
            f"{largest_gap(losses, alone):.3g} nats between a batch of {len(losses)} and single examples. "
            "Usual causes: a mean over the batch or over its tokens, batch norm in training mode, "
            "padding that the model does not mask."
        )
    return losses


def check_classes(model: nn.Module, task: Task, examples: Examples, batch: Any) -> None:
    """Proof that the model has an output for every label, where all labels are in memory anyway.

    Args:
        model: The model.
        task: Its task; only classification has classes.
        examples: The data.
        batch: A batch of some of them.

    Raises:
        LabelError: There is none for some label; the message names the example.
    """
    if not isinstance(task, Classification) or not isinstance(examples, TensorExamples):
        return
    try:
        with evaluation_mode(model), torch.no_grad():
            n_outputs = task.predict(model, batch).outputs.shape[-1]
    except LabelError as error:
        n_outputs = error.n_outputs
    try:
        check_labels(examples.tensors[-1].reshape(-1).long(), n_outputs)
    except LabelError as error:
        raise error.named(repr(examples.ids[error.row])) from None


class Exam:
    """The chosen examples, as a batch and one by one, and the passes over them."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        indices: list[int],
        tolerance: float | None,
        progress: Progress | None,
    ):
        self.model, self.task, self.examples, self.indices = model, task, examples, indices
        self.progress = progress
        self.dtype, self.device = coarsest_dtype(model), next(model.parameters()).device
        self.tolerance = (
            GRADIENT_ERROR.get(self.dtype, COARSE_ERROR) if tolerance is None else tolerance
        )
        self.batch = to_device(examples.batch(indices), self.device)
        self.singles = [to_device(examples.batch([i]), self.device) for i in indices]

    def _loss(self, data: Any) -> Tensor:
        with evaluation_mode(self.model), torch.no_grad():
            return self.task.loss(self.model, data)

    def loss_checks(self) -> Iterator[Check]:
        """The form of the loss: one number an example, finite, repeatable, free of the batch."""
        again = to_device(self.examples.batch(self.indices), self.device)
        if not is_same(self.batch, again):
            remedy = "Turn random augmentation off: a traced example must be the same each time."
            yield Check("data", "fail", "two readings of the same examples differ", remedy)
        try:
            losses = self._loss(self.batch)
        except Exception as error:  # whatever a user's model raises is the finding
            detail = f"the loss of a batch could not be computed: {type(error).__name__}: {error}"
            yield Check(
                "loss", "fail", detail, "Check that the task and the batches fit the model."
            )
            return
        if losses.ndim != 1 or len(losses) != len(self.indices):
            yield Check(
                "loss",
                "fail",
                f"expected one number an example, shape ({len(self.indices)},); the task returned "
                f"{tuple(losses.shape)}",
                "Use reduction='none' and sum over the example's own positions.",
            )
            return
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if bad:
            named = name_some([self.examples.ids[self.indices[i]] for i in bad])
            remedy = "Look at these examples, and at the model's weights."
            yield Check("loss", "fail", f"not finite for {named}", remedy)
            return
        yield Check("loss", "ok", f"one finite number an example, {float(losses.mean()):.4g} nats")
        yield from self._classes()
        yield self._repeats(losses)
        try:
            alone = torch.cat([self._loss(single) for single in self.singles])
        except Exception as error:  # as above
            detail = f"no loss of one example alone: {type(error).__name__}: {error}"
            yield Check("alone", "fail", detail, "The model must run on a batch of one.")
            return
        yield self._batching(losses, alone)
        yield from self._padding()

    def _classes(self) -> Iterator[Check]:
        """A label without an output, where all labels are in memory."""
        try:
            check_classes(self.model, self.task, self.examples, self.batch)
        except LabelError as error:
            said, _, remedy = str(error).partition(". ")
            yield Check("classes", "fail", said, remedy)

    def _repeats(self, losses: Tensor) -> Check:
        gap = largest_gap(losses, self._loss(self.batch))
        if gap <= 1e-5 * float(losses.abs().max()):
            return Check("repeats", "ok", "two passes agree")
        return Check(
            "repeats",
            "fail",
            f"two passes over the same batch differ by up to {gap:.3g} nats, though all modules are "
            "in evaluation mode",
            "Look for dropout or noise that is called as a function (F.dropout(x) trains by "
            "default), and pass training=self.training.",
        )

    def _batching(self, losses: Tensor, alone: Tensor) -> Check:
        if is_close(losses, alone, self.dtype):
            return Check("batching", "ok", "a batch's losses are those of its examples alone")
        ratio = losses / alone
        if bool(((ratio - ratio.mean()).abs() < 1e-3 * ratio.mean().abs()).all()):
            size = f"{1 / float(ratio.mean()):.4g}"
            detail = f"losses in a batch of {len(losses)} are those alone divided by {size}"
            remedy = "The loss is a mean over the batch: use reduction='none' and sum each example."
        else:
            gap = largest_gap(losses, alone)
            detail = f"an example's loss depends on its batch, by up to {gap:.3g} nats"
            remedy = (
                "Usual causes: a mean over the batch's tokens, batch norm without running "
                "statistics, padding that the model does not mask."
            )
        return Check("batching", "fail", detail, remedy)

    def _padding(self) -> Iterator[Check]:
        """Whether padding, or what stands under it, changes a loss."""
        at = self.shortest
        padded = None if at is None else pad_more(self.singles[at])
        if at is None or padded is None:
            return
        try:
            wide = self._loss(padded)
        except Exception as error:  # a context that is full already, for one
            yield Check("padding", "warn", f"not checked: {type(error).__name__}: {error}")
            return
        alone = self._loss(self.singles[at])
        remedy = "Pass attention_mask to every layer that mixes positions, and pad on the right."
        if not is_close(wide, alone, self.dtype):
            gap = largest_gap(wide, alone)
            detail = f"{PAD} more masked positions change a loss by {gap:.3g} nats"
            yield Check("padding", "fail", detail, remedy)
        else:
            yield Check("padding", "ok", f"{PAD} more masked positions leave the loss as it is")
        if "input_ids" not in padded:
            return
        other = self._loss(relettered(padded))
        if is_close(other, wide, self.dtype):
            yield Check("mask", "ok", "tokens under the mask do not matter")
        else:
            gap = largest_gap(other, wide)
            detail = f"other tokens under the mask change a loss by {gap:.3g} nats"
            yield Check("mask", "fail", detail, remedy)

    @property
    def shortest(self) -> int | None:
        """The example that is padded: the shortest; None where batches have no mask."""
        if not isinstance(self.batch, dict) or self.batch.get("attention_mask") is None:
            return None
        return min(
            range(len(self.singles)), key=lambda i: self.singles[i]["attention_mask"].shape[1]
        )
