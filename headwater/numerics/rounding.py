r"""Rounding a weight matrix to integers so that its outputs change little: LDLQ, greedy descent, and plain rounding.

Chee, Cai, Kuleshov and De Sa (2023), "QuIP: 2-Bit Quantization of Large Language Models with Guarantees",
arXiv:2307.13304. A linear layer $x \mapsto Wx$ with inputs of second moment $H = \mathbb{E}\,x x^\top$ whose weight
becomes $\hat W$ errs by

$$\ell(\hat W) = \operatorname{tr}\big((\hat W - W) H (\hat W - W)^\top\big)
= \mathbb{E}\,\lVert(\hat W - W)x\rVert^2 .$$

All functions take weights in units of the grid: they are rounded to integers, from 0 to `top` where one is given.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_BLOCK = 128  # columns that share one large product


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight may take: s (g - z) for g = 0 .. 2**bits - 1.

    Attributes:
        scale: s, one number, or one for each row.
        zero: z, likewise.
    """

    scale: Float[Tensor, "rows 1"]
    zero: Float[Tensor, "rows 1"]

    def units(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Weights in units of the grid."""
        return W / self.scale + self.zero

    def weights(self, g: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Back from these units."""
        return self.scale * (g - self.zero)


def symmetric_grid(W: Float[Tensor, "out in"], bits: int, spread: float = 2.4) -> Grid:
    """One grid for all weights, as wide as `spread` times their root mean square to either side."""
    top = 2**bits - 1
    size = spread * W.square().mean().sqrt().clamp(min=torch.finfo(W.dtype).tiny)
    return Grid((2 * size / top).view(1, 1), size.new_full((1, 1), top / 2))


def row_grids(W: Float[Tensor, "out in"], bits: int) -> Grid:
    """A grid for each row, from its smallest to its largest weight, one of its numbers being 0."""
    top = 2**bits - 1
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    scale = torch.where(high > low, high - low, torch.ones_like(high)) / top
    return Grid(scale, (-low / scale).round())


def dampen(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"], share: float
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]]:
    """H plus a share of its mean diagonal; inputs that are always zero get weights of zero."""
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.to(H))
    H = H + share * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return W.masked_fill(dead.to(W.device), 0), H


def proxy_loss(
    rounded: Float[Tensor, "out in"], W: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> float:
    r"""$\operatorname{tr}((\hat W - W) H (\hat W - W)^\top)$: the expected squared error of the outputs.

    Example:
        >>> proxy_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.eye(2))
        1.0
    """
    error = rounded - W
    return float(((error @ H) * error).sum(dtype=torch.float64))


def ldl(H: Float[Tensor, "in in"]) -> tuple[Float[Tensor, "in in"], Float[Tensor, " in"]]:
    r"""U strictly upper triangular and D positive with $H = (U + I)\,\mathrm{diag}(D)\,(U + I)^\top$.

    Rows and columns are reversed, so that Cholesky's lower factor becomes an upper one.

    Raises:
        ValueError: H is not positive definite.

    Example:
        >>> U, D = ldl(torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
        >>> U.tolist(), D.tolist()
        ([[0.0, 1.0], [0.0, 0.0]], [1.0, 1.0])
    """
    lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed):
        raise ValueError(
            f"Expected a positive definite matrix; its leading minor of order {int(failed)}, from the last column on, "
            "is not. Add to its diagonal."
        )
    root = lower.flip(0, 1)
    scale = root.diagonal()
    return (root / scale).triu(1), scale.square()


def lacks_rank(H: Float[Tensor, "rows columns"]) -> bool:
    """Whether an input is a linear combination of others; those that are always zero do not count.

    It is where a pivot of `ldl`, what is left of the input once those after it are known, vanishes beside its own
    second moment. A matrix that is no second moment has no rank of one, and lacks none.

    Example:
        >>> lacks_rank(torch.eye(2)), lacks_rank(torch.ones(2, 2)), lacks_rank(torch.diag(torch.tensor([1.0, 0.0])))
        (False, True, False)
    """
    if H.shape[0] != H.shape[1] or not bool(torch.isfinite(H).all()):
        return False
    alive = H.diagonal() > 0
    part = H[alive][:, alive].double()
    lower, failed = torch.linalg.cholesky_ex(part.flip(0, 1))
    pivots = lower.diagonal().flip(0).square()
    return bool(failed) or bool((pivots <= 1e-10 * part.diagonal()).any())


def quantize(
    z: Float[Tensor, "*shape"], top: int | None = None, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    r"""Q: the nearest integer $\lfloor z + \tfrac12 \rfloor$, or with a generator $\lfloor z + u \rfloor$, unbiased.

    Args:
        z: Numbers in units of the grid.
        top: Largest integer of the grid, which begins at 0; without one nothing is cut off.
        generator: Source of the uniform numbers u.
    """
    if generator is None:
        rounded = (z + 0.5).floor_()
    else:
        u = torch.rand(
            z.shape, generator=generator, dtype=torch.float64
        )  # the same on every device
        rounded = (z + u.to(z)).floor_()
    return rounded if top is None else rounded.clamp_(0, top)


def ldlq(
    W: Float[Tensor, "out in"],
    U: Float[Tensor, "in in"],
    *,
    top: int | None = None,
    generator: torch.Generator | None = None,
    block: int = _BLOCK,
) -> Float[Tensor, "out in"]:
    r"""Round column after column, each with the errors of those before it fed in.

    $$\hat W_k = Q\big(W_k + (W_{<k} - \hat W_{<k})\, U_{<k,k}\big)$$

    With the U of `ldl` the errors $(\hat W - W)(U + I)$ are those of Q alone, so that without a `top` the loss is
    $\sum_k D_k \lVert \eta_k \rVert^2$, the least that feedback of this form can reach. OPTQ is the same map.

    Args:
        W: Weights in units of the grid.
        U: Strictly upper triangular.
        top: Largest integer.
        generator: Round stochastically with it.
        block: Columns that get the errors of all before them by one product.
    """
    Wt = W.mT.contiguous()  # columns are rows here, contiguous ones
    rounded, error = torch.empty_like(Wt), torch.empty_like(Wt)
    for start in range(0, len(Wt), block):
        stop = min(start + block, len(Wt))
        fed = Wt[start:stop] - U[:start, start:stop].mT @ error[:start]
        for k in range(start, stop):
            z = torch.addmv(fed[k - start], error[start:k].mT, U[start:k, k], alpha=-1)
            rounded[k] = quantize(z, top, generator)
            torch.sub(rounded[k], Wt[k], out=error[k])
    return rounded.mT.contiguous()


def greedy(
    rounded: Float[Tensor, "out in"],
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    *,
    top: int | None = None,
    passes: int = 9,
    clamp: Literal["step", "pass"] = "step",
    block: int = _BLOCK,
) -> Float[Tensor, "out in"]:
    r"""Coordinate descent on the loss: every column in turn takes its best integers given the others.

    $$\hat W_i \leftarrow Q\big(\hat W_i - (sH)_i / H_{ii}\big), \qquad s = \hat W - W$$

    Args:
        rounded: Integers to begin with.
        W: Weights in units of the grid.
        H: Second moment of the inputs, with a positive diagonal.
        top: Largest integer.
        passes: Most passes over the columns; it stops where a pass changes nothing.
        clamp: "step" keeps every step on the grid, so that no step raises the loss; "pass" cuts off once after
            each pass, which may raise it.
        block: Columns that get the changes of all before them by one product.
    """
    G = H / H.diagonal()  # column i in units of H_ii
    found, error = rounded.mT.contiguous(), (rounded - W).mT.contiguous()
    limit = top if clamp == "step" else None
    for _ in range(passes):
        before = found.clone()
        for start in range(0, len(found), block):
            stop = min(start + block, len(found))
            # the best integers, but for what moves within the block
            best = found[start:stop] - G[:, start:stop].mT @ error
            moved = torch.empty_like(best)
            for k in range(start, stop):
                i = k - start
                z = torch.addmv(best[i], moved[:i].mT, G[start:k, k], alpha=-1)
                torch.sub(quantize(z, limit), found[k], out=moved[i])
            found[start:stop] += moved
            error[start:stop] += moved
        if top is not None and clamp == "pass":
            error += found.clamp(0, top) - found
            found.clamp_(0, top)
        if torch.equal(found, before):
            break
    return found.mT.contiguous()


def by_weight(H: Float[Tensor, "in in"]) -> Shaped[Tensor, " in"]:
    """Columns in the order in which they are rounded: those whose inputs are largest first."""
    return H.diagonal().argsort(descending=True, stable=True)


def ldlq_rg(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    *,
    top: int | None = None,
    passes: int = 9,
    clamp: Literal["step", "pass"] = "step",
) -> Float[Tensor, "out in"]:
    """LDLQ on columns in the order `by_weight`, then greedy passes in the same order.

    The published code sorts ascending and sweeps from the last column back, which is the same.
    """
    order = by_weight(H)
    turned = H[order][:, order]
    U, _ = ldl(turned.double())
    begun = ldlq(W[:, order], U.to(W), top=top)[:, order.argsort()]
    return _greedy_by_weight(begun, W, H, top=top, passes=passes, clamp=clamp)


def greedy_alone(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    *,
    top: int | None = None,
    passes: int = 9,
    clamp: Literal["step", "pass"] = "step",
) -> Float[Tensor, "out in"]:
    """Greedy passes from the nearest integers, columns in the order `by_weight`."""
    return _greedy_by_weight(quantize(W, top), W, H, top=top, passes=passes, clamp=clamp)


def _greedy_by_weight(begun: Tensor, W: Tensor, H: Tensor, **options: Any) -> Tensor:
    order = by_weight(H)
    found = greedy(begun[:, order], W[:, order], H[order][:, order].to(W), **options)
    return found[:, order.argsort()]


def checked_moment(H: Float[Tensor, "rows columns"], n: int) -> Float[Tensor, "n n"]:
    """H made exactly symmetric, if it can be a second moment of n inputs.

    Raises:
        ValueError: It cannot.
    """
    if H.shape != (n, n):
        raise ValueError(f"Expected a second moment of {n} inputs; got shape {tuple(H.shape)}.")
    if not bool(torch.isfinite(H).all()):
        raise ValueError("The second moment holds NaN or infinity; look for a broken example.")
    size = float(H.abs().max())
    if size == 0:
        raise ValueError("The second moment is zero: the layer has read nothing.")
    gap = float((H - H.mT).abs().max())
    if gap > 1e-4 * size:
        raise ValueError(f"The second moment is not symmetric (by {gap / size:.2g} of its size).")
    return (H + H.mT) / 2
