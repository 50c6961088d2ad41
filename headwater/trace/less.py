r"""LESS: what an Adam step on an example would do for the queries, over the checkpoints of a run.

Xia, Malladi, Gururangan, Arora and Chen (2024), "LESS: Selecting Influential Data for Targeted Instruction Tuning",
arXiv:2402.04333. With Γ the direction of the Adam update that example n would cause at checkpoint e, $\bar\eta_e$ the
mean learning rate there and P a random projection,

$$\tau(q, n) = \sum_e \bar\eta_e \cos\big(P\,\nabla\ell_q(\theta_e),\; P\,\Gamma_n(\theta_e)\big).$$
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gradients import Block, dense
from headwater.core.layers import Layer
from headwater.core.projection import (
    Joint,
    Projection,
    TwoSided,
    project_examples,
    project_gradients,
)
from headwater.core.scores import Scores
from headwater.core.target import Loss
from headwater.core.task import Measurement
from headwater.trace.base import Attributor, members, same_data, to_scores
from headwater.trace.influence import query_gradients
from headwater.trace.moments import Moments, moment_of
from headwater.trace.trackstar import unit


def adam_direction(
    gradient: Float[Tensor, "n *block"],
    mean: Float[Tensor, "*block"],
    square: Float[Tensor, "*block"],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Float[Tensor, "n *block"]:
    r"""$\Gamma = \dfrac{\beta_1 \bar m + (1 - \beta_1) g}{\sqrt{\beta_2 \bar v + (1 - \beta_2) g^2 + \epsilon}}$."""
    beta1, beta2 = betas
    step = beta1 * mean + (1 - beta1) * gradient
    return step / (beta2 * square + (1 - beta2) * gradient.square() + eps).sqrt()


@dataclass(frozen=True, kw_only=True)
class LESS(Attributor):
    """Cosine of a query's gradient and an example's Adam update, weighted by the learning rate of each checkpoint.

    Each example's whole gradient is formed once, so this is for adapters and small models.

    Args:
        rank: Numbers kept on each side of a layer; None keeps all.
        dim: Project all parameters by one matrix to so many numbers instead, as the paper does (8192).
        beta1: Decay of the optimizer's mean of gradients.
        beta2: Decay of its mean of squares.
        eps: Added under the root.
        seed: Seed of the projection.
    """

    paper: ClassVar[str] = "arXiv:2402.04333"

    rank: int | None = 32
    dim: int | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    seed: int = 0

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        moments: Sequence[Moments] | None = None,
        fits: Sequence[Fit] | None = None,
        rates: Sequence[float] | None = None,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            moments: The optimizer's `mean` and `square` at each checkpoint; see `headwater.trace.moments`.
            fits: The model at each checkpoint, from `headwater.core.fit.fits_at`; `fit` alone when left out.
            rates: Mean learning rate of each checkpoint; alike when left out. Only their ratios count.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries (group, query), taken of their cosines, as in the paper.
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: The optimizer's moments are missing, or not one for each checkpoint.
        """
        examples, each = as_examples(queries), members(fit, fits)
        if moments is None:
            raise ValueError(
                "LESS needs the optimizer's moments at each checkpoint: keep them while training (keep_optimizer=True) "
                "and pass moments=[trajectory.load_optimizer(i), …]. GradientCosine does without."
            )
        rates = [1.0] * len(each) if rates is None else list(rates)
        if not len(moments) == len(rates) == len(each) or sum(rates) <= 0:
            raise ValueError(
                f"Expected moments and a learning rate for each of {len(each)} checkpoints, not all zero; got "
                f"{len(moments)} moments and rates {rates}."
            )
        values: Tensor | float = 0.0
        for one, rate, state in zip(
            map(partial(same_data, fit), each), rates, moments, strict=True
        ):
            values = values + rate / sum(rates) * self._cosines(
                one, examples, state, measurement, progress
            )
        values = -torch.as_tensor(values)
        if weights is not None:
            values = weights.to(values) @ values
        return to_scores(
            self,
            fit,
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
            facts={"checkpoints": len(each)},
        )

    def _cosines(
        self,
        fit: Fit,
        queries: Any,
        moments: Moments,
        measurement: Measurement | None,
        progress: Progress | None,
    ) -> Float[Tensor, "query train"]:
        projection: Projection
        if self.dim is not None:
            projection = Joint(self.dim, seed=self.seed)
        else:
            longest = max(max(layer.shape[1:]) for layer in fit.followed)
            projection = TwoSided(longest if self.rank is None else self.rank, seed=self.seed)
        kept = {
            layer.name: tuple(moment_of(layer, moments, m) for m in ("mean", "square"))
            for layer in fit.followed
        }

        def gamma(layer: Layer, block: Block) -> Tensor:
            mean, square = (m.to(block.device, block.dtype) for m in kept[layer.name])
            return adam_direction(
                dense(block), mean, square, betas=(self.beta1, self.beta2), eps=self.eps
            )

        gradients = query_gradients(fit, queries, measurement, None, progress)
        asked = project_gradients(gradients, fit.followed, projection)
        train = project_examples(
            fit.capture(),
            fit.train,
            projection,
            Loss(),
            batches=fit.batches(fit.train),
            transform=gamma,
            progress=progress,
        )
        x, y = (unit(torch.cat(list(rows.values()), dim=1).double()) for rows in (asked, train))
        return x @ y.mT
