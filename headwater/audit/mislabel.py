r"""Which labels are wrong: a dozen measures in one table, one ranking, and at will a bound on the false claims.

A measure is a small dataclass that gives each training example a number and says which end of it is suspicious. What
they read (the model's outputs at its end and at the checkpoints of its run, gradients, representations) is gathered
once by `headwater.audit.subject.Subject`, however many measures ask for it.

The combined ranking is the mean of the members' ranks, equal weights and nothing tuned. Its members are one measure of
each kind, named beforehand: what the curvature says (self-influence), what training said (AUM; the margin of the last
model where no run was recorded), what the neighbours say, and what models say that have not seen the example.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.audit.base import Auditor, Findings, Passes, Section, Table, marked, verdict
from headwater.audit.confident import confidently_other, label_quality
from headwater.audit.subject import Outlook, Subject
from headwater.calibrate import Complexity, complexity
from headwater.core.capture import Progress
from headwater.core.curvature import EKFAC
from headwater.core.damping import Damping
from headwater.core.fit import Fit
from headwater.core.function_space import GateError, function_space_distance
from headwater.core.function_space.gates import activations
from headwater.core.tempering import fit_at_temperature
from headwater.numerics.ranks import average_ranks
from headwater.trace.influence import Influence
from headwater.trace.proximal import mislabel_scores
from headwater.training.trajectory import Trajectory

Side = Literal["high", "low"]

NO_RUN = "needs a recorded training run with checkpoints"
NO_CLASS = "needs one class an example"


class Measure(ABC):
    """A number for each training example that tells how doubtful its label is.

    Attributes:
        name: Name of its column.
        title: What people call it.
        paper: Its paper; empty where there is none.
        suspicious: Which end of it is; None where neither is.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    suspicious: ClassVar[Side | None] = "high"

    def missing(self, subject: Subject) -> str:
        """What there is not that it needs, in words; empty where it can be taken."""
        return ""

    @abstractmethod
    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        """Its value for each training example."""

    def suspicion(self, values: Float[Tensor, " train"]) -> Float[Tensor, " train"]:
        """The values, turned so that the doubtful ones are high."""
        return -values if self.suspicious == "low" else values


@dataclass(frozen=True, kw_only=True)
class SelfInfluence(Measure):
    r"""$\frac1N \nabla\ell_n^\top (C + \rho I)^{-1} \nabla\ell_n$: how far an example alone lowers its own loss.

    Koh and Liang (2017), arXiv:1703.04730.

    Args:
        damping: As in `headwater.trace.Influence`.
    """

    name: ClassVar[str] = "self_influence"
    title: ClassVar[str] = "self-influence"
    paper: ClassVar[str] = "arXiv:1703.04730"

    damping: str | float | Damping = "auto"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        method = Influence(damping=self.damping)
        found = subject.once(
            (self.name, self.damping),
            Passes(backward=1),
            lambda: method.self_influence(subject.fit, progress=subject.progress),
        )
        return found.double()


@dataclass(frozen=True, kw_only=True)
class IFComplexity(Measure):
    r"""IF-COMP: the code length of the label, $-\log p_y$ and the regret of having been able to learn any (nats).

    Ng, Grosse and Ghassemi (2024), arXiv:2406.02745; see `headwater.calibrate.complexity`.

    Args:
        temperature: Of the gradients and of the Fisher information.
        top: At most so many classes are examined, the most probable ones.
    """

    name: ClassVar[str] = "if_comp"
    title: ClassVar[str] = "IF-COMP"
    paper: ClassVar[str] = "arXiv:2406.02745"

    temperature: float = 3.0
    top: int = 20

    def missing(self, subject: Subject) -> str:
        return "" if subject.classes else NO_CLASS

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        return self.complexity(subject).labelled()

    def complexity(self, subject: Subject) -> Complexity:
        """Complexities of all examples: two passes with gradients for the fit, and one for each class."""
        top = min(self.top, subject.classes)

        def make() -> Complexity:
            made = EKFAC(folds=1)
            fit = fit_at_temperature(
                subject.fit, self.temperature, curvature=made, progress=subject.progress
            )
            return complexity(fit, subject.fit.train, top=top, progress=subject.progress)

        return subject.once((self.name, self), Passes(backward=2 + top), make)


@dataclass(frozen=True, kw_only=True)
class FunctionSpace(Measure):
    """Self-influence against a function-space distance in place of the data's curvature (LAFTR).

    Dhawan, Huang, Bae and Grosse (2023), arXiv:2302.03519; see `headwater.trace.proximal.mislabel_scores`.

    Args:
        n_samples: Inputs that the distance draws.
    """

    name: ClassVar[str] = "laftr"
    title: ClassVar[str] = "LAFTR self-influence"
    paper: ClassVar[str] = "arXiv:2302.03519"

    n_samples: int = 200

    def missing(self, subject: Subject) -> str:
        if not subject.classes:
            return NO_CLASS
        try:
            activations(subject.fit.model)
        except GateError:
            return "needs a network of affine layers and ReLUs"
        return ""

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        fit, progress = subject.fit, subject.progress

        def make() -> Tensor:
            distance = function_space_distance(fit, n_samples=self.n_samples, progress=progress)
            return mislabel_scores(fit, distance, progress=progress)

        return subject.once((self.name, self), Passes(forward=1, backward=1), make).double()


@dataclass(frozen=True, kw_only=True)
class ExampleLoss(Measure):
    """The fitted model's loss of the example, the mean over its positions (nats)."""

    name: ClassVar[str] = "loss"
    title: ClassVar[str] = "loss"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        return subject.final.loss


@dataclass(frozen=True, kw_only=True)
class Margin(Measure):
    r"""$z_y - \max_{c \ne y} z_c$ of the fitted model (nats)."""

    name: ClassVar[str] = "margin"
    title: ClassVar[str] = "margin"
    suspicious: ClassVar[Side] = "low"

    def missing(self, subject: Subject) -> str:
        return "" if subject.categorical else "needs classes"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        return subject.final.margin


@dataclass(frozen=True, kw_only=True)
class EL2N(Measure):
    r"""$\mathbb E\,\|p - e_y\|_2$ early in training, the mean over runs and early checkpoints.

    Paul, Ganguli and Dziugaite (2021), "Deep Learning on a Data Diet", arXiv:2107.07075.

    Args:
        early: Share of the steps that counts as early; one checkpoint at least is taken.
    """

    name: ClassVar[str] = "el2n"
    title: ClassVar[str] = "EL2N"
    paper: ClassVar[str] = "arXiv:2107.07075"

    early: float = 0.1

    def missing(self, subject: Subject) -> str:
        return _needs_run(subject)

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        return torch.stack([o.el2n for o in subject.early(self.early)]).mean(0)


@dataclass(frozen=True, kw_only=True)
class GraNd(Measure):
    r"""$\mathbb E\,\|\nabla\ell_n\|_2$ early in training, over the followed layers.

    Paul, Ganguli and Dziugaite (2021), "Deep Learning on a Data Diet", arXiv:2107.07075.

    Args:
        early: Share of the steps that counts as early; one checkpoint at least is taken.
    """

    name: ClassVar[str] = "grand"
    title: ClassVar[str] = "GraNd"
    paper: ClassVar[str] = "arXiv:2107.07075"

    early: float = 0.1

    def missing(self, subject: Subject) -> str:
        return "" if subject.trajectories else NO_RUN

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        chosen = [
            subject.gradient_norms(run, i)
            for run in range(len(subject.trajectories))
            for i in subject.kept(run, self.early)
        ]
        return torch.stack(chosen).mean(0)


class _Dynamics(Measure):
    """A summary of each run's checkpoints, the mean over runs."""

    def missing(self, subject: Subject) -> str:
        return _needs_run(subject)

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        runs = [subject.outlooks(r) for r in range(len(subject.trajectories))]
        return torch.stack([self.summary(run) for run in runs]).mean(0)

    @abstractmethod
    def summary(self, outlooks: Sequence[Outlook]) -> Float[Tensor, " train"]:
        """One number an example for one run."""


@dataclass(frozen=True, kw_only=True)
class AUM(_Dynamics):
    r"""Area under the margin: the mean over checkpoints of $z_y - \max_{c \ne y} z_c$.

    Pleiss, Zhang, Elenberg and Weinberger (2020), "Identifying Mislabeled Data using the Area Under the Margin
    Ranking", arXiv:2001.10528.
    """

    name: ClassVar[str] = "aum"
    title: ClassVar[str] = "AUM"
    paper: ClassVar[str] = "arXiv:2001.10528"
    suspicious: ClassVar[Side] = "low"

    def summary(self, outlooks: Sequence[Outlook]) -> Float[Tensor, " train"]:
        return torch.stack([o.margin for o in outlooks]).mean(0)


@dataclass(frozen=True, kw_only=True)
class Confidence(_Dynamics):
    r"""The mean over checkpoints of $p_y$.

    Swayamdipta et al. (2020), "Dataset Cartography", arXiv:2009.10795.
    """

    name: ClassVar[str] = "confidence"
    title: ClassVar[str] = "confidence over training"
    paper: ClassVar[str] = "arXiv:2009.10795"
    suspicious: ClassVar[Side] = "low"

    def summary(self, outlooks: Sequence[Outlook]) -> Float[Tensor, " train"]:
        return torch.stack([o.probability for o in outlooks]).mean(0)


@dataclass(frozen=True, kw_only=True)
class Variability(_Dynamics):
    r"""The standard deviation over checkpoints of $p_y$, which marks ambiguous examples and not wrong ones.

    Swayamdipta et al. (2020), "Dataset Cartography", arXiv:2009.10795.
    """

    name: ClassVar[str] = "variability"
    title: ClassVar[str] = "variability over training"
    paper: ClassVar[str] = "arXiv:2009.10795"
    suspicious: ClassVar[Side | None] = None

    def summary(self, outlooks: Sequence[Outlook]) -> Float[Tensor, " train"]:
        return torch.stack([o.probability for o in outlooks]).std(0, correction=0)


@dataclass(frozen=True, kw_only=True)
class Forgetting(_Dynamics):
    """How often a checkpoint gets wrong what the one before got right; infinite for what was never right.

    Toneva et al. (2019), "An Empirical Study of Example Forgetting during Deep Neural Network Learning",
    arXiv:1812.05159. An example of several positions is right where more than half of them are.
    """

    name: ClassVar[str] = "forgetting"
    title: ClassVar[str] = "forgetting events"
    paper: ClassVar[str] = "arXiv:1812.05159"

    def summary(self, outlooks: Sequence[Outlook]) -> Float[Tensor, " train"]:
        right = torch.stack([o.correct > 0.5 for o in outlooks])
        events = (right[:-1] & ~right[1:]).double().sum(0)
        return events.masked_fill(~right.any(0), math.inf)


@dataclass(frozen=True, kw_only=True)
class Perplexity(Measure):
    """The fitted model's perplexity of a text, exp of the mean loss a token."""

    name: ClassVar[str] = "perplexity"
    title: ClassVar[str] = "perplexity"

    def missing(self, subject: Subject) -> str:
        return "" if subject.categorical and not subject.classes else "needs tokens"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        return subject.final.loss.exp()


@dataclass(frozen=True, kw_only=True)
class IFD(Measure):
    r"""Instruction-following difficulty: the perplexity of an answer behind its prompt over that of the answer alone.

    $\exp(\overline{\mathrm{NLL}}(A \mid Q) - \overline{\mathrm{NLL}}(A))$, 1 where the answer is a single token. Below
    1 the prompt helps to say the answer; at 1 and above the two do not belong together, and among those below 1 the
    highest teach most. With a fit of a small model it is their superfiltering.

    Li et al. (2024), arXiv:2308.12032.
    """

    name: ClassVar[str] = "ifd"
    title: ClassVar[str] = "instruction-following difficulty"
    paper: ClassVar[str] = "arXiv:2308.12032"

    def missing(self, subject: Subject) -> str:
        return "" if subject.has_prompts else "needs texts with prompts that are not scored"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        behind, alone = subject.answers
        return (behind - alone).exp()


@dataclass(frozen=True, kw_only=True)
class ConfidentLearning(Measure):
    """cleanlab's label quality under out-of-fold probabilities (self-confidence); needs the extra `audit`.

    Northcutt, Jiang and Chuang (2021), arXiv:1911.00068.
    """

    name: ClassVar[str] = "confident_learning"
    title: ClassVar[str] = "confident learning (cleanlab)"
    paper: ClassVar[str] = "arXiv:1911.00068"
    suspicious: ClassVar[Side] = "low"

    def missing(self, subject: Subject) -> str:
        if not subject.classes:
            return NO_CLASS
        return "" if subject.probabilities is not None else "needs out-of-fold probabilities"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        probabilities = subject.out_of_fold
        assert probabilities is not None
        return label_quality(probabilities, subject.labels)


@dataclass(frozen=True, kw_only=True)
class NeighbourDisagreement(Measure):
    """Share of the nearest examples, by the model's last representation, that carry another label."""

    name: ClassVar[str] = "neighbours"
    title: ClassVar[str] = "neighbours of another label"

    def missing(self, subject: Subject) -> str:
        if not subject.classes:
            return NO_CLASS
        return "" if len(subject) > 1 else "needs other examples"

    def measure(self, subject: Subject) -> Float[Tensor, " train"]:
        labels = subject.labels
        return (labels[subject.neighbours[0]] != labels[:, None]).double().mean(1)


MEASURES: tuple[Measure, ...] = (
    SelfInfluence(),
    IFComplexity(),
    FunctionSpace(),
    ExampleLoss(),
    Margin(),
    EL2N(),
    GraNd(),
    AUM(),
    Confidence(),
    Variability(),
    Forgetting(),
    Perplexity(),
    IFD(),
    NeighbourDisagreement(),
    ConfidentLearning(),
)
# One of each kind; where two stand for one kind, the first that can be taken.
COMBINED: tuple[tuple[str, ...], ...] = (
    ("self_influence",),
    ("aum", "margin", "loss"),
    ("neighbours",),
    ("confident_learning",),
)


def combined_suspicion(
    suspicions: Sequence[Float[Tensor, " train"]],
) -> Float[Tensor, " train"]:
    r"""The mean over measures of $(r - \tfrac12) / n$, with r the rank of the example: 0 clean, 1 doubtful.

    Example:
        >>> combined_suspicion([torch.tensor([0.1, 9.0]), torch.tensor([5.0, 7.0])]).tolist()
        [0.25, 0.75]
    """
    if not suspicions:
        raise ValueError("Expected one measure or more to combine; got none.")
    ranks = torch.stack([average_ranks(s.double()) for s in suspicions])
    return ((ranks - 0.5) / ranks.shape[1]).mean(0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """A measure's values.

    Attributes:
        measure: The measure.
        values: One for each training example.
        passes: What it costs alone.
        seconds: Time it took, after what others had gathered.
    """

    measure: Measure
    values: Float[Tensor, " train"]
    passes: Passes
    seconds: float

    @property
    def suspicion(self) -> Float[Tensor, " train"]:
        return self.measure.suspicion(self.values)


def measure_all(
    subject: Subject, measures: Sequence[Measure] = MEASURES
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every measure that can be taken, by name, and of the others what they miss.

    Raises:
        FloatingPointError: A value is NaN.
    """
    found, missed = {}, {}
    for each in measures:
        if why := each.missing(subject):
            missed[each.name] = why
            continue
        started = time.perf_counter()
        with subject.watched() as used:
            values = each.measure(subject).double().cpu()
            passes = used()
        if values.isnan().any():
            first = subject.fit.train.ids[int(values.isnan().nonzero()[0])]
            raise FloatingPointError(
                f"The measure {each.name!r} of example {first!r} is NaN; look at the example, or leave the measure out."
            )
        seconds = time.perf_counter() - started
        found[each.name] = Measured(measure=each, values=values, passes=passes, seconds=seconds)
    return found, missed


@dataclass(frozen=True, kw_only=True)
class Mislabels(Auditor):
    """Rank training examples by how doubtful their labels are, and mark those held to be wrong.

    How many are marked: `n_issues`; else as many as the confident joint counts, under out-of-fold probabilities, or the
    mean over the recorded run's checkpoints, or the fitted model's own. Without classes none are marked. For marks with
    a bound on the false ones see `headwater.audit.control`.

    Args:
        measures: Names of the measures; every one that can be taken when left out.
        combine: Names of the measures whose ranks are averaged; one of each kind when left out.
        n_issues: How many to mark.
        neighbours: Nearest neighbours that are looked at.
    """

    measures: tuple[str, ...] = ()
    combine: tuple[str, ...] = ()
    n_issues: int | None = None
    neighbours: int = 10

    def __post_init__(self):
        known = [m.name for m in MEASURES]
        for unknown in (n for n in (*self.measures, *self.combine) if n not in known):
            raise ValueError(f"There is no measure {unknown!r}; there are: {', '.join(known)}.")
        if self.n_issues is not None and self.n_issues < 0:
            raise ValueError(f"n_issues must be 0 or more; got {self.n_issues}.")
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be 1 or more; got {self.neighbours}.")

    def audit(
        self,
        fit: Fit,
        *,
        trajectories: Sequence[Trajectory] = (),
        probabilities: Float[Tensor, "train class"] | None = None,
        probabilities_cost: Passes | None = None,
        progress: Progress | None = None,
    ) -> Findings:
        """Findings with a column for each measure, and `label_score`, `is_label_issue` and the labels.

        Args:
            fit: The fitted model.
            trajectories: Records of its training run with checkpoints; of several seeds, where there are.
            probabilities: Probabilities by models that were not trained on the example, such as
                `headwater.audit.out_of_fold` gives.
            probabilities_cost: What those cost.
            progress: Called with (done, total, note).
        """
        subject = Subject(
            fit,
            trajectories=trajectories,
            probabilities=probabilities,
            probabilities_cost=probabilities_cost,
            neighbours=self.neighbours,
            progress=progress,
        )
        return self.of(subject)

    def of(self, subject: Subject) -> Findings:
        """The findings about a subject."""
        if self.n_issues is not None and self.n_issues > len(subject):
            raise ValueError(
                f"Expected at most {len(subject):,} issues, one for each training example; got {self.n_issues:,} "
                "(n_issues, --issues)."
            )
        started = time.perf_counter()
        chosen = [m for m in MEASURES if not self.measures or m.name in self.measures]
        found, missed = measure_all(subject, chosen)
        members = self._members(found, subject.judged)
        suspicion = combined_suspicion([found[name].suspicion for name in members])
        columns: dict[str, Tensor | list] = {"label_score": 1 - suspicion}
        wrong, rule = self._marked(subject, suspicion)
        columns["is_label_issue"] = wrong
        if subject.classes:
            columns["given_label"] = subject.labels
            columns["predicted_label"] = _told(subject)[0].argmax(1)
        columns |= {name: each.values for name, each in found.items()}
        papers = dict.fromkeys(m.measure.paper for m in found.values() if m.measure.paper)
        section = Section(
            name="labels",
            title=subject.judged.capitalize(),
            sentences=(
                f"{held_to_be_wrong(int(wrong.sum()), len(subject), subject.judged)}: {rule}.",
                f"label_score is one minus the mean rank over {', '.join(members)}; equal weights, nothing tuned.",
            ),
            tables=(_table(found, missed, members, suspicion),),
            columns=tuple(columns),
            shown=tuple(suspicion.argsort(descending=True, stable=True)[:200].tolist()),
            passes=subject.newly_paid(),
            seconds=time.perf_counter() - started,
            papers=tuple(papers),
        )
        facts = {
            "method": "audit",
            "papers": list(papers),
            "judged": subject.judged,
            "combined": list(members),
            "marked_by": rule,
            "n_train": len(subject),
            "made_from": subject.fit.made_from,
        }
        return Findings(
            ids=subject.fit.train.ids,
            columns=columns,
            sections=(section,),
            metadata=subject.fit.train.metadata,
            facts=facts,
        )

    def _members(self, found: Mapping[str, Measured], judged: str) -> list[str]:
        """Names of the measures whose ranks are averaged."""
        if self.combine:
            lost = [name for name in self.combine if name not in found]
            if lost:
                raise ValueError(
                    f"{lost[0]!r} is to be combined and was not measured; there are: {', '.join(found)}."
                )
            return list(self.combine)
        kinds = (next((n for n in kind if n in found), None) for kind in COMBINED)
        members = [name for name in kinds if name is not None]
        able = [name for name, each in found.items() if each.measure.suspicious is not None]
        if not (members or able):
            raise ValueError(
                f"None of these measures tells which {judged} are doubtful; name others."
            )
        return members or able

    def _marked(self, subject: Subject, suspicion: Tensor) -> tuple[Bool[Tensor, " train"], str]:
        """Which labels are held to be wrong, and by what rule."""
        if self.n_issues is not None:
            return (
                marked(suspicion, self.n_issues),
                f"the {self.n_issues:,} most doubtful, as asked",
            )
        if not subject.classes:
            return torch.zeros(len(subject), dtype=torch.bool), (
                "without classes nothing says how many; ask for a number (n_issues, --issues), or verify a sample"
            )
        probabilities, whose = _told(subject)
        n = int(confidently_other(probabilities, subject.labels).sum())
        return marked(suspicion, n), (
            f"the {n:,} most doubtful, as many as {whose} hold confidently to be of another class"
        )


def held_to_be_wrong(n: int, total: int, judged: str) -> str:
    """How many are marked, in words that fit.

    Example:
        >>> held_to_be_wrong(1, 10, "labels"), held_to_be_wrong(2, 10, "texts")
        ('1 of 10 labels is held to be wrong', '2 of 10 texts are held to be doubtful')
    """
    return f"{n:,} of {total:,} {judged} {'is' if n == 1 else 'are'} held to be {verdict(judged)}"


def _told(subject: Subject) -> tuple[Float[Tensor, "train class"], str]:
    """The best probabilities there are of the classes, and whose they are."""
    if subject.probabilities is not None:
        return subject.probabilities.double(), "models that have not seen them"
    if subject.trajectories:
        runs = [o for r in range(len(subject.trajectories)) for o in subject.outlooks(r)]
        every = torch.stack([o.logits.softmax(1) for o in runs if o.logits is not None])
        return every.mean(0), "the checkpoints of the training run"
    logits = subject.final.logits
    assert logits is not None
    return logits.softmax(1), "the fitted model"


def _table(
    found: Mapping[str, Measured],
    missed: Mapping[str, str],
    members: Sequence[str],
    suspicion: Tensor,
) -> Table:
    """Each measure with its cost, and how far its top agrees with the ranking's."""
    k = max(1, len(suspicion) // 20)
    top = set(suspicion.topk(k).indices.tolist())
    rows: list[tuple[Any, ...]] = []
    for name, each in found.items():
        side = each.measure.suspicious
        shared = (
            f"{100 * len(top & set(each.suspicion.topk(k).indices.tolist())) / k:.0f} %"
            if side
            else ""
        )
        used = "yes" if name in members else ""
        rows.append((name, each.measure.title, side or "neither", used, shared, str(each.passes)))
    names = {m.name: m.title for m in MEASURES}
    rows += [(name, names[name], "", "", "", f"not taken: {why}") for name, why in missed.items()]
    heads = (
        "column",
        "measure",
        "doubtful end",
        "in the ranking",
        f"of the top {k:,}",
        "passes beyond the fit, alone",
    )
    return Table(
        title="Measures",
        columns={head: [row[i] for row in rows] for i, head in enumerate(heads)},
    )


def _needs_run(subject: Subject) -> str:
    if not subject.trajectories:
        return NO_RUN
    return "" if subject.categorical else "needs classes"
