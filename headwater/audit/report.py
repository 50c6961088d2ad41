"""The whole audit: every section that a fit allows, in one table of findings."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headwater.audit.base import Findings, Passes, joined
from headwater.audit.mislabel import Mislabels
from headwater.audit.outliers import Outliers
from headwater.audit.subject import Subject
from headwater.core.capture import Progress
from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.training.trajectory import Trajectory

_TEXT = 2_000  # characters of an example that are kept
_SHOWN = 100  # examples whose texts are kept

# Each looks at the subject and gives findings; one more is one entry more.
SECTIONS: dict[str, Callable[[Subject], Findings]] = {
    "outliers": lambda subject: Outliers(neighbours=subject.n_neighbours).of(subject),
}


def audit(
    fit: Fit,
    *,
    labels: Mislabels | None = None,
    trajectories: Sequence[Trajectory] = (),
    probabilities: Float[Tensor, "train class"] | None = None,
    probabilities_cost: Passes | None = None,
    sections: Sequence[str] = tuple(SECTIONS),
    progress: Progress | None = None,
) -> Findings:
    """Everything an audit can say of a fit's training data.

    Args:
        fit: The fitted model.
        labels: How labels are ranked and marked; `Mislabels()` when left out.
        trajectories: Records of the training run with checkpoints; of several seeds, where there are.
        probabilities: Probabilities by models that were not trained on the example.
        probabilities_cost: What those cost.
        sections: Names of further sections.
        progress: Called with (done, total, note).

    Raises:
        ValueError: There is no such section.
    """
    labels = Mislabels() if labels is None else labels
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"There is no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}.")
    subject = Subject(
        fit,
        trajectories=trajectories,
        probabilities=probabilities,
        probabilities_cost=probabilities_cost,
        neighbours=labels.neighbours,
        progress=progress,
    )
    found = joined([labels.of(subject), *(SECTIONS[name](subject) for name in sections)])
    shown = dict.fromkeys(i for s in found.sections for i in s.shown[:_SHOWN])
    found.texts.update({i: text for i in shown if (text := read(fit.train, i)) is not None})
    found.facts["passes"] = str(found.passes)
    return found


def read(examples: Examples, index: int) -> str | None:
    """How an example reads, or None where it has no text."""
    tokens: Any = getattr(examples, "tokens", None)
    return None if tokens is None else "".join(tokens(index))[:_TEXT]
