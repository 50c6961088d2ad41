r"""TRAK: attribution by the kernel of projected gradients.

Park, Georgiev, Ilyas, Leclerc and Madry (2023), "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186. The
model is linearised in its output $f = \log\frac{p}{1-p}$, the log-odds of the label, and features are projected
gradients, $\phi(z) = P^\top \nabla f(z)$. One Newton step of the logistic regression that remains, and an average over
M models, give

$$\tau = \Big(\frac1M \sum_m \phi_m(q)^\top (\Phi_m^\top \Phi_m)^{-1} \Phi_m^\top\Big) \cdot
\Big(\frac1M \sum_m Q_m\Big), \qquad Q = \operatorname{diag}(1 - p_n).$$
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
from headwater.core.forward import evaluate
from headwater.core.prediction import Categorical
from headwater.core.projection import (
    Joint,
    Projection,
    TwoSided,
    project_examples,
    project_gradients,
)
from headwater.core.scores import Scores
from headwater.core.target import Measured
from headwater.core.task import Measurement
from headwater.numerics import spectral
from headwater.trace.base import Attributor, members, same_data, to_scores
from headwater.trace.influence import query_gradients


def kernel_scores(
    query: Float[Tensor, "query k"],
    train: Float[Tensor, "train k"],
    *,
    ridge: float = 0.0,
    weight: Float[Tensor, " train"] | None = None,
) -> Float[Tensor, "query train"]:
    r"""$\phi_q^\top (\Phi^\top R\, \Phi + \rho I)^{-1} \Phi^\top$, in float64.

    Directions in which no training feature points are left out, so that redundant coordinates do no harm.

    Args:
        query: Features of the queries.
        train: Features Φ of the training examples.
        ridge: ρ in units of the mean eigenvalue of $\Phi^\top R\, \Phi$.
        weight: The diagonal of R; ones when left out.

    Raises:
        ValueError: There are no fewer features than examples and no ridge.
    """
    n, k = train.shape
    if ridge <= 0 and k >= n:
        raise ValueError(
            f"{k} features of {n} training examples determine nothing: ΦᵀΦ cannot be inverted. Give a ridge, such "
            "as 0.01, or keep fewer numbers (a lower rank, or dim=…)."
        )
    precision = max(torch.finfo(train.dtype).eps ** 2, torch.finfo(torch.float64).eps)
    query, train = query.double(), train.double()
    values, vectors = spectral.eigh(
        train.mT @ (train if weight is None else train * weight[:, None])
    )
    damped = values + ridge * values.mean()
    inverse = torch.where(values > 10 * k * precision * values.max(), 1 / damped, 0.0)
    return (query @ vectors * inverse) @ (train @ vectors).mT


def soft_threshold(
    values: Float[Tensor, "query train"], threshold: Float[Tensor, "query 1"]
) -> Float[Tensor, "query train"]:
    """Every value moved towards zero by the threshold, and those that would pass it set to zero.

    Example:
        >>> soft_threshold(torch.tensor([[3.0, -2.0, 0.5]]), torch.tensor([[1.0]])).tolist()
        [[2.0, -1.0, 0.0]]
    """
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def affordable_rank(layers: Any, n: int, *, most: int = 32) -> int:
    """The largest rank, up to `most`, with which all layers together keep at most n / 4 numbers; 1 at least."""
    for rank in range(most, 1, -1):
        if sum(TwoSided(rank).width(layer) for layer in layers) <= n / 4:
            return rank
    return 1


@dataclass(frozen=True, kw_only=True)
class TRAK(Attributor):
    """Projected gradients of the log-odds, whitened by their second moment, averaged over models.

    Args:
        rank: Numbers kept on each side of a layer's gradient. None takes the largest, up to 32, with which the
            features are at most a quarter of the examples.
        dim: Project all parameters by one matrix to so many numbers instead, as the paper does; dear for models with
            more than a million parameters.
        ridge: Added to the second moment, in units of its mean eigenvalue; needed where features outnumber examples.
        reweight: Weight examples by p (1 - p) in the second moment, as Newton's step has it and the paper leaves out.
        keep: Share of a query's scores that soft thresholding leaves; 1 leaves all.
        seed: Seed of the projection; each model of an ensemble has its own.
    """

    paper: ClassVar[str] = "arXiv:2303.14186"

    rank: int | None = None
    dim: int | None = None
    ridge: float = 0.0
    reweight: bool = False
    keep: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (self.ridge >= 0 and 0 < self.keep <= 1):
            raise ValueError(
                f"ridge must be 0 or more and keep above 0, up to 1; got {self.ridge} and {self.keep}."
            )

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        fits: Sequence[Fit] | None = None,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example.

        With the measurement "margin" these are the paper's; any other is treated the same, by its own gradient.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            fits: Several models of the ensemble, such as `headwater.core.fit.fits_at` makes; `fit` alone when left out.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: The task has no classes, or there are more features than examples and no ridge.
        """
        examples, each = as_examples(queries), members(fit, fits)
        kernel: Tensor | float = 0.0
        residual: Tensor | float = 0.0
        width = 0
        for number, one in enumerate(map(partial(same_data, fit), each)):
            missed = residuals(one, progress)
            residual = residual + missed
            projection = self._projection(one, self.seed + number)
            gradients = query_gradients(one, examples, measurement, weights, progress)
            asked = _side_by_side(project_gradients(gradients, one.followed, projection))
            train = _side_by_side(
                project_examples(
                    one.capture(),
                    one.train,
                    projection,
                    Measured("margin"),
                    batches=one.batches(one.train),
                    progress=progress,
                )
            )
            width = train.shape[1]
            weight = missed * (1 - missed) if self.reweight else None
            kernel = kernel + kernel_scores(asked, train, ridge=self.ridge, weight=weight)
        values = torch.as_tensor(kernel) / len(each) * residual / len(each)
        if self.keep < 1:
            kept = max(1, round(self.keep * values.shape[1]))
            lowest = values.abs().topk(min(kept + 1, values.shape[1]), dim=1).values[:, -1:]
            values = soft_threshold(values, lowest)
        return to_scores(
            self,
            fit,
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
            facts={"models": len(each), "features": width},
        )

    def _projection(self, fit: Fit, seed: int) -> Projection:
        if self.dim is not None:
            return Joint(self.dim, seed=seed)
        rank = affordable_rank(fit.followed, len(fit.train)) if self.rank is None else self.rank
        return TwoSided(rank, seed=seed)


def residuals(fit: Fit, progress: Progress | None = None) -> Float[Tensor, " train"]:
    """1 - p of each training example's label; of several scored positions, their mean."""

    def of(model: Any, batch: Any) -> Tensor:
        prediction = fit.task.predict(model, batch)
        if not isinstance(prediction, Categorical):
            raise ValueError(
                "TRAK linearises the log-odds of the label, so it needs classes; this task predicts real numbers. "
                "Use Influence, or TrackStar."
            )
        missed = -torch.expm1(-prediction.token_loss().double()) * prediction.mask
        return missed.sum(1) / prediction.mask.sum(1).clamp(min=1)

    batches = fit.batches(fit.train)
    return evaluate(fit.model, fit.train, of, batches=batches, progress=progress, note="residuals")


def _side_by_side(rows: dict[str, Tensor]) -> Float[Tensor, "n k"]:
    return torch.cat(list(rows.values()), dim=1)
