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

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONAL = "functional"


@dataclass(frozen=True)
class Use:
    """One module through which a layer's parameter acts."""

    module: str
    kind: str


@dataclass(frozen=True)
class Layer:
    """One followed parameter matrix, with its bias as the last column where it has one.

    Attributes:
        name: Name of the first module that uses it, or of the parameter itself.
        uses: Modules through which it acts.
        shape: (groups, out, in); groups is 1 but for grouped convolutions.
        parameters: Names of the model's parameters it covers: the weight, then the bias.
        shapes: Their shapes.
        kind: How rows are made; see `KINDS`.
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


# Row makers: (module, input, output gradient, batch size) to (a, g); `a` is shared, so it is made apart.


def _positions(x: Tensor, batch: int) -> Float[Tensor, "batch pos dim"]:
    """Any leading axes, first the example, as one axis of positions."""
    if x.numel() % batch or (x.ndim > 1 and prod(x.shape[:-1]) % batch):
        raise ValueError(f"A layer's tensor {tuple(x.shape)} cannot be split into {batch} examples.")
    return x.reshape(batch, -1, x.shape[-1])


def _with_one(a: Tensor, bias: bool) -> Tensor:
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) if bias else a


def _linear_a(module: nn.Module, x: Tensor, batch: int, bias: bool) -> Tensor:
    return _with_one(_positions(x, batch), bias)


def _linear_g(module: nn.Module, x: Tensor, g: Tensor, batch: int) -> Tensor:
    return _positions(g, batch)


def _conv_a(module: nn.Module, x: Tensor, batch: int, bias: bool) -> Tensor:
    """Patches (groups?, batch, sites, in / groups * kernel)."""
    if x.ndim == len(module.kernel_size) + 1:
        x = x[None]
    pads = module._reversed_padding_repeated_twice
    x = F.pad(x, pads, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for axis, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    n, n_axes, groups = len(module.kernel_size), x.ndim, module.groups
    x = x.unflatten(1, (groups, -1))  # batch, groups, channels, *sites, *kernel
    x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, n_axes + 1))
    x = x.reshape(groups, batch, -1, x.shape[2 + n] * prod(module.kernel_size))
    return _with_one(x if groups > 1 else x[0], bias)


def _conv_g(module: nn.Module, x: Tensor, g: Tensor, batch: int) -> Tensor:
    g = g.reshape(batch, module.groups, module.out_channels // module.groups, -1).permute(1, 0, 3, 2)
    return g if module.groups > 1 else g[0]


def _embedding_a(module: nn.Module, x: Tensor, batch: int, bias: bool) -> Tensor:
    raise AssertionError("an embedding's `a` is its output gradient")


def _embedding_rows(module: nn.Module, x: Tensor, g: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    tokens = x.reshape(batch, -1)
    onehot = F.one_hot(tokens, module.num_embeddings).to(g.dtype)
    if module.padding_idx is not None:  # PyTorch gives that row no gradient
        onehot = onehot * (tokens != module.padding_idx)[..., None]
    return g.reshape(batch, -1, module.embedding_dim), onehot


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a norm's gain: what the norm returns with gain one and bias zero."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    wide = x if x.dtype == torch.float64 else x.float()
    dims = tuple(range(-module.weight.ndim, 0))
    return (wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)).to(x.dtype)


def _norm_rows(module: nn.Module, x: Tensor, g: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """One position: the gradient of a gain sums over positions anyway."""
    parts = [g * _normalized(module, x)]
    if getattr(module, "bias", None) is not None:
        parts.append(g)
    channels_first = isinstance(module, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    if channels_first:
        sums = [p.reshape(batch, p.shape[1], -1).sum(dim=2) for p in parts]
    else:
        sums = [p.reshape(batch, -1, module.weight.numel()).sum(dim=1) for p in parts]
    rows = torch.cat(sums, dim=1)[:, None]
    return rows.new_ones(batch, 1, 1), rows


def _bias_rows(module: nn.Module, x: Tensor, g: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    rows = g.reshape(batch, -1, g.shape[-1]).sum(dim=1, keepdim=True)
    return rows.new_ones(batch, 1, 1), rows


SHARED_INPUT: dict[str, tuple[Callable, Callable]] = {
    "linear": (_linear_a, _linear_g),
    "conv1d": (_linear_a, _linear_g),
    "conv": (_conv_a, _conv_g),
}
WHOLE_ROWS: dict[str, Callable] = {"embedding": _embedding_rows, "norm": _norm_rows, "bias": _bias_rows}


def module_kind(module: nn.Module) -> str | None:
    """The kind of a module whose parameters can be followed by hooks, or None."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq
        return "embedding" if plain else None
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return "norm" if getattr(module, "weight", None) is not None else None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "norm" if module.affine and module.track_running_stats else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return "linear" if not isinstance(module, nn.Bilinear) and not list(module.children()) else None
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        known = hasattr(module, "eps") or hasattr(module, "variance_epsilon")
        return "norm" if known and len(list(module.parameters(recurse=False))) == 1 else None
    return None


def matrix_shape(module: nn.Module, kind: str) -> tuple[int, int, int]:
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
