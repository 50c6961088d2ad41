"""Curate: decide what to train on, and how, by gradients through training.

An estimator (`HyperGradient`) says how an outer loss after training depends on what training was given: weights of the
data's sources, a learning rate, the data itself. `DataWeights`, `LearningRate` and `Distillation` learn these.
"""

from headwater.curate.base import (
    HyperGradient,
    Info,
    InnerProblem,
    Learned,
    descend,
    functional_model,
    gradient_step,
    minibatch,
)
from headwater.curate.bilevel import Implicit, Unrolled, implicit_gradient
from headwater.curate.data_weights import DataWeights, source_weights, weighting_problem
from headwater.curate.distillation import Distillation, distillation_problem
from headwater.curate.evolution import PES, ESSingle, FullES, TruncatedES
from headwater.curate.learning_rate import LearningRate, inverse_time_rate, schedule_problem

__all__ = [
    "PES",
    "DataWeights",
    "Distillation",
    "ESSingle",
    "FullES",
    "HyperGradient",
    "Implicit",
    "Info",
    "InnerProblem",
    "Learned",
    "LearningRate",
    "TruncatedES",
    "Unrolled",
    "descend",
    "distillation_problem",
    "functional_model",
    "gradient_step",
    "implicit_gradient",
    "inverse_time_rate",
    "minibatch",
    "schedule_problem",
    "source_weights",
    "weighting_problem",
]
