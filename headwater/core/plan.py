"""A dry run: what a fit and a trace will take, before they are spent."""

import torch

from headwater.core.capture import Capture
from headwater.core.examples import Examples, to_device
from headwater.core.prediction import Categorical, Gaussian


def dual_rows(capture: Capture, examples: Examples, *, cut: float, probe: int = 64) -> int | None:
    """Rows that the dual curvature would need, from a few examples; None where positions make it unsuitable.

    With several positions an example the true rank is far above the number of examples, and few sampled rows lose to
    the Kronecker form; so the dual form is for predictions at one position.
    """
    n = min(probe, len(examples))
    chosen = torch.linspace(0, len(examples) - 1, n).long().tolist()
    with torch.no_grad():
        try:
            prediction = capture.task.predict(
                capture.model, to_device(examples.batch(chosen), capture.device)
            )
        except ValueError:  # a task that only knows its loss
            return None
    if not isinstance(prediction, Categorical | Gaussian) or prediction.mask.shape[1] > 1:
        return None
    return round(len(prediction.rows(cut).example) / n * len(examples))
