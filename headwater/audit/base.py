"""What an audit gives: one row for each training example, what was found in words, and what it cost.

Columns have the names that users of cleanlab know: `label_score` in [0, 1], low where the label is doubtful,
`is_label_issue`, `given_label`, `predicted_label`, `ood_score`, `is_outlier_issue`. Where there are no classes the
first two are about the texts, or the targets; `Findings.judged` says which.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.core.display import Shown
from headwater.core.files import write_bytes
from headwater.core.fit import Fit
from headwater.core.scores import from_table, to_table
from headwater.core.store import Artifact, ArtifactWriter
from headwater.extras import require
from headwater.training.changes import ChangeSet

KIND = "audit"


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What something cost beyond the fit, in passes over the training data.

    Args:
        forward: Passes that only run the model.
        backward: Passes with gradients, forward and backward.
        trainings: Trainings of the model.
    """

    forward: int = 0
    backward: int = 0
    trainings: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            trainings=self.trainings + other.trainings,
        )

    def __sub__(self, other: "Passes") -> "Passes":
        return Passes(
            forward=self.forward - other.forward,
            backward=self.backward - other.backward,
            trainings=self.trainings - other.trainings,
        )

    def __str__(self) -> str:
        """In words.

        Example:
            >>> print(Passes(), "|", Passes(forward=1), "|", Passes(forward=2, backward=1, trainings=5))
            0 | 1 forward | 2 forward, 1 with gradients, 5 trainings
        """
        named = (
            (self.forward, "forward"),
            (self.backward, "with gradients"),
            (self.trainings, "training" if self.trainings == 1 else "trainings"),
        )
        return ", ".join(f"{n} {name}" for n, name in named if n) or "0"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A small table of a report.

    Args:
        title: What it shows.
        columns: Its columns, of one length.
    """

    title: str
    columns: dict[str, list]

    def rows(self) -> list[tuple]:
        """Its rows."""
        return list(zip(*self.columns.values(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of an audit.

    Args:
        name: Its key, such as "labels".
        title: Its heading.
        sentences: What was found, and how.
        tables: Small tables of it.
        columns: The columns of the findings that it gave.
        shown: Numbers of the examples worth looking at, the most doubtful first.
        passes: What it cost beyond the fit and beyond the sections before it.
        seconds: Time it took.
        papers: Papers of what it used.
    """

    name: str
    title: str
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    columns: tuple[str, ...] = ()
    shown: tuple[int, ...] = ()
    passes: Passes = field(default_factory=Passes)
    seconds: float = 0.0
    papers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings(Shown):
    """What an audit found: columns with one value for each training example, and sections that tell of them.

    Args:
        ids: Names of the training examples.
        columns: One value for each of them; numbers as tensors, anything else as lists.
        sections: What was found, part by part.
        metadata: The examples' own columns.
        texts: How the examples shown read, by number, where they have a text.
        pictures: How they look, by number, where they are images: bytes (channel, row, column).
        facts: What made the findings.
    """

    ids: list[str]
    columns: dict[str, Tensor | list]
    sections: tuple[Section, ...] = ()
    metadata: dict[str, list] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    pictures: dict[int, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, column in self.columns.items():
            if len(column) != len(self.ids):
                raise ValueError(
                    f"Column {name!r} must have one value for each of {len(self.ids)} examples; got {len(column)}."
                )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def passes(self) -> Passes:
        """What all sections cost beyond the fit."""
        return sum((s.passes for s in self.sections), Passes())

    @property
    def judged(self) -> str:
        """What `label_score` is about, as people call it: labels, or texts or targets where there are no classes."""
        return self.facts.get("judged", "labels")

    @property
    def verdict(self) -> str:
        """What those that are marked are held to be."""
        return verdict(self.judged)

    @property
    def issues(self) -> list[int]:
        """Numbers of the examples whose labels are held to be wrong, the most doubtful first.

        Example:
            >>> found = Findings(ids=["a", "b"], columns={"is_label_issue": torch.tensor([False, True])})
            >>> found.issues
            [1]
        """
        marked = self.columns.get("is_label_issue")
        return [] if marked is None else self.top(int(torch.as_tensor(marked).sum()))

    def top(self, k: int = 10) -> list[int]:
        """Numbers of the k examples whose labels are most doubtful, those held to be wrong first."""
        known = [c for c in ("is_label_issue", "label_score") if c in self.columns]
        if not known:
            raise ValueError("These findings have no column about labels.")
        marked = torch.as_tensor(self.columns.get("is_label_issue", [False] * len(self))).bool()
        score = self.columns.get("label_score")
        score = torch.zeros(len(self)) if score is None else torch.as_tensor(score)
        order = score.double().argsort(stable=True)
        return torch.cat([order[marked[order]], order[~marked[order]]])[:k].tolist()

    def section(self, name: str) -> Section:
        """The section of that name.

        Raises:
            ValueError: There is none.
        """
        for each in self.sections:
            if each.name == name:
                return each
        there = ", ".join(s.name for s in self.sections)
        raise ValueError(f"There is no section {name!r}; there are: {there}.")

    def change_set(
        self, *, relabel: bool = True, keep: Sequence[str] = (), name: str = "the audit's changes"
    ) -> ChangeSet:
        """What to do about the labels held to be wrong, for `headwater.training.verify.verify`.

        Args:
            relabel: Give an example its predicted label where that differs from the given one; else all are removed.
            keep: Ids of examples that are kept as they are, whatever was found.
            name: What the changes are called.
        """
        given, predicted = (self.columns.get(c) for c in ("given_label", "predicted_label"))
        removed, labels = [], {}
        for i in self.issues:
            if self.ids[i] in set(keep):
                continue
            if relabel and given is not None and predicted is not None and given[i] != predicted[i]:
                labels[self.ids[i]] = int(predicted[i])
            else:
                removed.append(self.ids[i])
        return ChangeSet(name=name, remove=tuple(removed), relabel=labels, keep=tuple(keep))

    def table(self) -> dict[str, list]:
        """The columns as lists, with the ids first: one row for each example."""
        return {"id": self.ids} | {name: _listed(c) for name, c in self.columns.items()}

    def to_pandas(self):
        """One row for each example, with the metadata; needs the extra `tabular`."""
        pandas = require("pandas", extra="tabular")
        more = {k: v for k, v in self.metadata.items() if k not in self.columns}
        return pandas.DataFrame(self.table() | more)

    def write(self, path: str | Path) -> Path:
        """Write the table as Parquet or CSV, by the name's ending, whole or not at all.

        Raises:
            ValueError: The ending is neither.
        """
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        path = Path(path)
        if path.suffix not in (".parquet", ".csv"):
            raise ValueError(f"Expected a name that ends in .parquet or .csv; got {path.name!r}.")
        table, content = pyarrow.table(self.table()), io.BytesIO()
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, content)
        else:
            pyarrow.parquet.write_table(table, content)
        write_bytes(path, content.getvalue())
        return path

    def save(self, folder: str | Path) -> None:
        """Write the findings as an artifact: tables and a manifest."""
        facts = {
            "sections": [asdict(s) for s in self.sections],
            "texts": {str(i): t for i, t in self.texts.items()},
            "facts": self.facts,
        }
        made_from = self.facts.get("made_from", {})
        with ArtifactWriter(folder, kind=KIND, facts=facts, made_from=made_from) as writer:
            writer.table("findings", {k: v for k, v in self.table().items() if k != "id"} or {})
            writer.table("train", to_table(self.ids, self.metadata))
            for i, picture in self.pictures.items():
                writer.tensor(f"picture:{i}", picture)

    @classmethod
    def load(cls, folder: str | Path) -> "Findings":
        """Read findings saved by `save`."""
        artifact = Artifact.open(folder, kind=KIND)
        facts = artifact.facts
        ids, metadata = from_table(artifact.table("train").to_pydict())
        columns = artifact.table("findings").to_pydict()
        return cls(
            ids=ids,
            columns={name: _unlisted(c) for name, c in columns.items()},
            sections=tuple(_section(s) for s in facts["sections"]),
            metadata=metadata,
            texts={int(i): t for i, t in facts["texts"].items()},
            pictures={int(n.partition(":")[2]): t for n, t in artifact.tensors("picture:")},
            facts=facts["facts"],
        )

    def __repr__(self) -> str:
        lines = [f"Findings({len(self):,} training examples; cost beyond the fit: {self.passes})"]
        lines += [f"  {s.title}: {s.sentences[0]}" for s in self.sections if s.sentences]
        return "\n".join(lines)


class Auditor(ABC):
    """Asks one question of a fit's training data."""

    @abstractmethod
    def audit(self, fit: Fit) -> Findings:
        """Return `Findings` with a row for each training example."""


def verdict(judged: str) -> str:
    """A label is wrong; of a text or a target one can doubt that it belongs there."""
    return "wrong" if judged == "labels" else "doubtful"


def marked(suspicion: Tensor, n: int) -> Bool[Tensor, " train"]:
    """Which are the n of highest value, the first of equal ones.

    Example:
        >>> marked(torch.tensor([0.1, 0.9, 0.5]), 2).tolist()
        [False, True, True]
    """
    found = torch.zeros(len(suspicion), dtype=torch.bool)
    found[suspicion.double().argsort(descending=True, stable=True)[:n]] = True
    return found


def joined(parts: Sequence[Findings]) -> Findings:
    """Findings of several audits of the same examples, as one.

    Raises:
        ValueError: They are of other examples, or two of them give the same column.
    """
    columns: dict[str, Tensor | list] = {}
    for part in parts:
        if part.ids != parts[0].ids:
            raise ValueError("Findings can be joined where they are of the same examples.")
        twice = set(columns) & set(part.columns)
        if twice:
            raise ValueError(f"Two audits give a column {min(twice)!r}; name one of them anew.")
        columns |= part.columns
    return Findings(
        ids=parts[0].ids,
        columns=columns,
        sections=tuple(s for part in parts for s in part.sections),
        metadata=parts[0].metadata,
        texts={i: t for part in parts for i, t in part.texts.items()},
        pictures={i: t for part in parts for i, t in part.pictures.items()},
        facts={k: v for part in parts for k, v in part.facts.items()},
    )


def _listed(column: Tensor | list) -> list:
    return column.tolist() if isinstance(column, Tensor) else list(column)


def _unlisted(column: list) -> Tensor | list:
    kinds = {type(v) for v in column}
    return (
        torch.tensor(column, dtype=_DTYPES[kinds.pop()])
        if len(kinds) == 1 and kinds <= set(_DTYPES)
        else column
    )


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def _section(content: Mapping[str, Any]) -> Section:
    known = dict(content)
    known["tables"] = tuple(Table(**t) for t in known["tables"])
    known["passes"] = Passes(**known["passes"])
    for name in ("sentences", "columns", "shown", "papers"):
        known[name] = tuple(known[name])
    return Section(**known)
