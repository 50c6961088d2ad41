"""Adapt: change a model for other uses without losing what it can do.

`Continual` trains on one task after the other and holds the outputs on those before; `Regularizer` is its penalty, for
a training loop of your own. `drift` tells how far later checkpoints have moved, without the data.
"""

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

__all__ = [
    "Continual",
    "ContinualRun",
    "Drift",
    "Episode",
    "OneHead",
    "Regularizer",
    "Replay",
    "accuracy_of",
    "drift",
]
