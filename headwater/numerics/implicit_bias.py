r"""Which solution an algorithm finds where many are equally good: closed forms for least squares.

Vicol, Lorraine, Pedregosa, Duvenaud and Grosse (2022), "On Implicit Bias in Overparameterized Bilevel Optimization",
arXiv:2212.14032.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def neumann_filter(
    eigenvalues: Float[Tensor, "*shape"], *, lr: float, terms: int
) -> Float[Tensor, "*shape"]:
    r"""What `terms` further terms of a Neumann series make of $1/s$: $(1 - (1 - \alpha s)^{k+1})/s$.

    Truncation is a damping: sharp directions have $1/s$ already, flat ones only $\alpha (k + 1)$.
    It is also what $k + 1$ differentiated steps of gradient descent answer.

    Example:
        >>> neumann_filter(torch.tensor([0.0, 1.0]), lr=0.5, terms=1).tolist()
        [1.0, 0.75]
    """
    step = lr * eigenvalues
    flat = step.abs() < torch.finfo(step.dtype).eps ** 2  # also keeps the division from overflowing
    safe = torch.where(flat, 0.5, step)
    # (1 - s)^(k+1) - 1, without cancellation for small s.
    near = torch.expm1((terms + 1) * torch.log1p(-safe.clamp(max=0.5)))
    shrunk = torch.where(safe < 0.5, near, (1 - safe) ** (terms + 1) - 1)
    return lr * torch.where(flat, terms + 1.0, -shrunk / safe)


def closest_solution(
    X: Float[Tensor, "n dim"],
    y: Float[Tensor, " n"],
    start: Float[Tensor, " dim"],
    *,
    damping: float = 0.0,
) -> Float[Tensor, " dim"]:
    r"""The least-squares solution nearest to `start`: $w_0 + X^+ (y - X w_0)$.

    Gradient descent from $w_0$ converges to it. With damping λ it is the proximal solution,
    $\arg\min_w \tfrac12 \|Xw - y\|^2 + \tfrac\lambda2 \|w - w_0\|^2$, which tends to the former as
    λ tends to zero. From zero it is the solution of least norm.
    """
    left = y - X @ start
    if damping == 0:
        return start + torch.linalg.pinv(X) @ left
    gram = X @ X.T + damping * torch.eye(len(X), dtype=X.dtype, device=X.device)
    return start + X.T @ torch.linalg.solve(gram, left)


def project_onto_example(
    w: Float[Tensor, " dim"], x: Float[Tensor, " dim"], y: Float[Tensor, ""]
) -> Float[Tensor, " dim"]:
    r"""The nearest weights that fit one example, $w + x (y - x^\top w) / \|x\|^2$.

    Warm-started training on one example to convergence is this projection; on a sequence of
    examples it is the method of Kaczmarz (1937), and it remembers all of them.
    """
    return w + x * (y - x @ w) / x.square().sum()
