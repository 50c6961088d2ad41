r"""How far probabilities are from what happens: calibration error, log loss, Brier score, reliability.

Of examples predicted with confidence c, a share c should be right. Bins of equal mass hold equally many examples, so
that the error is not the noise of a few in a bin nearly empty (Nguyen and O'Connor 2015, arXiv:1508.05154); bins of
equal width are the older custom (Guo et al. 2017, arXiv:1706.04599).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Bins = Literal["mass", "width"]


@dataclass(frozen=True)
class Reliability:
    """Examples in bins of confidence, the least confident first.

    Attributes:
        count: Examples in each bin; none is empty.
        confidence: Their mean confidence.
        accuracy: Share of them that is right.
    """

    count: Int[Tensor, " bin"]
    confidence: Float[Tensor, " bin"]
    accuracy: Float[Tensor, " bin"]

    @property
    def error(self) -> float:
        r"""Expected calibration error, $\sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|$."""
        weight = self.count.double() / self.count.sum()
        return float((weight * (self.accuracy - self.confidence).abs()).sum())

    @property
    def greatest(self) -> float:
        """The greatest difference of any bin."""
        return float((self.accuracy - self.confidence).abs().max())

    @property
    def overconfidence(self) -> float:
        """Mean confidence less accuracy: positive where the model promises too much."""
        weight = self.count.double() / self.count.sum()
        return float((weight * (self.confidence - self.accuracy)).sum())

    def table(self) -> dict[str, list]:
        """One row a bin."""
        return {name: getattr(self, name).tolist() for name in ("count", "confidence", "accuracy")}


def reliability(
    confidence: Float[Tensor, " n"],
    right: Bool[Tensor, " n"],
    *,
    n_bins: int = 20,
    bins: Bins = "mass",
) -> Reliability:
    """Confidence beside accuracy, in bins.

    Args:
        confidence: Probability that each prediction was given.
        right: Whether it was right.
        n_bins: Number of bins; fewer where there are fewer examples, and empty ones are left out.
        bins: Of equal "mass" (examples sorted by confidence and cut in parts of one size) or equal "width".

    Raises:
        ValueError: There are no examples or no bins, or a confidence is not a probability.

    Example:
        >>> found = reliability(torch.tensor([0.6, 0.6, 0.9, 0.9]), torch.tensor([True, False, True, True]), n_bins=2)
        >>> found.accuracy.tolist(), round(found.error, 3)
        ([0.5, 1.0], 0.1)
    """
    if len(confidence) == 0 or n_bins < 1:
        raise ValueError(
            f"Expected examples and bins; got {len(confidence)} examples and {n_bins} bins."
        )
    if not bool(((confidence >= 0) & (confidence <= 1 + 1e-6)).all()):
        raise ValueError("A confidence is not a number in [0, 1]; pass probabilities, not logits.")
    confidence, values = confidence.double(), right.double()
    if bins == "mass":
        order = confidence.argsort(stable=True)
        parts = [part for part in order.tensor_split(n_bins) if len(part)]
    else:
        which = (confidence * n_bins).long().clamp(max=n_bins - 1)
        parts = [(which == b).nonzero().squeeze(1) for b in which.unique().tolist()]
    return Reliability(
        torch.tensor([len(part) for part in parts]),
        torch.stack([confidence[part].mean() for part in parts]),
        torch.stack([values[part].mean() for part in parts]),
    )


def expected_calibration_error(
    probabilities: Float[Tensor, "n class"],
    labels: Int[Tensor, " n"],
    *,
    n_bins: int = 20,
    bins: Bins = "mass",
) -> float:
    """Calibration error of the most probable class (see `reliability`).

    Example:
        >>> expected_calibration_error(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        0.25
    """
    confidence, predicted = probabilities.max(-1)
    return reliability(confidence, predicted == labels, n_bins=n_bins, bins=bins).error


def log_losses(
    probabilities: Float[Tensor, "n class"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Minus the log-probability of each label (nats); infinite where a label was held impossible."""
    return -probabilities.double().gather(-1, labels[:, None]).squeeze(-1).log()


def brier_scores(
    probabilities: Float[Tensor, "n class"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    r"""$\sum_c (p_c - [c = y])^2$ of each example, between 0 and 2.

    Example:
        >>> brier_scores(torch.tensor([[0.5, 0.5]]), torch.tensor([1])).tolist()
        [0.5]
    """
    p = probabilities.double()
    own = p.gather(-1, labels[:, None]).squeeze(-1)
    return p.square().sum(-1) - 2 * own + 1
