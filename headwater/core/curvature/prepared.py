r"""Queries kept in the eigenbasis, where the cheaper side is rotated.

A score is $\sum_{ij} q'_{ij} f(\lambda_{ij})\, n'_{ij}$ with both gradients in the eigenbasis. Rotating a training
example's rows, $a' = Q_A^\top a$ and $g' = Q_G^\top g$, costs far less than rotating each query's matrix back, and a
factored query is not formed until its eigenvalues ask for it.

A first stage is cheaper still. With $f(\lambda_{ij}) \approx \sum_r u_{ri} v_{rj}$ a score of two gradients of one
position is $\sum_r \big((g'_q \circ u_r) \cdot g'_n\big)\big((a'_q \circ v_r) \cdot a'_n\big)$: products of small Gram
matrices. Here the queries' few vectors are rotated back, and the data's rows serve as they come. The fit is weighted
by the gradients' second moment (unweighted it is useless), for which the product of its row and column sums stands
in, so that one singular value decomposition gives it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.curvature.base import Preconditioned
from headwater.core.curvature.moments import Basis, SharedRotation
from headwater.core.gradients import Block, Factored, Gradients, dense, inner
from headwater.numerics import kronecker


def in_basis(block: Block, basis: Basis, shared: SharedRotation | None = None) -> Block:
    """Gradients in an eigenbasis, factored ones left factored; `shared` keeps inputs that several layers read."""
    if isinstance(block, Factored):
        Q_A, Q_G = (None if q is None else q.to(block.a) for q in basis)
        rotate = shared or kronecker.rotate
        return Factored(rotate(block.a, Q_A), kronecker.rotate(block.g, Q_G))
    return kronecker.change_basis(block, *(None if q is None else q.to(block) for q in basis))


def separable(
    factor: Float[Tensor, "*lead out in"], weight: Float[Tensor, "*lead out in"], terms: int
) -> tuple[Float[Tensor, "term *lead out"], Float[Tensor, "term *lead in"]]:
    r"""Vectors with $f_{ij} \approx \sum_r u_{ri} v_{rj}$, best in the norm weighted by the marginals of `weight`.

    Example:
        >>> f, w = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])), torch.ones(2, 2)
        >>> u, v = separable(f, w, 1)
        >>> bool(torch.allclose(u[0, :, None] * v[0], f))
        True
    """
    weight = weight.double().clamp(min=0)
    row, column = weight.sum(-1).sqrt(), weight.sum(-2).sqrt()
    row, column = (x.clamp(min=1e-6 * float(x.max()) + 1e-30) for x in (row, column))
    u, s, vh = _leading_svd(row[..., :, None] * factor.double() * column[..., None, :], terms)
    root = s[..., :terms].sqrt()
    left = u[..., :, :terms] * root[..., None, :] / row[..., :, None]
    right = vh[..., :terms, :].mT * root[..., None, :] / column[..., :, None]
    return left.movedim(-1, 0).to(factor), right.movedim(-1, 0).to(factor)


def _leading_svd(
    matrix: Tensor, rank: int, *, spare: int = 8, steps: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """At least `rank` leading singular triples, by subspace iteration; exact where they are all of them.

    Halko, Martinsson and Tropp (2011), "Finding Structure with Randomness", algorithm 4.4.
    """
    width = min(rank + spare, *matrix.shape[-2:])
    start = torch.randn(matrix.shape[-1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh


class InEigenbasis(Preconditioned):
    """Queries in the eigenbasis, multiplied by f there; training rows are rotated as they come.

    Args:
        rotated: Queries in the eigenbasis.
        bases: (Q_A, Q_G) of each layer.
        factors: f of the eigenvalues (out, in) of each layer.
        weights: The eigenvalues, which weigh the separable fit.
        terms: Terms of the separable form; None for the exact one.
    """

    def __init__(
        self,
        rotated: Gradients,
        bases: dict[str, Basis],
        factors: dict[str, Tensor],
        weights: dict[str, Tensor],
        terms: int | None = None,
    ):
        self.bases, self.n, self._shared = bases, len(rotated), SharedRotation()
        self.blocks = {
            name: _separated(block, bases[name], factors[name], weights[name], terms)
            if terms is not None and isinstance(block, Factored) and block.pos == 1
            else dense(block) * factors[name].to(dense(block))
            for name, block in rotated.blocks.items()
        }

    def layer(self, name: str, block: Block) -> Tensor:
        own = self.blocks[name]
        if isinstance(own, Factored):
            return _over_terms(inner(own, block), self.n)
        return inner(own, in_basis(block, self.bases[name], self._shared))

    def finish_batch(self) -> None:
        self._shared.clear()

    def dense(self) -> Gradients:
        found = {}
        for name, block in self.blocks.items():
            if isinstance(block, Factored):
                found[name] = _over_terms(block.dense(), self.n)
            else:
                Q_A, Q_G = (None if q is None else q.to(block) for q in self.bases[name])
                found[name] = kronecker.change_back(block, Q_A, Q_G)
        return Gradients(found)


def _separated(
    block: Factored, basis: Basis, factor: Tensor, weight: Tensor, terms: int
) -> Factored:
    """The queries once for each term, (term · query), rotated back so that the data's rows serve as they are."""
    u, v = separable(factor, weight, terms)
    a = torch.cat([block.a * each[..., None, None, :].to(block.a) for each in v], dim=-3)
    g = torch.cat([block.g * each[..., None, None, :].to(block.g) for each in u], dim=-3)
    Q_A, Q_G = (None if q is None else q.mT.to(a) for q in basis)
    return Factored(kronecker.rotate(a, Q_A), kronecker.rotate(g, Q_G))


def _over_terms(x: Float[Tensor, "term_query ..."], n: int) -> Tensor:
    return x.unflatten(0, (-1, n)).sum(0)
