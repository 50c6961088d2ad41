"""How each attribution method is run where it needs more than a fit and queries."""

from typing import Any

from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.trace.base import Attributor


def run(method: Attributor, fit: Fit, queries: Examples, **options: Any) -> Scores:
    """Scores of a method, given what it cannot do without."""
    return method.attribute(fit, queries, **options)  # type: ignore[call-arg]
