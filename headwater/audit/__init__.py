"""Audit: what is wrong with the training data, read off the fit that attribution uses.

`Mislabels` ranks examples by how doubtful their labels are. What it finds is a table whose columns users of cleanlab
recognise, with the cost of each part in passes beyond the fit, and a change set that
`headwater.training.verify.verify` takes.
"""

from headwater.audit.base import Auditor, Findings, Passes, Section, Table
from headwater.audit.confident import confidently_other, label_quality, out_of_fold
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
from headwater.audit.subject import Outlook, Subject, outlook

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
    "Margin",
    "Measure",
    "Mislabels",
    "NeighbourDisagreement",
    "Outlook",
    "Passes",
    "Perplexity",
    "Section",
    "SelfInfluence",
    "Subject",
    "Table",
    "Variability",
    "combined_suspicion",
    "confidently_other",
    "label_quality",
    "measure_all",
    "out_of_fold",
    "outlook",
]
