"""Linear layers whose weights are held in a few bits, and models made of them on disk.

A weight is kept as packed codes, the scale and zero of its grid and, where it was rounded in other coordinates, a
diagonal and the seeds of two random orthogonal matrices (`headwater.numerics.incoherence`). It is made dense for each
product and let go of again, in the backward pass too, so that at most one is in memory. Capture follows such layers
as it follows linear ones; they have no weight to train.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.core.fingerprint import fingerprint_tensors
from headwater.core.store import Artifact, ArtifactWriter
from headwater.numerics.incoherence import KroneckerOrthogonal
from headwater.numerics.packing import pack, unpack

KIND = "quantized"  # of the artifact


@runtime_checkable
class WeightMaterializer(Protocol):
    """A weight that is held in some other form, and made dense when it is asked for."""

    in_features: int
    out_features: int

    def materialize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in)."""
        ...

    def bits_per_weight(self) -> float:
        """Bits of storage for each weight, all that is needed to make it counted."""
        ...

    def digest(self) -> str:
        """A fingerprint of what is held."""
        ...


class QuantizedLinear(nn.Module):
    r"""A linear layer with a weight of a few bits: $s\,(C - z)$, or if it was turned $U^\top s\,(C - z)\, V D^{-1}$.

    Args:
        codes: Integers (out, in) below 2**bits, or None to make a layer that is loaded afterwards.
        bits: 2, 3 or 4.
        shape: (out, in).
        scale: s, one number, or one for each output.
        zero: z, likewise.
        rescale: D (in), of a weight that was turned.
        seeds: Seeds of U (out, out) and V (in, in).
        bias: The bias, which stays as it is.
    """

    def __init__(
        self,
        codes: UInt8[Tensor, "out in"] | None,
        *,
        bits: int,
        shape: tuple[int, int],
        scale: Float[Tensor, "rows 1"],
        zero: Float[Tensor, "rows 1"],
        rescale: Float[Tensor, " in"] | None = None,
        seeds: Int64[Tensor, "2"] | None = None,
        bias: nn.Parameter | None = None,
    ):
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.rescale: Tensor | None
        self.seeds: Tensor | None
        if (rescale is None) != (seeds is None):
            raise ValueError("A weight that was turned has `rescale` and `seeds`; got one of them.")
        self.out_features, self.in_features = shape
        self.bits = bits
        if codes is None:
            codes = torch.zeros(shape, dtype=torch.uint8, device=scale.device)
        self.register_buffer("codes", pack(codes.flatten(), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("rescale", rescale)
        self.register_buffer("seeds", seeds)
        self.bias = bias
        self._held: Tensor | None = None

    def materialize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The dense weight."""
        if self._held is not None:
            return self._held if dtype is None else self._held.to(dtype)
        shape = self.out_features, self.in_features
        codes = unpack(self.codes, self.bits, shape[0] * shape[1]).view(shape)
        W = self.scale * (codes.to(self.scale) - self.zero)
        if self.seeds is not None and self.rescale is not None:
            U, V = (orthogonal(n, int(s)) for n, s in zip(shape, self.seeds.tolist(), strict=True))
            W = V.to(W).back(W) / self.rescale
            W = U.to(W).back(W.mT).mT
        return W if dtype is None else W.to(dtype)

    def bits_per_weight(self) -> float:
        return 8 * sum(b.nbytes for b in self.buffers()) / (self.out_features * self.in_features)

    def digest(self) -> str:
        return fingerprint_tensors(self.named_buffers())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._held.to(x)) if self._held is not None else _product(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        turned = "" if self.seeds is None else ", turned"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{turned}"


@lru_cache(maxsize=64)
def orthogonal(n: int, seed: int) -> KroneckerOrthogonal:
    """The random orthogonal matrix that a seed stands for, kept for the next layer of that size."""
    return KroneckerOrthogonal.random(n, seed)


class _Product(torch.autograd.Function):
    """x Wᵀ with W made again in the backward pass instead of kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, layer: QuantizedLinear) -> Tensor:
        return F.linear(x, layer.materialize(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.materialize(grads[0].dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return F.linear(tangents[0], ctx.layer.materialize(tangents[0].dtype))


def _product(x: Tensor, layer: QuantizedLinear) -> Tensor:
    return _Product.apply(x, layer)  # type: ignore[return-value]


@contextmanager
def held_dense(model: nn.Module) -> Iterator[None]:
    """All quantized weights of a model dense inside: many passes get faster, for as much memory as the model had."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m._held is None]
    try:
        for layer in layers:
            layer._held = layer.materialize()
        yield
    finally:
        for layer in layers:
            layer._held = None


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Put a module, or a parameter, in the place of another one."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# On disk


def layer_facts(layer: QuantizedLinear) -> dict[str, Any]:
    """What a layer is made with, but for its numbers."""
    return {
        "bits": layer.bits,
        "shape": [layer.out_features, layer.in_features],
        "rows": len(layer.scale),
        "turned": layer.seeds is not None,
        "bias": layer.bias is not None,
    }


def empty_layer(facts: Mapping[str, Any]) -> QuantizedLinear:
    """A layer to be loaded, from `layer_facts`."""
    (out, in_), rows, turned = facts["shape"], facts["rows"], facts["turned"]
    return QuantizedLinear(
        None,
        bits=facts["bits"],
        shape=(out, in_),
        scale=torch.ones(rows, 1),
        zero=torch.zeros(rows, 1),
        rescale=torch.ones(in_) if turned else None,
        seeds=torch.zeros(2, dtype=torch.int64) if turned else None,
        bias=nn.Parameter(torch.zeros(out)) if facts["bias"] else None,
    )


def save_quantized(
    model: nn.Module,
    folder: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    made_from: Mapping[str, str] | None = None,
    table: Mapping[str, list] | None = None,
) -> None:
    """Write a model with quantized layers: all its parameters and buffers, and what its layers are.

    Args:
        model: The model.
        folder: Where; a folder of its own.
        facts: What else is to be known of it.
        made_from: Fingerprints of what it was made from.
        table: A row for each layer, kept as the table "layers".
    """
    layers = {name: layer_facts(layer) for name, layer in quantized_layers(model).items()}
    tied: dict[str, str] = {}
    with ArtifactWriter(folder, kind=KIND, made_from=made_from) as writer:
        known: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in known:
                tied[name] = known[id(tensor)]
            else:
                known[id(tensor)] = name
                writer.tensor(name, tensor)
        if table:
            writer.table("layers", table)
        writer.fact("quantized", layers)
        writer.fact("tied", tied)
        for key, value in (facts or {}).items():
            writer.fact(key, value)


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Read a quantized model into one of the same architecture, whose numbers are overwritten; returns that one.

    Raises:
        ValueError: The architecture is another one; the message names a module or tensor that differs.
    """
    artifact = Artifact.open(folder, kind=KIND)
    device = next(model.parameters()).device
    modules = dict(model.named_modules())
    for name, facts in artifact.facts["quantized"].items():
        if name not in modules:
            raise ValueError(
                f"{folder} holds a quantized layer {name!r}, which this {type(model).__name__} lacks; pass a model of "
                "the architecture that was quantized."
            )
        replace_module(model, name, empty_layer(facts))
    state = {name: tensor.to(device, copy=True) for name, tensor in artifact.tensors()}
    tied = artifact.facts["tied"]
    try:
        model.load_state_dict(state | {n: state[o] for n, o in tied.items()}, assign=True)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(
            f"{folder} holds a model that differs from this {type(model).__name__}: {lines}"
        ) from error
    for name, other in tied.items():
        replace_module(model, name, model.get_parameter(other))
    return model
