r"""Gradients from function values alone: antithetic evolution strategies.

With $\epsilon \sim N(0, \sigma^2 I)$ the smoothed function $L_\sigma(\theta) = E\, L(\theta + \epsilon)$ has the
gradient $E[\epsilon\, L(\theta + \epsilon)] / \sigma^2$, whether $L$ is differentiable or not.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def antithetic_gradients(
    noise: Float[Tensor, "pair dim"],
    plus: Float[Tensor, " pair"],
    minus: Float[Tensor, " pair"],
    *,
    sigma: float,
) -> Float[Tensor, "pair dim"]:
    r"""One gradient estimate a pair: $\epsilon\,(L(\theta + \epsilon) - L(\theta - \epsilon)) / 2\sigma^2$.

    Its mean over $N/2$ pairs is the estimate of $N$ particles. It is unbiased for the gradient of
    $L_\sigma$, which is that of $L$ itself where $L$ is quadratic.

    Args:
        noise: What was added to θ, all of it: for a θ that was perturbed several times, their sum.
        plus: The losses of θ + noise.
        minus: The losses of θ - noise.
        sigma: Standard deviation of a single perturbation.

    Example:
        >>> eps = torch.tensor([[0.5, 0.0]])
        >>> antithetic_gradients(eps, torch.tensor([3.0]), torch.tensor([1.0]), sigma=0.5)
        tensor([[2., 0.]])
    """
    return noise * ((plus - minus) / (2 * sigma**2))[:, None]


def single_noise_variance(gradient: Float[Tensor, " dim"]) -> Float[Tensor, ""]:
    r"""Total variance of one antithetic pair on a linear loss: $(P + 1) \|\nabla L\|^2$.

    For ES-Single it is the same however many truncations the inner problem is cut into.
    """
    return (len(gradient) + 1) * gradient.square().sum()


def persistent_variance(
    response: Float[Tensor, "truncation truncation dim"],
) -> Float[Tensor, ""]:
    r"""Total variance of PES with one antithetic pair on losses that are linear in θ.

    Let truncation $t$ lose $\sum_{\tau \le t} G_{t\tau}^\top \theta_\tau$, where $\theta_\tau$ was
    in force in truncation τ. The sum of the estimates, $\sum_t \xi_t \sum_\tau G_{t\tau}^\top
    \epsilon_\tau / \sigma^2$ with $\xi_t = \sum_{s \le t} \epsilon_s$, has total variance

    $$\sum_s (P + 1)\|H_{ss}\|^2 + \sum_{s \ne \tau} (P \|H_{s\tau}\|^2 + H_{s\tau}^\top H_{\tau s}),
    \qquad H_{s\tau} = \sum_{t \ge \max(s, \tau)} G_{t\tau}.$$

    With losses at the end only and orthogonal $G_{T\tau}$ it grows linearly in their number; with
    equal ones it is that of ES-Single.

    Args:
        response: G, by the truncation that loses and the truncation in which θ was in force.
    """
    T, _, dim = response.shape
    lower = torch.ones(T, T, dtype=torch.bool, device=response.device).tril()
    from_here = response.where(lower[..., None], 0.0).flip(0).cumsum(0).flip(0)  # sum over t ≥ s
    later = torch.maximum(torch.arange(T)[:, None], torch.arange(T))
    H = from_here[later, torch.arange(T)]  # (s, τ)
    cross = (H * H.transpose(0, 1)).sum()
    return dim * H.square().sum() + cross
