"""What every attribution method is: one method that turns a fit and queries into scores."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from headwater.core.fit import Fit
from headwater.core.scores import Scores


class Attributor(ABC):
    """Attributes queries to training examples."""

    paper: ClassVar[str]

    @abstractmethod
    def attribute(self, fit: Fit, queries: Any) -> Scores:
        """Return `Scores` of shape (query, train), in units of the measurement."""
