r"""Damping: what is added to the eigenvalues of a curvature before they are inverted.

It decides the quality of an influence more than the choice of curvature does. The weight decay of the training run
is the principled choice, since a ridge penalty adds just that to the Hessian. Where none is recorded, the evidence
procedure of MacKay (1992, "Bayesian Interpolation", Neural Computation 4) finds the prior precision under which the
trained parameters are most probable: with $\gamma = \sum_i \lambda_i / (\lambda_i + \rho)$ the number of parameters
that the data determine,

$$\rho = \frac{\gamma}{N\,\lVert\theta - \theta_0\rVert^2}.$$
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Damping:
    """A positive number and its unit.

    Args:
        value: The damping.
        unit: "absolute", or "relative" to the mean eigenvalue of each layer.
        source: Where it comes from, for the record.

    Raises:
        ValueError: The value is not positive and finite.
    """

    value: float
    unit: Literal["absolute", "relative"] = "absolute"
    source: str = "given"

    def __post_init__(self):
        if not (self.value > 0 and self.value < float("inf")):
            raise ValueError(
                f"damping must be positive and finite; got {self.value}. Leave it out to use the training run's "
                "weight decay or an automatic choice."
            )
        if self.unit not in ("absolute", "relative"):
            raise ValueError(
                f"Expected a damping unit 'absolute' or 'relative'; got {self.unit!r}."
            )

    def absolute(self, mean_eigenvalue: float) -> float:
        """The number to add to a layer's eigenvalues."""
        return self.value if self.unit == "absolute" else self.value * max(mean_eigenvalue, 1e-30)


@dataclass(frozen=True)
class Inverse:
    r"""The damped inverse, $1 / (\lambda + \rho)$, with $\rho$ from a `Damping`."""

    damping: Damping

    def __call__(self, eigenvalues: Tensor, mean: float) -> Tensor:
        return 1 / (eigenvalues + self.damping.absolute(mean))


def evidence(eigenvalues: Iterable[Tensor], *, n: int, distance: float, steps: int = 200) -> float:
    """The damping under which the trained parameters are most probable (MacKay's fixed point).

    Args:
        eigenvalues: Eigenvalues of the mean curvature, all layers.
        n: Number of training examples.
        distance: Squared Euclidean distance of the parameters from where training began (or from zero).
        steps: Most iterations; the fixed point is reached in far fewer.

    Returns:
        The damping, in units of the mean curvature.
    """
    spectra = [e.flatten().double() for e in eigenvalues]
    mean = float(sum(e.sum() for e in spectra)) / sum(e.numel() for e in spectra)
    if distance <= 0 or mean <= 0:
        raise ValueError(
            "The automatic damping needs parameters that training moved and a curvature that is not zero; here their "
            f"squared distance is {distance:.3g} and the mean eigenvalue {mean:.3g}. Pass a number instead."
        )
    damping = mean
    for _ in range(steps):
        determined = float(sum((e / (e + damping)).sum() for e in spectra))
        # The update falls as the damping grows, and alone may swing about the fixed point for long. The geometric
        # mean of the two at least halves the distance to it, in logarithms, with each step.
        update = (damping * determined / (n * distance)) ** 0.5
        if abs(update - damping) <= 1e-12 * damping:
            return update
        damping = update
    return damping


def log_evidence(
    eigenvalues: Iterable[Tensor], *, n: int, distance: float, damping: float
) -> float:
    r"""Log probability of the data under a damping, by Laplace's approximation, up to what no damping changes.

    $$-\frac{N\rho}{2} \lVert\theta - \theta_0\rVert^2 + \frac12 \sum_i \log \frac{\rho}{\lambda_i + \rho}$$

    `evidence` finds its maximum over ρ.

    Args:
        eigenvalues: Eigenvalues of the mean curvature, all layers.
        n: Number of training examples.
        distance: Squared Euclidean distance of the parameters from where training began (or from zero).
        damping: ρ.
    """
    determined = sum(float(torch.log1p(e.double() / damping).sum()) for e in eigenvalues)
    return -(n * damping * distance + determined) / 2


def parse_damping(text: str | float | Damping) -> Damping | str:
    """Damping from what a person writes: 0.01, "0.1 relative", "weight_decay", "horizon", "evidence" or "auto".

    Raises:
        ValueError: The text is none of these.

    Example:
        >>> parse_damping("0.1 relative")
        Damping(value=0.1, unit='relative', source='given')
    """
    if isinstance(text, Damping):
        return text
    if isinstance(text, (int, float)):
        return Damping(float(text))
    words = text.split()
    if text in ("auto", "weight_decay", "horizon", "evidence"):
        return text
    try:
        unit = " ".join(words[1:]) or "absolute"
        if unit not in ("absolute", "relative"):
            raise ValueError(f"the unit is {unit!r}, not 'absolute' or 'relative'")
        return Damping(float(words[0]), unit)
    except (IndexError, ValueError) as error:
        raise ValueError(
            "Expected a damping such as 0.01, '0.1 relative', 'weight_decay', 'horizon', 'evidence' or 'auto'; "
            f"got {text!r} ({error})."
        ) from None


def mean_of(eigenvalues: Tensor) -> float:
    """Mean eigenvalue of a layer, the unit of relative damping."""
    return float(eigenvalues.double().mean()) if eigenvalues.numel() else 0.0
