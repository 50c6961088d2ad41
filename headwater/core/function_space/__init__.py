"""Distances between what two networks compute, from what is kept of the first one's data."""

from headwater.core.function_space.base import Distance, squared_norm
from headwater.core.function_space.distance import (
    FunctionSpaceDistance,
    function_space_distance,
    load_distance,
)
from headwater.core.function_space.gates import GateError, GateRecorder
from headwater.core.function_space.reference import QuadraticDistance, StoredDistance, divergence
from headwater.core.function_space.statistics import (
    AnchorStatistics,
    GateStatistics,
    collect_statistics,
    statistics_of,
)

__all__ = [
    "AnchorStatistics",
    "Distance",
    "FunctionSpaceDistance",
    "GateError",
    "GateRecorder",
    "GateStatistics",
    "QuadraticDistance",
    "StoredDistance",
    "collect_statistics",
    "divergence",
    "function_space_distance",
    "load_distance",
    "squared_norm",
    "statistics_of",
]
