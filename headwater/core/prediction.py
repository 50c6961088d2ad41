"""What a model predicts for a batch: a distribution at each position, and labels to score it on.

Losses are negative log-likelihoods in nats, one number a position. The curvature of the loss in the model's
outputs, which the Gauss–Newton matrix sandwiches, is the Fisher information of these distributions: it can be
sampled (labels drawn from the model), enumerated (every label with its probability), or multiplied.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.numerics import noise

IGNORE = -100  # PyTorch's mark for labels that are not scored


@dataclass(frozen=True)
class LabelRows:
    r"""Square-root rows of the Fisher information of a batch's predictions.

    Row r is one label of one position of one example; with $v_r = \sqrt{w_r}\,\nabla\ell_r$ the rows give
    $\sum_r v_r v_r^\top$, the Fisher information of the batch, but for what was dropped.

    Attributes:
        example: Its example (row).
        position: Its position (row).
        label: Its label (row).
        weight: $w_r$ (row).
        trace: Trace of the whole Fisher information in the outputs.
        lost: Share of that trace that was dropped.
    """

    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    label: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    trace: float = 0.0
    lost: float = 0.0


class Prediction(ABC):
    """Independent distributions at the positions of each example, with labels."""

    mask: Bool[Tensor, "batch pos"]
    target: Tensor  # the labels, first axis the example

    @abstractmethod
    def token_loss(self) -> Float[Tensor, "batch pos"]:
        """Negative log-likelihood of the labels, in nats; zero where masked."""

    @abstractmethod
    def with_target(self, target: Tensor) -> "Prediction":
        """The same prediction scored on other labels."""

    @abstractmethod
    def sample(self, keys: Int[Tensor, " batch"], seed: int) -> "Prediction":
        """The same prediction with labels drawn from the model, tied to example, position and seed."""

    @abstractmethod
    def rows(self, cut: float) -> LabelRows:
        """Every label of probability at least `cut`, as rows of the Fisher's square root."""

    @abstractmethod
    def row_value(
        self, position: Int[Tensor, " batch"], label: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """For one label an example: the number whose gradient is its row, unweighted."""

    @abstractmethod
    def hessian_product(self, tangent: Tensor) -> Tensor:
        """The Hessian of the summed loss in the outputs, applied to a change of the outputs."""

    @property
    @abstractmethod
    def outputs(self) -> Tensor:
        """The model's outputs that the loss depends on."""

    @abstractmethod
    def with_outputs(self, outputs: Tensor) -> "Prediction":
        """The same labels scored by other outputs."""

    def loss(self) -> Float[Tensor, " batch"]:
        """Loss of each example, summed over its positions."""
        return self.token_loss().sum(dim=1)

    def _counters(self) -> Int[Tensor, "batch pos"]:
        return self.mask.long().cumsum(dim=1)  # counts scored positions, so padding does not matter


@dataclass(frozen=True)
class Categorical(Prediction):
    """A distribution over classes at each position, scored by cross-entropy.

    Args:
        logits: Unnormalized log-probabilities.
        labels: Classes, -100 where a position is not scored.
    """

    logits: Float[Tensor, "batch pos vocab"]
    labels: Int[Tensor, "batch pos"]

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:  # type: ignore[override]
        return self.labels != IGNORE

    @property
    def outputs(self) -> Tensor:
        return self.logits

    @property
    def target(self) -> Tensor:  # type: ignore[override]
        return self.labels

    def with_outputs(self, outputs: Tensor) -> "Categorical":
        return replace(self, logits=outputs)

    def with_target(self, target: Tensor) -> "Categorical":
        return replace(self, labels=target)

    def token_loss(self) -> Float[Tensor, "batch pos"]:
        logits, labels = _float32(self.logits).flatten(0, 1), self.labels.flatten()
        loss = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORE, reduction="none"
        )
        return loss.view(self.labels.shape)

    def margin(self) -> Float[Tensor, " batch"]:
        r"""Log-odds of the labels, $z_y - \log\sum_{c\neq y} e^{z_c}$, summed over positions (nats)."""
        logits, labels = _float32(self.logits), self.labels.clamp(min=0)[..., None]
        others = logits.scatter(-1, labels, -torch.inf).logsumexp(dim=-1)
        odds = logits.gather(-1, labels).squeeze(-1) - others
        return (odds * self.mask).sum(dim=1)

    def sample(self, keys: Int[Tensor, " batch"], seed: int) -> "Categorical":
        with torch.no_grad():
            mask = self.mask
            u = noise.uniform(keys[:, None].expand_as(mask), self._counters(), seed)[mask]
            cumulative = _float32(self.logits[mask]).softmax(dim=-1).cumsum(dim=-1)
            # The last sum may miss 1 by rounding: scale by it, and never step past the last class.
            drawn = torch.searchsorted(cumulative, (u.to(cumulative) * cumulative[:, -1])[:, None])
            drawn = drawn.squeeze(1).clamp(max=self.logits.shape[-1] - 1)
            return replace(self, labels=self.labels.masked_scatter(mask, drawn))

    def rows(self, cut: float) -> LabelRows:
        with torch.no_grad():
            p = _float32(self.logits).softmax(dim=-1) * self.mask[..., None]
            kept = (p >= cut) & self.mask[..., None]
            # p_y |∇ℓ_y|² = p_y |p - e_y|², which sums to Σ_y p_y (1 - p_y)
            each = p * (1 - 2 * p + p.square().sum(dim=-1, keepdim=True))
            trace, dropped = float(each.sum()), float((each * ~kept).sum())
            example, position, label = kept.nonzero(as_tuple=True)
            lost = dropped / trace if trace > 0 else 0.0
            return LabelRows(example, position, label, p[kept], trace, lost)

    def row_value(self, position: Tensor, label: Tensor) -> Float[Tensor, " batch"]:
        labels = torch.full_like(self.labels, IGNORE)
        labels = labels.scatter(1, position[:, None], label[:, None])
        return self.with_target(labels).loss()

    def hessian_product(self, tangent: Tensor) -> Tensor:
        p = _float32(self.logits).softmax(dim=-1)
        weighted = p * tangent
        product = weighted - p * weighted.sum(dim=-1, keepdim=True)
        return product * self.mask[..., None]


@dataclass(frozen=True)
class Gaussian(Prediction):
    """A mean at each position with unit variance, scored by half the squared error."""

    mean: Float[Tensor, "batch pos dim"]
    target: Float[Tensor, "batch pos dim"]
    mask: Bool[Tensor, "batch pos"]

    @property
    def outputs(self) -> Tensor:
        return self.mean

    def with_outputs(self, outputs: Tensor) -> "Gaussian":
        return replace(self, mean=outputs)

    def with_target(self, target: Tensor) -> "Gaussian":
        return replace(self, target=target)

    def token_loss(self) -> Float[Tensor, "batch pos"]:
        return 0.5 * (self.mean - self.target).square().sum(dim=-1) * self.mask

    def sample(self, keys: Int[Tensor, " batch"], seed: int) -> "Gaussian":
        with torch.no_grad():
            dim = self.mean.shape[-1]
            counters = self._counters()[..., None] * dim + torch.arange(
                dim, device=self.mean.device
            )
            draws = noise.normal(keys[:, None, None].expand_as(counters), counters, seed)
            return replace(self, target=self.mean.detach() + draws.to(self.mean))

    def rows(self, cut: float) -> LabelRows:
        every = self.mask[..., None].expand_as(self.mean)
        example, position, label = every.nonzero(as_tuple=True)
        weight = torch.ones_like(example, dtype=self.mean.dtype)
        return LabelRows(example, position, label, weight, float(len(example)))

    def row_value(self, position: Tensor, label: Tensor) -> Float[Tensor, " batch"]:
        flat = position * self.mean.shape[-1] + label
        return self.mean.flatten(1).gather(1, flat[:, None]).squeeze(1)

    def hessian_product(self, tangent: Tensor) -> Tensor:
        return tangent * self.mask[..., None]


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
