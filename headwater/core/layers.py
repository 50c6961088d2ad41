r"""Layers as Capture sees them: every parameter as a matrix whose gradient is a sum of outer products.

For an example with positions t, the gradient of a followed layer is $\sum_t g_t a_t^\top$, with `a` (batch, pos, in)
what the layer read (a one appended for the bias) and `g` (batch, pos, out) the gradient of what it returned. All
kinds of module are brought to this one form:

| kind | a | g |
|---|---|---|
| linear, Conv1D, quantized linear | inputs, 1 | output gradients |
| convolution | patches, 1 | output gradients at each site; groups become a leading axis |
| embedding | output gradients | one-hot tokens, so that a tied output head is the same matrix |
| gains of a norm | 1 | normalized input times output gradient, then output gradients for the bias |
| anything else | 1 | the flattened gradient itself, from `torch.func` |

A module that runs several times, and modules that share a weight, add their positions: the sum is over all uses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONAL = "functional"
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CHANNELS_SECOND = (*_CONV, nn.GroupNorm, _BATCH_NORM)


@dataclass(frozen=True)
class Use:
    """One module through which a layer's parameter acts.

    Attributes:
        module: Its name.
        kind: How its rows are made; see `KINDS`.
        axis: Which axis of its tensors is the example: 0, 1 for sequence-first models, or None where all
            examples read the same, as position embeddings may; then its output is repeated for each.
    """

    module: str
    kind: str
    axis: int | None = 0


@dataclass(frozen=True)
class Layer:
    """One followed parameter matrix, with its bias as the last column where it has one.

    Attributes:
        name: Name of the first module that uses it, or of the parameter itself.
        uses: Modules through which it acts.
        shape: (groups, out, in); groups is 1 but for grouped convolutions.
        parameters: Names of the model's parameters it covers: the weight, then the bias.
        shapes: Their shapes.
        kind: Kind of the matrix: of its uses, or "functional".
        input_group: Name shared by layers that read the same tensor (query, key and value).
    """

    name: str
    uses: tuple[Use, ...]
    shape: tuple[int, int, int]
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: str
    input_group: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of one gradient: (out, in), behind the groups if there are several."""
        return self.shape[1:] if self.shape[0] == 1 else self.shape

    @property
    def has_bias(self) -> bool:
        return len(self.parameters) > 1

    def to_parameters(self, matrix: Float[Tensor, "n ..."]) -> dict[str, Tensor]:
        """Gradients (n, *block) as gradients of the model's parameters, each (n, *its shape)."""
        n = len(matrix)
        if self.kind == "norm":
            parts = matrix.flatten(1).chunk(len(self.parameters), dim=1)
        elif self.has_bias:
            weight, bias = matrix[..., :-1], matrix[..., -1]
            parts = (weight.mT if self.kind == "conv1d" else weight, bias)
        else:
            parts = (matrix.mT if self.kind == "conv1d" else matrix,)
        return {
            name: part.reshape(n, *shape)
            for name, part, shape in zip(self.parameters, parts, self.shapes, strict=True)
        }

    def from_parameters(self, values: dict[str, Tensor]) -> Float[Tensor, "n ..."]:
        """Inverse of `to_parameters`."""
        parts = [values[name] for name in self.parameters]
        n, (groups, out, in_) = len(parts[0]), self.shape
        if self.kind == "norm":
            return torch.cat([p.reshape(n, -1) for p in parts], dim=1).reshape(n, *self.block)
        weight = parts[0].mT if self.kind == "conv1d" else parts[0]
        weight = weight.reshape(n, groups, out, in_ - self.has_bias)
        if self.has_bias:
            weight = torch.cat([weight, parts[1].reshape(n, groups, out, 1)], dim=-1)
        return weight.reshape(n, *self.block)


# Row makers. `read` comes from the input and `grad` from the output's gradient; each is (batch, pos, dim), behind an
# axis of groups if there are several. Layers that read the same tensor share `read`, so it is made apart.


def _linear_read(module: Any, x: Tensor, batch: int, bias: bool) -> Tensor:
    return _with_one(x.reshape(batch, -1, x.shape[-1]), bias)


def _linear_grad(module: Any, x: Tensor, g: Tensor, batch: int, bias: bool) -> Tensor:
    return g.reshape(batch, -1, g.shape[-1])


def _with_one(a: Tensor, bias: bool) -> Tensor:
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) if bias else a


def _conv_read(module: Any, x: Tensor, batch: int, bias: bool) -> Tensor:
    """Patches (groups?, batch, sites, in / groups * kernel)."""
    n, groups = len(module.kernel_size), module.groups
    x = x if x.ndim == n + 2 else x[None]
    if any(pads := module._reversed_padding_repeated_twice):
        mode = module.padding_mode
        x = F.pad(x, pads, mode="constant" if mode == "zeros" else mode)
    steps = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, step, gap) in enumerate(steps, start=2):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    x = x.unflatten(1, (groups, -1))  # batch, groups, channels, *sites, *kernel
    x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    x = x.reshape(groups, batch, -1, prod(x.shape[2 + n :]))
    return _with_one(x if groups > 1 else x[0], bias)


def _conv_grad(module: Any, x: Tensor, g: Tensor, batch: int, bias: bool) -> Tensor:
    groups, sites = module.groups, prod(g.shape[-len(module.kernel_size) :])
    g = g.reshape(batch, -1, groups, module.out_channels // groups, sites)
    g = g.permute(2, 0, 1, 4, 3).flatten(2, 3)
    return g if groups > 1 else g[0]


def _embedding_read(module: Any, x: Tensor, batch: int, bias: bool) -> Tensor:
    """One-hot tokens; PyTorch gives the row of `padding_idx` no gradient."""
    tokens = x.reshape(batch, -1, 1).long()
    padding = -1 if module.padding_idx is None else module.padding_idx
    shape, dtype = (batch, tokens.shape[1], module.num_embeddings), module.weight.dtype
    onehot = torch.zeros(shape, dtype=dtype, device=x.device)
    return onehot.scatter_(2, tokens, (tokens != padding).to(onehot))


def _one(module: Any, x: Tensor, batch: int, bias: bool) -> Tensor:
    return x.new_ones(batch, 1, 1)


def _norm_grad(module: Any, x: Tensor, g: Tensor, batch: int, bias: bool) -> Tensor:
    """One position: the gradient of a gain sums over positions anyway."""
    gain = _channel_sums(module, g * _normalized(module, x), batch)
    return torch.cat([gain, _channel_sums(module, g, batch)], dim=-1) if bias else gain


def _bias_grad(module: Any, x: Tensor, g: Tensor, batch: int, bias: bool) -> Tensor:
    return _channel_sums(module, g, batch)


def _channel_sums(module: Any, g: Tensor, batch: int) -> Float[Tensor, "batch 1 channel"]:
    """Sums over all but the axes that a gain or bias has."""
    if isinstance(module, _CHANNELS_SECOND):
        unbatched = isinstance(module, _CONV) and g.ndim == len(module.kernel_size) + 1
        g = g[None] if unbatched else g
        return g.reshape(batch, -1, g.shape[1], prod(g.shape[2:])).sum((1, 3))[:, None]
    width = module.weight.numel() if module_kind(module) == "norm" else g.shape[-1]
    return g.reshape(batch, -1, width).sum(dim=1, keepdim=True)


def _normalized(module: Any, x: Tensor) -> Tensor:
    """The input of a norm's gain: what the norm returns with gain one and bias zero."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, _BATCH_NORM):
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    wide = x if x.dtype == torch.float64 else x.float()
    square = wide.square().mean(tuple(range(-module.weight.ndim, 0)), keepdim=True)
    return (wide * torch.rsqrt(square + eps)).to(x.dtype)


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (_linear_read, _linear_grad),
    "conv1d": (_linear_read, _linear_grad),
    "conv": (_conv_read, _conv_grad),
    "embedding": (_embedding_read, _linear_grad),
    "norm": (_one, _norm_grad),
    "bias": (_one, _bias_grad),
}


def module_kind(module: Any) -> str | None:
    """The kind of a module whose parameters can be followed by hooks, or None."""
    if isinstance(module, _CONV):
        return "conv"
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq
        return "embedding" if plain else None
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return "norm" if getattr(module, "weight", None) is not None else None
    if isinstance(module, _BATCH_NORM):
        return "norm" if module.affine and module.track_running_stats else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        leaf = not list(module.children()) and not isinstance(module, nn.Bilinear)
        return "linear" if leaf else None
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "eps")
    if named or hasattr(module, "variance_epsilon"):  # of Llama, T5 and their kin
        return "norm" if [*module._parameters] == ["weight"] else None
    return None


def matrix_shape(module: Any, kind: str) -> tuple[int, int, int]:
    """(groups, out, in) of a module's weight, without its bias."""
    if kind == "linear":
        return 1, module.out_features, module.in_features
    if kind == "conv1d":
        return 1, module.weight.shape[1], module.weight.shape[0]
    if kind == "conv":
        inside = module.in_channels // module.groups * prod(module.kernel_size)
        return module.groups, module.out_channels // module.groups, inside
    if kind == "embedding":
        return 1, module.num_embeddings, module.embedding_dim
    raise ValueError(f"Expected a kind with a weight matrix; got {kind!r}.")
