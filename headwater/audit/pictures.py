"""Small pictures of the examples that a report shows, where inputs are images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from headwater.core.examples import Examples

SIDE = 64  # pixels of a picture's longer side at most
_LEAST = 4  # fewer rows or columns are no image


def image_shape(x: Tensor) -> tuple[int, ...] | None:
    """(channel, row, column) of an example that looks like an image: 1 or 3 channels first; else None.

    Example:
        >>> image_shape(torch.zeros(3, 32, 32)), image_shape(torch.zeros(64))
        ((3, 32, 32), None)
    """
    real = x.is_floating_point() or x.dtype == torch.uint8
    if not real or x.ndim != 3 or x.shape[0] not in (1, 3) or min(x.shape[1:]) < _LEAST:
        return None
    return tuple(x.shape)


def thumbnail(image: Float[Tensor, "channel row column"]) -> Float[Tensor, "channel _ _"]:
    """The image, averaged down so that no side is longer than `SIDE`."""
    rows, columns = image.shape[1:]
    scale = min(1.0, SIDE / max(rows, columns))
    return adaptive_avg_pool2d(image, (max(1, round(rows * scale)), max(1, round(columns * scale))))


def pictures(
    examples: Examples, indices: Sequence[int], shape: Sequence[int] | None = None
) -> dict[int, UInt8[Tensor, "channel row column"]]:
    """Pictures of some examples by their numbers; none where inputs are no images.

    Black and white are the least and the greatest value of each channel over the pictures shown, so that inputs may be
    standardised in any way.

    Args:
        examples: The examples; images are the first of a batch's tensors, or its "pixel_values".
        indices: Which.
        shape: (row, column) or (channel, row, column) of images that are kept as vectors.

    Raises:
        ValueError: The inputs have another number of values than the shape.
    """
    found: dict[int, Tensor] = {}
    for i in indices:
        x = _input(examples.batch([i]))
        if x is None:
            return {}
        given = image_shape(x) if shape is None else _reshaped(x, shape)
        if given is None:
            return {}
        found[i] = thumbnail(x.detach().cpu().double().nan_to_num().reshape(given))
    if not found:
        return {}
    flat = torch.cat([x.flatten(1) for x in found.values()], dim=1)
    low, high = (edge(1).values[:, None, None] for edge in (flat.min, flat.max))
    span = (high - low).clamp(min=1e-12)
    return {i: (255 * (x - low) / span).round().to(torch.uint8) for i, x in found.items()}


def _input(batch: Any) -> Tensor | None:
    """What the model reads of a batch of one example."""
    if isinstance(batch, Mapping):
        batch = [batch.get("pixel_values")]
    x = batch[0] if isinstance(batch, list | tuple) and batch else None
    return x[0] if isinstance(x, Tensor) and x.ndim > 1 and len(x) == 1 else None


def _reshaped(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    full = (1, *shape) if len(shape) == 2 else tuple(shape)
    if len(full) != 3 or full[0] not in (1, 3) or min(full) < 1:
        raise ValueError(
            f"An image's shape is rows and columns, or 1 or 3 channels before them; got {tuple(shape)}."
        )
    if x.numel() != full[0] * full[1] * full[2]:
        raise ValueError(
            f"Inputs have {x.numel():,} values, and images {tuple(shape)} have {full[0] * full[1] * full[2]:,}."
        )
    return full
