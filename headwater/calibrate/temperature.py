r"""Temperature scaling: one number that divides all logits, the humble baseline of calibration.

Guo, Pleiss, Sun and Weinberger (2017), "On Calibration of Modern Neural Networks", arXiv:1706.04599.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.core.capture import Progress
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.forward import class_logits

LOWEST, HIGHEST = 0.05, 20.0


def best_temperature(
    logits: Float[Tensor, "n class"],
    labels: Int[Tensor, " n"],
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> float:
    r"""The temperature of the least mean log loss, between two limits.

    In $\beta = 1 / T$ the loss is convex, with slope $\mathbb E_p[z] - z_y$; the zero is found by bisection. Where all
    labels are the most probable ones there is none, and the lower limit is returned.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)  # right three times of four: odds of 3 to 1
        >>> round(2 / best_temperature(logits, torch.tensor([0, 0, 0, 1])), 4) == round(math.log(3), 4)
        True
    """
    z = logits.double()
    own = z.gather(1, labels[:, None]).squeeze(1)
    low, high = math.log(lowest), math.log(highest)
    for _ in range(60):
        middle = (low + high) / 2
        slope = float((((z / math.exp(middle)).softmax(1) * z).sum(1) - own).mean())
        low, high = (low, middle) if slope < 0 else (middle, high)  # a larger β is a lower T
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class ScaledPredictor(Predictor):
    """A classifier whose logits are divided by a temperature.

    Attributes:
        fit: A fit of the classifier.
        temperature: T; 1 leaves the classifier as it is.
    """

    fit: Fit
    temperature: float = 1.0

    def predict(self, examples: Any, *, progress: Progress | None = None) -> Predictions:
        data = as_examples(examples)
        fit = self.fit
        logits, labels = class_logits(fit.model, fit.task, data, batches=fit.batches(data))
        return Predictions(
            probabilities=(logits / self.temperature).softmax(1),
            labels=labels,
            ids=data.ids,
            facts={"papers": [TemperatureScaling.paper], "temperature": self.temperature},
        )


@dataclass(frozen=True, kw_only=True)
class TemperatureScaling(Calibrator):
    """Divide the logits by the temperature of the least log loss on validation data.

    Args:
        lowest: Least temperature.
        highest: Greatest temperature.
    """

    paper: ClassVar[str] = "arXiv:1706.04599"

    lowest: float = LOWEST
    highest: float = HIGHEST

    def calibrate(
        self, fit: Fit, validation: Any, *, progress: Progress | None = None
    ) -> ScaledPredictor:
        data = as_examples(validation)
        logits, labels = class_logits(fit.model, fit.task, data, batches=fit.batches(data))
        found = best_temperature(logits, labels, lowest=self.lowest, highest=self.highest)
        return ScaledPredictor(fit, found)
