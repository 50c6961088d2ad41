"""Decide which parameters are followed, by which path, and say what is left out."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.capture import (
    BatchInfo,
    Capture,
    LayerError,
    Rows,
    evaluation_mode,
    first_tensor,
)
from headwater.core.examples import take
from headwater.core.layers import FUNCTIONAL, Layer, Use, matrix_shape, module_kind
from headwater.core.sharding import is_sharded, refuse_sharded, reshard, whole
from headwater.core.target import Loss

Member = tuple[str, nn.Module]


@dataclass(frozen=True)
class LeftOut:
    """Parameters that are not followed, and why."""

    name: str
    numel: int
    why: str


@dataclass(frozen=True)
class Followed:
    """The followed layers of a model and the account of what they cover.

    Attributes:
        layers: Followed layers, in the order in which the model first uses them.
        left_out: Parameters that are not followed.
        tied: Groups of module names that share one parameter.
        reused: Modules that run several times in one forward pass, with how often.
    """

    layers: tuple[Layer, ...]
    left_out: tuple[LeftOut, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    reused: tuple[tuple[str, int], ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that is followed."""
        inside, outside = sum(x.numel for x in self.layers), sum(x.numel for x in self.left_out)
        return inside / max(inside + outside, 1)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def follow(
    model: nn.Module,
    task: Any,
    batch: Any,
    *,
    layers: str | Sequence[str] = "trainable",
    skip: str | Sequence[str] = (),
    max_side: int = 16_384,
    prove: bool = True,
) -> Followed:
    """Find the layers to follow by running one batch.

    Args:
        model: Any PyTorch model.
        task: Its task; the batch is run through `task.loss`.
        batch: A small batch; two examples are enough.
        layers: "trainable" (every parameter that requires a gradient, or all when none does), "all", or
            patterns of parameter or module names such as "encoder.*.weight".
        skip: Patterns of names to leave out.
        max_side: Matrices with a longer side are left out, as a factor of that size does not fit; embeddings
            and output heads of language models are the usual case.
        prove: Compare every layer's gradient on the batch with autograd's. What differs (a parameter that
            also acts outside its module, sequence-first tensors, routed tokens) is followed another way.

    Raises:
        ValueError: Nothing is left to follow.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    skip = [skip] if isinstance(skip, str) else list(skip)
    read, batch = _probe(model, task, batch)
    reshard(model)
    builder = _Builder(model, patterns, skip, max_side, read)
    builder.matrices()
    builder.biases()
    builder.rest()
    found = builder.layers
    if prove and found:
        found = _Proof(model, task, batch, found)(builder)
    if alone := [x.name for x in found if x.kind == FUNCTIONAL]:
        what = f"Gradients of single parameters ({', '.join(alone[:3])})"
        refuse_sharded(model, what, "leave these out with skip")
    if not found:
        named = ", ".join(sorted({n for n, _ in model.named_parameters()})[:8])
        why = "; ".join(sorted({x.why for x in builder.left_out})[:3])
        raise ValueError(
            f"The model has no layer to follow with layers={layers!r} and skip={skip!r} ({why}). Its "
            f"parameters are: {named}, …; pass layers='all' or patterns of these names."
        )
    return Followed(
        tuple(_with_input_groups(found, read)),
        tuple(builder.left_out),
        tuple(tuple(n for n, _ in m) for m in builder.by_weight.values() if len(m) > 1),
        tuple((name, len(inputs)) for name, inputs in read.items() if len(inputs) > 1),
    )


def _probe(model: nn.Module, task: Any, batch: Any) -> tuple[dict[str, list[int]], Any]:
    """The tensors (by identity) that modules read, in the order of their first run, and the batch.

    A batch of one is doubled: two examples tell the axis of the examples from the others.
    """
    names = {m: n for n, m in model.named_modules() if module_kind(m) is not None}
    read, alive = defaultdict(list), []

    def hook(module, args, kwargs, output):
        alive.append(first_tensor(args, kwargs))  # identities are only unique among living tensors
        read[names[module]].append(id(alive[-1]))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in names]
    try:
        with torch.no_grad(), evaluation_mode(model):
            n = task.loss(model, batch).numel()
    finally:
        for handle in handles:
            handle.remove()
    return dict(read), take(batch, torch.tensor([0, 0])) if n == 1 else batch


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, p) or fnmatch(name, f"{p}.*") for p in patterns)


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's parameter, unless it is none or packed numbers."""
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Parameter) and _is_real(found) else None


def _is_real(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.itemsize > 1


class _Builder:
    """Collects layers; each parameter is covered once."""

    def __init__(
        self,
        model: nn.Module,
        patterns: list[str],
        skip: list[str],
        max_side: int,
        read: dict[str, list[int]],
    ):
        self.patterns, self.skip, self.max_side = patterns, skip, max_side
        self.names: dict[int, list[str]] = defaultdict(list)
        self.parameters: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(name)
            self.parameters[id(parameter)] = parameter
        trainable = [key for key, p in self.parameters.items() if p.requires_grad]
        if patterns == ["trainable"] and trainable:
            self.wanted = set(trainable)
        elif patterns in (["trainable"], ["all"]):
            self.wanted = set(self.parameters)
        else:
            named = self.names.items()
            self.wanted = {k for k, names in named if any(_matches(n, patterns) for n in names)}
        self.by_weight: dict[int, list[Member]] = defaultdict(list)
        self.by_bias: dict[int, list[Member]] = defaultdict(list)
        modules = dict(model.named_modules())
        for name in read:
            module = modules[name]
            weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
            self.by_weight[id(module if weight is None else weight)].append((name, module))
            if bias is not None:
                self.by_bias[id(bias)].append((name, module))
        self.done: set[int] = set()
        self.layers: list[Layer] = []
        self.left_out: list[LeftOut] = []

    def takes(self, parameter: nn.Parameter | None) -> bool:
        key = id(parameter)
        if parameter is None or key not in self.wanted or key in self.done:
            return False
        return _is_real(parameter) and not any(_matches(n, self.skip) for n in self.names[key])

    def matrices(self) -> None:
        """Weights of modules, each with its bias where exactly the same modules add it."""
        for members in self.by_weight.values():
            weight = _parameter(members[0][1], "weight")
            if weight is None:
                self._without_parameter(*members[0])
            elif self.takes(weight):
                self._matrix(members, weight)

    def _matrix(self, members: list[Member], weight: nn.Parameter) -> None:
        kinds = [module_kind(m) or "" for _, m in members]
        bias = _parameter(members[0][1], "bias")
        alone = bias is None or self.by_bias[id(bias)] != members
        covered = [weight] if alone or not self.takes(bias) else [weight, bias]
        if set(kinds) == {"norm"}:
            shape = 1, sum(p.numel() for p in covered), 1
        else:
            shapes = {
                matrix_shape(m, k) for (_, m), k in zip(members, kinds, strict=True) if k != "norm"
            }
            alike = len(set(kinds)) == 1 or set(kinds) == {"linear", "embedding"}
            if not alike or len(shapes) > 1:
                return
            groups, out, in_ = shapes.pop()
            shape = groups, out, in_ + len(covered) - 1
            if max(out, in_) > self.max_side:
                self.leave(weight, f"a side of {max(out, in_)} exceeds max_side={self.max_side}")
                return
        kind = "linear" if len(set(kinds)) > 1 else kinds[0]
        self._add(members[0][0], zip(members, kinds, strict=True), shape, covered, kind)

    def biases(self) -> None:
        """Biases that are no column of a followed weight."""
        for members in self.by_bias.values():
            bias = _parameter(members[0][1], "bias")
            if bias is not None and self.takes(bias):
                uses = [(member, "bias") for member in members]
                self._add(self.names[id(bias)][0], uses, (1, bias.numel(), 1), [bias], "bias")

    def rest(self) -> None:
        """Parameters that no kind of module covers: by `torch.func`, or left out by name."""
        for key, parameter in self.parameters.items():
            if key in self.done:
                continue
            if not self.takes(parameter):
                real = "skipped" if _is_real(parameter) else "not real numbers"
                self.leave(parameter, real if key in self.wanted else "not asked for")
            elif max(parameter.shape, default=1) > self.max_side:
                side = max(parameter.shape)
                self.leave(parameter, f"a side of {side} exceeds max_side={self.max_side}")
            else:
                self.layers.append(self.functional(self.names[key][0], tuple(parameter.shape)))

    def functional(self, name: str, shape: tuple[int, ...]) -> Layer:
        return Layer(name, (), (1, prod(shape), 1), (name,), (shape,), FUNCTIONAL, name)

    def _without_parameter(self, name: str, module: nn.Module) -> None:
        """A quantized weight: followed when it is asked for by name."""
        own = [p for p in module.parameters(recurse=False) if _is_real(p) and p.ndim > 1]
        if (
            own or module_kind(module) != "linear"
        ):  # such as weight norm, which makes its weight from others
            return
        self.done.add(id(getattr(module, "weight", None)))  # packed
        label, shape = f"{name}.weight", matrix_shape(module, "linear")
        why = "skipped" if _matches(label, self.skip) else "quantized; ask for it by name"
        if max(shape) > self.max_side:
            why = f"a side of {max(shape)} exceeds max_side={self.max_side}"
        elif why != "skipped" and _matches(label, self.patterns):
            uses = (Use(name, "linear"),)
            self.layers.append(Layer(name, uses, shape, (label,), (shape[1:],), "linear", name))
            return
        self.left_out.append(LeftOut(label, prod(shape), why))

    def _add(
        self,
        name: str,
        members: Iterable[tuple[Member, str]],
        shape: tuple[int, int, int],
        covered: list[nn.Parameter],
        kind: str,
    ) -> None:
        uses = tuple(Use(module, use) for (module, _), use in members)
        names = tuple(self.names[id(p)][0] for p in covered)
        shapes = tuple(tuple(p.shape) for p in covered)
        self.layers.append(Layer(name, uses, shape, names, shapes, kind, name))
        self.done.update(id(p) for p in covered)

    def leave(self, parameter: nn.Parameter, why: str) -> None:
        self.done.add(id(parameter))
        self.left_out.append(LeftOut(self.names[id(parameter)][0], parameter.numel(), why))


class _Proof:
    """Layers' gradients against autograd's on one batch, where example b weighs b."""

    def __init__(self, model: nn.Module, task: Any, batch: Any, layers: Sequence[Layer]):
        self.model, self.task, self.batch, self.layers = model, task, batch, layers
        reshard(model)
        self.sharded = list(model.parameters()) if is_sharded(model) else []
        named = dict(model.named_parameters(remove_duplicate=False))
        wanted = [n for x in layers for n in x.parameters]
        self.parameters = {n: named[n] for n in wanted if n in named and _is_real(named[n])}
        self.truth = self._autograd()
        found = [g for g in self.truth.values() if g is not None]
        self.norm = sum(float(g.double().square().sum()) for g in found) ** 0.5

    def _weights(self, n: int, like: Tensor) -> Tensor:
        return torch.arange(1, n + 1, device=like.device, dtype=like.dtype)

    def _autograd(self) -> dict[str, Tensor | None]:
        frozen = [p for p in self.parameters.values() if not p.requires_grad]
        try:
            with evaluation_mode(self.model), torch.enable_grad():
                for p in frozen:
                    p.requires_grad_(True)
                losses = self.task.loss(self.model, self.batch)
                self.n = losses.numel()
                total = (losses.flatten() * self._weights(self.n, losses)).sum()
                found = _gradients(total, list(self.parameters.values()), self.sharded)
        finally:
            for p in frozen:
                p.requires_grad_(False)
        return dict(zip(self.parameters, found, strict=True))

    def __call__(self, builder: _Builder) -> list[Layer]:
        """The layers, those that differ followed another way; what has no effect is left out."""
        proven = {x.name: x for x in self.layers}
        wrong = self.wrong([x for x in self.layers if x.uses])
        for axis in (1, None):
            again = [proven[name] for name in wrong]
            again = [replace(x, uses=tuple(replace(u, axis=axis) for u in x.uses)) for x in again]
            wrong = self.wrong(again)
            proven |= {x.name: x for x in again if x.name not in wrong}
        found = []
        for layer in proven.values():
            if layer.kind == FUNCTIONAL and self.truth[layer.parameters[0]] is None:
                why = "the loss of the first examples does not depend on it"
                builder.leave(self.parameters[layer.parameters[0]], why)
            elif layer.name in wrong:
                parts = zip(layer.parameters, layer.shapes, strict=True)
                found += [builder.functional(n, s) for n, s in parts]
            else:
                found.append(layer)
        return found

    def wrong(self, layers: Sequence[Layer]) -> set[str]:
        """Names of the layers whose rows do not make autograd's gradient."""
        bad: set[str] = set()

        def emit(rows: Rows) -> None:
            if not self._agrees(rows):
                bad.add(rows.layer.name)

        while left := [x for x in layers if x.name not in bad]:
            capture = Capture(self.model, self.task, left)
            info = BatchInfo(torch.arange(self.n))
            keys = torch.zeros(self.n, dtype=torch.int64, device=capture.device)
            try:
                with capture.hooks():
                    capture.backward(self.batch, Loss(), info, keys, emit)
                break
            except LayerError as error:
                bad.add(error.layer)
            except RuntimeError:  # the model cannot do with outputs repeated for each example
                if all(use.axis is not None for x in left for use in x.uses):
                    raise
                return {x.name for x in layers}
        return bad

    def _agrees(self, rows: Rows) -> bool:
        """Whether the rows' gradient is autograd's but for rounding, of single products and of the whole."""
        layer, a, g = rows.layer, rows.a, rows.g
        if not self.truth.keys() >= set(layer.parameters):
            return True  # a quantized weight, in which autograd takes no gradient
        g = g * self._weights(self.n, g)[:, None, None]
        ours = layer.to_parameters((g.flatten(-3, -2).mT @ a.flatten(-3, -2))[None])
        gap = size = 0.0
        for name, x in ours.items():
            truth = self.truth[name]
            truth = torch.zeros_like(x) if truth is None else truth
            gap += float((x - truth).double().square().sum())
            size += float(truth.double().square().sum())
        a_norm, g_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (a, g))
        products = float((a_norm * g_norm).square().sum())
        # models in float64 may use float32 inside, and adapters in float32 may sit on 16-bit weights
        tolerance = 5e-2 if coarsest_dtype(self.model).itemsize <= 2 else 1e-3
        bound = tolerance * max(products, size) ** 0.5 + torch.finfo(g.dtype).eps * self.norm
        return gap**0.5 <= bound


def _gradients(
    total: Tensor, parameters: list[nn.Parameter], sharded: list[nn.Parameter]
) -> Sequence[Tensor | None]:
    """Autograd's gradients; of weights that are spread over ranks they come by `backward` alone."""
    if not sharded:
        return torch.autograd.grad(total, parameters, allow_unused=True)
    before = {p: p.grad for p in sharded}
    for p in before:
        p.grad = None
    try:
        total.backward()  # every rank has the same batch, so the mean over ranks is the gradient
        return [None if p.grad is None else whole(p.grad) for p in parameters]
    finally:
        for p, grad in before.items():
            p.grad = grad


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The least precise number format among the model's parameters: what rounding must be judged by."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _with_input_groups(layers: list[Layer], read: dict[str, list[int]]) -> list[Layer]:
    """Layers that read the same tensors in every call share the name of the first."""
    groups: dict[tuple, str] = {}
    grouped = []
    for layer in layers:
        if len(layer.uses) == 1 and layer.kind in ("linear", "conv1d"):
            use = layer.uses[0]
            key = (*read[use.module], layer.has_bias, layer.shape[2], use.kind, use.axis)
            layer = replace(layer, input_group=groups.setdefault(key, layer.name))
        grouped.append(layer)
    return grouped
