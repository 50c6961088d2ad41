"""What every calibrator offers: fitted on data it was not trained on, it gives probabilities that hold."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float, Int64
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.fit import Fit
from headwater.numerics.calibration import (
    Reliability,
    brier_scores,
    expected_calibration_error,
    log_losses,
    reliability,
)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Predictions:
    """Probabilities of the classes for some examples.

    Attributes:
        probabilities: They sum to one.
        labels: The labels that came with the examples; measures need them to be true.
        ids: Names of the examples.
        facts: What made them.
    """

    probabilities: Float[Tensor, "n class"]
    labels: Int64[Tensor, " n"]
    ids: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def predicted(self) -> Int64[Tensor, " n"]:
        """The most probable class."""
        return self.probabilities.argmax(-1)

    @property
    def confidence(self) -> Float[Tensor, " n"]:
        """Its probability."""
        return self.probabilities.amax(-1)

    def reliability(self, *, n_bins: int = 20) -> Reliability:
        """Confidence beside accuracy, in bins of equal mass."""
        return reliability(self.confidence, self.predicted == self.labels, n_bins=n_bins)

    def measures(self, *, n_bins: int = 20) -> dict[str, float]:
        """Accuracy, expected calibration error (equal mass), mean log loss in nats, and mean Brier score."""
        p, y = self.probabilities, self.labels
        return {
            "accuracy": float((self.predicted == y).double().mean()),
            "ece": expected_calibration_error(p, y, n_bins=n_bins),
            "nll": float(log_losses(p, y).mean()),
            "brier": float(brier_scores(p, y).mean()),
        }

    def table(self) -> dict[str, list]:
        """One row an example: its id, the given and the predicted label, and the confidence in the latter."""
        return {
            "id": list(self.ids),
            "given_label": self.labels.tolist(),
            "predicted_label": self.predicted.tolist(),
            "confidence": self.confidence.tolist(),
        }

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.3f}" for name, value in self.measures().items())
        return f"Predictions({len(self):,} examples of {self.probabilities.shape[1]} classes; by their labels {told})"


class Predictor(ABC):
    """A calibrated model."""

    @abstractmethod
    def predict(self, examples: Any, *, progress: Progress | None = None) -> Predictions:
        """Probabilities for examples, a tuple of tensors, or a dataset; labels may be any where there are none."""


class Calibrator(ABC):
    """A method; its fields are the hyperparameters."""

    paper: ClassVar[str]

    @abstractmethod
    def calibrate(
        self, fit: Fit, validation: Any, *, progress: Progress | None = None
    ) -> Predictor:
        """A calibrated model.

        Args:
            fit: A fit of the classifier.
            validation: Labelled examples like those to come, that were not trained on.
            progress: Called with (done, total, note).
        """
