"""Checks on a few examples that prove the numbers right before anything long runs."""

from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.examples import take
from headwater.core.follow import evaluation_mode
from headwater.core.task import Task


def check_loss(model: nn.Module, task: Task, batch: Any) -> Tensor:
    """The losses of a small batch, after proof that they are one an example and repeat.

    Raises:
        ValueError: The task returns no number an example, the loss of a batch is not made of its examples' losses,
            or two passes over a batch differ.
    """
    with evaluation_mode(model), torch.no_grad():
        losses = task.loss(model, batch)
        if losses.ndim != 1:
            raise ValueError(
                f"Expected the loss of each example, shape (batch,); the task returned {tuple(losses.shape)}. "
                "Use reduction='none' and sum over the example's own positions."
            )
        again = task.loss(model, batch)
        if not torch.equal(losses, again):
            worst = float((losses - again).abs().max())
            raise ValueError(
                f"Two passes over the same batch differ by up to {worst:.3g} nats, though the model is in evaluation "
                "mode. Look for dropout or noise that is called as a function, and switch it off."
            )
        alone = torch.cat([task.loss(model, take(batch, torch.tensor([i]))) for i in range(len(losses))])
    wide = losses.dtype == torch.float64
    rtol = 1e-6 if wide else (1e-3 if losses.dtype == torch.float32 else 5e-2)
    if not torch.allclose(losses, alone.to(losses), rtol=rtol, atol=rtol):
        worst = float((losses - alone).abs().max())
        raise ValueError(
            f"An example's loss depends on the batch it stands in: up to {worst:.3g} nats between a batch of "
            f"{len(losses)} and single examples. Usual causes: a mean over the batch or over its tokens, batch norm "
            "in training mode, padding that the model does not mask."
        )
    return losses
