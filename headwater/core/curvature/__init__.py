"""Curvature of the training loss, in several forms behind one operation."""

from typing import Any

from torch import Tensor

from headwater.core.curvature.base import (
    Curvature,
    CurvatureMethod,
    FitContext,
    Preconditioned,
    SpectralFunction,
)
from headwater.core.curvature.dense import Dense, DenseCurvature
from headwater.core.curvature.dual import Dual, DualCurvature
from headwater.core.curvature.layerwise import EKFAC, KFAC, Diagonal, Identity, Layerwise

METHODS: dict[str, type[CurvatureMethod]] = {
    m.kind: m for m in (Identity, Diagonal, KFAC, EKFAC, Dual, Dense)
}
FITTED: dict[str, type[Curvature]] = {c.kind: c for c in (Layerwise, DualCurvature, DenseCurvature)}


def restore(kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Curvature:
    """A saved curvature of a kind."""
    if kind not in FITTED:
        raise ValueError(
            f"Expected a curvature among {', '.join(FITTED)}; the artifact says {kind!r}."
        )
    return FITTED[kind].from_tensors(tensors, facts)


__all__ = [
    "EKFAC",
    "FITTED",
    "KFAC",
    "METHODS",
    "Curvature",
    "CurvatureMethod",
    "Dense",
    "DenseCurvature",
    "Diagonal",
    "Dual",
    "DualCurvature",
    "FitContext",
    "Identity",
    "Layerwise",
    "Preconditioned",
    "SpectralFunction",
    "restore",
]
