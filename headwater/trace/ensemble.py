"""Ensembles: the mean of a method's scores over models that differ in their seed.

Averaging over retrained models removes what the noise of one training run puts into the scores; TRAK (Park et al.
2023, arXiv:2303.14186) and SOURCE (Bae et al. 2024, arXiv:2405.12186) report both single models and ensembles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.numerics.ranks import average_ranks
from headwater.trace.base import Attributor, members, same_data
from headwater.trace.gradient import GradientDot

Average = Literal["value", "rank"]


def centered_ranks(values: Float[Tensor, "query train"]) -> Float[Tensor, "query train"]:
    """Ranks of each row, from -1/2 to 1/2; positive above the median.

    Example:
        >>> import torch
        >>> centered_ranks(torch.tensor([[10.0, 30.0, 20.0]])).tolist()
        [[-0.5, 0.5, 0.0]]
    """
    n = values.shape[1]
    return (average_ranks(values) - (n + 1) / 2) / max(n - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Ensemble(Attributor):
    """Mean of another method's scores over several fits.

    Args:
        method: The method.
        average: "value" averages scores as the papers do; "rank" averages the ranks of each query, which no single
            model with large gradients can outvote.
    """

    paper: ClassVar[str] = "arXiv:2303.14186"

    method: Attributor = field(default_factory=GradientDot)
    average: Average = "value"

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        fits: Sequence[Fit] | None = None,
        own: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Scores:
        """Mean scores of every training example.

        Args:
            fit: The fit whose examples are scored.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            fits: One fit for each model of the ensemble, of the same training data; `fit` alone when left out.
            own: What each model's method is given beside `options`, such as the record of its run.
            options: Passed on to the method.

        Raises:
            ValueError: The method keeps only some of the scores, or `own` is not one for each fit.
        """
        examples, each = as_examples(queries), members(fit, fits)
        own = [{}] * len(each) if own is None else own
        if len(own) != len(each):
            raise ValueError(f"Expected options of each of {len(each)} fits; got {len(own)}.")
        total: Tensor | float = 0.0
        first: Scores | None = None
        for one, more in zip(each, own, strict=True):
            scores = self.method.attribute(same_data(fit, one), examples, **options, **more)
            if len(scores.train_ids) < len(fit.train):
                raise ValueError(
                    f"The method kept {len(scores.train_ids)} of {len(fit.train)} examples, each fit its own; an "
                    "ensemble needs the scores of all: leave out keep."
                )
            values = scores.values.double()
            total = total + (values if self.average == "value" else centered_ranks(values))
            first = first or scores
        assert first is not None
        facts = first.facts | {
            "method": f"Ensemble of {first.facts['method']}",
            "papers": [self.paper, *first.facts["papers"]],
            "unit": first.unit if self.average == "value" else "",
            "made_from": fit.made_from,
            "members": len(each),
            "average": self.average,
        }
        return Scores(
            values=(total / len(each)).float(),  # type: ignore[union-attr]
            query_ids=first.query_ids,
            train_ids=fit.train.ids,
            measurement=first.measurement,
            metadata=fit.train.metadata,
            facts=facts,
        )
