r"""Low-rank truncation of weights, which needs no data: the humble baseline of an edit.

The best approximation of rank r in Frobenius norm (Eckart and Young 1936, doi:10.1007/BF02288367).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.fit import Fit
from headwater.forget.base import EVERY, Editor, WeightEdit, as_edit, editable_layers, matrix_of


def truncate(
    W: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " rank"]]:
    """The matrix of a rank that is nearest to W, and all singular values of W.

    Example:
        >>> truncate(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)[0].diagonal().tolist()
        [3.0, 2.0, 0.0]
    """
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank], S


@dataclass(frozen=True, kw_only=True)
class SVDTruncation(Editor):
    """Keep the greatest singular values of each matrix; knows neither data nor loss.

    Args:
        keep_rank: Share of the singular values that are kept, in (0, 1].
        layers: Patterns of names of linear and convolutional layers.
    """

    paper: ClassVar[str] = "doi:10.1007/BF02288367"

    keep_rank: float = 0.5
    layers: tuple[str, ...] = EVERY

    def __post_init__(self):
        if not 0 < self.keep_rank <= 1:
            raise ValueError(f"keep_rank must be in (0, 1]; got {self.keep_rank}.")

    def edit(self, fit: Fit, *, forget: Any = None, retain: Any = None) -> WeightEdit:
        named = dict(fit.model.named_parameters(remove_duplicate=False))
        edited, rows = {}, []
        for layer in editable_layers(fit, self.layers):
            W = matrix_of(layer, named[layer.parameters[0]].detach()).double()
            n = min(W.shape)
            rank = math.ceil(self.keep_rank * n)
            nearest, S = truncate(W, rank)
            edited[layer.name], energy = W if rank == n else nearest, S.square()
            sizes = {"out": W.shape[0], "in": W.shape[1], "pairs": n, "kept": rank}
            rows.append(
                {"layer": layer.name}
                | sizes
                | {"energy": float(energy[:rank].sum() / energy.sum())}
            )
        return as_edit(fit, edited, rows, self.facts(passes=0.0))
