"""Batches changed in ways that must not matter, and how near two losses are."""

from typing import Any

import torch
from torch import Tensor

from headwater.core.prediction import IGNORE

# Relative errors that rounding explains, by precision: of losses, and of gradients.
LOSS_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}
GRADIENT_ERROR = {torch.float64: 1e-7, torch.float32: 1e-3}
COARSE_ERROR = 5e-2  # of both, in 16 bits
PAD = 8  # positions added to see whether padding matters


def pad_more(batch: Any) -> dict[str, Any] | None:
    """The batch with masked positions appended on the right; None where it has no mask."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None

    def pad(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[:2] != mask.shape:
            return x
        if name == "position_ids":
            more = x[:, -1:] + torch.arange(1, PAD + 1, device=x.device)
        else:
            more = x.new_full((len(x), PAD, *x.shape[2:]), IGNORE if name == "labels" else 0)
        return torch.cat([x, more.to(x)], dim=1)

    return {name: pad(name, x) for name, x in batch.items()}


def relettered(padded: dict[str, Any]) -> dict[str, Any]:
    """A padded batch with other tokens under the mask: the example's own, so that they exist."""
    ids, mask = padded["input_ids"], padded["attention_mask"].bool()
    other = ids.roll(PAD, dims=1)
    return padded | {"input_ids": torch.where(mask, ids, torch.where(other == ids, ids + 1, other))}


def is_same(x: Any, y: Any) -> bool:
    """Whether two batches hold equal tensors."""
    if isinstance(x, Tensor):
        return x.shape == y.shape and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(is_same(x[k], y[k]) for k in x)
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(is_same, x, y))
    return True


def doubled(batch: Any) -> Any:
    """The same batch with its real numbers in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {k: doubled(v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(doubled(v) for v in batch)
    return batch


def is_close(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether losses agree but for rounding in that precision."""
    rtol = LOSS_ERROR.get(dtype, COARSE_ERROR)
    return torch.allclose(x, y.to(x), rtol=rtol, atol=rtol)


def largest_gap(x: Tensor, y: Tensor) -> float:
    """The largest difference of two losses."""
    return float((x - y).abs().max())
