r"""Gradient similarity: the inner product or cosine of a query's and an example's gradients.

The one-checkpoint form of TracIn (Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient
Descent", arXiv:2002.08484): one step of gradient descent at learning rate η on example n changes the measurement by
$-\eta\, \nabla f_q^\top \nabla \ell_n$.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress, sweep
from headwater.core.curvature import Preconditioned
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.core.scoring import Norms, PairScores
from headwater.core.target import Loss
from headwater.core.task import Measurement
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import query_gradients


def cosine(
    dot: Float[Tensor, "query train"], x: Float[Tensor, " query"], y: Float[Tensor, " train"]
) -> Tensor:
    """Cosines from inner products and norms; zero where a gradient is zero."""
    scale = x[:, None] * y[None, :]
    return torch.where(scale > 0, dot / scale.clamp(min=torch.finfo(dot.dtype).tiny), 0.0)


@dataclass(frozen=True, kw_only=True)
class _Similarity(Attributor):
    paper: ClassVar[str] = "arXiv:2002.08484"
    normalize: ClassVar[bool]

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example; the fit's curvature is not used."""
        examples = as_examples(queries)
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        n = len(fit.train)
        gathered: list[Accumulator] = [PairScores(Preconditioned(gradients), n)]
        gathered += [Norms(n)] if self.normalize else []
        batches = fit.batches(fit.train)
        sweep(fit.capture(), fit.train, gathered, Loss(), batches=batches, progress=progress)
        pairs, *norms = (each.finish() for each in gathered)  # type: ignore[attr-defined]
        values = cosine(-pairs, gradients.norms(), norms[0]) if self.normalize else -pairs
        return to_scores(
            self,
            fit,
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
        )


@dataclass(frozen=True, kw_only=True)
class GradientDot(_Similarity):
    """Minus the inner product of gradients: the change under one step of unit learning rate."""

    normalize: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class GradientCosine(_Similarity):
    """Minus the cosine of gradients, which no example can win by the size of its gradient alone."""

    normalize: ClassVar[bool] = True
