r"""Laplace's approximation of the last layer: a Gaussian over its weights, and the logits' Gaussian that follows.

With features φ (a one appended for the bias), p the predicted probabilities and δ a prior precision, the posterior of
the last layer's weights is Gaussian about the trained ones with covariance

$$\Sigma = \Big(\sum_n (\operatorname{diag} p_n - p_n p_n^\top) \otimes \varphi_n \varphi_n^\top
+ \delta I\Big)^{-1},$$

the generalized Gauss–Newton matrix of that layer, which for a linear layer under cross-entropy is the Hessian itself.
Logits are then Gaussian with covariance $(I \otimes \varphi)^\top \Sigma\,(I \otimes \varphi)$. Their softmax is
averaged over draws, or by the probit approximation $\operatorname{softmax}\big(z_c / \sqrt{1 + \pi v_c / 8}\big)$.

References:
    MacKay (1992), "The Evidence Framework Applied to Classification Networks"; Kristiadi, Hein and Hennig (2020),
    arXiv:2002.10118; Daxberger et al. (2021), "Laplace Redux", arXiv:2106.14806.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.core.capture import Progress
from headwater.core.damping import evidence
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit
from headwater.core.forward import LastLayer, class_logits, last_layer
from headwater.numerics import spectral
from headwater.numerics.calibration import log_losses

Predictive = Literal["probit", "mc"]
_CHUNK = 1 << 22  # numbers of intermediate products


def last_layer_ggn(
    features: Float[Tensor, "n feature"], probabilities: Float[Tensor, "n class"]
) -> Float[Tensor, "p p"]:
    r"""$\sum_n (\operatorname{diag} p_n - p_n p_n^\top) \otimes \varphi_n \varphi_n^\top$, classes first.

    Example:
        >>> last_layer_ggn(torch.tensor([[2.0]]), torch.tensor([[0.5, 0.5]])).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    x, p = features.double(), probabilities.double()
    n_class, width = p.shape[1], x.shape[1]
    blocks = x.new_zeros(n_class, width, n_class, width)
    for c in range(n_class):
        for d in range(c + 1):
            weight = p[:, c] * (float(c == d) - p[:, d])
            blocks[c, :, d] = blocks[d, :, c] = x.mT @ (x * weight[:, None])
    return blocks.reshape(n_class * width, -1)


def logit_covariance(
    features: Float[Tensor, "n feature"], covariance: Float[Tensor, "p p"]
) -> Float[Tensor, "n class class"]:
    r"""$(I \otimes \varphi)^\top \Sigma\,(I \otimes \varphi)$ of each example."""
    x = features.double()
    n_class = len(covariance) // x.shape[1]
    blocks = covariance.view(n_class, x.shape[1], n_class, x.shape[1])
    step = max(1, _CHUNK // (n_class * len(covariance)))
    parts = [
        torch.einsum("cidj,ni,nj->ncd", blocks, x[s : s + step], x[s : s + step])
        for s in range(0, len(x), step)
    ]
    return torch.cat(parts)


def probit(
    logits: Float[Tensor, "n class"], covariance: Float[Tensor, "n class class"]
) -> Float[Tensor, "n class"]:
    """Mean softmax of Gaussian logits by the probit approximation, each logit by its own variance."""
    variance = covariance.diagonal(dim1=1, dim2=2)
    return (logits / (1 + math.pi / 8 * variance).sqrt()).softmax(1)


def mean_softmax(
    logits: Float[Tensor, "n class"],
    covariance: Float[Tensor, "n class class"],
    *,
    n_samples: int,
    seed: int = 0,
) -> Float[Tensor, "n class"]:
    """Mean softmax of Gaussian logits over draws, the same standard draws for every example."""
    values, vectors = spectral.eigh(covariance)
    root = vectors * values.sqrt()[:, None]
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(logits)
    for _ in range(n_samples):
        z = torch.randn(logits.shape[1], 1, generator=generator, dtype=torch.float64)
        total += (logits + (root @ z)[..., 0]).softmax(1)
    return total / n_samples


@dataclass(frozen=True, eq=False)
class LaplacePredictor(Predictor):
    """A classifier whose last layer is uncertain.

    Attributes:
        fit: A fit of the classifier.
        layer: Its last layer.
        covariance: Of the layer's weights, classes first.
        prior_precision: δ.
        method: How the softmax is averaged, with what.
    """

    fit: Fit
    layer: LastLayer
    covariance: Float[Tensor, "p p"]
    prior_precision: float
    method: "LastLayerLaplace"

    def predict(self, examples: Any, *, progress: Progress | None = None) -> Predictions:
        data, fit = as_examples(examples), self.fit
        batches = fit.batches(data)
        logits, labels = class_logits(fit.model, fit.task, data, batches=batches)
        features = self.layer.features(fit.model, fit.task, data, batches=batches)
        return Predictions(
            probabilities=self.method.average(logits, features, self.covariance),
            labels=labels,
            ids=data.ids,
            facts={"papers": [self.method.paper], "prior_precision": self.prior_precision},
        )


@dataclass(frozen=True, kw_only=True)
class LastLayerLaplace(Calibrator):
    """A Gaussian over the last layer's weights, from its exact Gauss–Newton matrix over the training data.

    Args:
        prior_precision: δ: a number, "validation" (of a grid, that of the least log loss there), or "evidence" (under
            which the layer's weights are most probable; nothing is chosen on validation data then).
        predictive: How the softmax of Gaussian logits is averaged: "probit" or "mc".
        n_samples: Draws of "mc".
        seed: Seed of the draws.
        max_parameters: Refuse larger last layers, whose matrix would not fit.
    """

    paper: ClassVar[str] = "arXiv:2106.14806"

    prior_precision: float | Literal["validation", "evidence"] = "validation"
    predictive: Predictive = "probit"
    n_samples: int = 100
    seed: int = 0
    max_parameters: int = 8192

    def __post_init__(self):
        if not isinstance(self.prior_precision, str) and not self.prior_precision > 0:
            raise ValueError(
                f"prior_precision must be positive; got {self.prior_precision}. Leave it out to choose it on "
                "validation data."
            )

    def calibrate(
        self, fit: Fit, validation: Any, *, progress: Progress | None = None
    ) -> LaplacePredictor:
        layer = last_layer(fit.model, fit.task, fit.train)
        n_parameters = layer.n_features * layer.n_classes
        if n_parameters > self.max_parameters:
            raise ValueError(
                f"The last layer has {n_parameters:,} weights, and their matrix would hold their square; the most is "
                f"max_parameters={self.max_parameters:,}."
            )
        batches = fit.batches(fit.train)
        logits, _ = class_logits(fit.model, fit.task, fit.train, batches=batches)
        features = layer.features(
            fit.model, fit.task, fit.train, batches=batches, progress=progress
        )
        values, vectors = spectral.eigh(last_layer_ggn(features, logits.softmax(1)))

        def covariance(precision: float) -> Tensor:
            return (vectors / (values + precision)) @ vectors.mT

        precision = self._precision(fit, layer, values, covariance, as_examples(validation))
        return LaplacePredictor(fit, layer, covariance(precision), precision, self)

    def _precision(
        self, fit: Fit, layer: LastLayer, values: Tensor, covariance: Any, validation: Examples
    ) -> float:
        n = len(fit.train)
        if self.prior_precision == "evidence":
            distance = float(layer.weights(fit.model).square().sum())
            return n * evidence([values / n], n=n, distance=distance)
        if self.prior_precision != "validation":
            return float(self.prior_precision)
        batches = fit.batches(validation)
        logits, labels = class_logits(fit.model, fit.task, validation, batches=batches)
        features = layer.features(fit.model, fit.task, validation, batches=batches)

        def loss(precision: float) -> float:
            p = self.average(logits, features, covariance(precision))
            return float(log_losses(p, labels).mean())

        return min((10 ** (k / 4) for k in range(-16, 17)), key=loss)

    def average(
        self,
        logits: Float[Tensor, "n class"],
        features: Float[Tensor, "n feature"],
        covariance: Float[Tensor, "p p"],
    ) -> Float[Tensor, "n class"]:
        """Probabilities under Gaussian weights."""
        spread = logit_covariance(features, covariance)
        if self.predictive == "probit":
            return probit(logits, spread)
        return mean_softmax(logits, spread, n_samples=self.n_samples, seed=self.seed)
