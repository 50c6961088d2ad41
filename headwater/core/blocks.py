"""A model's blocks, one after the other: what each reads once those before it have been changed.

Data are run through block k, block k is changed, and what the changed block returns is what block k + 1 reads. Each
block runs twice on the data, whatever their number.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, evaluation_mode
from headwater.core.examples import Examples, take, to_device
from headwater.core.forward import InputMoments
from headwater.core.task import Task


def block_names(model: nn.Module) -> list[str]:
    """Names of the model's blocks, in order: the children of its largest module list or sequence; none without one."""
    lists = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)
    }
    if not lists:
        return []
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    prefix = f"{name}." if name else ""
    return [f"{prefix}{i}" for i in range(len(lists[name]))]


class _Stop(Exception):
    """The first block has been reached."""


class BlockByBlock:
    """Data on their way through a model's blocks.

    Blocks are called with the hidden states first, and with further arguments that are alike for all of them; this is
    checked on the first example. A key-value cache is left out.

    Args:
        model: The model, whose blocks may be changed from one call to the next.
        task: Its task.
        examples: The data.
        batches: How they are batched.
        names: The blocks in order; `block_names` when left out.

    Raises:
        ValueError: The model has no blocks, or they do not read one another's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        batches: Sequence[BatchPlan],
        names: Sequence[str] | None = None,
    ):
        self.model, self.task = model, task
        self.names = block_names(model) if names is None else list(names)
        if not self.names:
            raise ValueError(
                "The model has no list of blocks, so data cannot be run block by block; use the statistics of a fit."
            )
        self.at = 0
        self.hidden: list[Tensor] = []
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._masks: list[Tensor | None] = []
        device = next(model.parameters()).device
        with evaluation_mode(model), torch.no_grad():
            for number, plan in enumerate(batches):
                batch = to_device(examples.batch(plan.indices), device)
                if number == 0:
                    self._check(take(batch, torch.tensor([0], device=device)))
                hidden, rest, options = self._reach(batch)
                self.hidden.append(hidden)
                self._calls.append((rest, options))
                mask = task.masks(batch).get("")
                self._masks.append(None if mask is None or bool(mask.all()) else mask)

    @property
    def n_positions(self) -> int:
        """Real positions of the data."""
        return sum(
            h.shape[:-1].numel() if m is None or m.shape != h.shape[:-1] else int(m.sum())
            for h, m in zip(self.hidden, self._masks, strict=True)
        )

    def _reach(self, batch: Any) -> tuple[Tensor, tuple, dict[str, Any]]:
        """What the first block is called with."""
        found: list[tuple[Tensor, tuple, dict[str, Any]]] = []

        def hook(module, args, kwargs):
            found.append(_split(args, kwargs))
            raise _Stop

        first = self.model.get_submodule(self.names[0])
        handle = first.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.task.predict(self.model, batch)
        except _Stop:
            return found[0]
        finally:
            handle.remove()
        raise ValueError(f"Block {self.names[0]!r} did not run; name the blocks that do.")

    def _check(self, batch: Any) -> None:
        """Refuse blocks that are not a chain."""
        calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []
        outputs: list[Tensor] = []
        with ExitStack() as stack:
            for name in self.names:
                block = self.model.get_submodule(name)
                before = block.register_forward_pre_hook(
                    lambda module, args, kwargs: calls.append(_split(args, kwargs)),
                    with_kwargs=True,
                )
                after = block.register_forward_hook(
                    lambda module, args, output: outputs.append(_hidden(output))
                )
                stack.callback(before.remove)
                stack.callback(after.remove)
            self.task.predict(self.model, batch)
        chain = len(calls) == len(self.names) and all(
            x.shape == y.shape and torch.equal(x, y)
            for (x, *_), y in zip(calls[1:], outputs[:-1], strict=True)
        )
        alike = all(_same(call[1:], calls[0][1:]) for call in calls)
        if not (chain and alike):
            why = "are called with different arguments" if chain else "do not read one another"
            raise ValueError(
                f"The blocks {self.names[0]}, … of this {type(self.model).__name__} {why}, so data cannot be run block "
                "by block; use the statistics of a fit."
            )

    def moments(self, modules: Sequence[str]) -> dict[str, Float64[Tensor, "in in"]]:
        """Mean outer products of what some linear modules of the current block read, over real positions.

        Modules that read the same tensor share one matrix.
        """
        moments = InputMoments(self.model, modules)
        with moments.listening():
            for number, mask in enumerate(self._masks):
                self._run(number)
                moments.add(mask)
        return moments.finish()

    def advance(self) -> None:
        """Run the current block as it is now, and go on to the next."""
        for number in range(len(self.hidden)):
            self.hidden[number] = _hidden(self._run(number))
        self.at += 1

    def _run(self, number: int) -> Any:
        rest, options = self._calls[number]
        block = self.model.get_submodule(self.names[self.at])
        with evaluation_mode(block), torch.no_grad():
            return block(self.hidden[number], *rest, **options)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """Hidden states, and the other arguments but for objects with a state of their own, such as a cache."""
    if not args or not isinstance(args[0], Tensor):
        raise ValueError("Expected blocks that are called with the hidden states first.")
    plain = {k: v for k, v in kwargs.items() if _is_plain(v)}
    return args[0], tuple(v if _is_plain(v) else None for v in args[1:]), plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b
