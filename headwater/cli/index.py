"""`headwater index`: rows of the training data, made once and asked many questions."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from headwater.cli.common import (
    Session,
    emit_json,
    progress_bar,
    read_examples,
    run_session,
    say,
    update_record,
)
from headwater.cli.flags import RUN, Actions, require, run_action

if TYPE_CHECKING:
    from headwater.cli.flags import DataFlags
    from headwater.core.capture import Progress
    from headwater.core.fit import Fit
    from headwater.core.index import Damage, GradientIndex, LoGra, Whitened
    from headwater.data.tokens import TextExamples
    from headwater.trace import Cascade, Indexed

FOLDER, HELDOUT = "index", "index-heldout"
DUPLICATE = 0.999  # cosine of rows from which examples are shown as one


@dataclass(frozen=True, kw_only=True)
class Build:
    """Make the index of a run's training data, and of its held-out data where there are any.

    A killed build goes on where it stopped. Scores on a sample are compared with unprojected ones, and printed.

    Example: headwater index build runs/mine --rank 16

    Args:
        run: The run folder of `headwater fit`.
        kind: whitened needs the fit's curvature, logra does not.
        rank: Numbers kept on each side of a layer.
        sides: For whitened: the leading coordinates, random mixtures of all, or auto: what is better on the sample.
        dtype: How rows are stored.
        factors: Store each layer's matrix by so many of its singular pairs, for random sides and logra; whole when
            left out.
        damping: As for `headwater trace`; for logra a number or "0.1 relative".
        seed: Seed of random matrices.
        sample: Examples on which the error is measured; 0 measures none.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    kind: Literal["whitened", "logra"] = "whitened"
    rank: int = 16
    sides: Literal["auto", "leading", "random"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "int8"
    factors: int | None = None
    damping: str | None = None
    seed: int = 0
    sample: int = 200
    json: bool = False

    def check(self) -> None:
        """Refuse an index that holds nothing."""
        require("--rank", self.rank, "at least 1", self.rank >= 1)
        require("--factors", self.factors, "at least 1", self.factors is None or self.factors >= 1)
        require("--sample", self.sample, "0 or more", self.sample >= 0)

    def rows(self) -> "Whitened | LoGra":
        """What a row is."""
        from headwater.core.index import LoGra, Whitened

        given: dict[str, Any] = {} if self.damping is None else {"damping": self.damping}
        if self.kind == "logra":
            return LoGra(rank=self.rank, seed=self.seed, **given)
        return Whitened(rank=self.rank, sides=self.sides, seed=self.seed, **given)


@dataclass(frozen=True, kw_only=True)
class Add:
    """Add the rows of more data, read as the run's own are.

    Example: headwater index add runs/mine more.jsonl

    Args:
        run: The run folder.
        data: JSONL, CSV, Parquet or text file, or a folder of them.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    data: tyro.conf.Positional[Path]
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove examples by their ids.

    Example: headwater index remove runs/mine doc-17 doc-40 --compact

    Args:
        folder: The run folder or the index.
        ids: Ids of the examples.
        compact: Take the rows off the disk now.
        json: Print the result as JSON.
    """

    folder: tyro.conf.Positional[Path]
    ids: tyro.conf.Positional[tuple[str, ...]] = ()
    compact: bool = False
    json: bool = False

    def check(self) -> None:
        """Refuse to remove nothing."""
        if not (self.ids or self.compact):
            raise ValueError("Expected ids of examples, or --compact; got neither.")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make one index of several that have the same model, projection and dtype.

    Example: headwater index merge runs/all/index runs/a runs/b

    Args:
        out: Folder of the new index.
        indexes: Run folders or indexes.
        json: Print the result as JSON.
    """

    out: tyro.conf.Positional[Path]
    indexes: tyro.conf.Positional[tuple[Path, ...]]
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tell what an index holds and how well it answers.

    Args:
        folder: The run folder or the index.
        json: Print the result as JSON.
    """

    folder: tyro.conf.Positional[Path]
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of an index and tell which rows are damaged; the exit code is 1 where some are.

    Args:
        folder: The run folder or the index.
        repair: Make damaged rows again, and only those; needs the run folder.
        data: Data to make rows from, where those of the run and those that were added have moved.
        json: Print the result as JSON.
    """

    folder: tyro.conf.Positional[Path]
    repair: bool = False
    data: Path | None = None
    json: bool = False


def run(words: list[str]) -> int:
    return run_action("index", words, ACTIONS, example="build runs/mine")


def _build(command: Build) -> int:
    from headwater.core.index import GradientIndex

    session, _ = run_session(command.run)
    fitted = _fit(command.run, session)
    with progress_bar(quiet=command.json) as progress:
        index = GradientIndex.build(
            fitted,
            command.run / FOLDER,
            kind=command.rows(),
            dtype=command.dtype,
            factors=command.factors,
            sample=command.sample,
            progress=progress,
        )
        if session.heldout is not None:
            GradientIndex.build(
                fitted,
                command.run / HELDOUT,
                kind=replace(command, sides=_sides(index)).rows(),
                dtype=command.dtype,
                factors=command.factors,
                examples=session.heldout,
                sample=0,
                progress=progress,
            )
    return _tell(index, command.json, f'headwater trace {command.run} --index --prompt "…"')


def _sides(index: "GradientIndex") -> Literal["leading", "random"]:
    """Which coordinates an index was built with."""
    return "random" if index.journal.space["kind"] == "sketched" else "leading"


def _add(command: Add) -> int:
    from headwater.core.index import GradientIndex

    session, record = run_session(command.run)
    index = GradientIndex(command.run / FOLDER)
    more = read_examples(
        command.data, _columns(record), session.language, train=session.train, what="added example"
    )
    path = str(command.data.resolve())

    def noted(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"index": list(dict.fromkeys([*_added(record, command.run), path]))}

    # Before the rows: however an addition ends, its file is known.
    update_record(command.run, noted)
    with progress_bar(quiet=command.json) as progress:
        index.add(_fit(command.run, session), more, progress=progress)
    return _tell(index, command.json)


def _remove(command: Remove) -> int:
    from headwater.core.index import GradientIndex

    index = GradientIndex(_place(command.folder))
    if command.ids:
        index.remove(command.ids)
    if command.compact:
        index.compact()
    return _tell(index, command.json)


def _merge(command: Merge) -> int:
    from headwater.core.index import GradientIndex

    parts = [GradientIndex(_place(folder)) for folder in command.indexes]
    return _tell(GradientIndex.merge(_place(command.out), parts), command.json)


def _info(command: Info) -> int:
    from headwater.core.index import GradientIndex

    return _tell(GradientIndex(_place(command.folder)), command.json)


def _verify(command: Verify) -> int:
    from headwater.core.index import GradientIndex

    place = _place(command.folder)
    with progress_bar(quiet=command.json) as progress:
        if command.repair:
            found = _repair(command, place, progress)
            left = GradientIndex.verify(place)
        else:
            found = left = GradientIndex.verify(place, progress)
    if command.json:
        emit_json({"damaged": [vars(d) for d in found], "left": len(left)})
        return 1 if left else 0
    for damage in found:
        say(f"  {'mended: ' if command.repair else ''}{damage}")
    if left:
        how = "the data that their rows were made of are not at hand: name them with --data"
        if not command.repair:
            how = f"mend them with: headwater index verify {command.folder} --repair"
        say(f"{len(left)} damaged file{'s' * (len(left) > 1)}; {how}")
        return 1
    say(
        "Every byte of the index is what was written."
        if not found
        else "Nothing is damaged any more."
    )
    return 0


def _repair(command: Verify, place: Path, progress: "Progress | None") -> list["Damage"]:
    """Make what is damaged again, from the run's own data and from those that were added."""
    from headwater.core.index import GradientIndex
    from headwater.core.index.journal import Journal

    session, record = run_session(command.folder)
    fitted = _fit(command.folder, session)
    if command.data is not None:
        examples = read_examples(command.data, _columns(record), session.language)
        return GradientIndex.repair(place, fitted, examples, progress)
    journal, own = Journal.read(place), session.train.fingerprint()
    source = {s.number: journal.sources[s.source].data for s in journal.shards}
    wanted = {own if d.shard is None else source[d.shard] for d in GradientIndex.verify(place)}
    given = _sources(wanted, session, record, command.folder)
    found = []
    for name in sorted(given, key=lambda name: name == own):  # what is made of all rows comes last
        found += GradientIndex.repair(place, fitted, given[name], progress)
    return found


ACTIONS: Actions = {
    "build": (Build, _build),
    "add": (Add, _add),
    "remove": (Remove, _remove),
    "merge": (Merge, _merge),
    "info": (Info, _info),
    "verify": (Verify, _verify),
}


def _place(folder: Path) -> Path:
    """The index of a run folder, or the folder itself."""
    return folder / FOLDER if (folder / RUN).is_file() else folder


def _columns(record: dict[str, Any]) -> "DataFlags":
    """How added data are read: as the run's own, but all of them."""
    from headwater.cli.flags import DataFlags, restore

    return replace(restore(DataFlags, record["fit"]["columns"]), limit=None)


def _added(record: dict[str, Any], run: Path) -> list[str]:
    """Files that were added to a run's index."""
    paths = record.get("index", [])
    if not (isinstance(paths, list) and all(isinstance(p, str) for p in paths)):
        raise ValueError(
            f"{run / RUN} does not name the files that were added to the index; restore it from a copy."
        )
    return list(dict.fromkeys(paths))


def _sources(
    wanted: Collection[str], session: Session, record: dict[str, Any], run: Path
) -> dict[str, "TextExamples"]:
    """Those data of a run and its added files that have the fingerprints asked for, as far as they are there."""
    found = {session.train.fingerprint(): session.train}
    for path in map(Path, _added(record, run)):
        if path.exists() and not set(wanted) <= set(found):
            examples = read_examples(path, _columns(record), session.language)
            found[examples.fingerprint()] = examples
    return {name: examples for name, examples in found.items() if name in wanted}


def _fit(run: Path, session: Session) -> "Fit":
    from headwater.core.fit import load
    from headwater.core.task import CausalLM

    return load(run / "fit", session.language.model, session.train, CausalLM())


def _tell(index: "GradientIndex", as_json: bool, following: str = "") -> int:
    info = index.info()
    if as_json:
        emit_json(info)
        return 0
    say(str(index))
    say(
        f"  {info['bytes_per_row']:,} bytes an example, {info['removed']:,} removed rows still on the disk, "
        f"{info['sources']} sources{', an addition is unfinished' if info['unfinished'] else ''}"
    )
    for line in _quality(info):
        say(f"  {line}")
    if following:
        say(f"Next: {following}")
    return 0


def _quality(facts: dict[str, Any]) -> Sequence[str]:
    """What was measured of an index's error, in sentences."""
    lines = []
    if tried := facts.get("recall_10"):
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in tried.items())
        lines.append(f"of each top ten were found with coordinates that are: {told}")
    if "kept_share" in facts:
        lines.append(
            f"the kept coordinates carry {100 * facts['kept_share']:.0f} % of the influence expected of all"
        )
    if error := facts.get("error"):
        whole, dtype = error["whole"], error["dtype_alone"]
        hundred = whole["recall_100"]
        lines.append(
            f"beside unprojected scores of {error['queries']} × {error['rows']} pairs: "
            f"Spearman {whole['spearman']:.3f}, {100 * whole['recall_10']:.0f} % of each top ten"
            + ("" if hundred is None else f", {100 * hundred:.0f} % of each top hundred")
        )
        lines.append(
            f"of that the storage alone: Spearman {dtype['spearman']:.4f}, "
            f"{100 * dtype['recall_10']:.0f} % of each top ten"
        )
    elif "folder" in facts:
        lines.append("its error was not measured")
    return lines


def looked_up(facts: dict[str, Any]) -> list[str]:
    """How an answer was looked up, and what it may have missed."""
    if "stages" in facts:
        told = [f"  {line}" for line in _quality(facts["index"])]
        return [f"Candidates come from {facts['scanned']:,} rows of the index:", *told]
    spent = facts["seconds_queries"], facts["seconds_search"]
    lines = [
        f"Looked up {facts['scanned']:,} rows in {1000 * spent[1]:.0f} ms; the queries' own rows took {spent[0]:.1f} s."
    ]
    lines += [f"  {line}" for line in _quality(facts["index"])]
    if error := facts["index"].get("error"):
        missed = 10 * (1 - error["whole"]["recall_10"])
        lines.append(
            f"  so of the ten strongest by the whole curvature about {missed:.1f} may be missing; without "
            "--no-rescore more are looked at, without --index all"
        )
    return lines


def journal_digests(run: Path) -> list[str]:
    """What the answers of a run's indexes depend on."""
    from headwater.core.index.shards import file_digest

    files = [run / name / "index.json" for name in (FOLDER, HELDOUT)]
    return [file_digest(f) for f in files if f.is_file()]


def indexed(
    run: Path,
    fitted: "Fit",
    session: Session,
    record: dict[str, Any],
    where: Sequence[str],
    rescoring: dict[str, Any] | None = None,
) -> tuple["Fit", "Indexed | Cascade"]:
    """The method that looks a run's index up, and the fit with the texts of all its sources.

    Args:
        run: The run folder.
        fitted: Its fit.
        session: Its model and data.
        record: Its record.
        where: Metadata to look among.
        rescoring: Options of the cascade that scores again what was found; None looks up only.
    """
    from headwater.core.index import GradientIndex
    from headwater.trace import Cascade, Indexed

    index = GradientIndex(run / FOLDER)
    known = [source.data for source in index.journal.sources]
    given = _sources(set(known), session, record, run)
    if not set(known) <= set(given):
        from headwater.core.files import ArtifactMismatch

        files = ", ".join([record["fit"]["data"], *_added(record, run)])
        raise ArtifactMismatch(
            f"The index in {index.folder} was made from other data than the run now has; restore what has changed of "
            f"{files}, or remove the index and build it again."
        )
    texts = _joined([given[name] for name in known], index)
    place = {name: i for i, name in enumerate(texts.ids)}
    shared: dict[str, Any] = {
        "index": index,
        "where": conditions(where),
        "copies": DUPLICATE,
        "content": lambda name: tuple(texts.input_ids[place[name]].tolist()),
    }
    if rescoring is not None:
        return replace(fitted, train=texts), Cascade(**shared, **rescoring)
    heldout = run / HELDOUT
    held = GradientIndex(heldout) if heldout.is_dir() else None
    return replace(fitted, train=texts), Indexed(heldout=held, **shared)


def _joined(parts: Sequence["TextExamples"], index: "GradientIndex") -> "TextExamples":
    """The examples of all sources by their numbers; of those that share an id, removed ones get another."""
    from headwater.data.tokens import joined

    names = [name for part in parts for name in part.ids]
    live, several = set(index.numbers()), Counter(names)
    ids = [
        f"{name} (removed, {i})" if several[name] > 1 and i not in live else name
        for i, name in enumerate(names)
    ]
    return joined(parts, ids=ids)


def conditions(words: Sequence[str]) -> dict[str, Any] | None:
    """What `--where` asks for.

    Example:
        >>> conditions(["source=wiki", "source=books", "year=1990..1999", "date=2020.."])
        {'source': ['wiki', 'books'], 'year': ('1990', '1999'), 'date': ('2020', None)}
    """
    found: dict[str, Any] = {}
    for word in words:
        column, sign, value = word.partition("=")
        if not (column and sign):
            raise ValueError(f"Expected --where column=value or column=low..high; got {word!r}.")
        low, between, high = value.partition("..")
        known = found.get(column, [])
        if isinstance(known, tuple) or (between and known):
            raise ValueError(
                f"Expected one range or values of {column!r} in --where; got several, among them {word!r}."
            )
        found[column] = (low or None, high or None) if between else [*known, value]
    return found or None


__all__ = ["Add", "Build", "Info", "Merge", "Remove", "Verify", "conditions", "indexed", "run"]
