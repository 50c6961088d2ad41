r"""The survey: what every training example is like, gathered once and kept with the texts, so that it can be looked at.

One sweep of the fit gives each example's loss and its self-influence
$\frac1N \nabla\ell_n^\top (C + \rho I)^{-1} \nabla\ell_n$, which is large where nothing else in the data supports the
example (Koh and Liang 2017, arXiv:1703.04730). Where there is an index, its rows say that without gradients, and which
examples are near-duplicates of one another; equal texts always count as duplicates.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.audit.base import Passes
from headwater.audit.outliers import outside
from headwater.core.capture import Accumulator, BatchInfo, Kept, Progress, Rows, sweep
from headwater.core.checkpoint import Checkpoint
from headwater.core.damping import Inverse
from headwater.core.display import Shown, title_of
from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.core.forward import evaluate
from headwater.core.index.search import clusters
from headwater.core.scores import from_table, to_column
from headwater.core.scoring import self_scores
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.target import Loss
from headwater.extras import require

if TYPE_CHECKING:
    import pyarrow

    from headwater.core.index import GradientIndex

KIND = "survey"
NEAR = 0.999  # cosine of rows from which examples count as near-duplicates
MOST_ROWS = 20_000  # rows that are held against one another: the time grows with their square
_EXCERPT = 300  # characters
GROUP = 256  # texts that are read together
_SOURCES = range(2, 201)  # distinct values of a column that examples can be totalled by


@dataclass(frozen=True, eq=False, kw_only=True)
class Survey(Shown):
    """What each training example is like: one value an example, in their order.

    Attributes:
        ids: Names of the training examples.
        self_influence: How far each lowers its own loss (nats).
        loss: Loss of each (nats), or None where it was not measured.
        lengths: Tokens of each, or None where examples have none.
        outlier: Whose self-influence lies far above the others'.
        first: Number of the first near-duplicate of each: its own where there is none before it.
        texts: How each reads, or None where examples are no texts.
        metadata: Columns of metadata.
        source_column: The column that names sources, if any.
        facts: What made it: damping, passes, seconds, fingerprints.
    """

    ids: list[str]
    self_influence: Float[Tensor, " train"]
    loss: Float[Tensor, " train"] | None = None
    lengths: list[int] | None = None
    outlier: Bool[Tensor, " train"]
    first: Int[Tensor, " train"]
    texts: list[str] | None = None
    metadata: dict[str, list] = field(default_factory=dict)
    source_column: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        named = {"texts": self.texts, "lengths": self.lengths, "loss": self.loss} | self.metadata
        named |= {"self_influence": self.self_influence, "first": self.first}
        for name, column in named.items():
            if column is not None and len(column) != len(self.ids):
                raise ValueError(
                    f"{name!r} must have one value for each of {len(self.ids)} examples; got {len(column)}."
                )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def n_copies(self) -> list[int]:
        """Near-duplicates of each, itself among them."""
        sizes = self.first.bincount(minlength=len(self))
        return sizes[self.first].tolist()

    def top(self, k: int = 10) -> list[int]:
        """Numbers of the examples of largest self-influence."""
        return self.self_influence.argsort(descending=True, stable=True)[:k].tolist()

    def title(self, number: int) -> str:
        """What to call an example."""
        return title_of(self.ids[number], {k: v[number] for k, v in self.metadata.items()})

    def table(self) -> dict[str, list]:
        """A row for each example, without the whole texts and the metadata."""
        n, sources = len(self), self.metadata.get(self.source_column or "")
        titles = [self.title(i) for i in range(n)]
        copies = self.n_copies
        return {
            "id": self.ids,
            "number": list(range(n)),
            "title": titles,
            "excerpt": [excerpt(t) for t in self.texts or [""] * n],
            "source": [None] * n
            if sources is None
            else [None if v is None else str(v) for v in sources],
            "length": self.lengths or [None] * n,
            "loss": [None] * n if self.loss is None else self.loss.tolist(),
            "self_influence": self.self_influence.tolist(),
            "outlier": self.outlier.tolist(),
            "cluster": [
                None if k == 1 else f for k, f in zip(copies, self.first.tolist(), strict=True)
            ],
            "n_copies": copies,
        }

    def to_pandas(self):
        """One row for each example, with the metadata; needs the extra `tabular`."""
        pandas = require("pandas", extra="tabular")
        rows = self.table()
        return pandas.DataFrame(rows | {k: v for k, v in self.metadata.items() if k not in rows})

    def save(self, folder: str | Path) -> None:
        """Write the survey as an artifact: tables of the examples, their metadata and texts, and a manifest."""
        facts = {"source_column": self.source_column, "facts": self.facts}
        made_from = self.facts.get("made_from", {})
        with ArtifactWriter(folder, kind=KIND, facts=facts, made_from=made_from) as writer:
            writer.table("examples", _examples_table(self.table()))
            writer.table("train", _metadata_table(self.ids, self.metadata), group=GROUP)
            if self.texts is not None:
                texts = {"text": [_storable(t) for t in self.texts]}
                writer.table("texts", texts, compression="zstd", group=GROUP)

    @classmethod
    def load(cls, folder: str | Path) -> "Survey":
        """Read what `save` wrote."""
        artifact = Artifact.open(folder, kind=KIND)
        columns = artifact.table("examples").to_pydict()
        ids, metadata = from_table(artifact.table("train").to_pydict())
        there = "texts" in artifact.table_names
        numbers = zip(columns["number"], columns["cluster"], strict=True)
        return cls(
            ids=ids,
            self_influence=torch.tensor(columns["self_influence"], dtype=torch.float32),
            loss=_numbers(columns["loss"]),
            lengths=None if None in columns["length"] else columns["length"],
            outlier=torch.tensor(columns["outlier"], dtype=torch.bool),
            first=torch.tensor([i if f is None else f for i, f in numbers], dtype=torch.int64),
            texts=artifact.table("texts").column("text").to_pylist() if there else None,
            metadata=metadata,
            source_column=artifact.facts["source_column"],
            facts=artifact.facts["facts"],
        )

    def plot(self, *, bins: int = 40):
        """How self-influence is spread, with the outliers marked; needs the extra `plots`."""
        pyplot = require("matplotlib.pyplot", extra="plots")
        figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
        values = self.self_influence.double()
        logs = values[values > 0].log10()
        if len(logs):
            low, high = float(logs.min()), float(logs.max())
            ends = low - 1e-6, max(high, low + 1e-3) + 1e-6  # none falls out by rounding
            edges = torch.linspace(*ends, bins + 1, dtype=torch.float64).tolist()
            for chosen, color, label in (
                (~self.outlier, "tab:blue", "training examples"),
                (self.outlier, "tab:orange", "outliers"),
            ):
                some = values[chosen & (values > 0)].log10().tolist()
                axes.hist(some, bins=edges, color=color, label=f"{len(some):,} {label}")
            axes.legend(frameon=False)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_xlabel("self-influence (log₁₀ nats)")
        axes.set_ylabel("examples")
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        several = sum(k > 1 for k in Counter(self.first.tolist()).values())
        lines = [
            f"Survey({len(self):,} training examples, {int(self.outlier.sum()):,} outliers, "
            f"{several:,} groups of near-duplicates; cost {self.facts.get('passes', 'not known')})"
        ]
        for i in self.top(5):
            shown = repr(self.title(i)[:60])
            lines.append(f"  {float(self.self_influence[i]):.3g} nats  {shown}")
        return "\n".join(lines)


def excerpt(text: str) -> str:
    r"""The beginning of a text, on one line.

    Example:
        >>> excerpt("One\n\ntwo  three")
        'One two three'
    """
    line = " ".join(text[: 4 * _EXCERPT].split())
    short = len(line) <= _EXCERPT and len(text) <= 4 * _EXCERPT
    return line if short else f"{line[: _EXCERPT - 1]}…"


def likely_source(metadata: dict[str, list]) -> str | None:
    """The column that most likely names sources: the first of few values, which are neither all alike nor all unlike.

    Example:
        >>> likely_source({"title": ["a", "b", "c", "d"], "topic": ["x", "y", "x", "y"]})
        'topic'
    """
    for name, values in metadata.items():
        kinds = {str(v) for v in values if v is not None}
        if len(kinds) in _SOURCES and 2 * len(kinds) <= len(values):
            return name
    return None


def survey(
    fit: Fit,
    *,
    index: "GradientIndex | None" = None,
    source: str | None = None,
    least: float = NEAR,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Look at every training example once.

    Args:
        fit: The fitted model.
        index: An index of the training data; its rows give self-influence, and tell near-duplicates.
        source: Metadata column that names sources; a likely one when left out.
        least: Cosine of rows from which examples count as near-duplicates.
        checkpoint: Where the state of an unfinished sweep is kept.
        progress: Called with (done, total, note).

    Raises:
        ValueError: There is no such column.
    """
    started, train = time.perf_counter(), fit.train
    if source is not None and source not in train.metadata:
        columns = ", ".join(train.metadata) or "none"
        raise ValueError(
            f"The training data have no column {source!r}; their columns are: {columns}."
        )
    texts = _texts(train)
    position = None if index is None else _positions(index, train.ids)
    if index is None or position is None:
        own, loss, told = _swept(fit, checkpoint, progress)
        first = _duplicates(torch.zeros(len(train), 0), texts, 2.0)
        told |= {"duplicates": "equal texts"}
    else:
        own, loss, told = _looked_up(fit, index, position, progress)
        many = len(train) > MOST_ROWS
        rows = torch.zeros(len(train), 0) if many else index.rows(position)
        first = _duplicates(rows, texts, least)
        why = f"equal texts (rows are compared up to {MOST_ROWS:,} examples)"
        told |= {"duplicates": why if many else f"equal texts, and rows of cosine {least} or more"}
    return Survey(
        ids=list(train.ids),
        self_influence=own.float(),
        loss=loss.float(),
        lengths=None if train.lengths is None else list(train.lengths),
        outlier=outside(own.double().clamp(min=1e-30).log()),
        first=first,
        texts=texts,
        metadata=dict(train.metadata),
        source_column=source or likely_source(train.metadata),
        facts=told | {"made_from": fit.made_from, "seconds": time.perf_counter() - started},
    )


class _Losses(Accumulator):
    """The values of a target, example by example."""

    kept: ClassVar[Kept] = "rows"

    def __init__(self, target: "_Heard", n: int):
        self.target, self.values = target, torch.zeros(n, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        """The target is heard as a whole."""

    def end_batch(self, batch: BatchInfo) -> None:
        self.values[batch.indices] = self.target.heard.double().cpu()

    def forget(self, indices: Tensor) -> bool:
        self.values[indices] = 0
        return True

    def merge(self, other: "_Losses") -> None:
        self.values += other.values

    def tensors(self) -> dict[str, Tensor]:
        return {"losses": self.values}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.values = tensors["losses"]


class _Heard(Loss):
    """The training loss, whose last values are kept."""

    heard: Tensor

    def __call__(self, model, task, batch, keys, fixed=None):
        values, fixed = super().__call__(model, task, batch, keys, fixed)
        object.__setattr__(self, "heard", values.detach())
        return values, fixed


def _swept(
    fit: Fit, checkpoint: Checkpoint | None, progress: Progress | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Self-influence and loss of every example in one sweep."""
    n, damping, target = len(fit.train), fit.damping(), _Heard()
    own, losses = (
        self_scores(fit.curvature, Inverse(damping), n, fit.followed),
        _Losses(target, n),
    )
    sweep(
        fit.capture().at("auto", fit.train),
        fit.train,
        [own, losses],
        target,
        batches=fit.batches(fit.train),
        checkpoint=checkpoint,
        progress=progress,
        note="survey",
    )
    told = {
        "self_influence": "by the gradients of every example",
        "damping": vars(damping),
        "passes": str(Passes(backward=1)),
        "n_passes": 1.0,
        "papers": ["arXiv:1703.04730", "arXiv:2308.03296"],
    }
    return own.finish() / n, losses.values, told


def _looked_up(
    fit: Fit, index: "GradientIndex", position: Tensor, progress: Progress | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Self-influence by the index's rows, and the loss by running the model forward."""
    own = index.squares[position].double() / index.journal.n_train
    loss = evaluate(
        fit.model,
        fit.train,
        fit.task.loss,
        batches=fit.batches(fit.train),
        progress=progress,
        note="survey",
    )
    told = {
        "self_influence": "by the rows of the index, which leave a part out",
        "damping": index.journal.space["damping"],
        "passes": str(Passes(forward=1)),
        "papers": ["arXiv:1703.04730"],
    }
    return own, loss.double(), told


def _positions(index: "GradientIndex", ids: Sequence[str]) -> Tensor | None:
    """Where the rows of the examples are; None where one has none."""
    live = index.live.nonzero().flatten()
    place = dict(zip(index.ids(live), live.tolist(), strict=True))
    found = [place.get(name, -1) for name in ids]
    return None if -1 in found else torch.tensor(found, dtype=torch.int64)


def _duplicates(rows: Tensor, texts: list[str] | None, least: float) -> Tensor:
    """For each example the first of its near-duplicates; without rows by equal texts alone."""
    if rows.shape[1]:
        return clusters(rows, least=least, content=texts)
    same: dict[str, int] = {}
    named = enumerate(texts or [])
    found = [same.setdefault(text, i) for i, text in named]
    return torch.tensor(found, dtype=torch.int64) if found else torch.arange(len(rows))


def _texts(train: Examples) -> list[str] | None:
    """How every example reads, if they are texts."""
    whole: Any = getattr(train, "text", None)
    tokens: Any = getattr(train, "tokens", None)
    if whole is not None:
        return [whole(i) for i in range(len(train))]
    return None if tokens is None else ["".join(tokens(i)) for i in range(len(train))]


def _numbers(values: list) -> Tensor | None:
    return None if None in values else torch.tensor(values, dtype=torch.float32)


def _storable(text: str) -> str:
    """The text as UTF-8 holds it: half surrogate pairs are replaced."""
    return text.encode("utf-8", "replace").decode()


def _examples_table(columns: dict[str, list]) -> "pyarrow.Table":
    import pyarrow as pa

    kinds = {
        **dict.fromkeys(("id", "title", "excerpt", "source"), pa.string()),
        **dict.fromkeys(("number", "length", "cluster", "n_copies"), pa.int64()),
        **dict.fromkeys(("loss", "self_influence"), pa.float64()),
        "outlier": pa.bool_(),
    }
    texts = [name for name, kind in kinds.items() if kind == pa.string()]
    stored = {k: [v and _storable(v) for v in columns[k]] for k in texts}
    return pa.table({k: pa.array((columns | stored)[k], type=kinds[k]) for k in columns})


def _metadata_table(ids: list[str], metadata: dict[str, list]) -> "pyarrow.Table":
    """Ids and metadata; what no column of one type can hold goes in as JSON."""
    import pyarrow as pa

    arrays = {"id": pa.array([_storable(i) for i in ids])}
    for given, values in metadata.items():
        name, values = to_column(_storable(given), values)
        try:
            arrays[name] = pa.array([_storable(v) if isinstance(v, str) else v for v in values])
        except (pa.ArrowException, OverflowError):
            arrays[f"json:{name.partition(':')[2]}"] = pa.array(
                [json.dumps(v, default=str) for v in values]
            )
    return pa.table(arrays)
