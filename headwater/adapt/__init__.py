"""Adapt: make a model smaller or cheaper, so that it can still be traced.

`QuIP` rounds the weights of linear layers to a few bits, with the activation covariances of the fit or of calibration
examples. What it returns, `Quantized`, holds a model that runs, is saved, and is followed like any other.
"""

from headwater.adapt.base import Quantized, Quantizer
from headwater.adapt.quip import QuIP, Rounded, round_weight

__all__ = ["QuIP", "Quantized", "Quantizer", "Rounded", "round_weight"]
