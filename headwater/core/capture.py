"""The engine: one forward and one backward pass a batch, and every followed layer's rows.

Gradients are taken for activations only; no weight gradient of the model is ever formed. Each followed layer
hands what it read (`a`) and the gradient of what it returned (`g`) to accumulators as soon as the backward
pass has reached all its uses. This is the only loop over data in the core.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headwater.core.examples import Examples, take, to_device
from headwater.core.follow import Followed, evaluation_mode, functional_parameters
from headwater.core.layers import SHARED_INPUT, WHOLE_ROWS, Layer, Use
from headwater.core.store import Checkpoint
from headwater.core.target import Target
from headwater.core.task import Task

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BatchInfo:
    """Which rows a batch holds.

    Attributes:
        indices: The example of each row (row); an example may have several rows.
        fold: The fold of the data that all rows belong to.
        weights: Weight of each row in second moments of gradients (row), or None for ones.
        share: How much each row counts as an example (row), or None for ones.
    """

    indices: Tensor
    fold: int = 0
    weights: Tensor | None = None
    share: Tensor | None = None

    @property
    def n_examples(self) -> float:
        return float(len(self.indices) if self.share is None else self.share.sum())


@dataclass(frozen=True)
class Rows:
    """What one layer hands over for one batch: the gradient of row b is `g[b].mT @ a[b]`.

    Attributes:
        layer: The layer.
        a: (batch, pos, in), behind a leading axis of groups if there are several.
        g: (batch, pos, out), likewise.
        batch: Which rows these are.
        mask: Real positions (batch, pos), or None where all are; `a` and `g` are zero elsewhere.
    """

    layer: Layer
    a: Tensor
    g: Tensor
    batch: BatchInfo
    mask: Tensor | None = None

    @property
    def n_positions(self) -> float:
        """Positions that are not padding, counted by the rows' share."""
        share = self.batch.share
        if self.mask is None:
            return self.batch.n_examples * self.pos
        each = self.mask.sum(dim=-1)
        return float(each.sum() if share is None else (each * share).sum())

    @property
    def pos(self) -> int:
        return self.a.shape[-2]


class Accumulator(ABC):
    """Anything gathered over data: any split of the data, merged, equals the whole."""

    @abstractmethod
    def update(self, rows: Rows) -> None:
        """Take one layer's rows of one batch."""

    def end_batch(self, batch: BatchInfo) -> None:
        """All layers of a batch have been seen."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add what another accumulator gathered over other data."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The state, to go on after an interruption."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore `tensors()`."""


@dataclass
class _Call:
    use: Use
    x: Tensor
    g: Tensor | None = None


@dataclass
class _Tape:
    """The calls of one forward pass, and the roots from which the backward pass stops."""

    calls: dict[str, list[_Call]] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    roots: list[Tensor] = field(default_factory=list)
    shared: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    emit: Callable[[str], None] | None = None

    def clear(self) -> None:
        self.calls.clear()
        self.waiting.clear()
        self.roots.clear()
        self.shared.clear()
        self.emit = None


class Capture:
    """Runs batches through a model and hands each followed layer's rows on.

    Args:
        model: The model; its parameters and modes are left as they were.
        task: Its task.
        followed: The layers to follow.
    """

    def __init__(self, model: nn.Module, task: Task, followed: Followed | Sequence[Layer]):
        self.model, self.task = model, task
        self.layers = {layer.name: layer for layer in followed}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._functional = functional_parameters(model, tuple(self.layers.values()))
        self._vmap_works: bool | None = None
        self._tape = _Tape()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks in place, parameters frozen and modules in evaluation mode, all undone at the end."""
        modules = self._modules
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            for p in wanted:
                p.requires_grad_(False)
                stack.callback(p.requires_grad_, True)
            for layer in self.layers.values():
                for use in layer.uses:
                    hook = self._hook(layer.name, use)
                    handle = modules[use.module].register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            stack.callback(self._tape.clear)
            yield

    def _hook(self, name: str, use: Use):
        tape = self._tape

        def hook(module, args, kwargs, output):
            if not torch.is_grad_enabled():
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            if not output.requires_grad:
                root = output.detach().requires_grad_()
                tape.roots.append(root)
                output = root.clone()  # not a leaf, so the model may still change it in place
            call = _Call(use, x.detach())
            tape.calls.setdefault(name, []).append(call)
            tape.waiting[name] = tape.waiting.get(name, 0) + 1

            def receive(g: Tensor) -> None:
                call.g = g.detach() if call.g is None else call.g + g.detach()
                tape.waiting[name] -= 1
                if tape.waiting[name] == 0 and tape.emit is not None:
                    tape.emit(name)

            output.register_hook(receive)
            return output

        return hook

    def backward(self, data: Any, target: Target, batch: BatchInfo, keys: Tensor, emit: Callable[[Rows], None]):
        """One forward and one backward pass; returns the target's values, one a row.

        Call inside `hooks()`. `emit` receives each followed layer's rows once.
        """
        tape, masks = self._tape, self.task.masks(data)
        tape.clear()
        with torch.enable_grad():
            values, fixed = target(self.model, self.task, data, keys)
            total = values.sum()
        if values.ndim != 1:
            raise ValueError(f"Expected one number an example from the task; got shape {tuple(values.shape)}.")
        if not bool(torch.isfinite(values.detach()).all()):
            bad = batch.indices[(~torch.isfinite(values.detach())).nonzero()[0].cpu()].tolist()
            raise FloatingPointError(
                f"The loss of example number {bad[0]} is {values[~torch.isfinite(values)][0].item()}; "
                "look at this example, or at the model's weights, before tracing."
            )
        pending = set(self.layers)

        def finish(name: str) -> None:
            pending.discard(name)
            rows = self._rows(self.layers[name], tape.calls.pop(name, []), len(values), masks, batch)
            emit(rows)

        if tape.roots:
            tape.emit = finish
            torch.autograd.grad(total, tape.roots, allow_unused=True)
        tape.emit = None
        functional = self._functional_gradients(data, target, keys, fixed) if self._functional else {}
        for name in [n for n in self.layers if n in pending]:
            layer = self.layers[name]
            if layer.parameters[0] in functional:
                g = functional[layer.parameters[0]].flatten(1)[:, None]
                emit(Rows(layer, g.new_ones(len(g), 1, 1), g, batch))
            else:
                finish(name)
        tape.clear()
        return values.detach()

    def _rows(self, layer: Layer, calls: list[_Call], n: int, masks: dict, batch: BatchInfo) -> Rows:
        """Rows of all uses of a layer, their positions one after the other."""
        if not calls:
            raise ValueError(
                f"Layer {layer.name!r} did not run in this batch, though it ran when layers were chosen. "
                "Leave it out with skip, or follow it where it always runs."
            )
        modules, parts, real = self._modules, [], []
        for call in calls:
            module = modules[call.use.module]
            g = call.g
            if g is None:  # this output did not reach the target
                with torch.no_grad():
                    g = _output_like(module, call.x)
            if call.use.kind in SHARED_INPUT:
                make_a, make_g = SHARED_INPUT[call.use.kind]
                key = (layer.input_group, id(call.x))
                a = self._tape.shared.get(key) if len(calls) == 1 else None
                g = make_g(module, call.x, g, n)
                mask = _mask_for(masks, call.use.module, g)
                if a is None:
                    a = make_a(module, call.x, n, layer.has_bias)
                    a = a if mask is None else a * mask.to(a)
                    if len(calls) == 1:
                        self._tape.shared[key] = a
                g = g if mask is None else g * mask.to(g)
            else:
                a, g = WHOLE_ROWS[call.use.kind](module, call.x, g, n)
                mask = _mask_for(masks, call.use.module, g)
                if mask is not None and a.shape[-2] == mask.shape[-2]:
                    a, g = a * mask.to(a), g * mask.to(g)
            parts.append((a, g))
            real.append(mask)
        if len(parts) == 1:
            return Rows(layer, *parts[0], batch, None if real[0] is None else real[0][..., 0])
        a, g = (torch.cat(p, dim=-2) for p in zip(*parts, strict=True))
        return Rows(layer, a, g, batch, _joined(real, parts))

    def _functional_gradients(self, data: Any, target: Target, keys: Tensor, fixed: Any) -> dict[str, Tensor]:
        """Per-example gradients of the remaining parameters, by vmap or, where that fails, one by one."""
        if self._vmap_works is not False:
            try:
                gradients = self._by_vmap(data, target, keys, fixed)
                self._vmap_works = True
                return gradients
            except Exception as error:
                if self._vmap_works:
                    raise
                warnings.warn(
                    f"torch.func cannot batch this model ({type(error).__name__}); the gradients of "
                    f"{', '.join(list(self._functional)[:3])} are taken one example at a time.",
                    stacklevel=2,
                )
                self._vmap_works = False
        return self._one_by_one(data, target, keys, fixed)

    def _by_vmap(self, data: Any, target: Target, keys: Tensor, fixed: Any) -> dict[str, Tensor]:
        bound = _Bound(self.model, lambda m, d, k, f: target(m, self.task, d, k, f)[0].sum())

        def value(parameters, datum, key, label):
            one = torch.utils._pytree.tree_map(lambda t: t[None], (datum, key, label))
            return torch.func.functional_call(bound, parameters, one)

        parameters = {f"model.{n}": p.detach() for n, p in self._functional.items()}
        gradient = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0, 0))
        with torch.enable_grad(), _silenced(self._tape):
            found = gradient(parameters, data, keys, fixed)
        return {n.removeprefix("model."): g.detach() for n, g in found.items()}

    def _one_by_one(self, data: Any, target: Target, keys: Tensor, fixed: Any) -> dict[str, Tensor]:
        parameters = list(self._functional.values())
        rows: list[tuple[Tensor, ...]] = []
        for p in parameters:
            p.requires_grad_(True)
        try:
            for i in range(len(keys)):
                one = torch.tensor([i])
                label = None if fixed is None else fixed[one.to(fixed.device)]
                with torch.enable_grad(), _silenced(self._tape):
                    value, _ = target(self.model, self.task, take(data, one), keys[one.to(keys.device)], label)
                    found = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
                rows.append(tuple(
                    torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
                ))
        finally:
            for p in parameters:
                p.requires_grad_(False)
        stacked = (torch.stack(column) for column in zip(*rows, strict=True))
        return dict(zip(self._functional, stacked, strict=True))


class _Bound(nn.Module):
    """A function of a model, as a module, so that `functional_call` can replace the model's parameters."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(self.model, *args)


@contextmanager
def _silenced(tape: _Tape) -> Iterator[None]:
    """Passes whose calls are not recorded."""
    saved = tape.calls, tape.waiting, tape.roots
    tape.calls, tape.waiting, tape.roots = {}, {}, []
    try:
        yield
    finally:
        tape.calls, tape.waiting, tape.roots = saved


def _output_like(module: nn.Module, x: Tensor) -> Tensor:
    return torch.zeros_like(module.forward(x))


def _mask_for(masks: dict[str, Tensor], module: str, g: Tensor) -> Tensor | None:
    """The mask (batch, pos, 1) that holds for a module's positions, or None where all are real."""
    best = max((p for p in masks if module.startswith(p)), key=len, default=None)
    if best is None or masks[best].shape != g.shape[-3:-1]:
        return None
    mask = masks[best].to(g.device)
    return None if bool(mask.all()) else mask[..., None]


def _joined(masks: list[Tensor | None], parts: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The masks of several uses, one after the other."""
    if all(mask is None for mask in masks):
        return None
    full = [torch.ones(g.shape[-3:-1], dtype=torch.bool, device=g.device) for _, g in parts]
    return torch.cat([f if m is None else m[..., 0] for m, f in zip(masks, full, strict=True)], dim=1)


@dataclass(frozen=True)
class BatchPlan:
    """The examples of one batch, all of one fold."""

    indices: tuple[int, ...]
    fold: int


def plan_batches(
    examples: Examples, *, batch_size: int = 256, batch_tokens: int = 4096, folds: int = 1
) -> list[BatchPlan]:
    """Batches of like length under a budget of tokens, each inside one fold.

    Folds are drawn by the examples' ids, so they do not depend on order or batch size.
    """
    fold_of = (examples.keys % folds).tolist()
    lengths = examples.lengths or [1] * len(examples)
    limit = batch_tokens if examples.lengths else batch_size
    plans = []
    for fold in range(folds):
        members = sorted((i for i in range(len(examples)) if fold_of[i] == fold), key=lambda i: (-lengths[i], i))
        batch: list[int] = []
        for i in members:  # longest first, so the first of a batch is its width
            if batch and ((len(batch) + 1) * lengths[batch[0]] > limit or len(batch) == batch_size):
                plans.append(BatchPlan(tuple(batch), fold))
                batch = []
            batch.append(i)
        if batch:
            plans.append(BatchPlan(tuple(batch), fold))
    return plans


class Sink(Protocol):
    def __call__(self, rows: Rows) -> None: ...


def sweep(
    capture: Capture,
    examples: Examples,
    accumulators: Sequence[Accumulator],
    target: Target,
    *,
    batches: Sequence[BatchPlan] | None = None,
    checkpoint: Checkpoint | None = None,
    save_every: float = 30.0,
    progress: Progress | None = None,
    note: str = "",
    stop: Callable[[], bool] | None = None,
) -> int:
    """Pass once over the data; all accumulators share it. Returns the number of batches that were run.

    Args:
        capture: The model with its followed layers.
        examples: The data.
        accumulators: What to gather.
        target: What is differentiated.
        batches: The batches, from `plan_batches` when left out.
        checkpoint: Where to keep the state, so that a killed sweep goes on where it stopped.
        save_every: Seconds between two saves.
        progress: Called with (batches done, batches in all, note).
        note: What the sweep is for.
        stop: Asked after each batch; true ends the sweep early.
    """
    plans = plan_batches(examples) if batches is None else list(batches)
    start, finished = _resume(checkpoint, accumulators, note)
    if finished:
        return start
    saved, done = time.monotonic(), start

    def load(plan: BatchPlan) -> Any:
        return examples.batch(plan.indices)

    with capture.hooks(), ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, plans[start]) if start < len(plans) else None
        for number in range(start, len(plans)):
            data = to_device(ahead.result(), capture.device)  # type: ignore[union-attr]
            if number + 1 < len(plans):
                ahead = pool.submit(load, plans[number + 1])
            run_batch(capture, examples, plans[number], data, accumulators, target)
            done = number + 1
            if progress is not None:
                progress(done, len(plans), note)
            if checkpoint is not None and time.monotonic() - saved > save_every:
                _save(checkpoint, accumulators, {"done": done, "note": note, "finished": False})
                saved = time.monotonic()
            if stop is not None and stop():
                break
    if checkpoint is not None:
        _save(checkpoint, accumulators, {"done": done, "note": note, "finished": True})
    return done


def run_batch(
    capture: Capture,
    examples: Examples,
    plan: BatchPlan,
    data: Any,
    accumulators: Sequence[Accumulator],
    target: Target,
) -> None:
    """One batch, or the several that its rows make, through the accumulators."""
    indices = torch.tensor(plan.indices)
    keys = examples.keys[indices].to(capture.device)

    def emit(rows: Rows) -> None:
        for accumulator in accumulators:
            accumulator.update(rows)

    for part in target.parts(capture.model, capture.task, data, keys):
        chosen = part.index
        rows = indices if chosen is None else indices[chosen.cpu()]
        info = BatchInfo(rows, plan.fold, part.weights, part.share)
        some, some_keys = (data, keys) if chosen is None else (take(data, chosen), keys[chosen])
        with torch.no_grad():
            capture.backward(some, part.target, info, some_keys, emit)
        for accumulator in accumulators:
            accumulator.end_batch(info)


def _resume(checkpoint: Checkpoint | None, accumulators: Sequence[Accumulator], note: str) -> tuple[int, bool]:
    found = None if checkpoint is None else checkpoint.load()
    if found is None or found[1].get("note") != note:
        return 0, False
    tensors, facts = found
    for i, accumulator in enumerate(accumulators):
        prefix = f"{i}/"
        accumulator.load({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)})
    return int(facts["done"]), bool(facts["finished"])


def _save(checkpoint: Checkpoint, accumulators: Sequence[Accumulator], facts: dict[str, Any]) -> None:
    checkpoint.save({f"{i}/{k}": v for i, a in enumerate(accumulators) for k, v in a.tensors().items()}, facts)
