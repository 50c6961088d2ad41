r"""How many directions a matrix, or a layer, really uses: ranks, soft ranks, and directions that change nothing.

Bushnaq et al. (2024), "Using Degeneracy in the Loss Landscape for Mechanistic Interpretability", arXiv:2405.10927.

A change $\Delta W$ of a layer is invisible on the data if $J_k^\top \Delta W a = 0$ for all inputs $a$ and all rows
$J_k$ of the Jacobian of the outputs in what the layer returns. With $A = \mathbb E[a a^\top]$ and
$G = \mathbb E \sum_k J_k J_k^\top$ it is so at least wherever $G^{1/2} \Delta W A^{1/2} = 0$, a space of dimension
$d_\text{out} d_\text{in} - \operatorname{rank} G \cdot \operatorname{rank} A$.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def rank_tolerance(dim: int, dtype: torch.dtype) -> float:
    """Share of the largest eigenvalue of a second moment below which an eigenvalue is rounding.

    Rounding of the vectors enters their second moment squared; that of the eigendecomposition in float64 enters as it
    is.
    """
    double = torch.finfo(torch.float64).eps
    return dim * max(double, (8 * torch.finfo(dtype).eps) ** 2)


def rank(
    eigenvalues: Float[Tensor, "*lead dim"], tolerance: float | None = None
) -> Int64[Tensor, "*lead"]:
    """Number of eigenvalues above a share of the largest; by default above the rounding of float64.

    Example:
        >>> int(rank(torch.tensor([2.0, 1.0, 1e-30])))
        2
    """
    share = rank_tolerance(eigenvalues.shape[-1], torch.float64) if tolerance is None else tolerance
    largest = eigenvalues.amax(-1, keepdim=True)
    return ((eigenvalues > share * largest) & (largest > 0)).sum(-1)


def effective_dimension(
    eigenvalues: Float[Tensor, "*lead dim"], tau: float | Tensor
) -> Float[Tensor, "*lead"]:
    r"""The soft count $\sum_i d_i / (d_i + \tau)$ of eigenvalues above $\tau$.

    Example:
        >>> float(effective_dimension(torch.tensor([1.0, 1.0, 0.0]), 1.0))
        1.0
    """
    values = eigenvalues.clamp(min=0)
    return torch.where(values > 0, values / (values + tau), 0.0).sum(-1)


def participation_ratio(eigenvalues: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead"]:
    r"""$(\sum_i d_i)^2 / \sum_i d_i^2$: the dimension of a flat spectrum as wide as this one; 0 of no spectrum.

    Example:
        >>> float(participation_ratio(torch.tensor([3.0, 3.0, 0.0])))
        2.0
    """
    square = eigenvalues.square().sum(-1)
    return torch.where(square > 0, eigenvalues.sum(-1).square() / square.clamp(min=1e-300), 0.0)


def free_directions(
    d_out: int, d_in: int, rank_G: Int64[Tensor, "*lead"], rank_A: Int64[Tensor, "*lead"]
) -> int:
    r"""$d_\text{out} d_\text{in} - \operatorname{rank} G \cdot \operatorname{rank} A$, summed over groups.

    Example:
        >>> free_directions(3, 4, torch.tensor(2), torch.tensor(3))
        6
    """
    return int((d_out * d_in - rank_G * rank_A).sum())


def agreement(both: Float[Tensor, "unit unit"], n: float) -> Float[Tensor, "unit unit"]:
    """Share of the data on which two units are both on or both off.

    Args:
        both: How often two units are on together; on the diagonal how often one is.
        n: How much data there is.
    """
    on = both.diagonal()
    return (n - on[:, None] - on[None, :] + 2 * both) / n


def connected_components(linked: Bool[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """Number of the component of each node, in the order of their first nodes.

    Example:
        >>> linked = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
        >>> connected_components(linked).tolist()
        [0, 1, 0]
    """
    n = len(linked)
    labels = torch.full((n,), -1, dtype=torch.int64)
    count = 0
    for first in range(n):
        if labels[first] >= 0:
            continue
        reached = torch.zeros(n, dtype=torch.bool)
        reached[first] = True
        while True:
            more = reached | linked[reached].any(0).cpu()
            if bool((more == reached).all()):
                break
            reached = more
        labels[reached] = count
        count += 1
    return labels
