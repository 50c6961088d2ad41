"""The index of per-example gradients: build, add, remove, compact, merge."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.curvature import Layerwise
from headwater.core.damping import Damping
from headwater.core.distributed import World, current
from headwater.core.examples import Examples, as_examples
from headwater.core.files import ArtifactError, ArtifactMismatch, ArtifactMissing
from headwater.core.fingerprint import fingerprint_model, short
from headwater.core.fit import Fit
from headwater.core.index.answers import Answers
from headwater.core.index.checking import Damage, repair, verify
from headwater.core.index.encoding import Dtype, encoding_of
from headwater.core.index.journal import (
    JOURNAL,
    Journal,
    Pending,
    ShardFacts,
    Source,
    mask_of,
    ranges_of,
)
from headwater.core.index.metric import ProjectedMetric, fit_metric
from headwater.core.index.quality import take_sample
from headwater.core.index.shards import ShardWriter
from headwater.core.index.spaces import (
    LoGra,
    LoGraSpace,
    Space,
    Whitened,
    curvature_is_flat,
    factors_of,
    kept_share,
    space_of,
)
from headwater.core.index.stored import StoredRows
from headwater.core.index.writing import (
    RowWriter,
    clean,
    link_or_copy,
    require_room,
    write_rows,
    write_table,
)
from headwater.core.locks import FolderLock
from headwater.core.target import Loss

BLOCK_ROWS = 128  # with a checksum of their own
SHARD_BYTES = 1 << 28


class GradientIndex(Answers, StoredRows):
    """Projected gradients of a dataset on disk, to be asked many questions.

    Open one with `GradientIndex(folder)`; nothing is written by reading.

    Args:
        folder: Where it lies.

    Raises:
        ArtifactMissing: There is no index, or its first build is not finished.
        ArtifactDamaged: A file is missing or of another size.

    Example:
        >>> index = GradientIndex.build(fit, "runs/mine/index", dtype="int8")  # doctest: +SKIP
        >>> scores = index.attribute(fit, queries, keep=10)  # doctest: +SKIP
    """

    @classmethod
    def build(
        cls,
        fit: Fit,
        folder: str | Path,
        *,
        kind: Whitened | LoGra | None = None,
        dtype: Dtype = "int8",
        factors: int | None = None,
        examples: Any = None,
        sample: int = 200,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress | None = None,
    ) -> "GradientIndex":
        """Make the rows of a dataset in one pass; a killed build goes on where it stopped, byte for byte.

        The ranks of a process group share the pass, and the first writes: any number of them leaves the same bytes.

        A finished index of the same inputs and options is opened instead of built again.

        Args:
            fit: The fitted model.
            folder: Where the index goes.
            kind: What a row is; `Whitened()` when left out.
            dtype: How rows are stored.
            factors: Store each layer's matrix by so many of its singular pairs; None stores it whole. With one
                position an example a single pair loses nothing. The leading coordinates of `Whitened` are no
                matrices; its random mixtures and `LoGra` are.
            examples: The data; the fit's training data when left out.
            sample: Rows whose unprojected scores are computed to tell the error; 0 measures none.
            shard_bytes: Size at which a new shard is begun.
            progress: Called with (done, total, note).

        Raises:
            ArtifactMismatch: The folder holds an index of something else; the message names what differs.
            ValueError: The rows that are asked for have no factors.
            OutOfDisk: The rows would not fit.
        """
        folder, asked = Path(folder), kind or Whitened()
        data = fit.train if examples is None else as_examples(examples)
        spaces = asked.spaces(fit) if factors is None else _matrices(asked.spaces(fit))
        known = data.fingerprint()
        with _writing(folder, _made_from(fit, spaces[0]) | {"data": known}) as world:
            space, facts = _chosen(folder, spaces, fit, data, dtype, factors, sample, progress)
            asked_for = Journal(
                made_from=_made_from(fit, space),
                space=space.record(),
                layers=space.widths,
                dtype=dtype,
                factors=factors_of(space, factors),
                n_train=len(fit.train),
                facts=facts,
            )
            source = _source(fit, data, known, asked_for, shard_bytes)
            if world.is_first:
                _warn_of_width(space, len(data))
            journal = world.first(lambda: _begin(folder, asked_for, source))
            if not world.agreed(lambda: journal and bool(journal.sources)):
                _fill(folder, journal, fit, space, data, progress, sample)
        return cls(folder)

    def add(self, fit: Fit, examples: Any, *, progress: Progress | None = None) -> None:
        """Add the rows of more data, as new shards; they appear together once all are written.

        Raises:
            ArtifactMismatch: The fit is not the one that the index was made with.
            ValueError: An id is in the index already.
        """
        data, space = as_examples(examples), self.space(fit)
        known = data.fingerprint()
        with _writing(self.folder, _made_from(fit, space) | {"data": known}) as world:
            self._open(Journal.read(self.folder))
            source = _source(fit, data, known, self.journal, SHARD_BYTES)
            twice = set(data.ids) & set(self.ids())
            if twice:
                raise ValueError(
                    f"Example ids must be unique; {min(twice)!r}{_others(len(twice))} in the index already. Remove "
                    "them first, or give the new examples other ids."
                )
            journal = world.first(lambda: _pending(self.folder, self.journal, source))
            _fill(self.folder, journal, fit, space, data, progress)
            self._open(Journal.read(self.folder))

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows: they are marked at once and leave the disk with `compact`.

        Raises:
            ValueError: An id is not in the index; then nothing is removed.
        """
        with FolderLock(self.folder):
            self._open(Journal.read(self.folder))
            gone = self.positions_of(list(dict.fromkeys(ids)))
            shards = []
            for start, shard in zip(self.starts[:-1], self.journal.shards, strict=True):
                mask = ~shard.live()
                mask[gone[(gone >= start) & (gone < start + shard.n)] - start] = True
                shards.append(replace(shard, removed=ranges_of(mask)))
            replace(self.journal, shards=shards).write(self.folder)
            self._open(Journal.read(self.folder))

    def compact(self) -> None:
        """Write shards that have removed rows anew without them."""
        with FolderLock(self.folder):
            self._open(Journal.read(self.folder))
            _refuse_pending(self.folder, self.journal, "compact")
            clean(self.folder, self.journal)
            following, shards = self.journal.following, []
            for number, shard in enumerate(self.journal.shards):
                if not shard.removed:
                    shards.append(shard)
                elif shard.n_live:
                    shards.append(self._rewritten(number, following))
                    following += 1
            if not shards:
                raise ValueError(
                    f"Every row of the index in {self.folder} was removed; delete the folder instead."
                )
            journal = replace(self.journal, shards=shards, following=following)
            journal.write(self.folder)
            self._open(journal)
            clean(self.folder, journal)

    def _rewritten(self, number: int, following: int) -> ShardFacts:
        """A shard without its removed rows, under another number."""
        old, live = self.journal.shards[number], self.journal.shards[number].live()
        keep = live.nonzero().flatten()
        blocks = [len(part) for part in keep.split(BLOCK_ROWS)]
        start = self.starts[number]
        with ShardWriter(self.folder, following, blocks, self.encoding) as writer:
            done = writer.open()
            for part in keep.split(BLOCK_ROWS)[done:]:
                stored = self.shards[number].stored(part)
                writer.write_parts(stored | {"squares": self.squares[start + part]})
            rows = writer.seal()
        table = self.table(number).take(pyarrow.array(keep.numpy()))
        ids = write_table(self.folder, following, table)
        dropped = mask_of(old.dropped, old.last - old.first, old.first)
        dropped[old.plan_rows()[~live] - old.first] = True
        return replace(
            old,
            number=following,
            blocks=blocks,
            digests=writer.digests,
            rows=rows,
            ids=ids,
            dropped=ranges_of(dropped, old.first),
            removed=[],
        )

    @classmethod
    def merge(cls, folder: str | Path, indexes: Sequence["GradientIndex"]) -> "GradientIndex":
        """One index of the rows of several, whose files are linked, or copied where the disk cannot link.

        Raises:
            ArtifactMismatch: They are not of one model, projection and dtype; the message names what differs.
            ValueError: An id is in two of them.
        """
        folder = Path(folder)
        if not indexes:
            raise ValueError("Expected at least one index to merge; got none.")
        first = indexes[0].journal
        seen: dict[str, Path] = {}
        for index in indexes:
            _refuse_pending(index.folder, index.journal, "merge")
            _same_rows(index.folder, index.journal, indexes[0].folder, first)
            for name in index.ids():
                if name in seen:
                    raise ValueError(
                        f"Example {name!r} is in {seen[name]} and in {index.folder}; remove it from one of them."
                    )
                seen[name] = index.folder
        with FolderLock(folder):
            if (folder / JOURNAL).exists():
                raise ArtifactError(f"{folder} holds an index already; merge into a new folder.")
            sources: list[Source] = []
            shards: list[ShardFacts] = []
            for index in indexes:
                offset = sum(s.n for s in sources)
                for place, shard in enumerate(index.journal.shards):
                    moved = replace(shard, number=len(shards), source=shard.source + len(sources))
                    link_or_copy(index.folder / shard.rows_file, folder / moved.rows_file)
                    table = index.table(place)
                    numbers = pyarrow.array([n + offset for n in table["number"].to_pylist()])
                    table = table.set_column(1, "number", numbers)
                    shards.append(replace(moved, ids=write_table(folder, moved.number, table)))
                sources += index.journal.sources
            journal = replace(
                first, sources=sources, shards=shards, following=len(shards), metric=None, facts={}
            )
            if first.metric is not None:
                journal = replace(journal, metric=fit_metric(folder, journal))
            journal.write(folder)
        return cls(folder)

    def drop_pending(self) -> None:
        """Give up an addition that was not finished."""
        with FolderLock(self.folder):
            journal = replace(Journal.read(self.folder), pending=None)
            journal.write(self.folder)
            clean(self.folder, journal)
            self._open(journal)

    @staticmethod
    def verify(folder: str | Path, progress: Progress | None = None) -> list[Damage]:
        """Read every byte of an index; returns what is damaged, by file and rows."""
        return verify(Path(folder), progress)

    @classmethod
    def repair(
        cls, folder: str | Path, fit: Fit, examples: Any = None, progress: Progress | None = None
    ) -> list[Damage]:
        """Make damaged rows again from their data, and only those; returns what was mended.

        Args:
            folder: The index.
            fit: The fit it was made with.
            examples: The data of the damaged rows; the fit's training data when left out. Rows of other data stay.
            progress: Called with (done, total, note).

        Raises:
            ArtifactMismatch: The fit is not that of the index, or nothing that is damaged was made from the data.
        """
        data = fit.train if examples is None else as_examples(examples)
        folder = Path(folder)
        journal = Journal.read(folder)
        space = _space(folder, journal, fit)
        with FolderLock(folder):
            return repair(folder, fit, space, data, progress)

    def require(self, fit: Fit) -> None:
        """Refuse a fit of another model, task or curvature.

        Raises:
            ArtifactMismatch: The message names what differs.
        """
        _require(self.folder, self.journal, fit)

    def space(self, fit: Fit) -> Space:
        """The coordinates of the rows, made again from the fit.

        Raises:
            ArtifactMismatch: The fit is not the one that the index was made with.
        """
        return _space(self.folder, self.journal, fit)

    def info(self) -> dict[str, Any]:
        """What the index holds and how well it answers."""
        journal = self.journal
        files = sum(s.rows["bytes"] + s.ids["bytes"] for s in journal.shards)
        return journal.facts | {
            "folder": str(self.folder),
            "rows": len(self),
            "removed": self.n_rows - len(self),
            "numbers_per_row": self.encoding.dim,
            "layers": len(journal.layers),
            "dtype": journal.dtype,
            "factors": None if journal.factors is None else journal.factors["rank"],
            "kind": journal.space["kind"],
            "damping": journal.space["damping"],
            "bytes_per_row": self.encoding.bytes_per_row,
            "bytes": files + (0 if journal.metric is None else journal.metric["bytes"]),
            "shards": len(journal.shards),
            "sources": len(journal.sources),
            "unfinished": journal.pending is not None,
            "made_from": journal.made_from,
        }

    def project(
        self, fit: Fit, examples: Any, *, progress: Progress | None = None
    ) -> Float[Tensor, "n dim"]:
        """Rows of examples under the training loss, in float32, without storing them."""
        from headwater.core.index.answers import project

        data = as_examples(examples)
        return project(fit, self.space(fit), data, Loss(), progress=progress)

    def __repr__(self) -> str:
        info = self.info()
        return (
            f"GradientIndex({len(self):,} rows of {info['numbers_per_row']:,} numbers in {info['dtype']}, "
            f"{info['kind']}, {info['bytes'] / 1e9:.3g} GB in {self.folder})"
        )


@contextmanager
def _writing(folder: Path, of: dict[str, str]) -> Iterator[World]:
    """The ranks that make an index together, while the first keeps other writers out of its folder.

    Args:
        folder: The index.
        of: What it is made from, which must be the same everywhere.
    """
    world = current()
    with world.failing_together(), ExitStack() as stack:
        for rank, theirs in enumerate(world.exchange(of)):
            differ = [k for k in of if theirs[k] != of[k]]
            if differ:
                raise ValueError(
                    f"The ranks do not make the same index: rank {rank} has another {' and '.join(differ)} than rank "
                    f"{world.rank}. All must run the same program on the same data."
                )
        if world.is_first:
            stack.enter_context(FolderLock(folder))
        yield world


def _made_from(fit: Fit, space: Space) -> dict[str, str]:
    return {
        "model": fit.made_from["model"],
        "task": fit.made_from["task"],
        "projection": space.fingerprint,
    }


def _require(folder: Path, journal: Journal, fit: Fit) -> None:
    at_hand = {"model": fingerprint_model(fit.model), "task": fit.task.name}
    differ = [k for k, v in at_hand.items() if journal.made_from.get(k) != v]
    if differ:
        told = ", ".join(
            f"another {k} (index {short(journal.made_from.get(k, ''))}…, given {short(at_hand[k])}…)"
            for k in differ
        )
        raise ArtifactMismatch(
            f"The index in {folder} was made from {told}; build it again, or load the {' and '.join(differ)} it was "
            "made from."
        )


def _space(folder: Path, journal: Journal, fit: Fit) -> Space:
    """The coordinates of an index, made again from its fit."""
    _require(folder, journal, fit)
    space = space_of(journal.space, fit, folder)
    if list(space.widths.items()) != list(journal.layers.items()):
        raise ArtifactMismatch(
            f"The rows of the index in {folder} have other widths than its coordinates; build it again."
        )
    return space


def _source(
    fit: Fit, data: Examples, fingerprint: str, journal: Journal, shard_bytes: int
) -> Source:
    rows = max(BLOCK_ROWS, shard_bytes // journal.encoding.bytes_per_row)
    return Source(
        data=fingerprint,
        n=len(data),
        batch_size=fit.batch_size,
        batch_tokens=fit.batch_tokens,
        block_rows=BLOCK_ROWS,
        shard_rows=rows,
    )


def _begin(folder: Path, journal: Journal, source: Source) -> Journal:
    """The journal to go on with: a new one, or that of an unfinished or finished index of the same options."""
    try:
        old = Journal.read(folder)
    except ArtifactMissing:
        need = source.n * journal.encoding.bytes_per_row
        require_room(folder, need)
        journal = replace(journal, pending=Pending(source=source))
        journal.write(folder)
        clean(folder, journal)
        return journal
    known = old.sources[0] if old.sources else old.pending.source if old.pending else None
    if known is not None and known.training:
        raise ArtifactMismatch(
            f"The index in {folder} was written while the model trained, each row at the parameters of its step; "
            "choose another folder for rows at the final ones."
        )
    _same_rows(folder, old, folder, journal, "what is asked for now")
    if known is None or known.data != source.data:
        raise ArtifactMismatch(
            f"The index in {folder} was made from other data (saved {short(known.data) if known else 'nothing'}…, "
            f"given {short(source.data)}…); choose another folder, or point to the data it was made from."
        )
    return old


def _pending(folder: Path, journal: Journal, source: Source) -> Journal:
    """The journal with a source to be written, or the one that is being written already."""
    if journal.pending is None:
        require_room(folder, source.n * journal.encoding.bytes_per_row)
        journal = replace(journal, pending=Pending(source=source))
        journal.write(folder)
        clean(folder, journal)
    elif (journal.pending.source.data, journal.pending.source.training) != (source.data, False):
        raise ArtifactMismatch(
            f"The index in {folder} has an unfinished addition of other data "
            f"({short(journal.pending.source.data)}…); add those first, or give them up with drop_pending()."
        )
    return journal


def _refuse_pending(folder: Path, journal: Journal, what: str) -> None:
    if journal.pending is not None:
        raise ArtifactError(
            f"The index in {folder} has an unfinished addition; finish it, or give it up with drop_pending(), before "
            f"you {what} it."
        )


def _same_rows(
    folder: Path, journal: Journal, other_folder: Path, other: Journal, name: str = ""
) -> None:
    """Refuse rows of other coordinates, model or type."""
    pairs = {k: (v, other.made_from.get(k)) for k, v in journal.made_from.items()}
    pairs["dtype"] = journal.dtype, other.dtype
    pairs["factors"] = _factors_of(journal), _factors_of(other)
    differ = {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
    if differ:
        told = ", ".join(
            f"{k} ({short(str(a))} and {short(str(b))})" for k, (a, b) in differ.items()
        )
        raise ArtifactMismatch(
            f"The index in {folder} and {name or f'that in {other_folder}'} differ in {told}; build one again with the "
            "options of the other, or choose another folder."
        )


def _factors_of(journal: Journal) -> str:
    return "none" if journal.factors is None else str(journal.factors["rank"])


def _warn_of_width(space: Space, n: int) -> None:
    if not isinstance(space, LoGraSpace):
        return
    wide = {name: width for name, width in space.widths.items() if width > n / 2}
    if wide:
        name, width = max(wide.items(), key=lambda item: item[1])
        warnings.warn(
            f"Layer {name!r} keeps {width:,} numbers of {n:,} examples: with so few examples the damping decides most "
            "of each score. Lower the rank, or fit a curvature and build with Whitened().",
            stacklevel=3,
        )


def _others(n: int) -> str:
    return f" and {n - 1} others are" if n > 1 else " is"


def _fill(
    folder: Path,
    journal: Journal | None,
    fit: Fit,
    space: Space,
    data: Examples,
    progress: Progress | None,
    sample: int = 0,
) -> None:
    """Write the rows of the pending source, then list them; only the first rank has a journal."""
    world, writer = current(), None
    if journal is not None:
        metric = ProjectedMetric.read(folder, journal)
        writer = RowWriter(folder, journal, data, None if metric is None else metric.squares)
    source = world.agreed(lambda: writer and asdict(writer.pending.source))
    try:
        write_rows(writer, fit, space, data, Source(**source), progress)
    finally:
        if writer is not None:
            writer.close()
    journal = world.first(lambda: writer and _finished(folder, writer, space))
    taken = None
    if isinstance(space, LoGraSpace) and not _is_flat(fit):
        known = world.agreed(lambda: journal and "error" in journal.facts)
        taken = None if known else take_sample(fit, [space], data, fit.damping(), sample, progress)

    def put_in_place() -> None:
        finished = journal
        if finished is not None and taken is not None:
            metric = ProjectedMetric.read(folder, finished)
            error = taken.error(0, finished.encoding, metric)
            finished = replace(finished, facts=finished.facts | {"error": error})
        if finished is not None:
            finished.write(folder)
            clean(folder, finished)

    world.first(put_in_place)


def _finished(folder: Path, writer: RowWriter, space: Space) -> Journal:
    """The journal with all that was written, and second moments of the rows where the space has no others."""
    metric = writer.journal.metric
    if space.kind == LoGraSpace.kind and metric is None:
        metric = fit_metric(folder, writer.journal)
    return replace(writer.finished(), metric=metric)


def _matrices(spaces: Sequence[Space]) -> list[Space]:
    """Those coordinates that factors can be kept of."""
    found = [space for space in spaces if space.shapes() is not None]
    if not found:
        raise ValueError(
            "Leading coordinates make no matrices of low rank, so that no factors of them can be kept; build with "
            "Whitened(sides='random') or LoGra(), or without factors."
        )
    return found


def _is_flat(fit: Fit) -> bool:
    return isinstance(fit.curvature, Layerwise) and curvature_is_flat(fit.curvature)


def _begun(folder: Path) -> dict[str, Any] | None:
    """What an index that is there says of its coordinates."""
    try:
        journal = Journal.read(folder)
    except ArtifactMissing:
        return None
    return {"projection": journal.made_from["projection"], "facts": journal.facts}


def _chosen(
    folder: Path,
    spaces: Sequence[Space],
    fit: Fit,
    data: Examples,
    dtype: Dtype,
    factors: int | None,
    sample: int,
    progress: Progress | None,
) -> tuple[Space, dict[str, Any]]:
    """The coordinates that were begun with, or those that lose least on a sample; and what was measured of them."""
    begun = current().agreed(lambda: _begun(folder))
    if begun is not None:
        same = [s for s in spaces if s.fingerprint == begun["projection"]]
        return (same or list(spaces))[0], begun["facts"]
    chosen, facts = spaces[0], {}
    if not isinstance(chosen, LoGraSpace):
        damping = Damping(**chosen.record()["damping"])
        taken = take_sample(fit, spaces, data, damping, sample, progress)
        if taken is not None:
            ways = [encoding_of(dtype, s.widths, factors_of(s, factors)) for s in spaces]
            errors = [taken.error(i, way) for i, way in enumerate(ways)]
            best = max(range(len(spaces)), key=lambda i: errors[i]["whole"]["recall_10"])
            chosen, facts = spaces[best], {"error": errors[best]}
            if len(spaces) > 1:
                facts["recall_10"] = {
                    s.kind: e["whole"]["recall_10"] for s, e in zip(spaces, errors, strict=True)
                }
    share = kept_share(chosen, fit)
    return chosen, facts | ({} if share is None else {"kept_share": share})
