"""The training data as a page shows them: a row for each example, what stands out, and every text without the model.

All of it is read from the survey of a run (`headwater survey`). Before there is one, the rows are what the index or the
saved traces know, and the summary says so.
"""

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from headwater.audit.survey import GROUP, KIND, excerpt, likely_source
from headwater.core.display import title_of
from headwater.core.evidence import Evidence
from headwater.core.files import ArtifactError, ArtifactMissing
from headwater.core.scores import from_column
from headwater.core.store import Artifact
from headwater.report import text
from headwater.report.views.answer import CELL, NAME, Named, harmless, minus
from headwater.report.views.folders import folders, inside

FOLDER = "corpus"
SORTS = ("number", "length", "loss", "self_influence")
MOST = 500  # rows of a page
TEXT = 100_000  # characters of an example that are shown
_HELD = 8  # searches, and groups of texts, that are kept at hand
_BINS, _SHOWN, _MEMBERS, _KINDS = 40, 50, 20, 200


class _Held:
    """What was worked out last, kept for whichever of a server's threads asks next.

    Args:
        most: How much of it to keep.
    """

    def __init__(self, most: int):
        self._most, self._values, self._lock = most, {}, Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key; made where it is not at hand, by two threads at worst."""
        with self._lock:
            if key in self._values:
                return self._values[key]
        value = make()
        with self._lock:
            while len(self._values) >= self._most:
                del self._values[next(iter(self._values))]
            self._values[key] = value
        return value


@dataclass(frozen=True, eq=False)
class _Known:
    """The rows of a run's examples, as columns.

    Attributes:
        table: A pyarrow table with the columns of a row.
        told: Where they come from.
        source_column: The column that names sources.
        artifact: The survey, or None where there is none.
        texts: Texts of examples by number, where there is no survey.
        metadata: Their metadata, likewise.
        numbered: Whether the numbers are those of the training data, not of a list of some of them.
    """

    table: Any
    told: str
    source_column: str | None
    artifact: Artifact | None = None
    texts: Mapping[int, str] = field(default_factory=dict)
    metadata: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    numbered: bool = True
    _orders: _Held = field(default_factory=lambda: _Held(2 * len(SORTS)))
    _found: _Held = field(default_factory=lambda: _Held(_HELD))
    _parts: _Held = field(default_factory=lambda: _Held(_HELD))

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, NaN where one is missing."""
        return self.table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)

    def order(self, name: str, *, descending: bool = False) -> np.ndarray:
        """Rows by a column; equal ones as they stand, missing ones last."""

        def make() -> np.ndarray:
            values = self.column(name)
            return np.argsort(-values if descending else values, kind="stable")

        return self._orders.get((name, descending), make)

    def stored(self, table: str, place: int) -> dict[str, Any]:
        """A row of a table of the survey; those that were stored with it are at hand for the next."""
        assert self.artifact is not None
        artifact, start = self.artifact, place - place % GROUP
        part = self._parts.get((table, start), lambda: artifact.rows(table, start, start + GROUP))
        return part.slice(place - start, 1).to_pylist()[0]

    def matching(self, source: str | None, search: str | None) -> np.ndarray | None:
        """Which rows have a source and hold a text; None for all."""
        if source is None and search is None:
            return None
        return self._found.get((source, search), lambda: self._match(source, search))

    def _match(self, source: str | None, search: str | None) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        found = np.ones(len(self.table), dtype=bool)
        if source is not None:
            column = self.table.column("source")
            kinds = [kind for kind in column.unique().to_pylist() if kind is not None]
            meant = [kind for kind in kinds if source in (kind, _source(kind))]
            found &= _mask(pc.is_in(column, value_set=pa.array(meant, pa.string())))  # type: ignore[attr-defined]
        if search is not None:
            hit = np.zeros(len(self.table), dtype=bool)
            for name in ("id", "title", "excerpt"):
                column = self.table.column(name)
                held = pc.match_substring(column, search, ignore_case=True)  # type: ignore[attr-defined]
                hit |= _mask(held)
            found &= hit
        return found


def _source(name: str) -> str:
    """How a source is shown."""
    return text.visible(text.shortened(name, NAME))


def _mask(found: Any) -> np.ndarray:
    return found.fill_null(False).to_numpy(zero_copy_only=False).astype(bool)


def rows(
    run: str | Path,
    offset: int = 0,
    limit: int = 100,
    sort: str = "number",
    descending: bool = False,
    source: str | None = None,
    search: str | None = None,
) -> dict[str, Any]:
    """Some of the training examples, in an order.

    Args:
        run: The run folder.
        offset: How many to pass over.
        limit: How many to give; at most 500.
        sort: What to sort by: number, length, loss or self_influence; missing values come last.
        descending: The largest first.
        source: Only those of this source.
        search: Only those whose id, title or beginning holds this, in small or capital letters.

    Raises:
        ValueError: There is no such order, or the numbers are negative.
    """
    if sort not in SORTS:
        raise ValueError(f"Expected sort to be one of {', '.join(SORTS)}; got {sort!r}.")
    if offset < 0 or not 0 <= limit <= MOST:
        raise ValueError(
            f"Expected an offset of 0 or more and a limit from 0 to {MOST}; got {offset} and {limit}."
        )
    known = _known(run)
    order = known.order(sort, descending=descending)
    wanted = known.matching(source or None, (search or "").strip() or None)
    if wanted is not None:
        order = order[wanted[order]]
    page = known.table.take(order[offset : offset + limit]).to_pylist()
    return {"total": len(order), "offset": offset, "rows": [_row(each) for each in page]}


def every(run: str | Path, most: int) -> dict[str, Any]:
    """Rows for a file that holds them all: those of largest self-influence, in their order, where there are more."""
    known = _known(run)
    chosen = np.arange(len(known.table))
    if len(chosen) > most:
        chosen = np.sort(known.order("self_influence", descending=True)[:most])
    page = known.table.take(chosen).to_pylist()
    return {"total": len(known.table), "offset": 0, "rows": [_row(each) for each in page]}


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with harmless texts; its numbers are finite or None."""
    return {
        "number": row["number"],
        "id": row["id"],
        "title": text.visible(text.shortened(row["title"], NAME)),
        "excerpt": text.visible(row["excerpt"]),
        "source": row["source"] and _source(row["source"]),
        "length": row["length"],
        "loss": _finite(row["loss"]),
        "self_influence": _finite(row["self_influence"]),
        "outlier": row["outlier"],
        "cluster": row["cluster"],
        "n_copies": row["n_copies"] or 1,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def summary(run: str | Path) -> dict[str, Any]:
    """What stands out in the training data: how self-influence is spread, outliers, near-duplicates, and sources."""
    known = _known(run)
    table, own = known.table, known.column("self_influence")
    outliers = np.flatnonzero(_mask(table.column("outlier")))
    outliers = outliers[np.argsort(-own[outliers], kind="stable")]
    totals, queries = _nets(Path(run), known.source_column)
    return harmless(
        {
            "surveyed": known.artifact is not None,
            "told": known.told,
            "n": len(table),
            "self_influence": _histogram(own, _spread(own, len(outliers))),
            "loss": _histogram(known.column("loss")),
            "outliers": [
                {
                    "id": Named(row["id"]),
                    "number": row["number"],
                    "title": text.shortened(row["title"], NAME),
                    "score": f"{row['self_influence']:.3g}",
                }
                for row in table.take(outliers[:_SHOWN]).to_pylist()
            ],
            "clusters": _clusters(known),
            "sources": _sources(known, totals, len(queries)),
            "queries": queries,
        }
    )


def example(run: str | Path, number: int) -> dict[str, Any]:
    """One training example, whole, as far as it is stored.

    Args:
        run: The run folder.
        number: Its number.

    Raises:
        ArtifactMissing: There is no example of that number.
    """
    known = _known(run)
    place = _place(known, number)
    if place is None:
        raise ArtifactMissing(
            f"There is no example {number:,}; the {len(known.table):,} known ones have other numbers."
        )
    row = known.table.slice(place, 1).to_pylist()[0]
    content, metadata = known.texts.get(number), known.metadata.get(number, {})
    if known.artifact is not None:
        there = known.artifact.table_names
        if "texts" in there:
            content = known.stored("texts", place)["text"]
        told = known.stored("train", place)
        pairs = (from_column(k, [v]) for k, v in told.items() if k != "id")
        metadata = {name: values[0] for name, values in pairs}
    if content is None:
        how = "its text is not stored; `headwater survey` keeps the texts of all examples"
        content = row["excerpt"] or f"({how})"
    named: list[tuple[str, Any]] = [("example", row["id"]), *metadata.items()]
    for label, key, unit in (
        ("length", "length", " tokens"),
        ("training loss", "loss", " nats"),
        ("self-influence", "self_influence", " nats"),
    ):
        if row[key] is not None:
            named.append((label, f"{text.quantity(row[key])}{unit}"))
    if row["n_copies"] and row["n_copies"] > 1:
        named.append(("near-duplicates", f"{row['n_copies']:,} of this kind"))
    return harmless(
        {
            "number": number,
            "id": Named(row["id"]),
            "title": text.shortened(row["title"], NAME),
            "pieces": [{"text": content[:TEXT], "heat": ""}],
            "metadata": [
                (text.shortened(name, NAME), text.shortened(text.quantity(value), CELL))
                for name, value in named
            ],
            "truncated": len(content) > TEXT,
        }
    )


def surveyed(run: str | Path) -> bool:
    """Whether a run folder holds a survey."""
    return facts(run) is not None


def facts(run: str | Path) -> dict[str, Any] | None:
    """What made the survey of a run; None where there is none."""
    if (Path(run) / FOLDER).is_symlink():
        return None
    try:
        return Artifact.open(Path(run) / FOLDER, kind=KIND).facts["facts"]
    except ArtifactError:
        return None


def n_train(run: str | Path) -> int | None:
    """Number of training examples, where a survey knows it."""
    known = _known(run)
    return None if known.artifact is None else len(known.table)


def columns(run: str | Path) -> list[str]:
    """Metadata columns that examples can be totalled by, as far as they are known."""
    known = _known(run)
    if known.artifact is not None:
        named = _schema(known.artifact, "train")
        return [name.partition(":")[2] for name in named if ":" in name]
    return list(dict.fromkeys(name for each in known.metadata.values() for name in each))


def _schema(artifact: Artifact, table: str) -> list[str]:
    return artifact.rows(table, 0, 1).column_names


def numbers(run: str | Path) -> Mapping[str, int]:
    """Numbers of the training examples by id, where a survey or an index knows them."""
    run = Path(run)
    return _numbers(str(run), _stamps(run))


@lru_cache(maxsize=4)
def _numbers(run: str, stamps: Any) -> Mapping[str, int]:
    known = _known(run)
    if not known.numbered:
        return {}
    pairs = zip(
        known.table.column("id").to_pylist(),
        known.table.column("number").to_pylist(),
        strict=True,
    )
    return dict(pairs)


def stamp(place: Path) -> tuple[int, int, int] | None:
    """What changes when an artifact or a file is written anew."""
    for path in (place / "manifest.json", place / "index.json", place):
        try:
            found = os.stat(path)
        except OSError:
            continue
        return found.st_mtime_ns, found.st_size, found.st_ino
    return None


def _stamps(run: Path) -> tuple:
    """What the rows of a run depend on."""
    own = stamp(run / FOLDER)
    if own is not None:
        return (own,)
    folder = run / "traces"
    traces = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return (None, stamp(run / "index"), *(stamp(p) for p in traces))


def _known(run: str | Path) -> _Known:
    run = Path(run)
    return _read(str(run), _stamps(run))


@lru_cache(maxsize=4)
def _read(run: str, stamps: Any) -> _Known:
    place = Path(run)
    makers: tuple[Callable[[Path], _Known | None], ...] = (_surveyed, _indexed, _traced)
    found = (make(place) for make in makers)
    return next(each for each in found if each is not None)


def _surveyed(run: Path) -> _Known | None:
    """The survey; one that cannot be read, or lies elsewhere, counts as none."""
    if (run / FOLDER).is_symlink():
        return None
    try:
        artifact = Artifact.open(run / FOLDER, kind=KIND)
        table = artifact.table("examples").combine_chunks()
    except ArtifactError:
        return None
    made = artifact.facts["facts"]
    told = f"Every training example; self-influence {made.get('self_influence', 'as it was found')}"
    told += f"; near-duplicates by {made['duplicates']}." if "duplicates" in made else "."
    if "seconds" in made:
        told += f" The survey took {text.duration(made['seconds'])}"
        told += f" (passes over the data: {made['passes']})." if "passes" in made else "."
    return _Known(
        table=table,
        told=told,
        source_column=artifact.facts.get("source_column"),
        artifact=artifact,
    )


def _indexed(run: Path) -> _Known | None:
    """The rows of an index: ids and metadata, and self-influence."""
    from headwater.core.index import GradientIndex

    try:
        index = GradientIndex(run / "index")
    except ArtifactError:
        return None
    names, number, metadata = index.ids(), index.numbers(), index.metadata()
    own = index.self_influence().tolist()
    read = dict(_traced_texts(run))
    place = dict(zip(names, number, strict=True))
    told = (
        "Examples of the index, with self-influence by its rows; texts, losses, outliers and near-duplicates are known "
        "after `headwater survey`."
    )
    return _listed(
        told,
        [
            (n, i, {k: v[row] for k, v in metadata.items()}, read.get(i, ("", {}))[0], s)
            for row, (n, i, s) in enumerate(zip(number, names, own, strict=True))
        ],
        texts={place[i]: content for i, (content, _) in read.items() if i in place},
    )


def _traced(run: Path) -> _Known:
    """The examples that saved traces list, numbered as they come."""
    found = _traced_texts(run)
    told = (
        f"Only the {len(found):,} examples that saved traces list, numbered as they come; `headwater survey` looks at "
        "every training example."
        if found
        else "No example is known yet; `headwater survey` looks at every training example."
    )
    return _listed(
        told,
        [(n, i, metadata, content, None) for n, (i, (content, metadata)) in enumerate(found)],
        texts={n: content for n, (_, (content, _)) in enumerate(found)},
        numbered=False,
    )


def _traced_texts(run: Path) -> list[tuple[str, tuple[str, dict[str, Any]]]]:
    """Ids, texts and metadata of the examples that saved traces list, each once."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for evidence in _evidence(run):
        for answer in evidence.answers:
            for _, _, influencer in answer.ranked():
                found.setdefault(influencer.example_id, (influencer.text, influencer.metadata))
    return list(found.items())


def _listed(
    told: str,
    known: Sequence[tuple[int, str, dict[str, Any], str, float | None]],
    *,
    texts: Mapping[int, str],
    numbered: bool = True,
) -> _Known:
    import pyarrow as pa

    metadata = {n: each for n, _, each, _, _ in known}
    every = dict.fromkeys(name for each in metadata.values() for name in each)
    source = likely_source({k: [each.get(k) for each in metadata.values()] for k in every})
    empty = [None] * len(known)
    sources = [each.get(source or "") for each in metadata.values()]
    table = pa.table(
        {
            "id": pa.array([i for _, i, _, _, _ in known], pa.string()),
            "number": pa.array([n for n, _, _, _, _ in known], pa.int64()),
            "title": pa.array([title_of(i, m) for _, i, m, _, _ in known], pa.string()),
            "excerpt": pa.array([excerpt(t) for _, _, _, t, _ in known], pa.string()),
            "source": pa.array([None if v is None else str(v) for v in sources], pa.string()),
            "length": pa.array(empty, pa.int64()),
            "loss": pa.array(empty, pa.float64()),
            "self_influence": pa.array([s for *_, s in known], pa.float64()),
            "outlier": pa.array(empty, pa.bool_()),
            "cluster": pa.array(empty, pa.int64()),
            "n_copies": pa.array(empty, pa.int64()),
        }
    )
    return _Known(
        table=table,
        told=told,
        source_column=source,
        texts=texts,
        metadata=metadata,
        numbered=numbered,
    )


def _evidence(run: Path) -> list[Evidence]:
    """The saved traces; one that cannot be read is left out."""
    found = []
    for place in folders(run / "traces").values():
        try:
            found.append(_loaded(str(inside(run, place)), stamp(place)))
        except ArtifactError:
            continue
    return found


@lru_cache(maxsize=64)
def _loaded(place: str, stamp: Any) -> Evidence:
    return Evidence.load(place)


def _place(known: _Known, number: int) -> int | None:
    """The row of an example of a number."""
    own = known.table.column("number").to_numpy()
    if 0 <= number < len(own) and own[number] == number:
        return number
    found = np.flatnonzero(own == number)
    return int(found[0]) if len(found) else None


def _histogram(values: np.ndarray, told: str | None = None) -> dict[str, Any] | None:
    """Counts of values in bins that are equally wide on a logarithmic scale; None where there are no values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    positive = values[values > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 1.0)
    if high <= low * (1 + 1e-9):
        low, high = low / 2, high * 2
    edges = np.geomspace(low, high, _BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    found = {"edges": edges.tolist(), "counts": counts.tolist()}
    return found if told is None else found | {"told": told}


def _spread(values: np.ndarray, outliers: int) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, middle, high = (float(np.quantile(values, q)) for q in (0.05, 0.5, 0.95))
    return (
        f"Half of the examples lie below {middle:.3g} nats, nine in ten between {low:.3g} and {high:.3g}; "
        f"{outliers:,} lie above Tukey's fence of the logarithms."
    )


def _clusters(known: _Known) -> list[dict[str, Any]]:
    own = known.column("cluster")
    there = np.flatnonzero(np.isfinite(own))
    if not len(there):
        return []
    named, inverse, counts = np.unique(own[there], return_inverse=True, return_counts=True)
    grouped = np.split(there[np.argsort(inverse, kind="stable")], np.cumsum(counts)[:-1])
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    number = known.table.column("number").to_numpy()
    titles = known.table.column("title")
    return [
        {
            "id": int(named[i]),
            "n": int(counts[i]),
            "title": text.shortened(titles[int(grouped[i][0])].as_py(), NAME),
            "members": number[grouped[i][:_MEMBERS]].tolist(),
        }
        for i in order
    ]


def _nets(run: Path, column: str | None) -> tuple[list[dict[str, float]], list[str]]:
    """Net totals by source of each answer of the saved traces that totalled by the column, and what was asked."""
    totals, asked = [], []
    for evidence in _evidence(run):
        for answer in evidence.answers:
            if answer.sources and answer.source_column == column:
                totals.append({total.name: total.net for total in answer.sources})
                prompt = (
                    answer.prompt if len(answer.prompt) <= NAME else f"…{answer.prompt[-NAME:]}"
                )
                asked.append(f"{prompt} → {text.shortened(answer.completion, NAME)}")
    return totals, asked


def _sources(
    known: _Known, totals: Sequence[dict[str, float]], n_queries: int
) -> list[dict[str, Any]]:
    """Each source with its examples, their mean self-influence, and its net influence on each query."""
    names = known.table.column("source").to_pylist()
    own = known.column("self_influence")
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name is not None:
            places.setdefault(name, []).append(i)
    for name in (n for each in totals for n in each):
        places.setdefault(name, [])
    ranked = sorted(places.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:_KINDS]
    return [
        {
            "name": _source(name),
            "n": len(rows),
            "self_influence": _mean(own[rows]),
            "net": [each.get(name) for each in totals],
        }
        for name, rows in ranked
    ]


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return minus(f"{float(known.mean()):.3g}") if len(known) and math.isfinite(known.sum()) else "–"
