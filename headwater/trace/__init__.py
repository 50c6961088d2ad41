"""Trace: attribute what a model does to the training examples that taught it.

A method takes a fit and queries and returns scores (query, train), positive where the example raises the measurement.
"""

from headwater.trace.arnoldi import Arnoldi
from headwater.trace.base import Attributor
from headwater.trace.bm25 import BM25
from headwater.trace.cascade import Cascade
from headwater.trace.datainf import DataInf
from headwater.trace.ensemble import Ensemble
from headwater.trace.explicit import Explicit
from headwater.trace.gradient import GradientCosine, GradientDot
from headwater.trace.indexed import Indexed
from headwater.trace.influence import Influence, refine
from headwater.trace.less import LESS
from headwater.trace.lissa import LiSSA
from headwater.trace.newton import Newton
from headwater.trace.proximal import Proximal
from headwater.trace.random import Random
from headwater.trace.similarity import EmbeddingSimilarity, RepresentationSimilarity
from headwater.trace.source import Source
from headwater.trace.timeline import Timeline
from headwater.trace.tracin import TracIn
from headwater.trace.trackstar import TrackStar
from headwater.trace.trak import TRAK
from headwater.trace.unrolling import Unrolling

__all__ = [
    "BM25",
    "LESS",
    "TRAK",
    "Arnoldi",
    "Attributor",
    "Cascade",
    "DataInf",
    "EmbeddingSimilarity",
    "Ensemble",
    "Explicit",
    "GradientCosine",
    "GradientDot",
    "Indexed",
    "Influence",
    "LiSSA",
    "Newton",
    "Proximal",
    "Random",
    "RepresentationSimilarity",
    "Source",
    "Timeline",
    "TracIn",
    "TrackStar",
    "Unrolling",
    "refine",
]
