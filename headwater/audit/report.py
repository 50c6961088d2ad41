"""The whole audit: every section that a fit allows, in one table of findings."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headwater.audit.base import Findings, Passes, Section, Table, joined
from headwater.audit.memorization import recited_examples
from headwater.audit.mislabel import Mislabels
from headwater.audit.outliers import Outliers
from headwater.audit.pictures import pictures
from headwater.audit.structure import degeneracy
from headwater.audit.subject import Subject
from headwater.core.capture import Progress
from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.training.trajectory import Trajectory

_TEXT = 2_000  # characters of an example that are kept
_SHOWN = 100  # examples of a section whose texts are kept
_PICTURED = 50  # and whose pictures

_CANDIDATES = 50  # texts that are tried for recitation


def outliers(subject: Subject) -> Findings:
    """Inputs unlike the others."""
    return Outliers(neighbours=subject.n_neighbours).of(subject)


def memorization(subject: Subject, *, prefix: int = 32, suffix: int = 32) -> Findings | None:
    """Which of the texts that surprise the model least it recites; None where examples are no texts.

    Args:
        subject: The fit under audit.
        prefix: Tokens of a text that the model is given.
        suffix: Tokens that it is to say.
    """
    train, n = subject.fit.train, len(subject)
    if train.lengths is None or not subject.categorical or subject.classes:
        return None
    started = time.perf_counter()
    long = [i for i, length in enumerate(train.lengths) if length >= prefix + suffix]
    order = subject.final.loss[long].argsort(stable=True).tolist()[:_CANDIDATES]
    tried = [long[i] for i in order]
    told: list[float | None] = [None] * n
    sentence = f"No text has {prefix + suffix} tokens, so that none was tried for recitation."
    shown: list[int] = []
    if tried:
        found = recited_examples(
            subject.fit.model, train.subset(tried), prefix=prefix, suffix=suffix
        )
        distances = found.distances.tolist()
        for i, distance in zip(tried, distances, strict=True):
            told[i] = distance
        shown = [i for _, i in sorted(zip(distances, tried, strict=True))]
        sentence = (
            f"Given its first {prefix} tokens, the model says the next {suffix} to the last token for "
            f"{int(found.is_strict.sum())} of the {len(tried)} texts that surprise it least, and all but a quarter of "
            f"them for {int(found.is_loose.sum())}."
        )
    section = Section(
        name="memorization",
        title="Learnt by heart",
        sentences=(
            sentence,
            "recitation_distance is Levenshtein's distance in tokens over the length: 0 is recited.",
        ),
        columns=("recitation_distance",),
        shown=tuple(shown),
        passes=subject.newly_paid(),
        seconds=time.perf_counter() - started,
        papers=("arXiv:2510.24256",),
    )
    columns: dict[str, Tensor | list] = {"recitation_distance": told}
    return Findings(ids=train.ids, columns=columns, sections=(section,), metadata=train.metadata)


def structure(subject: Subject) -> Findings:
    """How many directions of the weights do nothing."""
    started = time.perf_counter()
    found = degeneracy(subject.fit, progress=subject.progress)
    share = found.free / max(found.n_parameters, 1)
    kept = ("layer", "d_in", "rank_A", "d_out", "rank_G", "free")
    rows = found.table()
    section = Section(
        name="structure",
        title="Directions of the weights that do nothing",
        sentences=(
            f"At least {found.free:,} of {found.n_parameters:,} directions ({100 * share:.1f} %) change no output.",
        ),
        tables=(
            Table(title="Layers", columns={name: rows[name] for name in kept if name in rows}),
        ),
        passes=subject.newly_paid() + Passes(backward=math.ceil(found.passes)),
        seconds=time.perf_counter() - started,
    )
    return Findings(
        ids=subject.fit.train.ids,
        columns={},
        sections=(section,),
        metadata=subject.fit.train.metadata,
    )


# Each looks at the subject and gives findings, or None where it has nothing to look at; one more is one entry more.
SECTIONS: dict[str, Callable[[Subject], Findings | None]] = {
    "outliers": outliers,
    "memorization": memorization,
    "structure": structure,
}
CHEAP = ("outliers", "memorization")  # what is looked at unless more is asked for


def audit(
    fit: Fit,
    *,
    labels: Mislabels | None = None,
    trajectories: Sequence[Trajectory] = (),
    probabilities: Float[Tensor, "train class"] | None = None,
    probabilities_cost: Passes | None = None,
    sections: Sequence[str] = CHEAP,
    image: Sequence[int] | None = None,
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
        image: (row, column) or (channel, row, column) of images that are kept as vectors; others are recognised.
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
    parts = [labels.of(subject), *(SECTIONS[name](subject) for name in sections)]
    found = joined([part for part in parts if part is not None])
    shown = dict.fromkeys(i for s in found.sections for i in s.shown[:_SHOWN])
    found.texts.update({i: text for i in shown if (text := read(fit.train, i)) is not None})
    pictured = dict.fromkeys(i for s in found.sections for i in s.shown[:_PICTURED])
    found.pictures.update(pictures(fit.train, list(pictured), image))
    found.facts["passes"] = str(found.passes)
    return found


def read(examples: Examples, index: int) -> str | None:
    """How an example reads, or None where it has no text."""
    tokens: Any = getattr(examples, "tokens", None)
    return None if tokens is None else "".join(tokens(index))[:_TEXT]
