"""What a model says of a dataset without any gradient: one number, or one vector, an example."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, Progress, evaluation_mode, first_tensor
from headwater.core.examples import Examples, to_device
from headwater.core.layers import module_kind
from headwater.core.task import Task

Pool = Literal["mean", "last"]


def evaluate(
    model: nn.Module,
    examples: Examples,
    function: Callable[[nn.Module, Any], Tensor],
    *,
    batches: Sequence[BatchPlan],
    progress: Progress | None = None,
    note: str = "forward",
) -> Shaped[Tensor, "n ..."]:
    """A function of (model, batch), first axis the example, over all examples, in their order."""
    device = next(model.parameters()).device
    found: Tensor | None = None
    with evaluation_mode(model), torch.no_grad():
        for done, plan in enumerate(batches, start=1):
            part = function(model, to_device(examples.batch(plan.indices), device)).cpu()
            if found is None:
                found = part.new_zeros(len(examples), *part.shape[1:])
            found[torch.tensor(plan.indices)] = part
            if progress is not None:
                progress(done, len(batches), note)
    if found is None:
        raise ValueError("There are no examples to run the model on.")
    return found


def last_module(model: nn.Module, task: Task, batch: Any) -> str:
    """Name of the linear or convolutional module that runs last: what it reads is the model's representation."""
    names: list[str] = []
    with ExitStack() as stack, evaluation_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            if module_kind(module) in ("linear", "conv1d", "conv"):
                hook = module.register_forward_hook(lambda *_, name=name: names.append(name))
                stack.callback(hook.remove)
        task.predict(model, batch)
    if not names:
        raise ValueError(
            "The model runs no linear or convolutional module; name the one whose input is the representation."
        )
    return names[-1]


def representations(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    batches: Sequence[BatchPlan],
    module: str | None = None,
    pool: Pool = "mean",
    progress: Progress | None = None,
) -> Float[Tensor, "n dim"]:
    """What a module reads, pooled over each example's real positions.

    Args:
        model: The model.
        task: Its task, which knows which positions are padding.
        examples: The data.
        batches: How they are batched.
        module: Whose input; the model's last linear or convolutional module when left out.
        pool: "mean" over positions, or the "last" of them.
        progress: Called with (done, total, note).
    """
    if module is None:
        probe = to_device(examples.batch([0]), next(model.parameters()).device)
        module = last_module(model, task, probe)
    modules = dict(model.named_modules(remove_duplicate=False))
    if module not in modules:
        raise ValueError(f"The model has no module {module!r}; name one of its named_modules().")
    seen: list[Tensor] = []

    def pooled(model: nn.Module, batch: Any) -> Tensor:
        seen.clear()
        task.predict(model, batch)
        if not seen:
            raise ValueError(f"Module {module!r} did not run; name one that does.")
        x = seen[-1]
        if module_kind(modules[module]) == "conv":  # channels come second
            x = x.flatten(2).mT
        return _pooled(x, task.masks(batch).get(""), pool)

    hook = modules[module].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(first_tensor(args, kwargs)), with_kwargs=True
    )
    try:
        options = {"batches": batches, "progress": progress, "note": "representations"}
        return evaluate(model, examples, pooled, **options)
    finally:
        hook.remove()


def _pooled(x: Tensor, mask: Tensor | None, pool: Pool) -> Float[Tensor, "batch dim"]:
    if x.ndim == 2:
        return x
    x = x.flatten(1, -2)
    if mask is None or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if pool == "last":
        number = torch.arange(x.shape[1], device=x.device)
        last = (mask * number).amax(1)
        return x[torch.arange(len(x), device=x.device), last]
    weight = mask[..., None].to(x)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
