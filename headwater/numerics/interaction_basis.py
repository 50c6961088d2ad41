r"""Bases of a layer's activations: principal directions, and the local interaction basis (LIB).

Bushnaq et al. (2024), "The Local Interaction Basis", arXiv:2405.10928, and "Using Degeneracy in the Loss Landscape for
Mechanistic Interpretability", arXiv:2405.10927.

Activations are rows $f = (x, 1)$ whose last entry is the constant that biases are folded into. A basis is a matrix C
with $\hat f = f C$ and $f = \hat f C^+$ on what is kept. The local interaction basis whitens the activations by the
eigenvectors U and eigenvalues D of their second moment, and then turns to the eigenvectors of how much the next layer
depends on them:

$$R = U D^{-1/2}, \quad R^+ = D^{1/2} U^\top, \quad M = R^+ M' R^{+\top} = V \Lambda V^\top, \quad
C = R V \Lambda^{1/2}, \quad C^+ = \Lambda^{-1/2} V^\top R^+,$$

where $M' = \mathbb E \sum_i \nabla \hat f^{l+1}_i (\nabla \hat f^{l+1}_i)^\top$ sums over the next layer's
directions. No invertible linear map between two layers changes $\hat f$.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwater.numerics.spectral import eigh

Rule = Literal["gauss", "trapezoid"]


@dataclass(frozen=True)
class Directions:
    """A basis of a layer's activations.

    Attributes:
        C: Takes activations with their constant to the basis (in, node).
        C_pinv: And back (node, in).
        weight: What each direction counts, in descending order (node): Λ, or the variance of principal directions.
        constant: Whether node 0 is the constant, and the others are without mean.
        apart: Nodes that read one activation each, which no other node reads.
    """

    C: Float[Tensor, "in node"]
    C_pinv: Float[Tensor, "node in"]
    weight: Float[Tensor, " node"]
    constant: bool
    apart: tuple[int, ...] = ()

    @property
    def n_nodes(self) -> int:
        """Directions without the constant."""
        return self.C.shape[1] - self.constant


@dataclass(frozen=True)
class Principal:
    """Eigenvectors of the activations' second moment, or of their covariance beside the constant.

    Attributes:
        U: Takes activations with their constant to the principal directions (in, node).
        U_pinv: And back (node, in).
        D: Second moment of each direction, in descending order; of the constant 1 (node).
        constant: Whether node 0 is the constant.
    """

    U: Float[Tensor, "in node"]
    U_pinv: Float[Tensor, "node in"]
    D: Float[Tensor, " node"]
    constant: bool


def principal(
    moment: Float[Tensor, "in in"],
    *,
    center: bool = True,
    cutoff: float = 1e-5,
    relative: bool = False,
) -> Principal:
    """Principal directions of activations.

    Args:
        moment: Second moment of activations whose last entry is the constant 1.
        center: Keep the constant as a direction of its own and take the covariance of the others.
        cutoff: Eigenvalues below are dropped.
        relative: Whether the cutoff is a share of the largest eigenvalue.
    """
    moment = moment.double()
    if not center:
        values, vectors = _descending(moment, cutoff, relative)
        return Principal(vectors, vectors.mT, values, False)
    mean, d = moment[:-1, -1], len(moment) - 1
    values, vectors = _descending(moment[:-1, :-1] - torch.outer(mean, mean), cutoff, relative)
    U, U_pinv = moment.new_zeros(d + 1, len(values) + 1), moment.new_zeros(len(values) + 1, d + 1)
    U[-1, 0], U[:-1, 1:], U[-1, 1:] = 1, vectors, -(mean @ vectors)
    U_pinv[0, :-1], U_pinv[0, -1], U_pinv[1:, :-1] = mean, 1, vectors.mT
    return Principal(U, U_pinv, torch.cat([values.new_ones(1), values]), True)


def _descending(matrix: Tensor, cutoff: float, relative: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues at or above the cutoff, the largest first, and their eigenvectors."""
    values, vectors = eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    least = cutoff * (float(values[0]) if relative else 1.0)
    keep = (values >= least) & (values > 0)
    return values[keep], vectors[:, keep]


def principal_directions(found: Principal) -> Directions:
    r"""The basis of principal directions, $\hat f = f U$."""
    return Directions(found.U, found.U_pinv, found.D, found.constant)


def neuron_directions(moment: Float[Tensor, "in in"]) -> Directions:
    """The neurons themselves, without their mean, behind the constant; the first vary most."""
    mean, d = moment[:-1, -1].double(), len(moment) - 1
    variance = moment.diagonal()[:-1].double() - mean.square()
    order = variance.argsort(descending=True)
    eye = torch.eye(d, dtype=torch.float64, device=moment.device)[:, order]
    C, C_pinv = (torch.eye(d + 1, dtype=torch.float64, device=moment.device) for _ in range(2))
    C[:-1, 1:], C[-1, 1:], C[:-1, 0], C[-1, 0] = eye, -mean[order], 0, 1
    C_pinv[1:, :-1], C_pinv[1:, -1], C_pinv[0, :-1], C_pinv[0, -1] = eye.mT, 0, mean, 1
    weight = torch.cat([variance.new_ones(1), variance[order]])
    return Directions(C, C_pinv, weight, True)


def interaction_directions(
    found: Principal,
    M_prime: Float[Tensor, "in in"],
    *,
    Lambda_prime: Float[Tensor, "in in"] | None = None,
    cutoff: float = 1e-5,
    relative: bool = False,
) -> Directions:
    r"""The local interaction basis.

    Args:
        found: Principal directions of the activations.
        M_prime: $M'$ in the neurons' coordinates.
        Lambda_prime: $\mathbb E[g f^\top]$ where $M' = \mathbb E[g g^\top]$ has one gradient g an example: then
            $\Lambda$ is the size of $V^\top R^+ \Lambda' R V$'s diagonal.
        cutoff: $\Lambda$ below is dropped.
        relative: Whether the cutoff is a share of the largest.

    Raises:
        ValueError: The next layer depends on no direction.
    """
    root = found.D.sqrt()
    R, R_pinv = found.U / root, root[:, None] * found.U_pinv
    M = R_pinv @ M_prime.double() @ R_pinv.mT
    first = int(found.constant)
    values, V = eigh(M[first:, first:])
    values, V = values.flip(0), V.flip(1)
    if Lambda_prime is not None:
        both = R_pinv[first:] @ Lambda_prime.double() @ R[:, first:]
        values = torch.einsum("ik,ij,jk->k", V, both, V).abs()
        order = values.argsort(descending=True)
        values, V = values[order], V[:, order]
    least = cutoff * (float(values[0]) if relative and len(values) else 1.0)
    keep = (values >= least) & (values > 0)
    if not bool(keep.any()):
        largest = float(values.max()) if len(values) else 0.0
        raise ValueError(
            f"No direction matters to the next node layer: the largest Lambda is {largest:.2g}, below the cutoff "
            f"{least:.2g}. The layer is dead on this data, or its scale is small: pass relative=True."
        )
    scale = values[keep].sqrt()
    C = R[:, first:] @ V[:, keep] * scale
    C_pinv = (V[:, keep] / scale).mT @ R_pinv[first:]
    if found.constant:
        C, C_pinv = torch.cat([R[:, :1], C], 1), torch.cat([R_pinv[:1], C_pinv])
        values = torch.cat([M[:1, 0], values[keep]])
    else:
        values = values[keep]
    return Directions(C, C_pinv, values, found.constant)


def kept_apart(
    directions: Directions,
    moment: Float[Tensor, "in in"],
    apart: Sequence[int],
    gains: Float[Tensor, " apart"],
    *,
    cutoff: float = 1e-5,
) -> Directions:
    r"""A basis of the other activations, and beside it a node for each that is kept apart.

    The node of an activation v with gain g is $\hat v = g (v - \mathbb E v)$ and counts $g^2 \operatorname{Var} v$:
    with $g^2 = M'_{vv}$ that is the $\Lambda$ of a basis of this one activation.

    Args:
        directions: A basis of the other activations and the constant, in their order.
        moment: Second moment of all activations and the constant.
        apart: Numbers of the activations that are kept apart.
        gains: What each is multiplied with.
        cutoff: Of those that count less there is no node.
    """
    first, size = int(directions.constant), len(moment)
    others = [i for i in range(size) if i not in set(apart)]
    mean = moment[list(apart), -1].double() * first
    weight = gains.square() * (moment.diagonal()[list(apart)].double() - mean.square())
    keep = ((weight >= cutoff) & (weight > 0)).nonzero().squeeze(1).tolist()
    n = len(directions.weight)
    C = torch.zeros(size, n + len(keep), dtype=torch.float64, device=moment.device)
    C_pinv = torch.zeros(n + len(keep), size, dtype=torch.float64, device=moment.device)
    C[others, :n], C_pinv[:n, others] = directions.C, directions.C_pinv
    if first:  # the constant brings back the mean, of those without a node too
        C_pinv[0, list(apart)] = mean
    for node, k in enumerate(keep, start=n):
        i, gain = apart[k], gains[k]
        C[i, node], C_pinv[node, i] = gain, 1 / gain
        if first:
            C[-1, node] = -gain * mean[k]
    every = torch.cat([directions.weight, weight[keep]])
    order = every[first:].argsort(descending=True, stable=True) + first
    order = torch.cat([torch.arange(first), order])
    places = [int((order == node).nonzero()) for node in range(n, len(every))]
    return Directions(
        C[:, order], C_pinv[order], every[order], directions.constant, tuple(sorted(places))
    )


def integration_points(n: int, rule: Rule = "gauss") -> tuple[list[float], list[float]]:
    """Points and weights of an integral from 0 to 1: Gauss–Legendre's (one is the midpoint), or the trapezoid's.

    The trapezoid's ends lie a thousandth of a step inside, because the slope of a ReLU at zero is not defined.

    Example:
        >>> integration_points(1)
        ([0.5], [1.0])
        >>> integration_points(3, "trapezoid")[1]
        [0.25, 0.5, 0.25]
    """
    least = {"gauss": 1, "trapezoid": 2}
    if rule not in least or n < least[rule]:
        raise ValueError(
            f"Expected a rule among gauss (1 point or more) and trapezoid (2 or more); got {rule!r} with {n}."
        )
    if rule == "gauss":
        points, weights = np.polynomial.legendre.leggauss(n)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    weights = np.full(n, 1 / (n - 1))
    weights[[0, -1]] /= 2
    inside = 1e-3 / (n - 1)
    return np.linspace(inside, 1 - inside, n).tolist(), weights.tolist()
