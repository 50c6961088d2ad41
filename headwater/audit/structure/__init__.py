"""What a model's layers really use: directions that do nothing, the interaction basis, and modules."""

from headwater.audit.structure.ablation import Ablation, Curve, ablate
from headwater.audit.structure.basis import InteractionBasis, NodeLayer, interaction_basis
from headwater.audit.structure.degeneracy import (
    Degeneracy,
    LayerDegeneracy,
    SyncBlocks,
    degeneracy,
    sync_blocks,
)
from headwater.audit.structure.graph import InteractionGraph, interaction_graph
from headwater.audit.structure.learning_coefficient import LearningCoefficient, learning_coefficient

__all__ = [
    "Ablation",
    "Curve",
    "Degeneracy",
    "InteractionBasis",
    "InteractionGraph",
    "LayerDegeneracy",
    "LearningCoefficient",
    "NodeLayer",
    "SyncBlocks",
    "ablate",
    "degeneracy",
    "interaction_basis",
    "interaction_graph",
    "learning_coefficient",
    "sync_blocks",
]
