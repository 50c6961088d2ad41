"""A live index of a Trainer's run: rows written by the training pass itself.

For a loop of your own there is `headwater.core.index.LiveIndex`.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.fit import Fit
from headwater.core.index import LiveIndex, LoGra, Outliers, Whitened
from headwater.core.prediction import IGNORE
from headwater.core.task import CausalLM
from headwater.extras import require
from headwater.training.record import FollowedDataset, Order

_CLOSE, _CLOSE_16 = 1e-3, 2e-2  # relative differences that rounding may make in 32 and in 16 bits
_OTHER = (
    ". Label smoothing, auxiliary losses and losses of your own are not followed; train without them, fit with a task "
    "of that loss, or write a loop of your own with LiveIndex."
)


def index_trainer(
    trainer: Any,
    fit: Fit,
    folder: str | Path,
    *,
    kind: Whitened | LoGra | None = None,
    outliers: Outliers | None = Outliers(),  # noqa: B008
    **options: Any,
) -> Any:
    """Make a Trainer of `transformers` write a live index in its next run; needs the extra `language`.

    The index is in the folder when `trainer.train()` returns. A run that goes on with `resume_from_checkpoint` keeps
    the rows of the steps before its checkpoint; rows reach the disk before each checkpoint does.

    Args:
        trainer: The Trainer, with a map-style dataset that it loads without worker processes.
        fit: A fit of the Trainer's model over the same examples in the same order, made before.
        folder: Where the index goes.
        kind: What a row is; random `LoGra()` when left out.
        outliers: How examples are found that stand out; by their losses, which are read off the model's outputs.
        options: Others of `LiveIndex`: `dtype`, `keep`.

    Returns:
        The callback, whose attribute `live` is the `LiveIndex`: after the run it has `index`, `fit` and `outliers`.

    Raises:
        ValueError: The fit is of another model or other data, examples are loaded by worker processes, or (in a
            step) the Trainer's loss is not the mean of the examples' losses.
    """
    transformers = require("transformers", extra="language")
    _check(trainer, fit)
    order = Order()
    trainer.train_dataset = FollowedDataset(trainer.train_dataset, order)
    trainer.data_collator = order.collating(trainer.data_collator)
    train, training_step, compute_loss = trainer.train, trainer.training_step, trainer.compute_loss

    class IndexCallback(transformers.TrainerCallback):
        """Turns the Trainer's events into steps of a live index."""

        live: Any = None
        step: Any = None
        checked = False

        def on_train_begin(self, args, state, control, **_):
            options_ = options | {"start": state.global_step}
            self.live = LiveIndex(fit, folder, kind=kind, outliers=outliers, **options_)
            self.live.__enter__()
            self.open = True

        def on_step_end(self, args, state, control, **_):
            if control.should_save:  # rows are on the disk before the checkpoint is
                self.live.save(state.global_step)

        on_epoch_end = on_step_end

        def on_train_end(self, args, state, control, **_):
            self.live.save(state.global_step)
            self.close(None)

        def close(self, kind: Any) -> None:
            if self.live is not None and self.open:
                self.open = False
                self.live.__exit__(kind, None, None)

    callback = IndexCallback()

    def live_training_step(model, inputs, *args, **kwargs):
        numbers, _ = order.next()
        with callback.live.step(numbers, number=trainer.state.global_step) as callback.step:
            found = training_step(model, inputs, *args, **kwargs)
        callback.step = None
        return found

    def live_compute_loss(model, inputs, *args, return_outputs=False, **kwargs):
        step = callback.step
        if step is None:  # an evaluation
            return compute_loss(model, inputs, *args, return_outputs=return_outputs, **kwargs)
        batch = dict(inputs)
        loss, outputs = compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        normalizer = _normalizer(trainer, fit, batch, kwargs.get("num_items_in_batch"))
        step.follow(loss, normalizer)
        if outliers is not None or not callback.checked:
            with torch.no_grad():
                step.losses = fit.task.loss(_Said(outputs), batch)
            _require_mean(loss, step.losses, normalizer)
            callback.checked = True
        return (loss, outputs) if return_outputs else loss

    def live_train(*args, **kwargs):
        try:
            return train(*args, **kwargs)
        finally:
            callback.step = None
            callback.close(RuntimeError)  # only after a failure is it still open

    trainer.train, trainer.training_step = live_train, live_training_step
    trainer.compute_loss = live_compute_loss
    trainer.add_callback(callback)
    return callback


class _Said(nn.Module):
    """A model that has run already."""

    def __init__(self, outputs: Any):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def _check(trainer: Any, fit: Fit) -> None:
    if trainer.args.dataloader_num_workers:
        raise ValueError(
            "The order of examples is seen only without worker processes; set "
            f"dataloader_num_workers=0 (now {trainer.args.dataloader_num_workers})."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "Copies of the model on several GPUs cannot be followed; launch one process for each instead."
        )
    if trainer.label_smoother is not None:
        raise ValueError(f"The Trainer's loss is not the task's{_OTHER}")
    if fit.model is not trainer.model:
        raise ValueError(
            "The fit is of another model than the Trainer's; make it with headwater.fit(trainer.model, …)."
        )
    if len(fit.train) != len(trainer.train_dataset):
        raise ValueError(
            f"The fit has {len(fit.train):,} examples and the Trainer {len(trainer.train_dataset):,}; fit with the "
            "examples of the Trainer's dataset, in its order."
        )


def _normalizer(trainer: Any, fit: Fit, batch: Any, told: Any) -> float:
    """What the Trainer divides the sum of the examples' losses by in `compute_loss`."""
    if told is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        return float(told)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return float(len(next(iter(batch.values()))))
    labels = labels[:, 1:] if isinstance(fit.task, CausalLM) else labels
    return float((labels != IGNORE).sum())


def _require_mean(loss: Tensor, losses: Tensor, normalizer: float) -> None:
    """Refuse a loss that is no mean of the examples' own."""
    ours, theirs = float(losses.sum()) / normalizer, float(loss.detach())
    close = _CLOSE if losses.dtype.itemsize > 2 else _CLOSE_16
    if math.isfinite(theirs) and not math.isclose(ours, theirs, rel_tol=close, abs_tol=1e-6):
        raise ValueError(
            f"The Trainer's loss is {theirs:.6g}, but the examples' losses divided by {normalizer:g} are {ours:.6g}: "
            f"rows would be of another loss than the task's{_OTHER}"
        )
