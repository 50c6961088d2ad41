"""Trace: attribute what a model does to the training examples that taught it.

A method takes a fit and queries and returns scores (query, train), positive where the example raises the measurement.
"""

from headwater.trace.base import Attributor
from headwater.trace.gradient import GradientCosine, GradientDot
from headwater.trace.influence import Influence, refine
from headwater.trace.unrolling import Unrolling

__all__ = ["Attributor", "GradientCosine", "GradientDot", "Influence", "Unrolling", "refine"]
