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


def largest_eigenvalue(
    product: Operator, start: Float[Tensor, "system dim"], *, steps: int = 50
) -> Float[Tensor, " system"]:
    """Largest eigenvalue in size, by power iteration (a lower bound of it that rises with `steps`).

    Args:
        product: x (system, dim) to A x, A symmetric.
        start: Vectors with a part in the leading direction, such as normal ones.
        steps: Products.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(largest_eigenvalue(lambda v: v @ A, torch.ones(1, 2)).item(), 4)
        3.0
    """
    tiny = torch.finfo(start.dtype).tiny
    v, size = start / start.norm(dim=1, keepdim=True).clamp(min=tiny), start.new_zeros(len(start))
    for _ in range(steps):
        Av = product(v)
        size = Av.norm(dim=1)
        v = Av / size.clamp(min=tiny)[:, None]
    return size


def neumann_series(
    product: Operator, b: Float[Tensor, "system dim"], *, lr: float, terms: int
) -> Solution:
    r"""Approximate $A^{-1} b$ by $\alpha \sum_{j=0}^{k} (I - \alpha A)^j b$.

    As many steps of gradient descent on the quadratic $\tfrac12 x^\top A x - b^\top x$ from zero, so
    that it is damped where A is flat. It converges for $0 < \alpha < 2 / \lambda_{\max}$.

    Args:
        product: x (system, dim) to A x, A symmetric and positive semi-definite.
        b: Right-hand sides.
        lr: The step α.
        terms: Terms k after the first; with 0 the answer is α b, and no product is taken but one
            for the residual.

    Raises:
        ValueError: The terms grow: the step is too large, or A has negative eigenvalues.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 0.5]))
        >>> neumann_series(lambda v: v @ A, torch.ones(1, 2), lr=1.0, terms=1).x
        tensor([[1.0000, 1.5000]])
    """
    scale = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
    term, x = b, lr * b
    for j in range(terms):
        term = term - lr * product(term)
        if not bool((term.norm(dim=1) <= 10 * scale).all()):
            raise ValueError(
                f"The Neumann series diverges (term {j + 1} of {terms} has grown over tenfold): lr "
                f"{lr:.3g} is above 2 / the largest eigenvalue, or the matrix has negative "
                "eigenvalues. Take a smaller lr, or add damping."
            )
        x = x + lr * term
    return Solution(x, (b - product(x)).norm(dim=1) / scale, terms + 1)
