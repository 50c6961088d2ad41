"""Which ReLUs fire together on a dataset, counted without keeping the patterns."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, Progress
from headwater.core.examples import Examples
from headwater.core.forward import evaluate
from headwater.core.task import Task


@dataclass(frozen=True)
class Gates:
    """Firing of one ReLU module's units.

    Attributes:
        both: How often two units fire together; on the diagonal how often one does.
        n: Rows they were seen on: examples, times positions or sites.
    """

    both: Float[Tensor, "unit unit"]
    n: int


def count_gates(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    batches: Sequence[BatchPlan],
    progress: Progress | None = None,
) -> dict[str, Gates]:
    """Firing of every `nn.ReLU` module, in one forward pass. Channels are the units of a convolution.

    Args:
        model: The model. Calls of `relu` that are no modules are not seen.
        task: Its task, which knows which positions are padding.
        examples: The data.
        batches: How they are batched.
        progress: Called with (done, total, note).
    """
    both: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    masks: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = output.movedim(1, -1) if output.ndim > 3 else output
            on, mask = x > 0, masks.get("")
            seen = mask is not None and mask.shape == on.shape[:-1]
            fires = (on[mask] if seen else on.reshape(-1, x.shape[-1])).double()
            both[name] = both.get(name, 0.0) + (fires.mT @ fires).cpu()
            counts[name] = counts.get(name, 0) + len(fires)

        return hook

    def run(model: nn.Module, batch: Any) -> Tensor:
        masks.clear()
        masks.update(task.masks(batch))
        return task.predict(model, batch).loss()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.ReLU):
                stack.callback(module.register_forward_hook(listen(name)).remove)
        evaluate(model, examples, run, batches=batches, progress=progress, note="gates")
    return {name: Gates(both[name], counts[name]) for name in both}
