"""Which curvature suits a model and its data: the exact dual form wherever its rows fit."""

import torch

from headwater.core.capture import Capture, evaluation_mode
from headwater.core.curvature import EKFAC, METHODS, CurvatureMethod, Dual
from headwater.core.examples import Examples, to_device
from headwater.core.prediction import Categorical, Gaussian


def choose_curvature(
    curvature: CurvatureMethod | str, capture: Capture, examples: Examples
) -> CurvatureMethod:
    """The curvature asked for; for "auto", the dual form where its rows fit."""
    if isinstance(curvature, CurvatureMethod):
        return curvature
    if curvature != "auto":
        if curvature not in METHODS:
            raise ValueError(
                f"Expected a curvature among {', '.join(METHODS)} or 'auto'; got {curvature!r}."
            )
        return METHODS[curvature]()
    method = Dual()
    rows = dual_rows(capture, examples, cut=method.cut)
    return method if rows is not None and rows <= method.max_rows else EKFAC()


def dual_rows(capture: Capture, examples: Examples, *, cut: float, probe: int = 64) -> int | None:
    """Rows that the dual curvature would need, from a few examples; None where positions make it unsuitable.

    With several positions an example the true rank is far above the number of examples, and few sampled rows lose to
    the Kronecker form; so the dual form is for predictions at one position.
    """
    n = min(probe, len(examples))
    chosen = torch.linspace(0, len(examples) - 1, n).long().tolist()
    with evaluation_mode(capture.model), torch.no_grad():
        try:
            prediction = capture.task.predict(
                capture.model, to_device(examples.batch(chosen), capture.device)
            )
        except ValueError:  # a task that only knows its loss
            return None
    if not isinstance(prediction, Categorical | Gaussian) or prediction.mask.shape[1] > 1:
        return None
    return round(len(prediction.rows(cut).example) / n * len(examples))
