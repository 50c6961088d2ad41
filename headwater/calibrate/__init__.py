"""Calibrate: say how sure one may be, so that a model or a ranking can be taken at its word.

A calibrator takes a fit and validation data and returns a predictor, whose probabilities hold up also where inputs are
unlike the training data. `complexity` tells what each example would cost the model to learn: it ranks wrong labels and
inputs out of distribution as well.

Batch predictive inference bounds what many unseen outcomes have in common (`quantile_bound`, `coverage_bound`,
`mean_bound` and others) without a model of the data, and puts error control on claims: `select` says which examples are
wrong and how many of those claims may be false.
"""

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.calibrate.batch_predictive import (
    BatchBound,
    accept_shifted,
    composed_bound,
    coverage_bound,
    mean_bound,
    order_at,
    quantile_bound,
    quantiles_bound,
    split_conformal_coverage,
)
from headwater.calibrate.claims import ClaimCurve, Selection, claim_curve, draw_sample, select
from headwater.calibrate.ifcomp import Complexity, IFComp, IFCompPredictor, complexity
from headwater.calibrate.laplace import LaplacePredictor, LastLayerLaplace
from headwater.calibrate.pnml import LastLayerPNML, LastLayerPNMLPredictor, genie_probabilities
from headwater.calibrate.temperature import ScaledPredictor, TemperatureScaling

__all__ = [
    "BatchBound",
    "Calibrator",
    "ClaimCurve",
    "Complexity",
    "IFComp",
    "IFCompPredictor",
    "LaplacePredictor",
    "LastLayerLaplace",
    "LastLayerPNML",
    "LastLayerPNMLPredictor",
    "Predictions",
    "Predictor",
    "ScaledPredictor",
    "Selection",
    "TemperatureScaling",
    "accept_shifted",
    "claim_curve",
    "complexity",
    "composed_bound",
    "coverage_bound",
    "draw_sample",
    "genie_probabilities",
    "mean_bound",
    "order_at",
    "quantile_bound",
    "quantiles_bound",
    "select",
    "split_conformal_coverage",
]
