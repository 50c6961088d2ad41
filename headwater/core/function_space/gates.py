"""A network's activations as gates: a copy in which they are recorded, or replaced by given ones.

With its gates held a ReLU network is affine in what it reads, whatever its architecture: chains, branches that add up,
convolutions, means over pixels, batch norms in evaluation mode. What is not, is refused by name.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from headwater.core.capture import first_tensor

SMOOTH = (nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LogSigmoid)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_POOLS = tuple(getattr(nn, f"{kind}Pool{n}d") for kind in ("Avg", "AdaptiveAvg") for n in (1, 2, 3))
_LINEAR = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    *_POOLS,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
_ADVICE = {
    "MaxPool": "Use a mean over pixels (AvgPool).",
    "Attention": "Attention multiplies what it reads with itself; a quadratic distance from a K-FAC fit covers it.",
    "Transformer": "Attention multiplies what it reads with itself; a quadratic distance from a K-FAC fit covers it.",
    "Norm": "Batch norms in evaluation mode are affine; other norms divide by what they read.",
    "Embedding": "The inputs must be numbers that have a mean and a covariance.",
}


class GateError(ValueError):
    """A module whose effect is not affine once the gates are held; the message names it."""


def activations(model: nn.Module, *, smooth: bool = False) -> list[str]:
    """Names of the modules that gates stand for.

    Args:
        model: The model.
        smooth: Take GELU, SiLU and the like for gates of their mean slope.

    Raises:
        GateError: A module is neither a gate nor affine.
    """
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.ReLU) or (smooth and isinstance(module, SMOOTH)):
            found.append(name)
        elif isinstance(module, SMOOTH):
            raise GateError(
                f"Module {name!r} is {kind}, whose slope is not 0 or 1. smooth=True takes its mean slope for a gate, "
                "which is an extension of the published method."
            )
        elif isinstance(module, _BATCH_NORM) and not module.track_running_stats:
            raise GateError(
                f"Module {name!r} ({kind}) norms by the batch it is in; it needs running statistics."
            )
        elif isinstance(module, (_BATCH_NORM, *_LINEAR)):
            continue
        elif isinstance(module, nn.MultiheadAttention) or _is_torch_leaf(module):
            advice = next((text for word, text in _ADVICE.items() if word in kind), "")
            raise GateError(
                f"Module {name!r} is {kind}; the function-space distance is for networks of linear layers, "
                f"convolutions, means over pixels, batch norms and ReLUs. {advice}".rstrip()
            )
    return found


def _is_torch_leaf(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's own modules without any inside; a user's own is proven by its outputs."""
    return type(module).__module__.startswith("torch.nn") and not list(module.children())


@dataclass(frozen=True)
class Gate:
    """What takes an activation's place at one call: `slope * s + offset`.

    Attributes:
        slope: (batch, unit...).
        offset: Likewise; None for zero.
    """

    slope: Tensor
    offset: Tensor | None = None


Gates = dict[str, Gate]  # by the activation's name, with "#2" behind it for its second call


def slope(activation: nn.Module, s: Tensor) -> Tensor:
    """The derivative of an activation at its pre-activations: 0 or 1 for a ReLU."""
    if isinstance(activation, nn.ReLU):
        return (s > 0).to(s)
    with torch.enable_grad():
        point = s.detach().clone().requires_grad_()
        # past its hooks, of which one may be asking
        return torch.autograd.grad(activation.forward(point).sum(), point)[0]


def call_name(name: str, number: int) -> str:
    """What the call of a module is named, counted from 0 in each forward pass."""
    return name if number == 0 else f"{name}#{number + 1}"


@dataclass
class _Tape:
    """What the activations of one forward pass do: replay given gates, or keep what they read."""

    given: Gates | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class HeldActivation(nn.Module):
    """An activation that can be held."""

    def __init__(self, name: str, activation: nn.Module, tape: _Tape):
        super().__init__()
        self.name, self.activation, self.tape = name, activation, tape

    def forward(self, s: Tensor) -> Tensor:
        number = self.tape.calls.get(self.name, 0)
        self.tape.calls[self.name] = number + 1
        name = call_name(self.name, number)
        if self.tape.given is None:
            self.tape.seen[name] = s
            return self.activation(s)
        gate = self.tape.given[name]
        return gate.slope * s if gate.offset is None else gate.slope * s + gate.offset


class Gated(nn.Module):
    """A copy of a model, in evaluation mode, whose activations can be held.

    Modules and parameters keep their names.

    Args:
        model: The model; it is left as it is.
        smooth: Take GELU, SiLU and the like for gates of their mean slope.

    Raises:
        GateError: A module is neither a gate nor affine.
    """

    def __init__(self, model: nn.Module, *, smooth: bool = False):
        super().__init__()
        names = activations(model, smooth=smooth)
        self.tape = _Tape()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if "" in names:
            raise GateError("The model is a single activation; there is nothing to compare.")
        held = {}
        for name in names:
            own = self.model.get_submodule(name)
            if hasattr(own, "inplace"):
                own.inplace = False  # type: ignore[assignment]
            held[id(own)] = HeldActivation(name, own, self.tape)
        # one module may stand in several places
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if id(module) in held:
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, held[id(module)])

    @contextmanager
    def holding(self, gates: Gates | None) -> Iterator[None]:
        """For one forward pass: activations held by gates, or recorded where there are none."""
        self.tape.given, self.tape.seen, self.tape.calls = gates, {}, {}
        try:
            yield
        finally:
            self.tape.given = None

    def forward(
        self, parameters: Mapping[str, Tensor], x: Tensor, gates: Gates | None = None
    ) -> Tensor:
        """Outputs with other parameters; those that are left out stay the copy's own.

        Args:
            parameters: By their names.
            x: Inputs (batch, ...).
            gates: What holds the activations; they act as they are when left out.
        """
        with self.holding(gates):
            return functional_call(self.model, dict(parameters), (x,))

    def with_pattern(self, parameters: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Gates]:
        """Outputs, and gates that are the tangent of each activation at what it read."""
        outputs = self(parameters, x)
        seen, self.tape.seen = self.tape.seen, {}
        gates = {}
        for name, s in seen.items():
            own = self.activation(name)
            tangent = slope(own, s)
            # a ReLU's tangent passes through the origin
            offset = None if isinstance(own, nn.ReLU) else own(s) - tangent * s
            gates[name] = Gate(tangent, offset)
        return outputs, gates

    def activation(self, name: str) -> nn.Module:
        """The activation behind the name of a call."""
        return self.model.get_submodule(name.partition("#")[0]).activation  # type: ignore[return-value]

    def prove(self, x: Float[Tensor, "n *input"]) -> None:
        """Check on two inputs or more that outputs are affine in inputs once the gates are held.

        Raises:
            GateError: They are not: something but the named activations bends.
        """
        half = len(x) // 2
        first, second = x[:half], x[half : 2 * half]
        gates = self.with_pattern({}, first)[1]
        middle = self({}, (first + second) / 2, gates)
        mean = (self({}, first, gates) + self({}, second, gates)) / 2
        error, size = (middle - mean).norm(), mean.norm() + middle.norm()
        if float(error) > 1e-3 * float(size):
            known = sum(isinstance(m, HeldActivation) for m in self.model.modules())
            raise GateError(
                f"With its {known} activations held the model should be affine, but at the middle of two inputs its "
                f"outputs are off by {float(error / size):.0%}: it bends by something that is no module of its own, "
                "such as F.relu, a softmax, a norm or attention. Make activations modules (nn.ReLU)."
            )


class GateRecorder:
    """Hooks that tell what a model reads and the slopes of its activations, in passes that somebody else makes.

    Args:
        model: The model.
        smooth: Take GELU, SiLU and the like for gates of their mean slope.

    Raises:
        GateError: A module is neither a gate nor affine.
    """

    def __init__(self, model: nn.Module, *, smooth: bool = False):
        self.model, self.names = model, activations(model, smooth=smooth)
        self.inputs: Tensor | None = None
        self.slopes: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator["GateRecorder"]:
        """Hooks in place; each forward pass takes the place of what was seen of the last one."""
        modules = dict(self.model.named_modules())
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name in self.names:
            handles.append(modules[name].register_forward_pre_hook(self._hook(name)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.inputs, self.slopes = None, {}

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = first_tensor(args, kwargs)
        if not _transformed(x):
            self.inputs, self.slopes = x.detach(), {}

    def _hook(self, name: str):
        calls: list[int] = [0]

        def hook(module: nn.Module, args: tuple) -> None:
            s = args[0]
            if _transformed(s):
                return
            calls[0] = calls[0] + 1 if name in self.slopes else 0
            self.slopes[call_name(name, calls[0])] = slope(module, s.detach())

        return hook


def _transformed(x: Tensor) -> bool:
    """Whether a transform of `torch.func` is running: then the pass is not the batch's own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]


def flipped(before: Gates, after: Gates) -> tuple[int, int]:
    """How many gates are on the other side of one half, and how many there are."""
    differ: Sequence[Bool[Tensor, "..."]] = [
        (before[name].slope > 0.5) != (after[name].slope > 0.5) for name in before
    ]
    return sum(int(x.sum()) for x in differ), sum(x.numel() for x in differ)
