r"""Verify a claim about training data: retrain without it, with it twice, and without as much chosen at random.

Scores predict what a small change of the examples' weights does to a measurement: with weights $w_n$ in place of one,

$$\Delta f(q) \approx \sum_n (w_n - 1)\, \tau(q, n).$$

Here each prediction is held against a training run that differs from the original in those weights and in nothing
else (same seed, same order of examples), or against the mean over several seeds. Removing examples at random is the
control: a ranking that knows something moves the measurement more than chance does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.display import Shown, plain_text
from headwater.core.files import ArtifactDamaged, read_json, write_json
from headwater.core.scores import Scores
from headwater.extras import require
from headwater.numerics.resampling import mean_interval
from headwater.training.changes import ChangeSet
from headwater.training.retraining import AS_IT_WAS, Change, Progress, Retrain, retrain_all

__all__ = ["Change", "ChangeSet", "Outcome", "Retrain", "Verification", "changes", "verify"]


def changes(
    scores: Scores, *, k: int = 10, queries: Sequence[int] | None = None, seed: int = 0
) -> list[Change]:
    """Leaving out the k examples that raise each query most, as many at random, and counting those k twice.

    With several queries it is the union of their examples that is left out, so that one run serves them all.

    Args:
        scores: Scores of all training examples.
        k: Examples of each query; those that raise it only.
        queries: Which queries to ask about; all when left out.
        seed: Seed of the random choice.

    Raises:
        ValueError: Only the strongest examples were kept, nothing raises a query, or k leaves no control.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    if len(scores.train_ids) < (scores.n_train or 0):
        raise ValueError(
            f"Only the strongest {len(scores.train_ids)} of {scores.n_train} examples were kept, and a choice among "
            "them is not a random one; score with keep=None, or name the changes yourself."
        )
    wrong = [q for q in queries or () if not 0 <= q < len(scores)]
    if wrong:
        raise ValueError(f"There are {len(scores)} queries, from 0; got {wrong[0]}.")
    asked = range(len(scores)) if queries is None else queries
    top = scores.top(k)
    strongest = sorted({scores.index(i) for q in asked for i in top[q] if scores.values[q, i] > 0})
    if not strongest:
        raise ValueError("No training example raises these queries, so there is nothing to remove.")
    numbers = scores.kept or range(len(scores.train_ids))
    rest = [n for n in numbers if n not in set(strongest)]
    if len(rest) < len(strongest):
        raise ValueError(
            f"{len(strongest)} of {len(list(numbers))} examples are to be left out, which leaves too few to choose as "
            "many at random from; lower k."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rest), generator=generator)[: len(strongest)].tolist()
    count = len(strongest)
    return [
        Change(name=f"without the top {count}", weights=dict.fromkeys(strongest, 0.0)),
        Change(
            name=f"without {count} at random",
            weights={rest[i]: 0.0 for i in sorted(order)},
            control=True,
        ),
        Change(name=f"with the top {count} twice", weights=dict.fromkeys(strongest, 2.0)),
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a change of the training data did to one query, beside what was predicted.

    Args:
        query_id: The query.
        change: The change, in words.
        control: Whether it was chosen at random.
        n_changed: Examples whose weight changed.
        predicted: Predicted change of the measurement, in its unit (nats).
        actual: Change after retraining, the mean over seeds.
        low: Lower end of the 95 % interval over seeds; None for one seed.
        high: Upper end.
        before: The measurement after the original training.
    """

    query_id: str
    change: str
    control: bool
    n_changed: int
    predicted: float
    actual: float
    before: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verification(Shown):
    """Predicted and actual changes, query by query.

    Args:
        outcomes: One for each change and query.
        measurement: What was measured.
        protocol: "same run" (the original seed and order) or "mean over seeds".
        facts: What made it.
    """

    outcomes: tuple[Outcome, ...]
    measurement: str
    protocol: str
    facts: dict[str, Any]

    @property
    def beats_chance(self) -> list[bool]:
        """For each query, whether leaving out the top moved it further down than leaving out others at random.

        Empty where no such pair of changes was made.
        """
        by: dict[str, dict[str, float]] = {}
        for o in self.outcomes:
            key = "control" if o.control else o.change
            by.setdefault(o.query_id, {})[key] = o.actual
        pairs = [
            (
                next((v for k, v in each.items() if k.startswith("without")), None),
                each.get("control"),
            )
            for each in by.values()
        ]
        return [top < chance for top, chance in pairs if top is not None and chance is not None]

    @property
    def exceeds_chance(self) -> list[bool]:
        """For each query, whether the first change moved it further, up or down, than the random one did."""
        moved: dict[str, dict[bool, float]] = {}
        for o in self.outcomes:
            moved.setdefault(o.query_id, {}).setdefault(o.control, abs(o.actual))
        return [each[False] > each[True] for each in moved.values() if len(each) == 2]

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Verification":
        """Read what `save` wrote.

        Raises:
            ArtifactDamaged: The file is no verification.
        """
        content = read_json(Path(path))
        try:
            outcomes = tuple(Outcome(**each) for each in content.pop("outcomes"))
            found = cls(outcomes=outcomes, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ArtifactDamaged(f"{path} holds no verification; make it again.") from error
        if not (_is_told(found) and all(map(_is_measured, outcomes))):
            raise ArtifactDamaged(f"{path} holds no verification; make it again.")
        return found

    def plot(self):
        """Predicted against actual changes, the random control in grey; needs the extra `plots`."""
        pyplot = require("matplotlib.pyplot", extra="plots")
        figure, axes = pyplot.subplots(figsize=(5, 4.6), layout="constrained")
        for control, color, label in ((True, "0.6", "at random"), (False, "tab:blue", "named")):
            some = [o for o in self.outcomes if o.control == control]
            guess, actual = [o.predicted for o in some], [o.actual for o in some]
            axes.scatter(guess, actual, color=color, label=label, zorder=3)
            for o in some:
                if o.low is not None and o.high is not None:
                    axes.plot([o.predicted] * 2, [o.low, o.high], color=color, linewidth=1.2)
        known = [v for o in self.outcomes for v in (o.predicted, o.actual) if v == v]
        if known:
            ends = [min(known), max(known)]
            axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axhline(0, color="0.8", linewidth=0.6)
        axes.axvline(0, color="0.8", linewidth=0.6)
        axes.set_xlabel(
            plain_text(f"predicted change of {self.measurement} (nats)", 90), parse_math=False
        )
        axes.set_ylabel(f"actual change, {self.protocol}")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        lines = [f"Verification of {self.measurement}, {self.protocol} (predicted → actual)"]
        lines += [
            f"  {o.query_id}, {o.change}: {o.predicted:+.3f} → {o.actual:+.3f}"
            for o in self.outcomes
        ]
        return "\n".join(lines)


def _is_told(found: Verification) -> bool:
    """Whether what a file says of a verification is of the types that it should be."""
    return (
        isinstance(found.measurement, str)
        and isinstance(found.protocol, str)
        and isinstance(found.facts, dict)
    )


def _is_measured(outcome: Outcome) -> bool:
    """Whether an outcome's texts are texts and its numbers are numbers."""
    texts = (outcome.query_id, outcome.change)
    numbers = (outcome.predicted, outcome.actual, outcome.before)
    ends = (v for v in (outcome.low, outcome.high) if v is not None)
    return all(isinstance(v, str) for v in texts) and all(
        isinstance(v, int | float) for v in (*numbers, *ends)
    )


def verify(
    retrain: Retrain,
    scores: Scores,
    planned: Sequence[Change] | None = None,
    *,
    relabelled: Scores | None = None,
    seeds: Sequence[int] = (0,),
    before: Float[Tensor, " query"] | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Retrain under each change and compare what happened with what the scores say.

    Args:
        retrain: Trains with the given weights of the examples and seed; returns the measurement of every query. Or an
            object that makes several runs at once (`headwater.training.retraining`).
        scores: The claim, in the measurement's unit.
        planned: The changes; `changes(scores)` when left out. Those of an audit are `ChangeSet.planned`.
        relabelled: Where changes give examples other labels: scores of those examples under them, by id.
        seeds: The original run's seed for a statement about that run; several for one about the expected outcome.
        before: The measurements of the original run, where one seed is given and they are known.
        cache: Folder in which every finished run's measurements are kept, so that a killed verification goes on.
            Choose one for each `retrain`, unless it tells what it is made from.
        progress: Called with (runs done, runs in all, note).

    Raises:
        ValueError: The scores have no unit or do not cover a change, or `retrain` returns other than one number a
            query.
        FloatingPointError: A run's measurements are not finite.
    """
    if not len(seeds):
        raise ValueError("Expected one seed or more; got none.")
    if before is not None and before.shape != (len(scores),):
        raise ValueError(
            f"before must be one number for each of {len(scores)} queries; got shape {tuple(before.shape)}."
        )
    if not scores.unit:
        raise ValueError(
            "These scores have no unit, only an order: they predict no change that could be held against retraining. "
            "Score with a method in nats, or hold the order against retraining with "
            "headwater.trace.measures.removal."
        )
    planned = changes(scores) if planned is None else list(planned)
    predicted = [change.predicted(scores, relabelled) for change in planned]
    known = before if len(seeds) == 1 else None
    first = [AS_IT_WAS] if known is None else []
    runs = [(change, seed) for change in [*first, *planned] for seed in seeds]
    measured = retrain_all(
        retrain,
        runs,
        n_train=scores.n_train or len(scores.train_ids),
        queries=scores.query_ids,
        cache=cache,
        progress=progress,
    )
    if known is not None:
        measured = torch.cat([known.double().cpu()[None], measured])
    values = measured.view(1 + len(planned), len(seeds), -1)
    outcomes = []
    for change, guess, after in zip(planned, predicted, values[1:], strict=True):
        moved = after - values[0]
        for q, query in enumerate(scores.query_ids):
            spread = mean_interval(moved[:, q]) if len(seeds) > 1 else None
            outcomes.append(
                Outcome(
                    query_id=query,
                    change=change.name,
                    control=change.control,
                    n_changed=len(change.weights | change.labels),
                    predicted=float(guess[q]),
                    actual=float(moved[:, q].mean()),
                    before=float(values[0][:, q].mean()),
                    low=None if spread is None else spread.low,
                    high=None if spread is None else spread.high,
                )
            )
    return Verification(
        outcomes=tuple(outcomes),
        measurement=scores.measurement,
        protocol="same run" if len(seeds) == 1 else f"mean over {len(seeds)} seeds",
        facts={"seeds": list(seeds), "runs": len(runs)},
    )
