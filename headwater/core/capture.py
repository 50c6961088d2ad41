"""The engine: one forward and one backward pass a batch, and every followed layer's rows.

Gradients are taken for activations only; no weight gradient of the model is ever formed. Each followed layer
hands what it read (`a`) and the gradient of what it returned (`g`) to accumulators as soon as the backward
pass has reached all its uses. This is the only loop over data in the core.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from headwater.core.checkpoint import SAVE_EVERY, Cadence, Checkpoint
from headwater.core.distributed import World, current
from headwater.core.examples import Examples, take, to_device
from headwater.core.layers import FUNCTIONAL, KINDS, Layer, Use
from headwater.core.memory import free_memory, is_out_of_memory
from headwater.core.sharding import frozen, is_sharded, refuse_sharded
from headwater.core.target import Enumerated, Target
from headwater.core.task import LabelError, Task

Progress = Callable[[int, int, str], None]
Precision = Literal["auto", "model", "bfloat16"]


@dataclass(frozen=True)
class BatchInfo:
    """Which rows a batch holds.

    Attributes:
        indices: The example of each row (row); an example may have several rows.
        fold: The fold of the data that all rows belong to.
        weights: Weight of each row in second moments of gradients (row), or None for ones.
        share: How much each row counts as an example (row), or None for ones.
        ids: Names of all examples, by index, for messages.
    """

    indices: Tensor
    fold: int = 0
    weights: Tensor | None = None
    share: Tensor | None = None
    ids: Sequence[str] | None = None

    @cached_property
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


Kept = Literal["sums", "rows", "apart"]


class Accumulator(ABC):
    """Anything gathered over data: any split of the data, merged, equals the whole.

    Attributes:
        kept: What happens over several batches and ranks. "sums": numbers of different batches are added up, which a
            sweep does unit by unit in one order, so that rounding does not depend on the number of ranks. "rows":
            every example has numbers of its own, which are put together exactly. "apart": each rank keeps what it
            gathered, such as one that writes its own files; a sweep then neither merges nor saves it.
    """

    kept: ClassVar[Kept] = "sums"
    _arguments: tuple[tuple, dict[str, Any]]

    def __new__(cls, *args: Any, **options: Any):
        new = super().__new__(cls)
        new._arguments = args, options
        return new

    def empty(self) -> Any:
        """Another one, made with the same arguments, that has seen nothing."""
        args, options = self._arguments
        return type(self)(*args, **options)

    def forget(self, indices: Tensor) -> bool:
        """Undo what was gathered of some examples, of which the last batch may be unfinished; whether it could."""
        return False

    @abstractmethod
    def update(self, rows: Rows) -> None:
        """Take one layer's rows of one batch."""

    def end_batch(self, batch: BatchInfo) -> None:  # noqa: B027
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


class LayerError(ValueError):
    """A layer that cannot be followed; `layer` is its name."""

    def __init__(self, layer: str, message: str):
        super().__init__(message)
        self.layer = layer


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module's own mode restored afterwards.

    PyTorch's fused attention for inference is off as well, because it runs past the modules inside.
    """
    modes = [(m, m.training) for m in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes:
            module.training = training


_LARGE = 1_000_000_000  # positions times parameters: below, bfloat16 saves less than a second


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, c, bool)() for c in checks)


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a module reads: the first tensor it is called with."""
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


@dataclass
class Call:
    """One run of a module: what it read, and the gradient of what it returned."""

    use: Use
    x: Tensor
    version: int  # of x, which changes when x is overwritten
    shape: torch.Size
    dtype: torch.dtype
    g: Tensor | None = None  # none comes if the output does not reach the target


@dataclass
class _Tape:
    """The calls of one forward pass, and the roots at which the backward pass stops."""

    rows: int = 0
    recording: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)
    waiting: Counter[str] = field(default_factory=Counter)
    roots: list[Tensor] = field(default_factory=list)
    shared: dict[tuple[str, int, bool], tuple[int, Tensor]] = field(default_factory=dict)
    emit: Callable[[str], None] | None = None

    def clear(self) -> None:
        self.__init__()


class Capture:
    """Runs batches through a model and hands each followed layer's rows on.

    Args:
        model: The model; its parameters and modes are left as they were.
        task: Its task.
        followed: The layers to follow.
        dtype: Type in which rows are handed over, and so of the products made of them; that of the model's
            activations when left out. The model's own passes are the same either way.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        followed: Iterable[Layer],
        *,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.task, self.dtype = model, task, dtype
        self.layers = {layer.name: layer for layer in followed}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._group_sizes = Counter(layer.input_group for layer in self.layers.values())
        named = dict(model.named_parameters(remove_duplicate=False))
        self._functional = {
            layer.parameters[0]: named[layer.parameters[0]]
            for layer in self.layers.values()
            if layer.kind == FUNCTIONAL
        }
        self._vmap_works: bool | None = None
        self._tape = _Tape()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def at(self, precision: Precision, examples: Examples) -> "Capture":
        """The same engine with its rows in another precision; "auto" is bfloat16 where that saves time worth having.

        It does for models in float32 on hardware with bfloat16 products, over data that take a second or so. What it
        costs was measured: scores keep their ranks to a Spearman correlation of 0.9995 (docs/benchmarks/cost.md).
        """
        if precision not in get_args(Precision):
            offered = ", ".join(get_args(Precision))
            raise ValueError(f"Expected a precision among {offered}; got {precision!r}.")
        if precision == "auto":
            work = sum(examples.lengths or [len(examples)]) * sum(
                x.numel for x in self.layers.values()
            )
            single = {p.dtype for p in self.model.parameters()} == {torch.float32}
            low = single and work >= _LARGE and has_bfloat16(self.device)
        else:
            low = precision == "bfloat16"
        dtype = torch.bfloat16 if low else None
        return Capture(self.model, self.task, self.layers.values(), dtype=dtype)

    @property
    def precision(self) -> str:
        """What rows are handed over in, in words."""
        return "model" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks in place, parameters frozen and modules in evaluation mode, all undone at the end."""
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(frozen(self.model))
            for layer in self.layers.values():
                for use in layer.uses:
                    hook = self._hook(layer.name, use)
                    module = self._modules[use.module]
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            stack.callback(self._tape.clear)
            yield

    def _hook(self, name: str, use: Use):
        tape = self._tape

        def hook(module, args, kwargs, output):
            if not tape.recording:
                return None
            x, calls = first_tensor(args, kwargs), tape.calls.setdefault(name, [])
            if use.axis is None and output.shape[0] == 1:
                x, output = (t.expand(tape.rows, *t.shape[1:]) for t in (x, output))
            number = len(calls)
            calls.append(Call(use, x, x._version, output.shape, output.dtype))
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:
                root = output.detach().requires_grad_()
                tape.roots.append(root)
                output = root.clone()  # not a leaf, so the model may still change it in place
            tape.waiting[name] += 1

            def receive(g: Tensor) -> None:
                tape.calls[name][number].g = g
                tape.waiting[name] -= 1
                if tape.waiting[name] == 0 and tape.emit is not None:
                    tape.emit(name)

            output.register_hook(receive)
            return output

        return hook

    def clear(self) -> None:
        """Let go of what a pass has left behind, such as one that ran out of memory."""
        self._tape.clear()

    def backward(
        self,
        data: Any,
        target: Target,
        batch: BatchInfo,
        keys: Tensor,
        emit: Callable[[Rows], None],
    ) -> Tensor:
        """One forward and one backward pass; returns the target's values, one a row.

        Call inside `hooks()`. `emit` receives each followed layer's rows once.

        Raises:
            FloatingPointError: A value is not finite; the message names the example.
            LayerError: A layer did not run, or its tensors are not made of the examples'.
        """
        tape = self._tape
        tape.clear()
        tape.rows, tape.recording = len(keys), True
        try:
            with torch.enable_grad():
                values, fixed = target(self.model, self.task, data, keys)
                total = values.sum()
        finally:
            tape.recording = False
        _check(values.detach(), batch)
        masks = {p: None if bool(m.all()) else m for p, m in self.task.masks(data).items()}
        pending = dict.fromkeys(self.layers)

        def finish(name: str) -> None:
            del pending[name]
            emit(self._rows(self.layers[name], tape.calls.pop(name, []), len(values), masks, batch))

        with torch.no_grad():
            if tape.roots and total.requires_grad:
                tape.emit = finish
                torch.autograd.grad(total, tape.roots, allow_unused=True)
                tape.emit = None
            if self._functional:
                for name, g in self._functional_gradients(data, target, keys, fixed).items():
                    layer, g = self.layers[name], g.flatten(1)[:, None]
                    del pending[name]
                    emit(Rows(layer, g.new_ones(len(g), 1, 1), g, batch))
            for name in list(pending):
                finish(name)
        tape.clear()
        return values.detach()

    def _rows(
        self, layer: Layer, calls: list[Call], n: int, masks: dict[str, Any], batch: BatchInfo
    ) -> Rows:
        """Rows of all uses of a layer, their positions one after the other."""
        if not calls:
            raise LayerError(
                layer.name,
                f"Layer {layer.name!r} did not run in this batch, though it ran when layers were chosen. "
                "Leave it out with skip, or follow it where it always runs.",
            )
        try:
            parts = [self._part(layer, call, n, masks) for call in calls]
        except (RuntimeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(str(tuple(call.x.shape)) for call in calls)
            raise LayerError(
                layer.name,
                f"What layer {layer.name!r} reads, {shapes}, cannot be split into {n} examples ({error}). "
                "Leave it out with skip.",
            ) from error
        if len(parts) == 1:
            return Rows(layer, *parts[0][:2], batch, parts[0][2])
        a, g = (torch.cat(x, dim=-2) for x in ([p[0] for p in parts], [p[1] for p in parts]))
        if all(mask is None for *_, mask in parts):
            return Rows(layer, a, g, batch)
        every = [
            g.new_ones(g.shape[-3:-1], dtype=torch.bool) if m is None else m for _, g, m in parts
        ]
        return Rows(layer, a, g, batch, torch.cat(every, dim=1))

    def _part(
        self, layer: Layer, call: Call, n: int, masks: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(a, g) of one run of a module, and the mask of its real positions."""
        module, use, x, g = self._modules[call.use.module], call.use, call.x.detach(), call.g
        if x._version != call.version and use.kind != "bias":
            raise LayerError(
                layer.name,
                f"What layer {layer.name!r} read was overwritten in place before its gradient was taken. "
                "Make that operation out of place, or leave the layer out with skip.",
            )
        if g is None:
            g = torch.zeros(call.shape, dtype=call.dtype, device=x.device)
        if use.axis == 1:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        make_read, make_grad = KINDS[use.kind]
        grad = make_grad(module, x, g, n, layer.has_bias)
        mask = _mask_for(masks, use.module, grad)
        key = (layer.input_group, id(call.x), mask is None)
        left, read = self._tape.shared.pop(key, (self._group_sizes[layer.input_group], None))
        if read is None:
            read = make_read(module, x, n, layer.has_bias)
            read = read if mask is None else read * mask[..., None]
            read = read if self.dtype is None else read.to(self.dtype)
        grad = grad if self.dtype is None else grad.to(self.dtype)
        if left > 1:
            self._tape.shared[key] = left - 1, read
        return (grad, read, mask) if use.kind == "embedding" else (read, grad, mask)

    def _functional_gradients(
        self, data: Any, target: Target, keys: Tensor, fixed: Any
    ) -> dict[str, Tensor]:
        """Per-example gradients of the remaining parameters, by vmap or, where that fails, one by one."""
        if self._vmap_works is not False:
            try:
                gradients = self._by_vmap(data, target, keys, fixed)
                self._vmap_works = True
                return gradients
            except Exception as error:
                if self._vmap_works or is_out_of_memory(error):
                    raise
                warnings.warn(
                    f"torch.func cannot batch this model ({type(error).__name__}); the gradients of "
                    f"{', '.join(list(self._functional)[:3])} are taken one example at a time.",
                    stacklevel=2,
                )
                self._vmap_works = False
        return self._one_by_one(data, target, keys, fixed)

    def _by_vmap(self, data: Any, target: Target, keys: Tensor, fixed: Any) -> dict[str, Tensor]:
        bound = Bound(self.model, lambda m, d, k, f: target(m, self.task, d, k, f)[0].sum())
        leaves, spec = pytree.tree_flatten((data, keys, fixed))

        def value(parameters: dict[str, Tensor], tensors: list[Tensor]) -> Tensor:
            rows = iter(tensors)
            one = [next(rows)[None] if isinstance(x, Tensor) else x for x in leaves]
            return torch.func.functional_call(bound, parameters, pytree.tree_unflatten(one, spec))

        parameters = {f"model.{n}": p.detach() for n, p in self._functional.items()}
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be batched
            gradient = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))
            found = gradient(parameters, tensors)
        return {n.removeprefix("model."): g.detach() for n, g in found.items()}

    def _one_by_one(self, data: Any, target: Target, keys: Tensor, fixed: Any) -> dict[str, Tensor]:
        parameters = list(self._functional.values())
        rows: dict[str, list[Tensor]] = {name: [] for name in self._functional}
        for p in parameters:
            p.requires_grad_(True)
        try:
            for i in range(len(keys)):
                one = take((data, keys, fixed), torch.tensor([i]))
                with torch.enable_grad():
                    value = target(self.model, self.task, *one)[0].sum()
                    found = torch.autograd.grad(value, parameters, allow_unused=True)
                for part, p, g in zip(rows.values(), parameters, found, strict=True):
                    part.append(torch.zeros_like(p) if g is None else g)
        finally:
            for p in parameters:
                p.requires_grad_(False)
        return {name: torch.stack(part) for name, part in rows.items()}


def _check(values: Tensor, batch: BatchInfo) -> None:
    if values.ndim != 1:
        raise ValueError(
            f"Expected one number an example from the task; got shape {tuple(values.shape)}."
        )
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        number = int(batch.indices[row])
        name = f"number {number}" if batch.ids is None else repr(batch.ids[number])
        raise FloatingPointError(
            f"The loss of example {name} is {values[row].item()}; "
            "look at this example, or at the model's weights, before tracing."
        )


class Bound(nn.Module):
    """A function of a model, as a module, so that `functional_call` can replace the model's parameters."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(self.model, *args)

    def at(self, parameters: Mapping[str, Tensor], *args: Any) -> Any:
        """The function's value with some of the model's parameters replaced."""
        named = {f"model.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(self, named, args)


def _mask_for(masks: dict[str, Tensor | None], module: str, grad: Tensor) -> Tensor | None:
    """The mask (batch, pos) that holds for a module's positions, or None where all are real.

    A position that receives a gradient is real whatever the mask says: encoder states that a decoder
    reads may be as many as the decoder's tokens.
    """
    inside = [p for p in masks if not p or module == p or module.startswith(f"{p}.")]
    mask = masks[max(inside, key=len)] if inside else None
    if mask is None or mask.shape != grad.shape[-3:-1]:
        return None
    mask = mask.to(grad.device)
    return None if bool(grad[..., ~mask, :].any()) else mask


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

    Raises:
        ValueError: A batch would hold nothing.
    """
    if batch_size < 1 or batch_tokens < 1:
        raise ValueError(
            f"batch_size and batch_tokens must be at least 1; got {batch_size} and {batch_tokens}. "
            "Leave them out for their defaults."
        )
    fold_of = (examples.keys % folds).tolist()
    lengths = examples.lengths or [1] * len(examples)
    limit = batch_tokens if examples.lengths else batch_size
    plans = []
    for fold in range(folds):
        members = sorted(
            (i for i in range(len(examples)) if fold_of[i] == fold), key=lambda i: (-lengths[i], i)
        )
        batch: list[int] = []
        for i in members:  # longest first, so the first of a batch is its width
            if batch and ((len(batch) + 1) * lengths[batch[0]] > limit or len(batch) == batch_size):
                plans.append(BatchPlan(tuple(batch), fold))
                batch = []
            batch.append(i)
        if batch:
            plans.append(BatchPlan(tuple(batch), fold))
    return plans


def units_of(plans: Sequence[BatchPlan], *, most: int = 256) -> list[list[BatchPlan]]:
    """Runs of batches of one fold, about `most` of them: what ranks divide among themselves.

    They do not depend on the number of ranks. Sums are taken over each unit and then over the units in their order, so
    neither do the results.
    """
    size, units = math.ceil(len(plans) / most), []
    for plan in plans:
        if not units or len(units[-1]) == size or units[-1][0].fold != plan.fold:
            units.append([])
        units[-1].append(plan)
    return units


def sweep(
    capture: Capture,
    examples: Examples,
    accumulators: Sequence[Accumulator],
    target: Target,
    *,
    batches: Sequence[BatchPlan] | None = None,
    checkpoint: Checkpoint | None = None,
    save_every: float = SAVE_EVERY,
    progress: Progress | None = None,
    note: str = "",
    stop: Callable[[], bool] | None = None,
) -> int:
    """Pass once over the data; all accumulators share it. Returns the number of batches that were run.

    The ranks of a process group share the batches, and all end with the whole: the same bits as one process has, on
    the same hardware with the same number of threads. A batch that does not fit into memory is halved.

    Args:
        capture: The model with its followed layers.
        examples: The data.
        accumulators: What to gather.
        target: What is differentiated.
        batches: The batches, from `plan_batches` when left out.
        checkpoint: Where to keep the state, so that a killed sweep goes on where it stopped, with any number of ranks.
        save_every: Least seconds between two saves; more where a save takes long, so that saving stays a twentieth.
        progress: Called with (batches done, batches in all, note), by the first rank only.
        note: What the sweep is for.
        stop: Asked after each unit of batches; true ends the sweep early.

    Raises:
        RankFailed: Another rank failed; the message has its error.
    """
    world = current()
    plans = plan_batches(examples) if batches is None else list(batches)
    units = units_of(plans)
    in_rounds = checkpoint is not None or stop is not None
    if checkpoint is not None and any(a.kept == "apart" for a in accumulators):
        raise ValueError("A sweep with a checkpoint cannot hold accumulators that are kept apart.")
    # what is merged after each round, and what only at the end
    often = [a.kept == "sums" or (in_rounds and world.size > 1) for a in accumulators]
    often = [o and a.kept != "apart" for o, a in zip(often, accumulators, strict=True)]
    once = [
        a.kept == "rows" and world.size > 1 and not o
        for o, a in zip(often, accumulators, strict=True)
    ]
    with world.failing_together():
        state = _State(world, checkpoint if world.is_first else None, accumulators, save_every)
        facts = {"note": note, "batches": len(plans)}
        start, finished = state.resume(facts, units)
        done = sum(map(len, units[:start]))
        if finished:
            return done
        step = world.size if in_rounds or any(often) else max(len(units) - start, 1)
        rounds = [units[i : i + step] for i in range(start, len(units), step)]
        ends = [a.empty() if o else a for a, o in zip(accumulators, once, strict=True)]
        mine = [unit for some in rounds for unit in some[world.rank :: world.size]]
        report = progress if world.is_first else None
        with capture.hooks(), _Passes(capture, examples, target, mine) as passes:
            for some in rounds:
                parts = [a.empty() if o else a for a, o in zip(ends, often, strict=True)]
                n, ahead = sum(map(len, some)), min(world.size, len(some))

                def report_batch(own: int, done=done, n=n, ahead=ahead) -> None:
                    if report is not None:
                        report(done + min(own * ahead, n), len(plans), note)

                parts = passes.run(
                    some[world.rank :: world.size],
                    parts,
                    often,
                    report_batch,
                    equal=max(sum(map(len, some[r :: world.size])) for r in range(world.size)),
                )
                enough = False
                if any(often):
                    for unit in _merged(world, ends, parts, often, some):
                        done += len(unit)
                        if enough := stop is not None and stop():
                            break
                else:
                    done += n
                    enough = stop is not None and stop()
                state.save_sometimes(facts | {"done": done, "finished": False})
                if enough:
                    break
        if any(once):
            _gather(world, accumulators, ends, once)
        state.save(facts | {"done": done, "finished": True})
    return done


def _merged(
    world: World,
    totals: Sequence[Accumulator],
    parts: Sequence[Accumulator],
    chosen: Sequence[bool],
    units: Sequence[list[BatchPlan]],
) -> Iterator[list[BatchPlan]]:
    """Add what each rank gathered of its unit to the totals, one unit after the other."""
    wanted = [i for i, c in enumerate(chosen) if c]
    has_unit = world.rank < len(units)
    own = _tensors([parts[i] for i in wanted]) if has_unit and world.size > 1 else {}
    for rank, tensors in enumerate(world.each(own if has_unit else None)):
        if rank >= len(units):
            continue
        theirs = [parts[i] for i in wanted]
        if rank != world.rank:
            theirs = [totals[i].empty() for i in wanted]
            _load(theirs, tensors or {})
        for i, part in zip(wanted, theirs, strict=True):
            totals[i].merge(part)
        yield units[rank]


def _gather(
    world: World,
    totals: Sequence[Accumulator],
    parts: Sequence[Accumulator],
    chosen: Sequence[bool],
) -> None:
    """Put together rows of examples that the ranks have gathered, each of its own."""
    pairs = [(t, p) for t, p, c in zip(totals, parts, chosen, strict=True) if c]
    own = _tensors([part for _, part in pairs])
    for rank, tensors in enumerate(world.each(own)):
        for i, (total, part) in enumerate(pairs):
            other = part
            if rank != world.rank:
                other = total.empty()
                other.load(_under(tensors or {}, f"{i}/"))
            total.merge(other)


class _State:
    """The state of a sweep on disk, written by the first rank and read for all.

    Args:
        world: All ranks.
        checkpoint: Where it is; None for none, and on the other ranks.
        accumulators: What is gathered.
        save_every: Least seconds between two saves.
    """

    def __init__(
        self,
        world: World,
        checkpoint: Checkpoint | None,
        accumulators: Sequence[Accumulator],
        save_every: float,
    ):
        self.world, self.checkpoint, self.accumulators = world, checkpoint, accumulators
        self.cadence = Cadence(save_every)

    def resume(self, facts: dict[str, Any], units: Sequence[list[BatchPlan]]) -> tuple[int, bool]:
        """How many units a checkpoint of the same sweep has done, and whether it is finished."""
        found = None if self.checkpoint is None else self.checkpoint.load()
        borders = list(accumulate(map(len, units), initial=0))
        usable = (
            found is not None
            and facts.items() <= found[1].items()
            and (found[1]["finished"] or found[1]["done"] in borders)
        )
        known = [found[1]["done"], found[1]["finished"]] if found and usable else None
        known, *others = self.world.exchange([known, facts])
        elsewhere = next((theirs for _, theirs in others if theirs != facts), None)
        if elsewhere is not None:
            raise ValueError(
                f"The ranks are not in the same sweep: this one is in {facts}, another in {elsewhere}. "
                "All must run the same program on the same data."
            )
        known = known[0]
        if known is None:
            return 0, False
        tensors = next(self.world.each(found[0] if found and usable else None))
        _load(self.accumulators, tensors or {})
        return borders.index(known[0]), bool(known[1])

    def save_sometimes(self, facts: dict[str, Any]) -> None:
        """Save if it is time to."""
        if self.checkpoint is not None and self.cadence.due:
            with self.cadence.saving():
                self.save(facts)

    def save(self, facts: dict[str, Any]) -> None:
        if self.checkpoint is not None:
            self.checkpoint.save(_tensors(self.accumulators), facts)


def _tensors(accumulators: Sequence[Accumulator]) -> dict[str, Tensor]:
    return {f"{i}/{k}": v for i, a in enumerate(accumulators) for k, v in a.tensors().items()}


def _load(accumulators: Sequence[Accumulator], tensors: dict[str, Tensor]) -> None:
    for i, accumulator in enumerate(accumulators):
        accumulator.load(_under(tensors, f"{i}/"))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


class _Passes:
    """Runs units of batches, loading ahead, in halves where memory does not suffice.

    Args:
        capture: The model, with its hooks in place.
        examples: The data.
        target: What is differentiated.
        units: All units that will be run, in their order.
    """

    def __init__(
        self,
        capture: Capture,
        examples: Examples,
        target: Target,
        units: Sequence[list[BatchPlan]],
    ):
        self.capture, self.examples, self.target = capture, examples, target
        plans = [plan for unit in units for plan in unit]
        self.following = dict(pairwise(plans))
        self.sharded = is_sharded(capture.model)
        if isinstance(target, Enumerated):  # as many passes as there are likely labels
            refuse_sharded(capture.model, "All labels", "draw them with fisher='mc'")
        self.limit = math.inf  # positions of a batch that memory suffices for
        self._shrunk: tuple[str, str] | None = None  # what it did not suffice for, and what it does
        self._running = BatchPlan((), 0)
        self._pool = ThreadPoolExecutor(1)
        self._ahead: dict[BatchPlan, Future] = {}

    def __enter__(self) -> "_Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        units: Sequence[list[BatchPlan]],
        parts: list[Accumulator],
        fresh: Sequence[bool],
        report: Callable[[int], None],
        *,
        equal: int,
    ) -> list[Accumulator]:
        """Run units through accumulators and return these, some of them started again where memory did not suffice.

        Args:
            units: The units.
            parts: The accumulators.
            fresh: Which of them have seen nothing but these units, of which there is then one.
            report: Called with the number of batches done.
            equal: As many passes are made where the weights are spread over ranks, which need each other for them.
        """
        done = 0
        for unit in units:
            while True:
                try:
                    for number, plan in enumerate(unit):
                        self._batch(plan, parts)
                        report(done + number + 1)
                    break
                except Exception as error:
                    if not is_out_of_memory(error) or self.sharded or not self._halve(error):
                        raise
                self.capture.clear()
                free_memory(self.capture.device)
                indices = torch.tensor([i for plan in unit for i in plan.indices])
                parts = [
                    p.empty() if f else _without(p, indices)
                    for p, f in zip(parts, fresh, strict=True)
                ]
            done += len(unit)
            self._tell()
        if self.sharded:
            for _ in range(equal - done):
                self._idle()
        return parts

    def _batch(self, plan: BatchPlan, accumulators: Sequence[Accumulator]) -> None:
        for piece in self._pieces(plan):
            self._running = piece
            data = to_device(self._loaded(piece), self.capture.device)
            run_batch(self.capture, self.examples, piece, data, accumulators, self.target)

    def _loaded(self, plan: BatchPlan) -> Any:
        """A batch, while the next one is on its way."""
        found = self._ahead.pop(plan, None)
        found = found or self._pool.submit(self.examples.batch, plan.indices)
        after = self.following.get(plan)
        if after is not None and after not in self._ahead:
            self._ahead[after] = self._pool.submit(self.examples.batch, after.indices)
        return found.result()

    def _pieces(self, plan: BatchPlan) -> list[BatchPlan]:
        """A batch in parts that memory suffices for."""
        n = max(1, int(min(self.limit / self._width(plan), len(plan.indices))))
        cuts = range(0, len(plan.indices), n)
        return [BatchPlan(plan.indices[i : i + n], plan.fold) for i in cuts]

    def _width(self, plan: BatchPlan) -> int:
        lengths = self.examples.lengths
        return 1 if lengths is None else max(1, max(lengths[i] for i in plan.indices))

    def _halve(self, error: Exception) -> bool:
        """Allow half of the batch that did not fit; false where it was a single example."""
        plan, n = self._running, len(self._running.indices)
        if n == 1:
            name = self.examples.ids[plan.indices[0]]
            error.add_note(f"Even example {name!r} alone does not fit into memory.")
            return False
        first = self._shrunk[0] if self._shrunk else self._described(plan, n)
        self.limit = n // 2 * self._width(plan)
        self._shrunk = first, self._described(plan, n // 2)
        return True

    def _tell(self) -> None:
        """Say once which size works."""
        if self._shrunk:
            (failed, works), self._shrunk = self._shrunk, None
            warnings.warn(
                f"Out of memory with a batch of {failed}; the sweep goes on with at most {works}. "
                "Results differ by rounding only.",
                stacklevel=4,
            )

    def _described(self, plan: BatchPlan, n: int) -> str:
        width = "" if self.examples.lengths is None else f" ({n * self._width(plan):,} tokens)"
        return f"{n:,} example{'s' * (n > 1)}{width}"

    def _idle(self) -> None:
        """A pass for the sake of the other ranks, which need this one's share of the weights."""
        plan = BatchPlan((0,), 0)
        data = to_device(self.examples.batch(plan.indices), self.capture.device)
        run_batch(self.capture, self.examples, plan, data, [], self.target)


def _without(accumulator: Accumulator, indices: Tensor) -> Accumulator:
    if not accumulator.forget(indices):
        raise MemoryError(
            f"Out of memory, and {type(accumulator).__name__} cannot take back half a batch; choose smaller batches."
        )
    return accumulator


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

    try:
        for part in target.parts(capture.model, capture.task, data, keys):
            chosen = part.index
            rows = indices if chosen is None else indices[chosen.cpu()]
            info = BatchInfo(rows, plan.fold, part.weights, part.share, examples.ids)
            some, some_keys = (data, keys) if chosen is None else (take(data, chosen), keys[chosen])
            with torch.no_grad():
                capture.backward(some, part.target, info, some_keys, emit)
            for accumulator in accumulators:
                accumulator.end_batch(info)
    except LabelError as error:  # found on the batch itself, before its rows are spread
        raise error.named(repr(examples.ids[plan.indices[error.row]])) from None
