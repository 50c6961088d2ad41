"""Which inputs are unlike all others: the distance to the nearest examples in the model's last representation.

Kuan and Mueller (2022), "Back to the Basics: Revisiting Out-of-Distribution Detection Baselines", arXiv:2207.03061,
find that this humble distance holds its own.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.audit.base import Auditor, Findings, Section
from headwater.audit.subject import Subject
from headwater.core.fit import Fit
from headwater.numerics.ranks import average_ranks


def outside(values: Float[Tensor, " n"], fence: float = 1.5) -> Bool[Tensor, " n"]:
    """Which values lie above Tukey's fence: the upper quartile plus `fence` times the distance of the quartiles.

    Example:
        >>> outside(torch.tensor([1.0, 2.0, 3.0, 4.0, 40.0])).tolist()
        [False, False, False, False, True]
    """
    low, high = values.double().quantile(torch.tensor([0.25, 0.75]).double())
    return values > high + fence * (high - low)


@dataclass(frozen=True, kw_only=True)
class Outliers(Auditor):
    """Rank training examples by how far their nearest neighbours are.

    `ood_score` is the share of the examples that are further out, so low is far out; `is_outlier_issue` marks those
    whose log distance, one minus the mean cosine, lies above Tukey's fence.

    Args:
        neighbours: Nearest neighbours that are looked at.
        fence: Distances of the quartiles that an example may lie above the upper one.
    """

    neighbours: int = 10
    fence: float = 1.5

    def audit(self, fit: Fit) -> Findings:
        """Findings with the columns `ood_score` and `is_outlier_issue`."""
        return self.of(Subject(fit, neighbours=self.neighbours))

    def of(self, subject: Subject) -> Findings:
        """The findings about a subject."""
        started = time.perf_counter()
        distance = (1 - subject.neighbours[1].mean(1)).clamp(min=1e-12)
        far = outside(distance.log(), self.fence)
        score = 1 - (average_ranks(distance) - 0.5) / len(distance)
        section = Section(
            name="outliers",
            title="Inputs unlike the others",
            sentences=(
                f"{int(far.sum()):,} of {len(subject):,} inputs lie far from their {subject.n_neighbours} nearest "
                "others in the model's last representation.",
            ),
            columns=("ood_score", "is_outlier_issue"),
            shown=tuple(score.argsort(stable=True)[:50].tolist()),
            passes=subject.newly_paid(),
            seconds=time.perf_counter() - started,
            papers=("arXiv:2207.03061",),
        )
        return Findings(
            ids=subject.fit.train.ids,
            columns={"ood_score": score, "is_outlier_issue": far},
            sections=(section,),
            metadata=subject.fit.train.metadata,
        )
