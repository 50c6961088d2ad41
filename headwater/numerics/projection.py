r"""Random projections that keep inner products: $\mathbb{E}\,(Px)^\top (Py) = x^\top y$ (Johnson and Lindenstrauss).

An entry of the matrix is a function of (seed, key, row, column) alone, so that any block of it can be made again where
it is needed, and nothing but the seed is kept.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.numerics import noise

Kind = Literal["rademacher", "gaussian"]
_CHUNK = 1 << 23  # entries made at a time
_WORD = 64


def random_matrix(
    rows: int,
    columns: range,
    *,
    seed: int = 0,
    key: int = 0,
    kind: Kind = "rademacher",
    device: torch.device | None = None,
) -> Float[Tensor, "row column"]:
    """Some columns of a random matrix with independent entries of mean 0 and variance 1, in float32.

    Args:
        rows: Number of rows.
        columns: Which columns, one after the other.
        seed: Seed.
        key: What the matrix is for; see `headwater.numerics.noise.keys`.
        kind: "rademacher" (signs) or "gaussian".
        device: Where to make it.

    Example:
        >>> whole = random_matrix(2, range(100), seed=1)
        >>> bool((random_matrix(2, range(70, 80), seed=1) == whole[:, 70:80]).all())
        True
    """
    if columns.step != 1:
        raise ValueError(f"Expected columns one after the other; got {columns}.")
    row = torch.arange(rows, device=device)[:, None] << 32
    if kind == "gaussian":
        counter = row + torch.arange(columns.start, columns.stop, device=device)
        return noise.normal(torch.full_like(counter, key), counter, seed).float()
    if kind != "rademacher":
        raise ValueError(f"Expected a projection 'rademacher' or 'gaussian'; got {kind!r}.")
    first, last = columns.start // _WORD, -(-columns.stop // _WORD)
    counter = row + torch.arange(first, last, device=device)
    words = noise.bits(torch.full_like(counter, key), counter, seed)
    shifts = torch.arange(_WORD, device=device)
    signs = ((words[..., None] >> shifts) & 1).float().mul_(2).sub_(1).flatten(1)
    return signs[:, columns.start - first * _WORD :][:, : len(columns)]


def project(
    x: Float[Tensor, "n p"],
    dim: int,
    *,
    seed: int = 0,
    key: int = 0,
    kind: Kind = "rademacher",
    start: int = 0,
) -> Float[Tensor, "n dim"]:
    r"""$x P^\top / \sqrt{\text{dim}}$ with P made block by block.

    Args:
        x: Vectors, or the coordinates of longer ones from `start` on; the projections of all parts add up.
        dim: Numbers that are kept of each.
        seed: Seed of P.
        key: What P is for.
        kind: "rademacher" or "gaussian".
        start: The coordinate at which x begins.
    """
    step = max(_WORD, _CHUNK // dim // _WORD * _WORD)
    total = x.new_zeros(len(x), dim)
    for begin in range(0, x.shape[1], step):
        part = x[:, begin : begin + step]
        columns = range(start + begin, start + begin + part.shape[1])
        P = random_matrix(dim, columns, seed=seed, key=key, kind=kind, device=x.device)
        total += part @ P.to(x).mT
    return total / dim**0.5
