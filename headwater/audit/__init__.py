"""Audit: what is wrong with data or a model, each finding with its evidence.

Memorization: which passages a model recites, which wrong labels it has kept, and along which directions of its weights
it is more active on what it has learnt by heart.
"""

from headwater.audit.memorization import (
    LabelMemory,
    Recitation,
    Spectrum,
    label_memory,
    perplexity,
    recitation,
    recited_examples,
    spectrum,
)

__all__ = [
    "LabelMemory",
    "Recitation",
    "Spectrum",
    "label_memory",
    "perplexity",
    "recitation",
    "recited_examples",
    "spectrum",
]
