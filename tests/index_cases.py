"""Indexes of tiny models."""

from headwater.core.curvature import EKFAC, KFAC, Diagonal, Identity
from headwater.core.index import GradientIndex, LoGra, Whitened
from tests.curvature_cases import case, shared

EVERYTHING = Whitened(rank=None, damping=0.01)
LAYERWISE = (EKFAC(), KFAC(), Diagonal())


def built(folder, name="mlp", curvature=None, **options):
    """A fit and an index of its training data."""
    fitted = shared(name).fitted(curvature or EKFAC())
    options = {"kind": EVERYTHING, "dtype": "float32"} | options
    return fitted, GradientIndex.build(fitted, folder, **options)


__all__ = ["EVERYTHING", "LAYERWISE", "Identity", "LoGra", "Whitened", "built", "case", "shared"]
