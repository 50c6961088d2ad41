"""Checks on a few examples that prove the numbers right before anything long runs.

`examine` makes them all and returns a `Diagnosis`; `check_loss` and `check_classes` are the short
form that every fit begins with.
"""

from headwater.core.doctor.diagnosis import Check, Diagnosis, LayerCheck
from headwater.core.doctor.exam import check_classes, check_loss
from headwater.core.doctor.examination import examine

__all__ = ["Check", "Diagnosis", "LayerCheck", "check_classes", "check_loss", "examine"]
