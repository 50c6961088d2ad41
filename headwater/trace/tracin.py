r"""TracIn: inner products of gradients along training.

Pruthi, Liu, Kale and Sundararajan (2020), "Estimating Training Data Influence by Tracing Gradient Descent",
arXiv:2002.08484. A step of gradient descent on a batch of size B that holds example n changes a measurement by
$-\frac{\eta}{B} \nabla f_q^\top \nabla \ell_n$ to first order. TracInCP sums this over checkpoints.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.curvature import Preconditioned
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.trace.base import Attributor, members, same_data, to_scores
from headwater.trace.influence import inner_products, query_gradients


def tracin(
    products: Iterable[Float[Tensor, "query train"]],
    rates: Sequence[float] | Float[Tensor, "checkpoint train"],
) -> Float[Tensor, "query train"]:
    r"""$-\sum_c \eta_c\, \nabla f_q(\theta_c)^\top \nabla \ell_n(\theta_c)$.

    Args:
        products: The inner products at each checkpoint.
        rates: The learning rate of each checkpoint, or of each checkpoint and example: zero at steps that did not
            see the example gives TracIn in its ideal form.
    """
    total: Tensor | float = 0.0
    for product, rate in zip(products, rates, strict=True):
        total = total - rate * product
    return torch.as_tensor(total)


@dataclass(frozen=True, kw_only=True)
class TracIn(Attributor):
    """Sum of gradient products over the checkpoints of a run.

    With rates that are a learning rate over the size of its batch, times the visits to an example that the checkpoint
    stands for, scores are in nats; without rates each checkpoint counts alike and only the order counts.
    """

    paper: ClassVar[str] = "arXiv:2002.08484"

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        fits: Sequence[Fit] | None = None,
        rates: Sequence[float] | Float[Tensor, "checkpoint train"] | None = None,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            fits: The model at each checkpoint, from `headwater.core.fit.fits_at`; `fit` alone when left out.
            rates: Learning rate of each checkpoint, or of each checkpoint and example.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: There is not one rate for each checkpoint, or not one for each checkpoint and example.
        """
        examples, each = as_examples(queries), members(fit, fits)
        if rates is not None:
            _check(rates, len(each), len(fit.train))

        def products() -> Iterable[Tensor]:
            for one in map(partial(same_data, fit), each):
                gradients = query_gradients(one, examples, measurement, weights, progress)
                prepared = Preconditioned(gradients)
                yield inner_products(one, prepared, fit.train, progress=progress).finish()

        values = tracin(products(), [1.0] * len(each) if rates is None else rates)
        return to_scores(
            self,
            fit,
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="" if rates is None else "nats",
            facts={"checkpoints": len(each)},
        )


def _check(rates: Sequence[float] | Tensor, n_checkpoints: int, n_train: int) -> None:
    """Refuse rates that are not one for each checkpoint, or one for each checkpoint and example."""
    if len(rates) != n_checkpoints:
        raise ValueError(
            f"Expected one learning rate for each of {n_checkpoints} checkpoints; got {len(rates)}."
        )
    shape = tuple(torch.as_tensor(rates).shape)
    if shape not in ((n_checkpoints,), (n_checkpoints, n_train)):
        raise ValueError(
            f"Expected rates of shape ({n_checkpoints},), one for each checkpoint, or "
            f"({n_checkpoints}, {n_train}), one for each checkpoint and training example; got {shape}."
        )
