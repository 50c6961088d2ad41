"""Audit: what is wrong with the training data, read off the fit that attribution uses.

`Mislabels` ranks examples by how doubtful their labels are. What it finds is a table whose columns users of cleanlab
recognise, with the cost of each part in passes beyond the fit, and a change set that
`headwater.training.verify.verify` takes.

Audit: what is wrong with data or a model, each finding with its evidence.

Memorization: which passages a model recites, which wrong labels it has kept, and along which directions of its weights
it is more active on what it has learnt by heart.

Audit: what is wrong with the data or the model, each finding with its evidence.
"""

from headwater.audit.base import (
    Auditor,
    Findings,
    Passes,
    Section,
    Table,
)
from headwater.audit.confident import (
    confidently_other,
    label_quality,
    out_of_fold,
)
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
from headwater.audit.mislabel import (
    AUM,
    EL2N,
    MEASURES,
    Confidence,
    ConfidentLearning,
    ExampleLoss,
    Forgetting,
    GraNd,
    IFComplexity,
    Margin,
    Measure,
    Mislabels,
    NeighbourDisagreement,
    Perplexity,
    SelfInfluence,
    Variability,
    combined_suspicion,
    measure_all,
)
from headwater.audit.subject import (
    Outlook,
    Subject,
    outlook,
)

__all__ = [
    "AUM",
    "EL2N",
    "MEASURES",
    "Auditor",
    "Confidence",
    "ConfidentLearning",
    "ExampleLoss",
    "Findings",
    "Forgetting",
    "GraNd",
    "IFComplexity",
    "LabelMemory",
    "Margin",
    "Measure",
    "Mislabels",
    "NeighbourDisagreement",
    "Outlook",
    "Passes",
    "Perplexity",
    "Recitation",
    "Section",
    "SelfInfluence",
    "Spectrum",
    "Subject",
    "Table",
    "Variability",
    "combined_suspicion",
    "confidently_other",
    "label_memory",
    "label_quality",
    "measure_all",
    "out_of_fold",
    "outlook",
    "perplexity",
    "recitation",
    "recited_examples",
    "spectrum",
]
