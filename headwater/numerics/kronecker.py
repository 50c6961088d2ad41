r"""Products of factored gradients, $\sum_t g_t a_t^\top$, in the cheapest order.

Arrays are (…, batch, pos, dim): `a` the inputs, `g` the output gradients, with any leading axes (the groups of a
grouped convolution) treated alike.
"""

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 128  # below twice this side a whole product is as fast as its upper triangle


def sum_dtype(x: Tensor) -> torch.dtype:
    """The type that sums over x are kept in: its own, float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def second_moment(
    x: Float[Tensor, "*lead rows dim"], weight: Float[Tensor, " rows"] | None = None
) -> Tensor:
    r"""$\sum_r w_r x_r x_r^\top$, multiplying blocks of the upper triangle only.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> second_moment(x).tolist()
        [[10.0, 14.0], [14.0, 20.0]]
    """
    y = x if weight is None else x * weight[:, None]
    dim = x.shape[-1]
    n_blocks = max(1, min(4, dim // _BLOCK))
    if n_blocks == 1:
        return y.mT @ x
    edges = [dim * i // n_blocks for i in range(n_blocks + 1)]
    out = x.new_empty(*x.shape[:-2], dim, dim)
    for i in range(n_blocks):
        rows = slice(edges[i], edges[i + 1])
        upper = y[..., rows].mT @ x[..., edges[i] :]
        out[..., rows, edges[i] :] = upper
        out[..., edges[i + 1] :, rows] = upper[..., edges[i + 1] - edges[i] :].mT
    return out


def rotate(
    x: Float[Tensor, "*lead batch pos dim"], basis: Float[Tensor, "*lead dim new"] | None
) -> Tensor:
    """Inner products of x with the columns of a basis; None is the identity."""
    if basis is None:
        return x
    return (x.flatten(-3, -2) @ basis).unflatten(-2, x.shape[-3:-1])


def gradient(a: Tensor, g: Tensor) -> Float[Tensor, "*lead batch out in"]:
    r"""Each example's gradient $\sum_t g_t a_t^\top$."""
    if a.shape[-2] == 1:
        return g.mT * a
    return g.mT @ a


def squared_sum(
    a: Tensor,
    g: Tensor,
    Q_A: Tensor | None = None,
    Q_G: Tensor | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    limit: int = 1 << 24,
) -> Float[Tensor, "*lead out in"]:
    r"""$\sum_b w_b\,(Q_G^\top \sum_t g_{bt} a_{bt}^\top Q_A)^{\circ 2}$, the second moment of rotated gradients.

    With one position the square factorizes, $(g'\circ g')^\top(a'\circ a')$, and no gradient is formed. With more,
    tokens are rotated before the sum, or the sum after, whichever needs fewer multiplications; at most `limit`
    numbers of gradients are held at a time. Sums over examples are taken in float32 at least.
    """
    wide = sum_dtype(a)
    pos, d_in, d_out = a.shape[-2], a.shape[-1], g.shape[-1]
    if pos == 1:
        g2 = rotate(g, Q_G).squeeze(-2).square()
        if weight is not None:
            g2 = g2 * weight[:, None]
        return g2.mT @ rotate(a, Q_A).squeeze(-2).square()
    side_in, side_out = (0 if q is None else d for q, d in ((Q_A, d_in), (Q_G, d_out)))
    tokens_first = pos * (d_in * side_in + d_out * side_out) <= d_in * d_out * (side_in + side_out)
    if tokens_first:
        a, g = rotate(a, Q_A), rotate(g, Q_G)
    batch = a.shape[-3]
    step = max(1, limit // (d_in * d_out * prod(a.shape[:-3])))
    total = a.new_zeros(*a.shape[:-3], d_out, d_in, dtype=wide)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        rotated = gradient(a[..., part, :, :], g[..., part, :, :])
        if not tokens_first:
            rotated = change_basis(rotated.movedim(-3, 0), Q_A, Q_G).movedim(0, -3)
        square = rotated.square_()
        if weight is None:
            total += square.sum(dim=-3, dtype=wide)
        else:
            total += torch.tensordot(weight[part], square.movedim(-3, 0), dims=1)
    return total


def change_basis(
    x: Float[Tensor, "n *lead out in"], Q_A: Tensor | None, Q_G: Tensor | None
) -> Tensor:
    r"""$Q_G^\top X Q_A$: coordinates of matrices in a Kronecker eigenbasis; None is the identity."""
    x = x if Q_A is None else x @ Q_A
    return x if Q_G is None else Q_G.mT @ x


def change_back(
    x: Float[Tensor, "n *lead out in"], Q_A: Tensor | None, Q_G: Tensor | None
) -> Tensor:
    r"""$Q_G X Q_A^\top$: the inverse of `change_basis`."""
    x = x if Q_A is None else x @ Q_A.mT
    return x if Q_G is None else Q_G @ x


def singular_pairs(
    x: Float[Tensor, "*batch out in"], rank: int
) -> tuple[Float[Tensor, "*batch rank out"], Float[Tensor, "*batch rank in"]]:
    r"""Leading singular pairs $\sqrt{s_k} u_k$ and $\sqrt{s_k} v_k$, the strongest first.

    Their products sum to the best approximation of that rank. They come from the eigenvectors of the smaller of
    $x x^\top$ and $x^\top x$, whose projection of x keeps the accuracy of x itself.

    Example:
        >>> u, v = singular_pairs(torch.tensor([[0.0, 4.0], [0.0, 0.0]]), 1)
        >>> (u.mT @ v).tolist()
        [[0.0, 4.0], [0.0, 0.0]]
    """
    if x.shape[-2] > x.shape[-1]:
        right, left = singular_pairs(x.mT, rank)
        return left, right
    unit = torch.linalg.eigh(x @ x.mT).eigenvectors[..., -rank:].flip(-1).mT
    other = unit @ x
    root = other.norm(dim=-1, keepdim=True).sqrt()
    return unit * root, other / root.clamp(min=torch.finfo(x.dtype).tiny)
