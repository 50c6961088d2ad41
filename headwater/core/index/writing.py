"""Rows into shards: the plan of a source, the accumulator that makes rows, and the writer that survives a kill."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.core.capture import (
    Accumulator,
    BatchInfo,
    BatchPlan,
    Kept,
    Progress,
    Rows,
    sweep,
)
from headwater.core.distributed import current
from headwater.core.examples import Examples
from headwater.core.files import HashedFile, disk_room, sync_folder
from headwater.core.fit import Fit
from headwater.core.gradients import Factored
from headwater.core.index.journal import JOURNAL, Journal, Pending, ShardFacts, Source
from headwater.core.index.shards import ShardWriter
from headwater.core.index.spaces import Space
from headwater.core.index.stored import metric_name, source_batches
from headwater.core.scores import to_column
from headwater.core.target import Loss

_ROUND = 1.0  # seconds of work after which rows are written, at least


class SpaceRows(Accumulator):
    """Rows of the index for each example, all layers side by side; full gradients are not formed.

    Args:
        space: The coordinates.
        n: Number of examples.
    """

    def __init__(self, space: Space, n: int):
        self.space, self.n = space, n
        self._starts: dict[str, slice] = {}
        start = 0
        for name, width in space.widths.items():
            self._starts[name] = slice(start, start + width)
            start += width
        self.dim = start
        self._batch: Tensor | None = None
        self._rows: Tensor | None = None

    def update(self, rows: Rows) -> None:
        wide = torch.promote_types(rows.a.dtype, torch.float32)
        part = self.space(rows.layer, Factored(rows.a, rows.g).to(wide))
        if self._batch is None:
            self._batch = part.new_zeros(len(part), self.dim)
        self._batch[:, self._starts[rows.layer.name]] = part

    def end_batch(self, batch: BatchInfo) -> None:
        self.space.clear()
        rows, self._batch = self._batch, None
        if rows is not None:
            self.take(batch, rows.cpu())

    def take(self, batch: BatchInfo, rows: Float[Tensor, "row dim"]) -> None:
        """Keep the rows of a batch."""
        if self._rows is None:
            self._rows = rows.new_zeros(self.n, self.dim)
        self._rows.index_add_(0, batch.indices, rows)

    def merge(self, other: "SpaceRows") -> None:
        if other._rows is not None:
            self._rows = other._rows if self._rows is None else self._rows + other._rows

    def finish(self) -> Float[Tensor, "n dim"]:
        """One row for each example."""
        return torch.zeros(self.n, self.dim) if self._rows is None else self._rows

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._rows is None else {"rows": self._rows}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._rows = tensors.get("rows")


class BatchRows(SpaceRows):
    """The same for some of the data, batch by batch and put together over the ranks.

    Args:
        space: The coordinates.
    """

    kept: ClassVar[Kept] = "rows"

    def __init__(self, space: Space):
        super().__init__(space, 0)
        self._found: list[tuple[Tensor, Tensor]] = []

    def take(self, batch: BatchInfo, rows: Float[Tensor, "row dim"]) -> None:
        self._found.append((batch.indices, rows))

    def forget(self, indices: Tensor) -> bool:
        self.space.clear()
        self._batch = None
        self._found = [f for f in self._found if not bool(torch.isin(f[0], indices).any())]
        return True

    def merge(self, other: "BatchRows") -> None:
        self._found += other._found

    def of(self, indices: Sequence[int]) -> Float[Tensor, "row dim"]:
        """Rows of some examples, in their order."""
        place = {i: k for k, i in enumerate(i for found, _ in self._found for i in found.tolist())}
        return torch.cat([rows for _, rows in self._found])[[place[i] for i in indices]]

    def tensors(self) -> dict[str, Tensor]:
        if not self._found:
            return {}
        indices, rows = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        return {"indices": indices, "rows": rows}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._found = [(tensors["indices"], tensors["rows"])] if tensors else []


@dataclass(frozen=True)
class RowPlan:
    """In which batches, blocks and shards the rows of a source are made.

    A block is a few batches and a shard a few blocks, so that a build that goes on runs the same batches.

    Attributes:
        batches: The batches, in the order of the rows.
        block_rows: Least rows of a block.
        shard_rows: Least rows of a shard.
    """

    batches: list[BatchPlan]
    block_rows: int
    shard_rows: int

    @classmethod
    def of(cls, source: Source, examples: Examples) -> "RowPlan":
        """The plan of a source."""
        return cls(source_batches(source, examples), source.block_rows, source.shard_rows)

    @cached_property
    def blocks(self) -> list[range]:
        """Batches of each block."""
        return _groups([len(b.indices) for b in self.batches], self.block_rows)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        return [sum(len(self.batches[i].indices) for i in block) for block in self.blocks]

    @cached_property
    def shards(self) -> list[range]:
        """Blocks of each shard."""
        return _groups(self.sizes, self.shard_rows)

    @cached_property
    def order(self) -> Int[Tensor, " row"]:
        """The example of each row."""
        return torch.tensor([i for b in self.batches for i in b.indices], dtype=torch.int64)

    def batches_with(self, rows: Tensor) -> list[int]:
        """Batches that some rows are in."""
        ends = torch.tensor([len(b.indices) for b in self.batches]).cumsum(0)
        return torch.searchsorted(ends, rows, right=True).unique().tolist()


def _groups(sizes: Sequence[int], least: int) -> list[range]:
    """Neighbours gathered until each group has `least`; a short rest is a group too.

    Example:
        >>> _groups([2, 2, 1, 5, 1], 4)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    groups, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= least or i == len(sizes) - 1:
            groups.append(range(start, i + 1))
            start, total = i + 1, 0
    return groups


class RowWriter:
    """Takes rows in the order of a plan and leaves sealed shards, each listed as soon as it is sealed.

    Args:
        folder: The index.
        journal: What it holds; its pending source is the one that is written.
        examples: The source's data.
        squares: Squared lengths of stored rows, where they are not the plain ones.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        examples: Examples,
        squares: Callable[[Tensor], Tensor] | None = None,
    ):
        if journal.pending is None:
            raise ValueError("There is nothing to write: no source is pending.")
        self.folder, self.journal, self.examples = folder, journal, examples
        self.squares = squares
        self.pending: Pending = journal.pending
        self.plan = RowPlan.of(self.pending.source, examples)
        self._waiting: list[Tensor] = []
        self._shard: ShardWriter | None = None
        self._block = 0  # the next one, over all shards

    def begin(self) -> int:
        """Go on behind the last whole block; returns the batch to begin with."""
        sealed = len(self.pending.shards)
        self._block = self.plan.shards[sealed - 1].stop if sealed else 0
        if sealed < len(self.plan.shards):
            self._open()
        if self._block >= len(self.plan.blocks):
            return len(self.plan.batches)
        return self.plan.blocks[self._block].start

    @property
    def bytes_left(self) -> int:
        """Bytes of the rows that are not sealed yet."""
        sealed = sum(s.n for s in self.pending.shards)
        return (len(self.plan.order) - sealed) * self.journal.encoding.bytes_per_row

    def _open(self) -> None:
        number = len(self.pending.shards)
        blocks = self.plan.shards[number]
        sizes = [self.plan.sizes[b] for b in blocks]
        self._shard = ShardWriter(self.folder, self.journal.following, sizes, self.journal.encoding)
        self._block = blocks.start + self._shard.open()
        if self._block == blocks.stop:
            self._seal()

    def take(self, indices: Tensor, rows: Tensor) -> None:
        """The next batch's rows."""
        self._waiting.append(rows)
        if sum(len(r) for r in self._waiting) < self.plan.sizes[self._block]:
            return
        if self._shard is None:
            raise ValueError("The writer has not begun.")
        self._shard.write(torch.cat(self._waiting), self.squares)
        self._waiting = []
        self._block += 1
        if self._block == self.plan.shards[len(self.pending.shards)].stop:
            self._seal()

    def _seal(self) -> None:
        shard = self._shard
        if shard is None:
            return
        blocks = self.plan.shards[len(self.pending.shards)]
        first = sum(self.plan.sizes[: blocks.start])
        last = first + sum(shard.blocks)
        offset = sum(s.n for s in self.journal.sources)
        order = self.plan.order[first:last].tolist()
        facts = ShardFacts(
            number=shard.number,
            source=len(self.journal.sources),
            first=first,
            last=last,
            rows=shard.seal(),
            blocks=shard.blocks,
            digests=shard.digests,
            ids=write_ids(self.folder, shard.number, self.examples, order, offset),
        )
        self._shard = None
        self.pending = replace(self.pending, shards=[*self.pending.shards, facts])
        self.journal = replace(self.journal, pending=self.pending, following=facts.number + 1)
        self.journal.write(self.folder)
        shard.journal.unlink(missing_ok=True)
        if len(self.pending.shards) < len(self.plan.shards):
            self._open()

    def close(self) -> None:
        """Let go of what is open; what was written stays."""
        if self._shard is not None:
            self._shard.__exit__(None, None, None)

    def finished(self) -> Journal:
        """The journal with the source and its shards in their places."""
        return replace(
            self.journal,
            sources=[*self.journal.sources, self.pending.source],
            shards=[*self.journal.shards, *self.pending.shards],
            pending=None,
        )


def write_rows(
    writer: RowWriter | None,
    fit: Fit,
    space: Space,
    data: Examples,
    source: Source,
    progress: Progress | None = None,
) -> None:
    """Write what is left of a source's rows: every rank makes some of them, the first writes them in their order.

    Ranks meet after a second or so of work; how often they do and how many there are changes no byte.

    Args:
        writer: On the first rank, what writes them.
        fit: The fitted model.
        space: The coordinates.
        data: The source's examples.
        source: The source.
        progress: Called with (done, total, note).
    """
    world, batches = current(), source_batches(source, data)
    start = world.agreed(lambda: writer and writer.begin())
    n = 4 * world.size

    def report(done: int, total: int, note: str) -> None:
        if progress is not None:
            progress(start + done, len(batches), note)

    while start < len(batches):
        began, some, found = monotonic(), batches[start : start + n], BatchRows(space)
        sweep(
            space.capture(fit), data, [found], Loss(), batches=some, progress=report, note="index"
        )

        if writer is not None:
            with world.failing_together():
                rows = found.of([i for batch in some for i in batch.indices])
                sizes = [len(batch.indices) for batch in some]
                for batch, part in zip(some, rows.split(sizes), strict=True):
                    writer.take(torch.tensor(batch.indices), part)
        start, short = start + len(some), monotonic() - began < _ROUND
        n *= 2 if world.agreed(lambda short=short: short) else 1


def write_ids(
    folder: Path, number: int, examples: Examples, order: Sequence[int], offset: int
) -> dict[str, Any]:
    """The table of a shard's ids and metadata; returns its size and checksum."""
    columns = [to_column(k, [v[i] for i in order]) for k, v in examples.metadata.items()]
    return write_table(
        folder,
        number,
        {"id": [examples.ids[i] for i in order], "number": [offset + i for i in order]}
        | dict(columns),
    )


def write_table(folder: Path, number: int, columns: Any) -> dict[str, Any]:
    """A shard's table under its name, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    final = folder / f"ids-{number:05}.parquet"
    partial = folder / f".{final.name}.partial"
    partial.unlink(missing_ok=True)
    try:
        with disk_room(folder, table.nbytes), HashedFile(partial) as file:
            pyarrow.parquet.write_table(table, file)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(folder)
    return file.facts


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutOfDisk: The message says how much is needed and how much is free.
    """
    place = folder if folder.is_dir() else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    with disk_room(folder, needed):
        pass


def clean(folder: Path, journal: Journal) -> None:
    """Remove files that no journal lists: of shards that were compacted away, and of work that was given up."""
    shards = [*journal.shards, *([] if journal.pending is None else journal.pending.shards)]
    known = {JOURNAL, ".lock"} | {s.rows_file for s in shards} | {s.ids_file for s in shards}
    if journal.metric is not None:
        known.add(metric_name(journal.metric["number"]))
    going_on = f"rows-{journal.following:05}.safetensors"
    for path in _own_files(folder):
        kept = journal.pending is not None and going_on in path.name
        if path.name not in known and not kept:
            path.unlink(missing_ok=True)


def _own_files(folder: Path) -> Iterable[Path]:
    """Files that an index writes, and no others that lie beside them."""
    yield from folder.glob(f".{JOURNAL}.partial-*")
    for pattern in ("rows-*.safetensors", "ids-*.parquet", "metric-*.safetensors"):
        yield from folder.glob(pattern)
        yield from folder.glob(f".{pattern}.*")


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, without copying where the disk can."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        partial.replace(target)
