"""What a model says of a dataset without any gradient: one number, or one vector, an example."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, Progress, evaluation_mode, first_tensor
from headwater.core.examples import Examples, to_device
from headwater.core.layers import module_kind
from headwater.core.task import Task
from headwater.numerics import kronecker

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


class _Enough(Exception):
    """All that was asked for has been read."""


class InputMoments:
    """Sums of outer products of what some linear modules read; modules that read the same tensor share one.

    Args:
        model: The model, whose modules may be replaced from one batch to the next.
        modules: Their names.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]):
        self.model, self.modules = model, list(modules)
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.modules, 0)
        self._read: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}

    @contextmanager
    def listening(self, *, stop: bool = False) -> Iterator[None]:
        """What modules read is remembered inside; with `stop` the forward pass ends once all have."""
        with ExitStack() as stack:
            for name in self.modules:

                def hook(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                    self._read[name] = first_tensor(args, kwargs)
                    if stop and len(self._read) == len(self.modules):
                        raise _Enough

                module = self.model.get_submodule(name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def add(self, mask: Bool[Tensor, "batch pos"] | None) -> None:
        """Add what was read in a batch, at its real positions."""
        if missing := [name for name in self.modules if name not in self._read]:
            raise ValueError(f"Module {missing[0]!r} did not run; leave it out.")
        if not self._leader:
            first = {id(self._read[name]): name for name in reversed(self.modules)}
            self._leader = {name: first[id(self._read[name])] for name in self.modules}
        for name in dict.fromkeys(self._leader.values()):
            x = self._read[name]
            x = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x
            x = x.reshape(-1, x.shape[-1])
            moment = kronecker.second_moment(x.to(kronecker.sum_dtype(x))).double()
            self.sums[name] = self.sums[name].add_(moment) if name in self.sums else moment
            self.counts[name] += len(x)
        self._read.clear()

    def finish(self) -> dict[str, Float64[Tensor, "in in"]]:
        """Means over positions, by module."""
        means = {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}
        return {name: means[leader] for name, leader in self._leader.items()}


def input_moments(
    model: nn.Module,
    task: Task,
    examples: Examples,
    modules: Sequence[str],
    *,
    batches: Sequence[BatchPlan],
    progress: Progress | None = None,
) -> dict[str, Float64[Tensor, "in in"]]:
    """Mean outer products of what linear modules read, over the real positions of all examples: one forward pass.

    It is the activation covariance A that K-FAC has too, without the one of a bias. The pass ends where the last of
    the modules has been reached.

    Args:
        model: The model.
        task: Its task.
        examples: The data.
        modules: Names of the modules.
        batches: How they are batched.
        progress: Called with (done, total, note).
    """
    moments, device = InputMoments(model, modules), next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad(), moments.listening(stop=True):
        for done, plan in enumerate(batches, start=1):
            batch = to_device(examples.batch(plan.indices), device)
            with suppress(_Enough):
                task.predict(model, batch)
            mask = task.masks(batch).get("")
            moments.add(None if mask is None or bool(mask.all()) else mask)
            if progress is not None:
                progress(done, len(batches), "inputs")
    return moments.finish()
