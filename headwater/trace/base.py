"""What every attribution method is: one method that turns a fit and queries into scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.core.task import Measurement, measurement_name


class Attributor(ABC):
    """Attributes queries to training examples.

    Attributes:
        paper: The paper of the method, as "arXiv:…" or "doi:…"; empty where there is none.
    """

    paper: ClassVar[str]

    @abstractmethod
    def attribute(self, fit: Fit, queries: Any) -> Scores:
        """Return `Scores` of shape (query, train), in units of the measurement."""


def asked(fit: Fit, measurement: Measurement | None) -> Measurement:
    """The measurement that is asked about: the given one, or the task's own."""
    return fit.task.measurement_of if measurement is None else measurement


def to_scores(
    method: Attributor,
    fit: Fit,
    queries: Examples,
    values: Float[Tensor, "asked train"],
    *,
    measurement: Measurement | None = None,
    weights: Float[Tensor, "asked query"] | None = None,
    names: Sequence[str] | None = None,
    unit: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Scores:
    """Values with their names and with what made them.

    Args:
        method: The method.
        fit: The fit.
        queries: The queries.
        values: One row for each query, or for each group of them.
        measurement: What was asked.
        weights: The groups.
        names: Their names.
        unit: Unit of the values; empty where only their order counts.
        facts: More to record.
    """
    every: dict[str, Any] = {
        "method": type(method).__name__,
        "papers": [method.paper] if method.paper else [],
        "unit": unit,
        "n_train": len(fit.train),
        "made_from": fit.made_from,
        "options": asdict(method) if is_dataclass(method) else {},
    }
    return Scores(
        values=values.float(),
        query_ids=queries.ids if weights is None else list(names or map(str, range(len(values)))),
        train_ids=fit.train.ids,
        measurement=measurement_name(asked(fit, measurement)),
        metadata=fit.train.metadata,
        facts=every | dict(facts or {}),
    )
