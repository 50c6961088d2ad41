r"""Bernoulli-gated linear networks: what two ReLU networks differ by, when gates are random and shared.

Dhawan, Huang, Bae and Grosse (2023), "Efficient Parametric Approximations of Neural Network Function Space Distance",
arXiv:2302.03519.

A ReLU multiplies its pre-activation by a gate, 1 where it is positive and 0 elsewhere. Replace the gates by
independent coins $g_i \sim \mathrm{Bernoulli}(m_i)$, the same for two networks, and both are linear in what they read.
With $a$ the activations of the first and $\delta$ the difference of the second's from them, a layer takes

$$s = W_0 a + b_0, \quad \delta_s = (W_1 - W_0)\,a + (b_1 - b_0) + W_1 \delta, \qquad
a \leftarrow g \circ s, \quad \delta \leftarrow g \circ \delta_s .$$

BGLN-S draws inputs and gates; BGLN-D carries the means and covariances of $a$ and $\delta$ through the layers, and has
the expected squared distance without drawing anything.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

Affine = Callable[[Tensor], Tensor]  # rows (n, in) to rows (n, out)


def squared_distance(
    before: Float[Tensor, "batch dim"], after: Float[Tensor, "batch dim"]
) -> Float[Tensor, " batch"]:
    """Half the squared distance of outputs."""
    return 0.5 * (after - before).square().sum(-1)


def softmax_distance(
    before: Float[Tensor, "batch class"], after: Float[Tensor, "batch class"]
) -> Float[Tensor, " batch"]:
    """Half the squared distance of probabilities."""
    return squared_distance(before.softmax(-1), after.softmax(-1))


def kl_distance(
    before: Float[Tensor, "batch class"], after: Float[Tensor, "batch class"]
) -> Float[Tensor, " batch"]:
    """KL(before ‖ after) of the distributions that logits stand for, in nats.

    Example:
        >>> a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> [round(float(kl_distance(*pair)), 4) for pair in ((a, b), (b, a))]  # the direction matters
        [0.1201, 0.1109]
    """
    logs = before.log_softmax(-1), after.log_softmax(-1)
    return kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": squared_distance,
    "softmax": softmax_distance,
    "kl": kl_distance,
}


@dataclass(frozen=True)
class PairMoments:
    r"""First and second moments of activations $a$ of one network and of the difference $\delta$ of another's.

    Attributes:
        mean: $E[a]$.
        difference: $E[\delta]$.
        covariance: Cov(a).
        difference_covariance: Cov(δ).
        cross: Cov(a, δ).
    """

    mean: Float[Tensor, " dim"]
    difference: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]
    difference_covariance: Float[Tensor, "dim dim"]
    cross: Float[Tensor, "dim dim"]

    @classmethod
    def of_inputs(
        cls, mean: Float[Tensor, " dim"], covariance: Float[Tensor, "dim dim"]
    ) -> "PairMoments":
        """Both networks read the same."""
        zero = torch.zeros_like(covariance)
        return cls(mean, torch.zeros_like(mean), covariance, zero, zero)


def through_affine(
    moments: PairMoments, before: Affine, after: Affine, *, released: bool = False
) -> PairMoments:
    r"""Moments behind an affine map, of which each network has its own.

    With $D = W_1 - W_0$, $C$ = Cov(a), $\Delta$ = Cov(δ) and $X$ = Cov(a, δ):

    $$C \leftarrow W_0 C W_0^\top, \quad
    \Delta \leftarrow D C D^\top + W_1 \Delta W_1^\top + D X W_1^\top + W_1 X^\top D^\top, \quad
    X \leftarrow W_0 (C D^\top + X W_1^\top).$$

    Args:
        moments: Those in front of it.
        before: The first network's map, of rows.
        after: The second's.
        released: Leave X out, as the paper's code does. Then only a difference in a single layer is counted rightly.
    """
    origin = torch.zeros_like(moments.mean)[None]
    at_origin = before(origin), after(origin)

    def W0(x: Tensor) -> Tensor:
        return before(x) - at_origin[0]

    def W1(x: Tensor) -> Tensor:
        return after(x) - at_origin[1]

    def D(x: Tensor) -> Tensor:
        return W1(x) - W0(x)

    e, d = moments.mean[None], moments.difference[None]
    C, dC, X = moments.covariance, moments.difference_covariance, moments.cross
    mean = before(e)
    CD = D(C)  # C Dᵀ: rows of a matrix are what maps act on
    dC_s = D(CD.mT).mT + W1(W1(dC).mT)
    if released:
        X_s = mean.new_zeros(mean.shape[1], mean.shape[1])
    else:
        XW1 = W1(X)  # X W1ᵀ
        half = D(XW1.mT).mT
        dC_s = dC_s + half + half.mT
        X_s = W0((CD + XW1).mT).mT
    return PairMoments(mean[0], (after(e + d) - mean)[0], W0(W0(C).mT), dC_s, X_s)


def through_gates(
    moments: PairMoments,
    rate: Float[Tensor, " dim"],
    *,
    released: bool = False,
    random: bool = True,
) -> PairMoments:
    r"""Moments behind gates that are open with probability m, whatever passes and whatever the other gates do.

    Off the diagonal a second moment is multiplied by $m_i m_j$. On the diagonal it is $E[g_i^2] = m_i$ that multiplies
    it, mean included: $m_i C_{ii} + m_i (1 - m_i)\, e_i^2$ for a covariance.

    Args:
        moments: Those in front of the gates.
        rate: m.
        released: Take $m_i m_j$ on the diagonal too, as the paper's code does.
        random: False where the numbers are slopes, not probabilities: then nothing is drawn.
    """
    e, d = moments.mean, moments.difference
    both = rate[:, None] * rate
    coin = torch.zeros_like(rate) if released or not random else rate * (1 - rate)

    def gated(covariance: Tensor, product: Tensor) -> Tensor:
        own = coin * (covariance.diagonal() + product)
        return both * covariance + torch.diag(own)

    return PairMoments(
        rate * e,
        rate * d,
        gated(moments.covariance, e * e),
        gated(moments.difference_covariance, d * d),
        gated(moments.cross, e * d),
    )


def expected_squared_distance(moments: PairMoments) -> Float[Tensor, ""]:
    r"""$\tfrac12 E\|\delta\|^2 = \tfrac12 (\|E\delta\|^2 + \operatorname{tr} \mathrm{Cov}(\delta))$."""
    return 0.5 * (moments.difference.square().sum() + moments.difference_covariance.trace())


def covariance_root(
    covariance: Float[Tensor, "dim dim"] | Float[Tensor, " dim"], *, jitter: float = 1e-4
) -> Tensor:
    """A matrix whose product with its transpose is the covariance, or the deviations where that is a diagonal.

    Args:
        covariance: Whole, or its diagonal.
        jitter: Added to the diagonal, in units of its mean: pixels that never change make a covariance singular. One of
            zeros, as of a single example, is its own root.

    Raises:
        ValueError: The covariance is not positive definite even so.
    """
    whole = covariance.ndim == 2
    diagonal = covariance.diagonal() if whole else covariance
    extra = jitter * diagonal.mean()
    if not bool(covariance.any()):
        return torch.zeros_like(covariance)
    if not whole:
        return (covariance.clamp(min=0) + extra).sqrt()
    root, info = torch.linalg.cholesky_ex(covariance + torch.diag(extra.expand(len(covariance))))
    if int(info):
        raise ValueError(
            f"The covariance of the inputs plus {jitter:g} times its mean diagonal is not positive definite (found at "
            f"row {int(info)} of {len(covariance)}). Raise the jitter, gather more examples, or keep its diagonal only."
        )
    return root
