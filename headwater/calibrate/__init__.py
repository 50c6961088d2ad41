"""Calibrate: say how sure a model is, so that it can be taken at its word.

A calibrator takes a fit and validation data and returns a predictor, whose probabilities hold up also where inputs are
unlike the training data. `complexity` tells what each example would cost the model to learn: it ranks wrong labels and
inputs out of distribution as well.
"""

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.calibrate.boltzmann import Complexity, complexity
from headwater.calibrate.ifcomp import IFComp, IFCompPredictor
from headwater.calibrate.laplace import LaplacePredictor, LastLayerLaplace
from headwater.calibrate.pnml import LastLayerPNML, LastLayerPNMLPredictor, genie_probabilities
from headwater.calibrate.temperature import ScaledPredictor, TemperatureScaling

__all__ = [
    "Calibrator",
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
    "TemperatureScaling",
    "complexity",
    "genie_probabilities",
]
