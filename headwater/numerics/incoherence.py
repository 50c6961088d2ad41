r"""Random orthogonal matrices that are cheap to multiply by, and what they are for: incoherence.

Chee, Cai, Kuleshov and De Sa (2023), arXiv:2307.13304. A matrix is easy to round when no entry stands out, and its
inputs' second moment $H = Q \Lambda Q^\top$ when no eigenvector points along a coordinate:

$$\mu_W = \sqrt{mn}\,\max_{ij} \lvert W_{ij} \rvert / \lVert W \rVert_F, \qquad
\mu_H = \sqrt{n}\,\max_{ij} \lvert Q_{ij} \rvert .$$

Both become small, whatever they were, under $U = P_{\text{out}} (O_1 \otimes O_2) P_{\text{in}}$ with random orthogonal
$O_i$ of sides p and q, $pq = n$, between random permutations: n (p + q) products a vector instead of n².
"""

import warnings
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headwater.numerics import noise, spectral


def factor_pair(n: int) -> tuple[int, int]:
    """Two factors of n near its root: the products of every second of its primes, in ascending order.

    Example:
        >>> [factor_pair(n) for n in (576, 1536, 192, 7)]
        [(24, 24), (32, 48), (24, 8), (7, 1)]
    """
    primes, left, divisor = [], n, 2
    while divisor * divisor <= left:
        while left % divisor == 0:
            primes.append(divisor)
            left //= divisor
        divisor += 1
    primes += [left] if left > 1 else []
    return prod(primes[::2]), prod(primes[1::2])


def haar(n: int, seed: int, key: int = 0) -> Float[Tensor, "n n"]:
    """A random orthogonal matrix, uniform over all, in float64: the QR factor of Gaussian numbers, signs set right.

    Args:
        n: Its side.
        seed: Seed.
        key: What it is for.
    """
    counter = torch.arange(n * n)
    Q, R = torch.linalg.qr(noise.normal(torch.full_like(counter, key), counter, seed).view(n, n))
    return Q * R.diagonal().sign()


def _permutation(n: int, seed: int, key: int) -> Int64[Tensor, " n"]:
    counter = torch.arange(n)
    return noise.bits(torch.full_like(counter, key), counter, seed).argsort()


STANDS_OUT = 8.0  # of mu_W after a turn; 4 to 7 is what Gaussian numbers give


@dataclass(frozen=True, eq=False)
class KroneckerOrthogonal:
    r"""$U = P_{\text{out}} (O_1 \otimes O_2) P_{\text{in}}$, to be multiplied by without forming it.

    Attributes:
        left: $O_1$.
        right: $O_2$.
        order_in: $(P_{\text{in}} x)_i = x_{\text{order\_in}[i]}$.
        order_out: Likewise.
    """

    left: Float[Tensor, "p p"]
    right: Float[Tensor, "q q"]
    order_in: Int64[Tensor, " n"]
    order_out: Int64[Tensor, " n"]

    @classmethod
    def random(cls, n: int, seed: int) -> "KroneckerOrthogonal":
        """The random matrix of side n that a seed stands for, the same on every machine but for rounding."""
        p, q = factor_pair(n)
        if min(p, q) == 1 and n > 64:
            warnings.warn(
                f"{n} is prime, so that its random orthogonal matrix is a dense one of {n} × {n}; it is slow to make "
                "and to multiply by.",
                stacklevel=2,
            )
        orders = (_permutation(n, seed, key) for key in (2, 3))
        return cls(haar(p, seed, 0), haar(q, seed, 1), *orders)

    def to(self, like: Tensor) -> "KroneckerOrthogonal":
        """The same in the type and on the device of a tensor."""
        orders = (self.order_in.to(like.device), self.order_out.to(like.device))
        return KroneckerOrthogonal(self.left.to(like), self.right.to(like), *orders)

    def __call__(self, x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """U x for every vector along the last axis."""
        p, q = len(self.left), len(self.right)
        x = x[..., self.order_in].unflatten(-1, (p, q))
        return (self.left @ (x @ self.right.mT)).flatten(-2)[..., self.order_out]

    def back(self, x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """Uᵀ x, the inverse."""
        p, q = len(self.left), len(self.right)
        x = x[..., self.order_out.argsort()].unflatten(-1, (p, q))
        return (self.left.mT @ (x @ self.right)).flatten(-2)[..., self.order_in.argsort()]

    def both_sides(self, H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """U H Uᵀ."""
        return self(self(H).mT).mT


def mu_weight(W: Float[Tensor, "out in"]) -> float:
    """μ_W: 1 where all entries are of one size, √(mn) where a single one is not zero.

    Example:
        >>> mu_weight(torch.ones(2, 2)), mu_weight(torch.eye(4))
        (1.0, 2.0)
    """
    return float(W.numel() ** 0.5 * W.abs().max() / W.norm().clamp(min=torch.finfo(W.dtype).tiny))


def mu_hessian(H: Float[Tensor, "n n"]) -> float:
    """μ_H, from the eigenvectors: between 1 and √n."""
    vectors = spectral.eigh(H, dtype=None)[1]
    return float(len(H) ** 0.5 * vectors.abs().max())


def balance(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"], Float[Tensor, " in"]]:
    r"""$WD$, $D^{-1}HD^{-1}$ and $D = (\operatorname{diag}(H) / \operatorname{diag}(W^\top W))^{1/4}$.

    H is taken in units of its largest entry, and diagonals as 1e-8 where they are smaller. It is the D that makes
    $\operatorname{tr}(D^{-1}HD^{-1})\,\lVert WD \rVert_F^2$ least.
    """
    H = H / H.abs().max().clamp(min=torch.finfo(H.dtype).tiny)
    D = (H.diagonal().clamp(min=1e-8) / W.square().sum(0).to(H).clamp(min=1e-8)) ** 0.25
    return W * D.to(W), H / D / D[:, None], D


@dataclass(frozen=True)
class Turned:
    """A layer in coordinates where nothing stands out, and the way back.

    Attributes:
        W: The turned weight.
        H: The turned second moment, undamped.
        rescale: D.
        U: Acts on outputs.
        V: Acts on inputs.
    """

    W: Float[Tensor, "out in"]
    H: Float[Tensor, "in in"]
    rescale: Float[Tensor, " in"]
    U: KroneckerOrthogonal
    V: KroneckerOrthogonal

    def back(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight in the layer's own coordinates."""
        W = self.V.to(W).back(W) / self.rescale.to(W)
        return self.U.to(W).back(W.mT).mT


def turn(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    seeds: tuple[int, int],
    *,
    rescale: bool = True,
) -> Turned:
    r"""$U W D V^\top$ and $V (D^{-1} H D^{-1} n / \operatorname{tr} + 0.01 I) V^\top$.

    Args:
        W: The weight.
        H: The second moment of its inputs.
        seeds: Seeds of U and V.
        rescale: Whether D balances the columns; else it is the identity.
    """
    n, D = len(H), torch.ones(len(H), dtype=H.dtype, device=H.device)
    if rescale:
        W, H, D = balance(W, H)
    H = H * (n / H.trace()) + 0.01 * torch.eye(n, dtype=H.dtype, device=H.device)
    U, V = (KroneckerOrthogonal.random(k, s) for k, s in zip(W.shape, seeds, strict=True))
    W = U.to(W)(V.to(W)(W).mT).mT
    return Turned(W, V.to(H).both_sides(H), D, U, V)


def turn_safely(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"], seeds: tuple[int, int]
) -> Turned:
    """The turned layer, without D where that would leave weights that stand out.

    Where a single input is far larger than all others, as behind the massive activations of language models, D makes
    one column of W so large that no turn can hide it, and the grid cuts it off.
    """
    turned = turn(W, H, seeds)
    return turned if mu_weight(turned.W) <= STANDS_OUT else turn(W, H, seeds, rescale=False)
