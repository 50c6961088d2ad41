"""Audit: what is wrong with the data or the model, each finding with its evidence and what it cost.

`audit` reads the fit that attribution uses and gives a table whose columns users of cleanlab recognise: `Mislabels`
ranks examples by how doubtful their labels are, `Outliers` inputs by how unlike the others they are, and
`Overconfidence` holds the model's confidence against held-out data. A random sample that a person verified puts error
control on the ranking (`controlled`), and what is found becomes a change set that `headwater.training.verify.verify`
takes.

Memorization: which passages a model recites, which wrong labels it has kept, and along which directions of its weights
it is more active on what it has learnt by heart. Structure: which directions of the weights do nothing.
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
from headwater.audit.control import Verified, controlled, write_sheet
from headwater.audit.curvature_spectrum import Spectrum, spectrum
from headwater.audit.memorization import (
    LabelMemory,
    Recitation,
    label_memory,
    owed_to_itself,
    perplexity,
    ranking_kept,
    recitation,
    recited_examples,
)
from headwater.audit.mislabel import (
    AUM,
    EL2N,
    IFD,
    MEASURES,
    Confidence,
    ConfidentLearning,
    ExampleLoss,
    Forgetting,
    FunctionSpace,
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
from headwater.audit.outliers import Outliers, outside
from headwater.audit.overconfidence import Overconfidence, Sureness, sureness_of
from headwater.audit.report import SECTIONS, audit
from headwater.audit.subject import (
    Outlook,
    Subject,
    outlook,
)
from headwater.audit.survey import Survey

__all__ = [
    "AUM",
    "EL2N",
    "IFD",
    "MEASURES",
    "SECTIONS",
    "Auditor",
    "Confidence",
    "ConfidentLearning",
    "ExampleLoss",
    "Findings",
    "Forgetting",
    "FunctionSpace",
    "GraNd",
    "IFComplexity",
    "LabelMemory",
    "Margin",
    "Measure",
    "Mislabels",
    "NeighbourDisagreement",
    "Outliers",
    "Outlook",
    "Overconfidence",
    "Passes",
    "Perplexity",
    "Recitation",
    "Section",
    "SelfInfluence",
    "Spectrum",
    "Subject",
    "Sureness",
    "Survey",
    "Table",
    "Variability",
    "Verified",
    "audit",
    "combined_suspicion",
    "confidently_other",
    "controlled",
    "label_memory",
    "label_quality",
    "measure_all",
    "out_of_fold",
    "outlook",
    "outside",
    "owed_to_itself",
    "perplexity",
    "ranking_kept",
    "recitation",
    "recited_examples",
    "spectrum",
    "sureness_of",
    "write_sheet",
]
