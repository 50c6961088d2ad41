r"""Timeline: when in training something was learnt, and from what.

SOURCE (see `headwater.trace.source`) is a sum over segments of training. Its summands, kept apart, say of each stretch
of training, and of each stage of several (pretrain, then fine-tune), how much what was seen there bears on a query at
the end. A number is a change of the query's measurement in nats, were an example counted once more in that stretch,
expected over orders of the examples, after all that came later has let it fade.

It is a derivative, with SOURCE's assumptions: Hessian and gradients stand still within a segment, and the curvature is
that of the fit. What was learnt by heart is not learnt more by seeing it again, so that a segment's *net* sum is not
how much the segment taught: read its positive and its negative part too, and its strongest examples.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.display import Shown
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit
from headwater.core.prediction import IGNORE
from headwater.core.scores import GroupTotals, Scores, from_table, to_table
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.task import Measurement
from headwater.extras import require
from headwater.trace.base import to_scores
from headwater.trace.source import Source
from headwater.training.trajectory import Segment, StageRecord, Trajectory

KIND = "timeline"
_TEXT = 200  # characters kept of an example's text
_PANELS = 8  # queries that a plot shows unless it is told which
_LEGEND = ("raised it", "lowered it", "net", "training loss (right)")


@dataclass(frozen=True, eq=False, kw_only=True)
class Timeline(Shown):
    """What each segment of training did to each query, example by example.

    Attributes:
        values: (segment, query, train), in nats: change of the measurement at the end of training, were the example
            counted once more in that segment.
        segments: The segments, first to last.
        stages: The stages of training, with their names.
        losses: Mean training loss of each step, for the plot.
        query_ids: Names of the queries.
        train_ids: Names of the training examples.
        measurement: What was measured.
        queries: How each query reads; its name where that is not known.
        metadata: Columns of metadata, one value a training example.
        texts: Beginnings of the strongest examples' texts by id, where they can be read.
        gap: Largest difference between the sum over segments and the attribution made as a whole (nats), or None where
            that was not made.
        facts: What made the timeline: method, options, what each segment remembers, fingerprints.
    """

    values: Float[Tensor, "segment query train"]
    segments: tuple[Segment, ...]
    stages: tuple[StageRecord, ...]
    losses: list[float]
    query_ids: list[str]
    train_ids: list[str]
    measurement: str = "loss"
    queries: list[str] = field(default_factory=list)
    metadata: dict[str, list] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    gap: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        shape = (len(self.segments), len(self.query_ids), len(self.train_ids))
        if tuple(self.values.shape) != shape:
            raise ValueError(
                f"Expected values {shape} for these segments and ids; got {tuple(self.values.shape)}."
            )
        if not self.queries:
            object.__setattr__(self, "queries", list(self.query_ids))

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def net(self) -> Float[Tensor, "segment query"]:
        """Sums of all scores of a segment."""
        return self.values.double().sum(2)

    @property
    def raised(self) -> Float[Tensor, "segment query"]:
        """Sums of its positive scores."""
        return self.values.double().clamp(min=0).sum(2)

    @property
    def lowered(self) -> Float[Tensor, "segment query"]:
        """Sums of its negative scores."""
        return self.values.double().clamp(max=0).sum(2)

    @property
    def by_stage(self) -> Float[Tensor, "stage query train"]:
        """Scores summed over the segments of each stage."""
        stage = torch.tensor([segment.stage for segment in self.segments])
        found = self.values.new_zeros(len(self.stages), *self.values.shape[1:])
        return found.index_add_(0, stage, self.values)

    def scores(self, segment: int | None = None) -> Scores:
        """The scores of one segment; the sum over all segments when left out."""
        return Scores(
            values=self.values.double().sum(0).float() if segment is None else self.values[segment],
            query_ids=self.query_ids,
            train_ids=self.train_ids,
            measurement=self.measurement,
            metadata=self.metadata,
            facts=self.facts,
        )

    def by(self, column: str) -> list[GroupTotals]:
        """Totals of each segment by the values of a metadata column."""
        return [self.scores(k).by(column) for k in range(len(self))]

    def strongest(self, segment: int, query: int, k: int = 5) -> list[tuple[str, float]]:
        """Ids and scores of the examples of largest size in a segment, without those that it did not see."""
        values = self.values[segment, query]
        order = values.abs().topk(min(k, len(values))).indices.tolist()
        return [(self.train_ids[i], float(values[i])) for i in order if values[i] != 0]

    def stage_of(self, segment: int) -> str:
        """What the stage of a segment is called."""
        number = self.segments[segment].stage
        return self.stages[number].name or f"stage {number + 1}"

    def rows(self, query: int, *, top: int = 5, column: str | None = None) -> list[dict[str, Any]]:
        """A row for each segment of one query: what tables and machines are shown.

        Args:
            query: Number of the query.
            top: How many of the strongest examples.
            column: Metadata column to total by.
        """
        net, raised, lowered = self.net, self.raised, self.lowered
        totals = [] if column is None else self.by(column)
        rows = []
        for k, segment in enumerate(self.segments):
            row: dict[str, Any] = {
                "stage": self.stage_of(k),
                "start": segment.start,
                "stop": segment.stop,
                "net": float(net[k, query]),
                "raised": float(raised[k, query]),
                "lowered": float(lowered[k, query]),
                "strongest": self.strongest(k, query, top),
            }
            if totals:
                names, sums = totals[k].names, totals[k].net[query].tolist()
                row["totals"] = dict(zip(names, sums, strict=True))
            rows.append(row)
        return rows

    def to_pandas(self, *, top: int | None = None):
        """One row a segment, query and training example; all of them, or the top of each side.

        Needs the extra `tabular`.
        """
        pandas = require("pandas", extra="tabular")
        frames = []
        for k, segment in enumerate(self.segments):
            frame = self.scores(k).to_pandas(top=top)
            for name, value in (
                ("stop", segment.stop),
                ("start", segment.start),
                ("stage", self.stage_of(k)),
                ("segment", k),
            ):
                frame.insert(0, name, value)
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True)

    def save(self, folder: str | Path) -> None:
        """Write the timeline as an artifact: a tensor, a table of the training examples, a manifest."""
        facts = {name: getattr(self, name) for name in _FACTS}
        parts = {name: [asdict(each) for each in getattr(self, name)] for name in _PARTS}
        made_from = self.facts.get("made_from", {})
        with ArtifactWriter(folder, kind=KIND, facts=facts | parts, made_from=made_from) as writer:
            writer.tensor("values", self.values)
            writer.table("train", to_table(self.train_ids, self.metadata))

    @classmethod
    def load(cls, folder: str | Path) -> "Timeline":
        """Read a timeline saved by `save`."""
        artifact = Artifact.open(folder, kind=KIND)
        facts = dict(artifact.facts)
        segments = [
            Segment(**s | {"checkpoints": tuple(s["checkpoints"])}) for s in facts.pop("segments")
        ]
        stages = tuple(StageRecord(**each) for each in facts.pop("stages"))
        train_ids, metadata = from_table(artifact.table("train").to_pydict())
        return cls(
            values=artifact.tensor("values"),
            segments=tuple(segments),
            stages=stages,
            train_ids=train_ids,
            metadata=metadata,
            **facts,
        )

    def plot(self, queries: Sequence[int] | None = None):
        """A panel for each query over the steps of training; needs the extra `plots`.

        A bar spans its segment: up what the segment's examples raised, down what they lowered, and a line for the net.
        Stages are named and parted by dashed lines; the training loss is the faint curve behind.

        Args:
            queries: Numbers of the queries; the first eight when left out.
        """
        pyplot = require("matplotlib.pyplot", extra="plots")
        chosen = range(min(len(self.query_ids), _PANELS)) if queries is None else list(queries)
        figure, panels = pyplot.subplots(
            len(chosen),
            figsize=(8, 2.1 * len(chosen) + 0.8),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, query in zip(panels[:, 0], chosen, strict=True):
            self._panel(axes, query)
        panels[-1, 0].set_xlabel("training step")
        figure.supylabel(f"change of {self.measurement} at the end (nats)", fontsize="medium")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        order = [label for label in _LEGEND if label in named]
        handles = [named[label] for label in order]
        figure.legend(handles, order, loc="outside upper center", ncols=4, frameon=False)
        return figure

    def _panel(self, axes: Any, query: int) -> None:
        starts = [segment.start for segment in self.segments]
        widths = [segment.steps for segment in self.segments]
        raised, lowered, net = (x[:, query].tolist() for x in (self.raised, self.lowered, self.net))
        self._loss_curve(axes)
        bars = {"align": "edge", "edgecolor": "white", "linewidth": 0.8, "alpha": 0.85}
        axes.bar(starts, raised, widths, color="tab:blue", label=_LEGEND[0], **bars)
        axes.bar(starts, lowered, widths, color="tab:orange", label=_LEGEND[1], **bars)
        stops = [segment.stop for segment in self.segments]
        axes.hlines(net, starts, stops, color="black", linewidth=1.8, label=_LEGEND[2])
        axes.axhline(0, color="black", linewidth=0.6)
        high, low = max([*raised, 0.0]), min([*lowered, 0.0])
        size = high - low or 1.0
        axes.set_ylim(low - 0.08 * size, high + 0.3 * size)  # room for the names of the stages
        steps = self.stages[-1].stop
        axes.set_xlim(0, steps)
        for number, stage in enumerate(self.stages):
            if number:
                axes.axvline(stage.start, color="black", linewidth=1, linestyle=(0, (4, 3)))
            center, name = (stage.start + stage.stop) / 2, stage.name or f"stage {number + 1}"
            style = {"ha": "center", "va": "top", "fontsize": "small", "style": "italic"}
            place = {"transform": axes.get_xaxis_transform(), "color": "0.25"}
            axes.text(center, 0.97, _plain(name, 24), parse_math=False, **style, **place)
        title = _plain(self.queries[query], 110)
        axes.set_title(title, loc="left", fontsize="small", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)

    def _loss_curve(self, axes: Any) -> None:
        known = [(k, v) for k, v in enumerate(self.losses) if v == v]
        if not known:
            return
        behind = axes.twinx()
        behind.plot(*zip(*known, strict=True), color="0.5", linewidth=0.8, alpha=0.5)
        axes.plot([], [], color="0.5", linewidth=0.8, alpha=0.5, label=_LEGEND[3])
        behind.set_ylim(bottom=0)
        behind.tick_params(axis="y", labelsize="x-small", colors="0.55", length=2)
        behind.spines[["top", "left"]].set_visible(False)
        behind.spines["right"].set_color("0.7")
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)

    def __repr__(self) -> str:
        n, q, n_train = self.values.shape
        lines = [
            f"Timeline({q} queries × {n} segments of {self.stages[-1].stop} steps × {n_train:,} training examples, "
            f"change of {self.measurement} in nats were an example counted once more)"
        ]
        for query in range(min(q, 5)):
            lines.append(f"  {_plain(self.queries[query], 90)}")
            rows = self.rows(query, top=3)
            for row in rows:
                named = ", ".join(f"{_plain(i, 24)} {value:+.2g}" for i, value in row["strongest"])
                lines.append(
                    _line(f"{row['start']}-{row['stop']}", row["stage"], row) + f"  {named}"
                )
            total = {key: sum(row[key] for row in rows) for key in ("net", "raised", "lowered")}
            lines.append(_line("all", "", total))
        if q > 5:
            lines.append(f"  … and {q - 5} more queries")
        if self.gap is not None:
            lines.append(
                f"  check: the sum is the attribution made as a whole, to {self.gap:.2g} nats"
            )
        return "\n".join(lines)


_PARTS = ("segments", "stages")
_FACTS = ("losses", "query_ids", "measurement", "queries", "texts", "gap", "facts")


def _line(steps: str, stage: str, row: dict[str, Any]) -> str:
    sums = "  ".join(f"{key} {row[key]:+8.3g}" for key in ("net", "raised", "lowered"))
    return f"    {steps:>13}  {_plain(stage, 16):16}  {sums}"


def _plain(text: str, width: int) -> str:
    """The text on one line, cut to a width; what is not to be printed is escaped."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return line if len(line) <= width else f"{line[: width - 1]}…"


def timeline(
    fit: Fit,
    queries: Any,
    *,
    trajectory: Trajectory | str | Path,
    source: Source | None = None,
    measurement: Measurement | None = None,
    check: bool = False,
    top: int = 20,
    progress: Progress | None = None,
) -> Timeline:
    """When in training each query was learnt, and from which examples.

    Args:
        fit: The model at the end of the run, and the data of all its stages.
        queries: Examples, a tuple of tensors, or a dataset, like the training data.
        trajectory: The record of the run with its checkpoints, or its folder; several runs made one after another are
            one record by `headwater.training.join.join`.
        source: The method, with its number of segments; `Source()` with a segment for each stage at least when left
            out.
        measurement: What is asked; the task's own when left out.
        check: Attribute once more as a whole, and hold the sum over segments against it (twice the time).
        top: Examples of each query and segment whose texts are kept.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The record does not lead to the fit's model, or has too few checkpoints.
    """
    started, examples = time.perf_counter(), as_examples(queries)
    record = trajectory if isinstance(trajectory, Trajectory) else Trajectory.load(trajectory)
    if source is None:
        source = Source(segments=max(Source.segments, len(record.stages)))
    options: dict[str, Any] = {
        "trajectory": record,
        "measurement": measurement,
        "progress": progress,
    }
    values, told = source.told_by_segment(fit, examples, **options)
    total = to_scores(
        source,
        fit,
        examples,
        values.sum(0),
        measurement=measurement,
        unit="nats",
        facts={"curvature": source.told_curvature(fit), "segments": told},
    )
    gap = None
    if check:
        whole = source.attribute(fit, examples, **options).values
        gap = float((whole - total.values).abs().max())
    found = Timeline(
        values=values.float(),
        segments=tuple(record.segments(source.segments)),
        stages=tuple(record.stages),
        losses=record.losses,
        query_ids=total.query_ids,
        train_ids=total.train_ids,
        measurement=total.measurement,
        queries=_readable(examples),
        metadata=total.metadata,
        gap=gap,
        facts=total.facts | {"seconds": time.perf_counter() - started},
    )
    found.texts.update(_texts(found, fit.train, top))
    return found


def _readable(queries: Examples) -> list[str]:
    """How queries read: what is not scored, an arrow, and the rest; the name of one that has no text."""
    read = getattr(queries, "tokens", None)
    if read is None:
        return list(queries.ids)
    texts = []
    for q in range(len(queries)):
        pieces, scored = read(q), queries.batch([q])["labels"][0] != IGNORE
        first = int(scored.long().argmax())
        prompt, said = ("".join(part) for part in (pieces[:first], pieces[first:]))
        texts.append(f"{prompt.strip()} → {said.strip()}" if first > 1 else prompt + said)
    return texts


def _texts(found: Timeline, train: Examples, top: int) -> dict[str, str]:
    """The beginnings of the texts of the strongest examples, if they have texts."""
    read = getattr(train, "tokens", None)
    if read is None:
        return {}
    pairs = [(k, q) for k in range(len(found)) for q in range(len(found.query_ids))]
    wanted = {name for k, q in pairs for name, _ in found.strongest(k, q, top)}
    numbers = {name: i for i, name in enumerate(train.ids) if name in wanted}
    return {name: "".join(read(i))[:_TEXT] for name, i in numbers.items()}
