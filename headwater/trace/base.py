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


def direction(fit: Fit, measurement: Measurement | None) -> float:
    """What a like example is taken to do to a measurement: -1 for the loss, which it lowers, else 1."""
    return -1.0 if measurement_name(asked(fit, measurement)) == "loss" else 1.0


def members(fit: Fit, fits: Sequence[Fit] | None) -> Sequence[Fit]:
    """The fits of several checkpoints or seeds, or the one fit.

    Raises:
        ValueError: There is none.
    """
    if fits is None:
        return [fit]
    if not len(fits):
        raise ValueError("Expected one fit or more in `fits`; got none.")
    return fits


def same_data(fit: Fit, other: Fit) -> Fit:
    """The other fit, if it is one of the same training examples.

    Raises:
        ValueError: It has other examples.
    """
    if other.train.ids != fit.train.ids:
        raise ValueError(
            f"All fits must have the same training examples; one has {len(other.train)}, of other ids than the "
            f"{len(fit.train)} of the first."
        )
    return other


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
