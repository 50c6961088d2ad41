"""Nearest neighbours of every point among the others."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK = 1 << 22  # numbers of a block of cosines


def nearest(x: Float[Tensor, "n dim"], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The k other points of largest cosine with each point, largest first, and the cosines.

    Exact, a block of rows at a time. The cosine with a vector of zeros is zero.

    Args:
        x: The points.
        k: Neighbours; fewer than points.

    Example:
        >>> index, cosine = nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]), 1)
        >>> index.flatten().tolist()
        [2, 2, 0]
    """
    if not 0 < k < len(x):
        raise ValueError(f"k must be from 1 to {len(x) - 1}, the other points; got {k}.")
    unit = normalize(x.double(), dim=1)
    index, cosine = [], []
    for rows in torch.arange(len(x)).split(max(1, _BLOCK // len(x))):
        block = unit[rows] @ unit.mT
        block[torch.arange(len(rows)), rows] = -torch.inf
        top = block.topk(k, dim=1)
        index.append(top.indices)
        cosine.append(top.values)
    return torch.cat(index), torch.cat(cosine)
