r"""A model cut at node layers: what each section makes of the activations it reads, as a map that can be repeated.

A *node layer* is a place in the model through which everything flows: the activations there (several tensors side by
side where a residual stream runs beside a branch) determine the outputs. Activations are rows $f = (x, 1)$: the
constant 1 stands for the biases that follow, so that a section maps activations and constant to the next node layer's
activations and constant, and a scaled row $\alpha f$ scales the biases too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, evaluation_mode
from headwater.core.examples import Examples, to_device
from headwater.core.layers import module_kind
from headwater.core.prediction import Prediction
from headwater.core.sharding import frozen, refuse_sharded
from headwater.core.task import Task

Parts = tuple[Tensor, ...]
OUTPUT = "output"
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CONV = (nn.Conv2d, nn.Conv3d)
_CHANNELS_SECOND = (*_CONV, nn.GroupNorm, _BATCH_NORM)


@dataclass(frozen=True)
class Step:
    """A stretch of a model's forward pass.

    Attributes:
        name: Name of the node layer that it reads.
        run: From the parts of that node layer, and the batch, to the parts of the next; the last step returns the
            model's outputs. Parts are (batch, dim), (batch, pos, dim) or (batch, channel, *sites).
        modules: The modules that run in it.
        apart: Numbers of the parts that it reads whose activations are kept apart from the others, such as the
            variance that a norm divides by.
    """

    name: str
    run: Callable[[Parts, Any], Parts]
    modules: tuple[nn.Module, ...] = ()
    apart: tuple[int, ...] = ()


@dataclass(frozen=True)
class Activations:
    """Activations of a node layer on a batch.

    Attributes:
        f: Activations, and the constant 1 as the last coordinate.
        shapes: Shapes of the parts side by side in it, without the batch.
        mask: Positions that count; None where all do.
    """

    f: Float[Tensor, "batch pos dim"]
    shapes: tuple[tuple[int, ...], ...]
    mask: Bool[Tensor, "batch pos"] | None = None

    @property
    def n_positions(self) -> int:
        """Positions that count."""
        return self.f.shape[0] * self.f.shape[1] if self.mask is None else int(self.mask.sum())

    def rows(self) -> Float[Tensor, "row dim"]:
        """The positions that count, one after the other."""
        return self.f.flatten(0, 1) if self.mask is None else self.f[self.mask]


def join(parts: Parts) -> Float[Tensor, "batch pos dim"]:
    """Parts side by side; channels are the dimension of convolutions, and sites their positions."""
    flat = []
    for x in parts:
        x = x.movedim(1, -1) if x.ndim > 3 else x
        flat.append(x.reshape(len(x), prod(x.shape[1:-1]), x.shape[-1]))
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def split(x: Float[Tensor, "batch pos dim"], shapes: Sequence[tuple[int, ...]]) -> Parts:
    """Inverse of `join`."""
    channels = [s[0 if len(s) > 2 else len(s) - 1] for s in shapes]
    parts = []
    for part, shape in zip(x.split(channels, dim=-1), shapes, strict=True):
        if len(shape) > 2:
            part = part.reshape(len(x), *shape[1:], shape[0]).movedim(-1, 1)
        parts.append(part.reshape(len(x), *shape))
    return tuple(parts)


class _Returns(nn.Module):
    """A model that returns what it was given once, so that a task makes its prediction of it."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Sections:
    """A model cut at node layers; the last one, "output", is what the task predicts from.

    Args:
        model: The model.
        task: Its task.
        steps: Its forward pass; see `steps_of`.
        nodes: Names of steps whose inputs are the node layers, in their order; those of all steps when left out.

    Raises:
        ValueError: A name is unknown or out of order, or a module between node layers is not supported.
    """

    def __init__(
        self, model: nn.Module, task: Task, steps: Sequence[Step], nodes: Sequence[str] | None
    ):
        refuse_sharded(model, "Sections of a model", "load it whole")
        known = [step.name for step in steps]
        nodes = [n for n in (known if nodes is None else nodes) if n != OUTPUT]
        wrong = [n for n in nodes if n not in known]
        if wrong or not nodes:
            what = f"got {wrong[0]!r}" if wrong else "got none"
            raise ValueError(f"Expected node layers among {', '.join(known)}; {what}.")
        places = [known.index(n) for n in nodes]
        if any(b <= a for a, b in pairwise(places)):
            raise ValueError(f"Expected node layers in the model's order, {', '.join(known)}.")
        self.model, self.task = model, task
        self.names = (*nodes, OUTPUT)
        self._start = steps[: places[0]]
        self._parts = [steps[a:b] for a, b in pairwise([*places, len(steps)])]
        for name, part in zip(nodes, self._parts, strict=True):
            for step in part:
                _check_modules(name, step)
        self._constant: Tensor | None = None

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def share(self, number: int) -> float:
        """Share of the model's parameters that one section holds."""
        own = {p for step in self._parts[number] for m in step.modules for p in m.parameters()}
        return sum(p.numel() for p in own) / sum(p.numel() for p in self.model.parameters())

    def apart(self, number: int, like: "Activations") -> list[int]:
        """Activations of a node layer that are kept apart from the others."""
        if number == len(self):
            return []
        sizes = [s[0 if len(s) > 2 else len(s) - 1] for s in like.shapes]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        parts = self._parts[number][0].apart
        return [i for k in parts for i in range(starts[k], starts[k] + sizes[k])]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The model in evaluation mode, its parameters frozen, and its biases scaled by the constant."""
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(frozen(self.model))
            modules = {m: None for part in self._parts for step in part for m in step.modules}
            for module in modules:
                if (bias := _bias(module)) is not None:
                    hook = module.register_forward_hook(self._folded(module, bias))
                    stack.callback(hook.remove)
            yield

    def _folded(self, module: nn.Module, bias: Tensor):
        second = isinstance(module, _CHANNELS_SECOND)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            c = self._constant
            if c is None:
                return None
            sites = output.shape[2:] if second else output.shape[1:-1]
            if prod(sites) == c.shape[1]:
                c = c.reshape(len(c), *sites)
            else:  # positions were put together: their constants are too
                c = c.mean(1).reshape(len(c), *[1] * len(sites))
            wide = bias.reshape(-1, *[1] * len(sites)) if second else bias
            return output + (c.unsqueeze(1 if second else -1) - 1) * wide

        return hook

    def start(self, batch: Any) -> Parts:
        """The parts of the first node layer."""
        parts: Parts = ()
        for step in self._start:
            parts = step.run(parts, batch)
        return parts if self._start else model_inputs(batch)

    def forward(self, batch: Any) -> list[Activations]:
        """The activations of all node layers, the outputs last. Call inside `hooks()`."""
        masks = self.task.masks(batch)
        with torch.no_grad():
            parts, found = self.start(batch), []
            for number in range(len(self)):
                if not all(p.is_floating_point() for p in parts):
                    raise ValueError(
                        f"What node layer {self.names[number]!r} reads is no real numbers but {parts[0].dtype}; begin "
                        "behind the embedding."
                    )
                x = join(parts)
                mask = masks.get("")
                mask = None if mask is None or mask.shape != x.shape[:2] else mask
                shapes = tuple(tuple(p.shape[1:]) for p in parts)
                found.append(Activations(_with_constant(x), shapes, mask))
                for step in self._parts[number]:
                    parts = step.run(parts, batch)
            prediction = self._predict(parts, batch)
            x, mask = prediction.outputs, prediction.mask
            mask = None if bool(mask.all()) else mask
            found.append(Activations(_with_constant(x), (tuple(x.shape[1:]),), mask))
        return found

    def run(
        self, number: int, f: Float[Tensor, "batch pos dim"], like: Activations, batch: Any
    ) -> Float[Tensor, "batch pos_out dim_out"]:
        """One section: from a node layer's activations, with their constant, to the next one's.

        Args:
            number: Which section.
            f: Activations.
            like: Those of the same node layer in `forward`.
            batch: The batch, as many examples as `f`.
        """
        constant = f[..., -1]
        self._constant = constant
        try:
            parts = split(f[..., :-1], like.shapes)
            for step in self._parts[number]:
                parts = step.run(parts, batch)
            last = number == len(self) - 1
            x = self._predict(parts, batch).outputs if last else join(parts)
        finally:
            self._constant = None
        if x.shape[1] != constant.shape[1]:
            constant = constant.mean(1, keepdim=True).expand(-1, x.shape[1])
        return torch.cat([x, constant[..., None]], dim=-1)

    def rest(
        self, number: int, f: Tensor, activations: Sequence[Activations], batch: Any
    ) -> Tensor:
        """The outputs (batch, pos, dim), from the activations of one node layer."""
        for n in range(number, len(self)):
            f = self.run(n, f, activations[n], batch)
        return f[..., :-1]

    def _predict(self, parts: Parts, batch: Any) -> Prediction:
        return self.task.predict(_Returns(parts[0]), batch)

    def prediction(self, outputs: Float[Tensor, "batch pos dim"], batch: Any) -> Prediction:
        """The task's prediction with other outputs."""
        return self.task.predict(self.model, batch).with_outputs(outputs)

    def check(self, batch: Any) -> None:
        """Verify on a batch that the sections make up the model and keep examples apart.

        Raises:
            ValueError: They do not.
        """
        with self.hooks(), torch.no_grad():
            found = self.forward(batch)
            expected = self.task.predict(self.model, batch).outputs
            if not _close(found[-1].f[..., :-1], expected):
                raise ValueError(
                    "The sections, one after the other, do not make the model's outputs: its forward pass does more "
                    "than its steps. Give the steps yourself (headwater.core.sections.Step)."
                )
            for number, name in enumerate(self.names[:-1]):
                f, after = found[number].f, found[number + 1].f
                changed = f.clone()
                changed[1:] = changed[1:] + 1 + f[1:].abs()
                changed[..., -1] = 1
                same = self.run(number, changed, found[number], batch)[:1]
                if not _close(same, after[:1]):
                    raise ValueError(
                        f"The section after node layer {name!r} mixes the examples of a batch, so that there are no "
                        "gradients of one example; leave that module out, or use it in evaluation mode."
                    )

    def over(
        self, examples: Examples, batches: Sequence[BatchPlan]
    ) -> Iterator[tuple[BatchPlan, Any, list[Activations]]]:
        """Each batch, its data and the activations of all node layers. Iterate inside `hooks()`."""
        for plan in batches:
            data = to_device(examples.batch(plan.indices), self.device)
            yield plan, data, self.forward(data)


def model_inputs(batch: Any) -> Parts:
    """The one tensor that a batch gives to a model: the first of a tuple, or what a dictionary has beside labels."""
    if isinstance(batch, Mapping):
        inputs = [v for k, v in batch.items() if k not in ("labels", "attention_mask")]
        return tuple(inputs[:1])
    return (batch[0],)


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def _close(x: Tensor, y: Tensor) -> bool:
    scale = float(y.abs().max()) if y.numel() else 0.0
    return x.shape == y.shape and float((x - y).abs().max()) <= 1e-4 * max(scale, 1e-12)


def _bias(module: nn.Module) -> Tensor | None:
    """What a module adds whatever it reads."""
    if isinstance(module, _BATCH_NORM):
        if module.running_mean is None or module.running_var is None:
            return None
        scale = torch.rsqrt(module.running_var + module.eps)
        weight = 1.0 if module.weight is None else module.weight.detach()
        shift = 0.0 if module.bias is None else module.bias.detach()
        return shift - module.running_mean * scale * weight
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _check_modules(node: str, step: Step) -> None:
    """Refuse what has weights whose biases cannot be told, and what looks at a whole batch."""
    for module in step.modules:
        own = dict(module.named_parameters(recurse=False))
        kind = module_kind(module)
        if isinstance(module, _BATCH_NORM) and module.running_mean is None:
            why = "its statistics are the batch's own; train it with track_running_stats=True"
        elif own and (kind is None or kind == "embedding"):
            why = "its weights are of no supported kind (linear, convolution, norm)"
        elif isinstance(module, nn.Conv1d):
            why = "its channels come before its positions; use Conv2d with a side of 1"
        else:
            continue
        raise ValueError(
            f"The section after node layer {node!r} has a module that is not supported, {type(module).__name__} in "
            f"{step.name!r}: {why}; or choose node layers that leave it outside."
        )


def steps_of(model: nn.Module) -> list[Step]:
    """A model's forward pass in steps: those of an `nn.Sequential`, or what its own method `steps` returns.

    Raises:
        ValueError: The model has neither.
    """
    own = getattr(model, "steps", None)
    if callable(own):
        found: Any = own()
        return list(found)
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"Expected an nn.Sequential, or a model with a method `steps`; got {type(model).__name__}. Node layers are "
            "places that everything flows through: give the model's forward pass as a list of "
            "headwater.core.sections.Step."
        )
    leaves = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and not isinstance(module, nn.Sequential)
    ]
    tops = [(n, m) for n, m in leaves if not any(n.startswith(f"{o}.") for o, _ in leaves)]
    return [_module_step(name, module, first=not i) for i, (name, module) in enumerate(tops)]


def _module_step(name: str, module: nn.Module, *, first: bool) -> Step:
    def run(parts: Parts, batch: Any) -> Parts:
        read = parts if parts or not first else model_inputs(batch)
        return (module(*read),)

    return Step(name, run, tuple(module.modules()))


def default_nodes(steps: Sequence[Step]) -> list[str]:
    """The inputs of the steps with a linear map or a convolution."""
    weighty = ("linear", "conv", "conv1d")
    return [s.name for s in steps if any(module_kind(m) in weighty for m in s.modules)]
