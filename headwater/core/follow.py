"""Decide which parameters are followed, by which path, and say what is left out."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.layers import FUNCTIONAL, SHARED_INPUT, Layer, Use, matrix_shape, module_kind


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


@dataclass
class _Call:
    module: str
    inputs: int  # identity of the tensor read


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module's own mode restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _probe(model: nn.Module, names: dict[nn.Module, str], run) -> list[_Call]:
    calls, alive = [], []

    def hook(module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        alive.append(x)  # identities are only unique among living tensors
        calls.append(_Call(names[module], id(x)))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in names]
    try:
        with torch.no_grad(), evaluation_mode(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _selected(model: nn.Module, layers: str | Sequence[str]) -> set[int]:
    """Identities of the parameters (or weights that are no parameters) that are wanted."""
    named = list(model.named_parameters(remove_duplicate=False))
    if layers == "all":
        return {id(p) for _, p in named}
    if layers == "trainable":
        trainable = {id(p) for _, p in named if p.requires_grad}
        return trainable or {id(p) for _, p in named}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    return {id(p) for name, p in named if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, pattern + ".*")


def follow(
    model: nn.Module,
    task: Any,
    batch: Any,
    *,
    layers: str | Sequence[str] = "trainable",
    skip: Sequence[str] = (),
    max_side: int = 16_384,
) -> Followed:
    """Find the layers to follow by running one batch.

    Args:
        model: Any PyTorch model.
        task: Its task; one batch is run through `task.loss`.
        batch: A small batch.
        layers: "trainable" (every parameter that requires a gradient, or all when none does), "all", or
            patterns of parameter or module names such as "encoder.*.weight".
        skip: Patterns of names to leave out.
        max_side: Matrices with a longer side are left out, as a factor of that size does not fit; embeddings
            and output heads of language models are the usual case.

    Raises:
        ValueError: Nothing is left to follow.
    """
    wanted = _selected(model, layers)
    modules = {m: n for n, m in model.named_modules() if module_kind(m) is not None}
    calls = _probe(model, modules, lambda: task.loss(model, batch))
    n_calls: dict[str, int] = defaultdict(int)
    for call in calls:
        n_calls[call.module] += 1

    builder = _Builder(model, wanted, skip, max_side)
    by_weight: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    order = {name: i for i, name in reversed(list(enumerate(c.module for c in calls)))}
    for module, name in sorted(modules.items(), key=lambda item: order.get(item[1], len(calls))):
        if n_calls[name]:
            weight = getattr(module, "weight", None)
            by_weight[id(weight) if isinstance(weight, nn.Parameter) else id(module)].append((name, module))
    pattern = None if layers in ("trainable", "all") else ([layers] if isinstance(layers, str) else layers)
    for members in by_weight.values():
        builder.matrix(members, pattern)
    builder.rest(n_calls)

    found = _with_input_groups(builder.layers, calls)
    if not found:
        raise ValueError(
            f"The model has no layer to follow with layers={layers!r}"
            + (f" and skip={list(skip)!r}" if skip else "")
            + ". Its parameters are: "
            + ", ".join(sorted({n for n, _ in model.named_parameters()})[:8])
            + ", …; pass layers='all' or patterns of these names."
        )
    return Followed(
        tuple(found),
        tuple(builder.left_out),
        tuple(tuple(n for n, _ in m) for m in by_weight.values() if len(m) > 1),
        tuple((n, k) for n, k in n_calls.items() if k > 1),
    )


class _Builder:
    """Collects layers; each parameter is covered once."""

    def __init__(self, model: nn.Module, wanted: set[int], skip: Sequence[str], max_side: int):
        self.model, self.wanted, self.skip, self.max_side = model, wanted, skip, max_side
        self.names: dict[int, list[str]] = defaultdict(list)
        self.parameters: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(name)
            self.parameters[id(parameter)] = parameter
        self.done: set[int] = set()
        self.layers: list[Layer] = []
        self.left_out: list[LeftOut] = []

    def takes(self, parameter: Any) -> bool:
        key = id(parameter)
        if not isinstance(parameter, nn.Parameter) or key not in self.wanted or key in self.done:
            return False
        return not any(_matches(n, s) for n in self.names[key] for s in self.skip)

    def matrix(self, members: list[tuple[str, nn.Module]], patterns: Sequence[str] | None) -> None:
        """The layer of one weight, used by one or several modules."""
        (name, module), kinds = members[0], [module_kind(m) for _, m in members]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            self._without_parameter(name, module, patterns)
            return
        if not self.takes(weight) or (len(set(kinds)) > 1 and set(kinds) != {"linear", "embedding"}):
            return
        if kinds[0] == "norm":
            self._norm(members)
            return
        shape = matrix_shape(module, kinds[0] or "")
        if max(shape[1:]) > self.max_side:
            self._leave(weight, f"a side of {max(shape[1:])} exceeds max_side={self.max_side}")
            return
        biases = {id(getattr(m, "bias", None)): getattr(m, "bias", None) for _, m in members}
        own = next(iter(biases.values())) if len(biases) == 1 else None
        with_bias = own is not None and self.takes(own)
        covered = [weight, own] if with_bias else [weight]
        kind = "linear" if "embedding" in kinds and "linear" in kinds else kinds[0]
        self._add(name, members, kinds, (shape[0], shape[1], shape[2] + with_bias), covered, kind)
        if not with_bias:
            for member, bias in ((m, getattr(m[1], "bias", None)) for m in members):
                if kinds[0] != "conv" and self.takes(bias):
                    self._bias(member, bias)

    def _norm(self, members: list[tuple[str, nn.Module]]) -> None:
        module = members[0][1]
        bias = getattr(module, "bias", None)
        covered = [module.weight] if bias is None else [module.weight, bias]
        alike = all(getattr(m, "bias", None) is bias for _, m in members)
        if alike and all(self.takes(p) for p in covered):
            n = sum(p.numel() for p in covered)
            self._add(members[0][0], members, ["norm"] * len(members), (1, n, 1), covered, "norm")

    def _bias(self, member: tuple[str, nn.Module], bias: nn.Parameter) -> None:
        self._add(f"{member[0]}.bias", [member], ["bias"], (1, bias.numel(), 1), [bias], "bias")

    def _without_parameter(self, name: str, module: nn.Module, patterns: Sequence[str] | None) -> None:
        """A quantized weight: followed when it is asked for by name."""
        label, shape = f"{name}.weight", matrix_shape(module, "linear")
        if patterns is None or not any(_matches(label, p) for p in patterns):
            self.left_out.append(LeftOut(label, shape[1] * shape[2], "quantized; ask for it by name"))
            return
        self.layers.append(
            Layer(name, (Use(name, "linear"),), shape, (label,), (shape[1:],), "linear", name)
        )

    def rest(self, n_calls: dict[str, int]) -> None:
        """Parameters that no module kind covers: by `torch.func`, or left out by name."""
        for key, names in self.names.items():
            parameter = self.parameters[key]
            if key in self.done:
                continue
            if self.takes(parameter):
                n = parameter.numel()
                self._add(names[0], [], [], (1, n, 1), [parameter], FUNCTIONAL)
            else:
                why = "not asked for" if key not in self.wanted else "skipped"
                self._leave(parameter, why)

    def _add(self, name, members, kinds, shape, covered, kind) -> None:
        uses = tuple(Use(n, k) for (n, _), k in zip(members, kinds, strict=True))
        parameters = tuple(self.names[id(p)][0] for p in covered)
        shapes = tuple(tuple(p.shape) for p in covered)
        self.layers.append(Layer(name, uses, shape, parameters, shapes, kind, name))
        self.done.update(id(p) for p in covered)

    def _leave(self, parameter: nn.Parameter, why: str) -> None:
        self.done.add(id(parameter))
        self.left_out.append(LeftOut(self.names[id(parameter)][0], parameter.numel(), why))


def _with_input_groups(layers: list[Layer], calls: list[_Call]) -> list[Layer]:
    """Layers that read the same tensors in every call share the name of the first."""
    read: dict[str, list[int]] = defaultdict(list)
    for call in calls:
        read[call.module].append(call.inputs)
    groups: dict[tuple, str] = {}
    grouped = []
    for layer in layers:
        name = layer.name
        if len(layer.uses) == 1 and layer.uses[0].kind in ("linear", "conv1d") and layer.uses[0].kind in SHARED_INPUT:
            key = (tuple(read[layer.uses[0].module]), layer.has_bias, layer.shape[2], layer.uses[0].kind)
            name = groups.setdefault(key, layer.name)
        grouped.append(Layer(**{**vars(layer), "input_group": name}))
    return grouped


def functional_parameters(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The parameters that only `torch.func` can follow, by name."""
    wanted = {n for layer in layers if layer.kind == FUNCTIONAL for n in layer.parameters}
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in wanted}
