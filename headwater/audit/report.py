"""The whole audit: every section that a fit allows, in one table of findings."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.audit.base import Findings, Passes, Section, Table, joined
from headwater.audit.curvature_spectrum import Spectrum, spectrum
from headwater.audit.memorization import OWED, Recitation, owed_to_itself, recited_examples
from headwater.audit.mislabel import IFComplexity, Mislabels, SelfInfluence
from headwater.audit.outliers import Outliers, outside
from headwater.audit.overconfidence import Overconfidence
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
_FEWEST, _OTHERS = 5, 200  # examples learnt by heart, and others, for a spectrum


def outliers(subject: Subject) -> Findings | None:
    """Inputs unlike the others; None where there are none."""
    if len(subject) < 2:
        return None
    return Outliers(neighbours=subject.n_neighbours).of(subject)


def complexity(subject: Subject) -> Findings | None:
    """Inputs that are unlike the training data by IF-COMP, for which many labels could be taught; None without classes.

    Where IF-COMP ranks labels as well it costs nothing more.
    """
    if not subject.classes:
        return None
    started, measure, train = time.perf_counter(), IFComplexity(), subject.fit.train
    found = measure.complexity(subject)
    confidence = found.confidence()
    far = outside(-confidence)
    section = Section(
        name="complexity",
        title="Inputs of which the model knows little",
        sentences=(
            f"{int(far.sum()):,} of {len(subject):,} inputs have labels whose expected code length, entropy and regret "
            "together, lies far above the others'.",
            "complexity is what predicting without having seen the label costs (nats, to first order).",
        ),
        columns=("complexity", "complexity_score", "is_complexity_issue"),
        shown=tuple(confidence.argsort(stable=True)[:50].tolist()),
        passes=subject.newly_paid(),
        seconds=time.perf_counter() - started,
        papers=(measure.paper,),
    )
    columns: dict[str, Tensor | list] = {
        "complexity": found.unlabelled,
        "complexity_score": confidence.exp(),
        "is_complexity_issue": far,
    }
    return Findings(ids=train.ids, columns=columns, sections=(section,), metadata=train.metadata)


def memorization(subject: Subject, *, prefix: int = 32, suffix: int = 32) -> Findings | None:
    """What was learnt by heart: texts that are recited, or labels whose probability is owed to the example itself.

    Args:
        subject: The fit under audit.
        prefix: Tokens of a text that the model is given.
        suffix: Tokens that it is to say.
    """
    if subject.classes:
        return _labels_by_heart(subject)
    train, n = subject.fit.train, len(subject)
    if not _has_texts(subject):
        return None
    started = time.perf_counter()
    told: list[float | None] = [None] * n
    sentence = f"No text has {prefix + suffix} tokens, so that none was tried for recitation."
    shown: list[int] = []
    if recited := _recited(subject, prefix, suffix):
        tried, found = recited
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


def _has_texts(subject: Subject) -> bool:
    return subject.fit.train.lengths is not None and subject.categorical and not subject.classes


def _recited(subject: Subject, prefix: int, suffix: int) -> tuple[list[int], Recitation] | None:
    """Numbers of the long texts that surprise the model least, and how it continues them; made once."""
    train = subject.fit.train
    assert train.lengths is not None
    long = [i for i, length in enumerate(train.lengths) if length >= prefix + suffix]
    order = subject.final.loss[long].argsort(stable=True).tolist()[:_CANDIDATES]
    tried = [long[i] for i in order]
    if not tried:
        return None
    model, some = subject.fit.model, train.subset(tried)
    found = subject.once(
        ("recitation", prefix, suffix),
        Passes(),
        lambda: recited_examples(model, some, prefix=prefix, suffix=suffix),
    )
    return tried, found


def _owed(subject: Subject) -> Float[Tensor, " train"]:
    own, exact = SelfInfluence().measure(subject), subject.fit.curvature.kind in ("dual", "dense")
    return owed_to_itself(subject.final.loss, own, exact=exact)


def _labels_by_heart(subject: Subject) -> Findings:
    """Labels that the model would not say, had it not been trained on them."""
    started, train = time.perf_counter(), subject.fit.train
    owed = _owed(subject)
    section = Section(
        name="memorization",
        title="Learnt by heart",
        sentences=(
            f"{int((owed >= OWED).sum()):,} of {len(subject):,} labels owe {OWED:g} or more of their probability to "
            "having been trained on.",
            "memorization is that share by the example's self-influence, an estimate to first order: wrong labels that "
            "were learnt, and right ones that nothing else in the data supports.",
        ),
        columns=("memorization",),
        shown=tuple(owed.argsort(descending=True, stable=True)[:50].tolist()),
        passes=subject.newly_paid(),
        seconds=time.perf_counter() - started,
        papers=("arXiv:2008.03703", "arXiv:1703.04730"),
    )
    columns: dict[str, Tensor | list] = {"memorization": owed}
    return Findings(ids=train.ids, columns=columns, sections=(section,), metadata=train.metadata)


def recital(subject: Subject, *, prefix: int = 32, suffix: int = 32) -> Findings | None:
    """Which directions of the weights recite: how active bands of falling curvature are on what was learnt by heart.

    Args:
        subject: The fit under audit, of curvature "kfac" or "ekfac".
        prefix: Tokens of a text that the model is given.
        suffix: Tokens that it is to say.
    """
    fit, train = subject.fit, subject.fit.train
    if not (subject.classes or _has_texts(subject)):
        return None
    started = time.perf_counter()
    if subject.classes:
        owed = _owed(subject)
        order = owed.argsort(descending=True, stable=True).tolist()
        known = order[: min(_CANDIDATES, int((owed >= OWED).sum()))]
    else:
        tried, found = _recited(subject, prefix, suffix) or ([], None)
        known = (
            [i for i, loose in zip(tried, found.is_loose.tolist(), strict=True) if loose]
            if found
            else []
        )
    draw = torch.randperm(len(subject), generator=torch.Generator().manual_seed(0)).tolist()
    others = [i for i in draw if i not in set(known)][:_OTHERS]
    sentences: tuple[str, ...] = (
        f"{len(known)} of the training examples are learnt by heart, and {_FEWEST} are needed to say which directions "
        "of the weights serve them.",
    )
    tables: tuple[Table, ...] = ()
    if len(known) >= _FEWEST and others:
        sets = {"clean": train.subset(others), "memorized": train.subset(known)}
        try:
            sentences, tables = _bands_told(spectrum(fit, sets), len(known), len(others))
        except ValueError as error:  # the fit has no factors, or they rest on too little
            sentences = (f"Which directions of the weights recite cannot be told: {error}",)
    section = Section(
        name="recital",
        title="Directions of the weights that recite",
        sentences=sentences,
        tables=tables,
        passes=subject.newly_paid(),
        seconds=time.perf_counter() - started,
        papers=("arXiv:2510.24256",),
    )
    return Findings(ids=train.ids, columns={}, sections=(section,), metadata=train.metadata)


def _bands_told(
    seen: Spectrum, known: int, others: int
) -> tuple[tuple[str, ...], tuple[Table, ...]]:
    """What a spectrum says of so many examples learnt by heart beside others."""
    columns = {name: column for name, column in seen.table().items() if name != "set"}
    title = "Activity on what was learnt by heart over that on others, by layer and band"
    return (
        f"In the half of the directions where the curvature is lowest, the {known} examples learnt by heart are "
        f"{seen.sensitivity('memorized'):.2f} times as active as {others} others (mean of {len(seen.layers)} layers).",
        "Above one, `headwater forget curvature-edit` can remove directions that serve them more than others; near one "
        "it takes ordinary examples along.",
    ), (Table(title=title, columns=columns),)


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


def overconfidence(subject: Subject) -> Findings:
    """How much surer the model is than it may be."""
    return Overconfidence().of(subject)


# Each looks at the subject and gives findings, or None where it has nothing to look at; one more is one entry more.
SECTIONS: dict[str, Callable[[Subject], Findings | None]] = {
    "outliers": outliers,
    "complexity": complexity,
    "memorization": memorization,
    "recital": recital,
    "overconfidence": overconfidence,
    "structure": structure,
}
CHEAP = ("outliers", "memorization", "overconfidence")  # what is looked at unless more is asked for


def audit(
    fit: Fit,
    *,
    labels: Mislabels | None = None,
    trajectories: Sequence[Trajectory] = (),
    probabilities: Float[Tensor, "train class"] | None = None,
    probabilities_cost: Passes | None = None,
    heldout: Any = None,
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
        heldout: Labelled examples that the model was not trained on, which tell how sure it may be.
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
        heldout=heldout,
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
