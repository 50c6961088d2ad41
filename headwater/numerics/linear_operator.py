"""Linear systems whose matrix is only known by its products."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """Solutions of several systems with one matrix.

    Attributes:
        x: The solutions (system, dim).
        residual: Euclidean norm of what is left, relative to the right-hand side (system).
        steps: Products that were taken.
    """

    x: Float[Tensor, "system dim"]
    residual: Float[Tensor, " system"]
    steps: int


def conjugate_gradients(
    product: Operator,
    b: Float[Tensor, "system dim"],
    *,
    precondition: Operator | None = None,
    start: Float[Tensor, "system dim"] | None = None,
    steps: int = 100,
    tolerance: float = 1e-6,
    progress: Callable[[int, float], None] | None = None,
) -> Solution:
    """Solve A x = b for several right-hand sides at once by preconditioned conjugate gradients.

    Hestenes and Stiefel (1952). Each system keeps its own step sizes; one product serves all.

    Args:
        product: x (system, dim) to A x, A symmetric and positive definite.
        b: Right-hand sides.
        precondition: An approximation of the inverse of A, symmetric and positive definite.
        start: First guess; zero when left out.
        steps: Most products.
        tolerance: Relative residual at which a system counts as solved.
        progress: Called with (step, largest relative residual).

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> b = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> x = conjugate_gradients(lambda v: v @ A, b).x
        >>> bool(torch.allclose(x @ A, b))
        True
    """
    apply = precondition or (lambda v: v)
    scale = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - product(x)
    z = apply(r)
    p, rz = z.clone(), (r * z).sum(1)
    done = 0
    for _ in range(steps):
        open_ = (r.norm(dim=1) / scale) > tolerance
        if not bool(open_.any()):
            break
        Ap = product(p)
        bend = (p * Ap).sum(1)
        moves = open_ & (bend > 0)  # rounding may leave no way down
        if not bool(moves.any()):
            break
        alpha = torch.where(moves, rz / bend, 0.0)[:, None]
        x, r = x + alpha * p, r - alpha * Ap
        z = apply(r)
        following = (r * z).sum(1)
        p = z + torch.where(moves, following / rz, 0.0)[:, None] * p
        rz = following
        done += 1
        if progress is not None:
            progress(done, float((r.norm(dim=1) / scale).max()))
    return Solution(x, r.norm(dim=1) / scale, done)
