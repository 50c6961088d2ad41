r"""Gradients in scaled coordinates: an optimizer's diagonal preconditioner as part of every layer's rows.

Under $\theta \leftarrow \theta - \eta P g$ with diagonal P the coordinates $\varphi = P^{-1/2} \theta$ descend plainly:
their gradient is $P^{1/2} g$ and their curvature $P^{1/2} H P^{1/2}$. A layer's gradient $\sum_t g_t a_t^\top$, times a
matrix $S = \sum_r u_r v_r^\top$ elementwise, is $\sum_{t,r} (g_t \circ u_r)(a_t \circ v_r)^\top$: rows of the same
form, so that every accumulator works on them as on any others. One term leaves them as many as they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import BatchInfo, Capture, Precision, Rows
from headwater.core.examples import Examples
from headwater.core.gradients import Gradients, dense
from headwater.core.target import Target


@dataclass(frozen=True)
class Scale:
    r"""Elementwise factors $S = \sum_r u_r v_r^\top$ of one layer's gradient.

    Attributes:
        u: (term, out), or (term, group, out).
        v: (term, in), or (term, group, in).
    """

    u: Float[Tensor, "term *out"]
    v: Float[Tensor, "term *in"]

    @property
    def matrix(self) -> Float[Tensor, "*block"]:
        """S itself."""
        return (self.u[..., :, None] * self.v[..., None, :]).sum(0)

    def rows(self, rows: Rows) -> Rows:
        """Rows of the scaled gradients; each position makes one for every term."""
        a, g = (
            torch.cat([x * s[..., None, None, :].to(x) for s in side], dim=-2)
            for x, side in ((rows.a, self.v), (rows.g, self.u))
        )
        mask = None if rows.mask is None else rows.mask.repeat(1, len(self.u))
        return replace(rows, a=a, g=g, mask=mask)


def exact_scale(matrix: Float[Tensor, "*block"]) -> Scale:
    """Any matrix of factors, with as many terms as its shorter side.

    Example:
        >>> exact_scale(torch.tensor([[1.0, 2.0, 3.0]])).v.tolist()
        [[1.0, 2.0, 3.0]]
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        v = matrix.movedim(-2, 0)
        return Scale(_units(matrix, -2), v)
    return Scale(matrix.movedim(-1, 0), _units(matrix, -1))


def _units(matrix: Tensor, side: int) -> Tensor:
    eye = torch.eye(matrix.shape[side], dtype=matrix.dtype, device=matrix.device)
    return eye if matrix.ndim == 2 else eye[:, None].expand(-1, matrix.shape[0], -1)


def separable_scale(second_moment: Float[Tensor, "*block"], eps: float) -> Scale:
    r"""One term for $(\sqrt{V} + \epsilon)^{-1/2}$: $V_{ij} \approx r_i c_j / \sum_i r_i$, sums of rows and columns.

    Shazeer and Stern (2018), "Adafactor", arXiv:1804.04235: of all such products it is nearest to V in I-divergence.

    Example:
        >>> scale = separable_scale(torch.outer(torch.tensor([1.0, 16.0]), torch.tensor([1.0, 81.0])), 0.0)
        >>> bool(torch.allclose(scale.matrix, torch.tensor([[1.0, 1 / 3], [1 / 2, 1 / 6]])))
        True
    """
    root = second_moment.sum((-2, -1), keepdim=True).sqrt().clamp(min=eps).squeeze(-1)
    u, v = (
        (second_moment.sum(side) / root).clamp(min=max(eps, 1e-30)).pow(-0.25)[None]
        for side in (-1, -2)
    )
    return Scale(u, v)


class ScaledCapture(Capture):
    """An engine whose rows are those of scaled gradients.

    Args:
        capture: The engine that makes the rows.
        scales: The scale of each layer.
    """

    def __init__(self, capture: Capture, scales: Mapping[str, Scale]):
        # layers that read the same tensor scale it differently
        layers = [replace(layer, input_group=layer.name) for layer in capture.layers.values()]
        super().__init__(capture.model, capture.task, layers, dtype=capture.dtype)
        self.scales = scales

    def at(self, precision: Precision, examples: Examples) -> "ScaledCapture":
        return ScaledCapture(super().at(precision, examples), self.scales)

    def backward(
        self,
        data: Any,
        target: Target,
        batch: BatchInfo,
        keys: Tensor,
        emit: Callable[[Rows], None],
    ) -> Tensor:
        def scaled(rows: Rows) -> None:
            emit(self.scales[rows.layer.name].rows(rows))

        return super().backward(data, target, batch, keys, scaled)


def scaled(
    gradients: Gradients, scales: Mapping[str, Scale], *, inverse: bool = False
) -> Gradients:
    """Gradients times the scales of their layers, or divided by them; as they are where there are no scales."""
    if not scales:
        return gradients
    found = {}
    for name, block in gradients.blocks.items():
        whole = dense(block)
        matrix = scales[name].matrix.to(whole)
        found[name] = whole / matrix if inverse else whole * matrix
    return Gradients(found)
