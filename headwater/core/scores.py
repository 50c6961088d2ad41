"""Scores: how each training example bears on each query."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.core.display import Shown
from headwater.core.store import Artifact, ArtifactWriter
from headwater.extras import require


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupTotals:
    """Scores of all training examples, totalled by the values of a metadata column.

    Attributes:
        column: The column.
        names: Its values, as text.
        counts: Training examples of each (group).
        raised: Sums of the positive scores (query, group).
        lowered: Sums of the negative scores (query, group).
    """

    column: str
    names: list[str]
    counts: list[int]
    raised: Float[Tensor, "query group"]
    lowered: Float[Tensor, "query group"]

    @property
    def net(self) -> Float[Tensor, "query group"]:
        """Sums of all scores."""
        return self.raised + self.lowered


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Shown):
    """Predicted change of each query's measurement when a training example is added once more.

    The columns are all training examples, or those that are among the strongest of any query (`kept`): then the
    scores took memory for those alone, however many there are.

    Attributes:
        values: (query, train), in the measurement's unit (nats) unless `unit` says otherwise; positive where the
            example raises it.
        query_ids: Names of the queries.
        train_ids: Names of the training examples.
        measurement: What was measured.
        low: Lower ends of the intervals (query, train), NaN where none was computed, or None.
        high: Upper ends.
        significance: Share of held-out examples that reach the score by chance (query, train), or None.
        control: Scores of the held-out examples (query, control), or None.
        by_layer: Parts of each layer (layer, query, train), or None.
        layers: Names of the layers of `by_layer` and `layer_totals`.
        layer_totals: Absolute parts of each layer, summed over all training examples (layer, query), or None.
        kept: Numbers of the training examples that the columns stand for; None for all in order.
        n_train: Number of all training examples.
        totals: Totals over all training examples by a metadata column, where some examples were not kept.
        metadata: Columns of metadata, one value a training example of `train_ids`.
        facts: What made the scores: method, damping, costs, fingerprints.
    """

    values: Float[Tensor, "query train"]
    query_ids: list[str]
    train_ids: list[str]
    measurement: str = "loss"
    low: Float[Tensor, "query train"] | None = None
    high: Float[Tensor, "query train"] | None = None
    significance: Float[Tensor, "query train"] | None = None
    control: Float[Tensor, "query control"] | None = None
    by_layer: Float[Tensor, "layer query train"] | None = None
    layers: list[str] = field(default_factory=list)
    layer_totals: Float[Tensor, "layer query"] | None = None
    kept: list[int] | None = None
    n_train: int | None = None
    totals: GroupTotals | None = None
    metadata: dict[str, list] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        shape = (len(self.query_ids), len(self.train_ids))
        if tuple(self.values.shape) != shape:
            raise ValueError(
                f"Expected scores {shape} for these ids; got {tuple(self.values.shape)}."
            )
        if self.kept is not None and (self.n_train is None or len(self.kept) != shape[1]):
            raise ValueError(
                f"Scores of some training examples need n_train and a number for each of the {shape[1]}; got "
                f"n_train={self.n_train} and {len(self.kept)} numbers."
            )
        if self.n_train is None:
            object.__setattr__(self, "n_train", shape[1])

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def unit(self) -> str:
        """The unit of the values; empty where only their order counts."""
        return self.facts.get("unit", "nats")

    def __sub__(self, other: "Scores") -> "Scores":
        """A contrast: why this rather than that, query by query."""
        if self.train_ids != other.train_ids or len(self) != len(other):
            raise ValueError(
                "A contrast needs scores of as many queries over the same training examples. Where only the strongest "
                "were kept, ask for it at once: attribute(..., weights=torch.tensor([[1.0, -1.0]]))."
            )
        ids = [f"{a} - {b}" for a, b in zip(self.query_ids, other.query_ids, strict=True)]
        control = None
        if self.control is not None and other.control is not None:
            control = self.control - other.control
        return Scores(
            values=self.values - other.values,
            query_ids=ids,
            train_ids=self.train_ids,
            measurement=f"{self.measurement} (difference)",
            control=control,
            significance=None
            if control is None
            else significance(self.values - other.values, control),
            kept=self.kept,
            n_train=self.n_train,
            metadata=self.metadata,
            facts=self.facts,
        )

    def index(self, column: int) -> int:
        """Number of the training example of a column, in the training data."""
        return column if self.kept is None else self.kept[column]

    def only(self, columns: Sequence[int]) -> "Scores":
        """The scores of some columns, as of the strongest that were kept."""
        chosen = list(columns)

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[..., chosen]

        return replace(
            self,
            **{name: cut(getattr(self, name)) for name in _BY_COLUMN},
            train_ids=[self.train_ids[i] for i in chosen],
            metadata={k: [v[i] for i in chosen] for k, v in self.metadata.items()},
            kept=[self.index(i) for i in chosen],
        )

    def top(self, k: int = 10, *, lowest: bool = False) -> Sequence[list[int]]:
        """For each query the k training examples that raise its measurement most, or lower it most."""
        k = min(k, self.values.shape[1])
        return torch.topk(self.values, k, dim=1, largest=not lowest).indices.tolist()

    def to_pandas(self, *, top: int | None = None):
        """One row a query and training example, with the metadata; all pairs, or the top of each side.

        Needs the extra `tabular`.
        """
        pandas = require("pandas", extra="tabular")
        rows, ends = (
            [],
            []
            if top is None
            else list(zip(self.top(top), self.top(top, lowest=True), strict=True)),
        )
        for q, query in enumerate(self.query_ids):
            chosen: Sequence[int] = range(self.values.shape[1])
            if top is not None:
                chosen = sorted({*ends[q][0], *ends[q][1]}, key=lambda i: -float(self.values[q, i]))
            rows.extend(self._row(q, query, i) for i in chosen)
        return pandas.DataFrame(rows)

    def _row(self, q: int, query: str, i: int) -> dict[str, Any]:
        row = {"query": query, "train": self.train_ids[i], "score": float(self.values[q, i])}
        for name in ("low", "high", "significance"):
            column = getattr(self, name)
            if column is not None:
                row[name] = float(column[q, i])
        return row | {k: v[i] for k, v in self.metadata.items()}

    def by(self, column: str) -> GroupTotals:
        """Totals over all training examples for each value of a metadata column.

        Raises:
            ValueError: There is no such column, or only the strongest examples were kept and it was not asked for.
        """
        if self.totals is not None and self.totals.column == column:
            return self.totals
        if self.kept is not None and len(self.kept) < (self.n_train or 0):
            raise ValueError(
                f"Only the strongest {len(self.kept)} of {self.n_train} examples were kept, without totals by "
                f"{column!r}; ask for them with attribute(..., group_by={column!r})."
            )
        names, index = groups_of(self.metadata, column)
        totals = torch.zeros(2, len(self), len(names), dtype=torch.float64)
        doubles = self.values.double()
        for total, part in zip(totals, (doubles.clamp(min=0), doubles.clamp(max=0)), strict=True):
            total.index_add_(1, index, part)
        return GroupTotals(
            column=column,
            names=names,
            counts=index.bincount(minlength=len(names)).tolist(),
            raised=totals[0].to(self.values),
            lowered=totals[1].to(self.values),
        )

    def save(self, folder: str | Path) -> None:
        """Write the scores as an artifact: tensors, a table of the training examples, a manifest."""
        facts = {k: getattr(self, k) for k in _FACTS}
        if self.totals is not None:
            facts["totals"] = vars(self.totals) | {
                k: getattr(self.totals, k).tolist() for k in ("raised", "lowered")
            }
        with ArtifactWriter(
            folder, kind="scores", facts=facts, made_from=self.facts.get("made_from", {})
        ) as writer:
            for name in _TENSORS:
                if getattr(self, name) is not None:
                    writer.tensor(name, getattr(self, name))
            writer.table("train", to_table(self.train_ids, self.metadata))

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """Read scores saved by `save`."""
        artifact = Artifact.open(folder, kind="scores")
        tensors = {n: artifact.tensor(n) for n in _TENSORS if n in artifact.tensor_names}
        train_ids, metadata = from_table(artifact.table("train").to_pydict())
        facts = dict(artifact.facts)
        if totals := facts.pop("totals", None):
            ends = {k: torch.tensor(totals[k]) for k in ("raised", "lowered")}
            facts["totals"] = GroupTotals(**totals | ends)
        return cls(**tensors, **facts, train_ids=train_ids, metadata=metadata)

    def plot(self, query: int = 0, *, top: int = 10):
        """A bar for each of the strongest examples of a query, with intervals; needs the extra `plots`."""
        pyplot = require("matplotlib.pyplot", extra="plots")
        ends = self.top(top)[query] + self.top(top, lowest=True)[query][::-1]
        chosen = list(dict.fromkeys(ends))
        values = self.values[query, chosen].tolist()
        figure, axes = pyplot.subplots(figsize=(6, 0.3 * len(chosen) + 1), layout="constrained")
        errors = None
        if self.low is not None and self.high is not None:
            low, high = self.low[query, chosen], self.high[query, chosen]
            center = torch.tensor(values)
            errors = torch.stack([center - low, high - center]).nan_to_num(0).clamp(min=0).numpy()
        colors = ["tab:blue" if v > 0 else "tab:orange" for v in values]
        axes.barh(range(len(chosen)), values, xerr=errors, color=colors)
        axes.set_yticks(range(len(chosen)), [self.train_ids[i] for i in chosen])
        axes.invert_yaxis()
        axes.set_xlabel(f"change of {self.measurement} ({self.unit or 'no unit'})")
        axes.set_title(self.query_ids[query])
        return figure

    def __repr__(self) -> str:
        q, n = self.values.shape
        of = "" if n == self.n_train else f" kept of {self.n_train:,}"
        unit = f"in {self.unit}" if self.unit else "without unit: only their order counts"
        lines = [
            f"Scores({q} queries × {n} training examples{of}, change of {self.measurement} {unit})"
        ]
        most, least = self.top(3), self.top(3, lowest=True)
        for row, name in enumerate(self.query_ids[:5]):
            raised, lowered = (
                ", ".join(
                    f"{self.train_ids[i]} {float(self.values[row, i]):+.3g}" for i in end[row]
                )
                for end in (most, least)
            )
            lines.append(f"  {name}: raised by {raised}; lowered by {lowered}")
        if q > 5:
            lines.append(f"  … and {q - 5} more queries")
        return "\n".join(lines)


def to_table(ids: list[str], metadata: dict[str, list]) -> dict[str, list]:
    """Ids of examples and their metadata, as columns that a table can hold."""
    return {"id": ids} | dict(to_column(k, v) for k, v in metadata.items())


def from_table(columns: dict[str, list]) -> tuple[list[str], dict[str, list]]:
    """Inverse of `to_table`: ids and metadata."""
    return columns["id"], dict(from_column(k, v) for k, v in columns.items() if k != "id")


def to_column(name: str, values: list) -> tuple[str, list]:
    """A column of metadata as tables have it: of one type; values of several types, and nested ones, as JSON."""
    kinds = {type(v) for v in values if v is not None}
    if len(kinds) <= 1 and not kinds & {dict, list, tuple}:
        return f"meta:{name}", values
    return f"json:{name}", [json.dumps(v, default=str) for v in values]


def from_column(name: str, values: list) -> tuple[str, list]:
    """Inverse of `to_column`."""
    kind, _, name = name.partition(":")
    if kind != "json":
        return name, values
    return name, [None if v is None else json.loads(v) for v in values]


_TENSORS = ("values", "low", "high", "significance", "control", "by_layer", "layer_totals")
_BY_COLUMN = ("values", "low", "high", "significance", "by_layer")
_FACTS = ("query_ids", "measurement", "layers", "kept", "n_train", "facts")


def groups_of(metadata: dict[str, list], column: str) -> tuple[list[str], Int[Tensor, " train"]]:
    """The distinct values of a metadata column, and the place of each example's value among them.

    Example:
        >>> names, index = groups_of({"source": ["web", "book", "web"]}, "source")
        >>> names, index.tolist()
        (['book', 'web'], [1, 0, 1])
    """
    if column not in metadata:
        columns = ", ".join(metadata) or "none"
        raise ValueError(f"There is no metadata column {column!r}; there are: {columns}.")
    values = [str(v) for v in metadata[column]]
    names = sorted(set(values))
    place = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([place[v] for v in values], dtype=torch.int64)


def significance(
    values: Float[Tensor, "query train"], control: Float[Tensor, "query control"]
) -> Float[Tensor, "query train"]:
    r"""How often a held-out example reaches a score: $p = (1 + \#\{c : c \ge s\}) / (1 + n)$, on the score's side.

    Held-out examples were not trained on, so what the model says about a query cannot have come from them; their
    scores are the noise that a training example must rise above.

    Example:
        >>> significance(torch.tensor([[5.0, -5.0]]), torch.tensor([[1.0, 2.0, -1.0]]))
        tensor([[0.2500, 0.2500]])
    """
    n = control.shape[1]
    ordered = control.double().sort(dim=1).values.contiguous()
    doubles = values.double().contiguous()
    above = n - torch.searchsorted(ordered, doubles, right=False)
    below = torch.searchsorted(ordered, doubles, right=True)
    return ((1 + torch.where(doubles >= 0, above, below)) / (1 + n)).float()
