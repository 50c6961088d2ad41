"""Linear systems whose matrix is only known by its products."""

from collections.abc import Callable, Iterable
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


def lanczos(
    product: Operator, start: Float[Tensor, "1 dim"], *, steps: int = 100
) -> tuple[Float[Tensor, " value"], Float[Tensor, "value dim"]]:
    """Approximate eigenpairs of a symmetric matrix from its products, largest magnitude first.

    Lanczos' form of Arnoldi's iteration, each vector made orthogonal to all before it (twice, which is enough). It
    stops early where the vectors span all that products can reach; then the eigenpairs are exact.

    Args:
        product: x (system, dim) to A x, A symmetric.
        start: Where to begin, such as a random vector.
        steps: Most products.

    Returns:
        Eigenvalues, and orthonormal vectors as rows.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64))
        >>> values, _ = lanczos(lambda v: v @ A, torch.ones(1, 3, dtype=torch.float64))
        >>> [round(v, 6) for v in values.tolist()]
        [3.0, -1.0, 0.5]
    """
    dim, precision = start.shape[1], torch.finfo(start.dtype).eps
    basis = start.new_zeros(min(steps, dim), dim)
    T = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    q, largest, done = start[0] / start.norm(), 0.0, 0
    for k in range(len(basis)):
        basis[k], done = q, k + 1
        r = product(q[None])[0]
        for _ in range(2):
            overlap = basis[:done] @ r
            T[:done, k] += overlap.double().cpu()
            r = r - overlap @ basis[:done]
        norm = float(r.norm())
        largest = max(largest, float(T[:done, k].norm()), norm)
        if norm <= dim * precision * largest:
            break
        q = r / norm
    T = T[:done, :done]
    # each column holds what lies along the vectors before it; below the diagonal it is the mirror image
    upper = T.triu(1)
    values, vectors = torch.linalg.eigh(torch.diag(T.diagonal()) + upper + upper.mT)
    order = values.abs().argsort(descending=True)
    return values[order].to(start), vectors[:, order].mT.to(start) @ basis[:done]


@dataclass(frozen=True)
class Neumann:
    """Where a Neumann series stands.

    Attributes:
        x: The approximate solutions (system, dim).
        diverged: Whether it grew out of bounds.
        steps: Terms that were taken.
    """

    x: Float[Tensor, "system dim"]
    diverged: bool
    steps: int


def neumann_series(
    products: Iterable[Operator],
    b: Float[Tensor, "system dim"],
    *,
    scale: float,
    bound: float = 1e3,
) -> Neumann:
    r"""Solve A x = b by $r_{j+1} = b + (I - A_j / s)\, r_j$ and $x = r / s$, with an estimate A_j of A for each step.

    It converges where the eigenvalues of A lie between 0 and 2 s.

    Args:
        products: For each step the product x (system, dim) to A_j x.
        b: Right-hand sides.
        scale: s.
        bound: The series counts as diverged once r has grown by so many times its largest possible growth, which is
            by one norm of b a step.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> b = torch.ones(1, 2, dtype=torch.float64)
        >>> x = neumann_series([lambda v: v @ A] * 60, b, scale=2.0).x
        >>> bool(torch.allclose(x @ A, b))
        True
    """
    r, done = b, 0
    scale_of_b = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
    for product in products:
        r = b + r - product(r) / scale
        done += 1
        growth = r.norm(dim=1) / scale_of_b / (done + 1)
        if not bool((growth <= bound).all()):  # NaN is no convergence either
            return Neumann(r / scale, True, done)
    return Neumann(r / scale, False, done)
