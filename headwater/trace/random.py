"""Random scores: the control that every other method must beat, and the zero of every benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.numerics import noise
from headwater.trace.base import Attributor, to_scores


@dataclass(frozen=True, kw_only=True)
class Random(Attributor):
    """Standard normal scores, tied to the ids of query and example.

    Args:
        seed: Seed.
    """

    paper: ClassVar[str] = ""

    seed: int = 0

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
        """Scores of every training example; the model is not run.

        Args:
            fit: The fit whose examples are scored.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: Recorded only.
            weights: Linear combinations of queries (group, query).
            names: Names of those groups.
            progress: Not called.
        """
        examples = as_examples(queries)
        shape = (len(examples), len(fit.train))
        values = noise.normal(
            examples.keys[:, None].expand(shape), fit.train.keys.expand(shape), self.seed
        )
        if weights is not None:
            values = weights.to(values) @ values
        options = {"measurement": measurement, "weights": weights, "names": names}
        return to_scores(self, fit, examples, values, **options)
