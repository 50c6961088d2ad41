"""Trace: attribute what a model does to the training examples that taught it.

A method takes a fit and queries and returns scores (query, train), positive where the example raises the measurement.
"""

from headwater.trace.base import Attributor
from headwater.trace.bm25 import BM25
from headwater.trace.ensemble import Ensemble
from headwater.trace.gradient import GradientCosine, GradientDot
from headwater.trace.influence import Influence, refine
from headwater.trace.random import Random
from headwater.trace.similarity import EmbeddingSimilarity, RepresentationSimilarity
from headwater.trace.tracin import TracIn

__all__ = [
    "BM25",
    "Attributor",
    "EmbeddingSimilarity",
    "Ensemble",
    "GradientCosine",
    "GradientDot",
    "Influence",
    "Random",
    "RepresentationSimilarity",
    "TracIn",
    "refine",
]
