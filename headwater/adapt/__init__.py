"""Adapt: change a model for other uses without losing what it can do.

`QuIP` rounds the weights of linear layers to a few bits, with the activation covariances of the fit or of calibration
examples; what it returns, `Quantized`, holds a model that runs, is saved, and is followed like any other. `Continual`
trains on one task after the other and holds the outputs on those before; `Regularizer` is its penalty, for a training
loop of your own. `drift` tells how far later checkpoints have moved, without the data.
"""

from headwater.adapt.base import Quantized, Quantizer
from headwater.adapt.continual import (
    Continual,
    ContinualRun,
    Episode,
    OneHead,
    Regularizer,
    Replay,
    accuracy_of,
)
from headwater.adapt.drift import Drift, drift
from headwater.adapt.quip import QuIP, Rounded, round_weight

__all__ = [
    "Continual",
    "ContinualRun",
    "Drift",
    "Episode",
    "OneHead",
    "QuIP",
    "Quantized",
    "Quantizer",
    "Regularizer",
    "Replay",
    "Rounded",
    "accuracy_of",
    "drift",
    "round_weight",
]
