"""Every byte of an index looked at, and damaged rows made again, only those."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwater.core.capture import Progress, sweep
from headwater.core.examples import Examples
from headwater.core.files import ArtifactError, ArtifactMismatch, sync_folder
from headwater.core.fingerprint import short
from headwater.core.fit import Fit
from headwater.core.index.encoding import Encoding
from headwater.core.index.journal import Journal, Ranges, ShardFacts
from headwater.core.index.metric import ProjectedMetric, fit_metric
from headwater.core.index.shards import (
    ShardLayout,
    ShardWriter,
    block_digest,
    file_digest,
    spans,
)
from headwater.core.index.spaces import Space
from headwater.core.index.stored import metric_name, require_finished
from headwater.core.index.writing import BatchRows, RowPlan, write_ids
from headwater.core.target import Loss


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged file of an index.

    Attributes:
        file: Its name.
        what: What is wrong with it.
        shard: The shard it belongs to, or None.
        rows: Damaged rows of the shard, [first, behind the last]; empty where no row is.
        ids: Their examples, as far as they can be told.
    """

    file: str
    what: str
    shard: int | None = None
    rows: Ranges = field(default_factory=list)
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = f"{self.file} {self.what}"
        if self.rows:
            n = sum(b - a for a, b in self.rows)
            spans = ", ".join(f"{a}-{b - 1}" for a, b in self.rows[:4])
            more = ", …" if len(self.rows) > 4 else ""
            names = (
                f" ({', '.join(self.ids[:4])}{', …' if len(self.ids) > 4 else ''})"
                if self.ids
                else ""
            )
            told += f": {n:,} rows, {spans}{more}{names}"
        return told


def verify(folder: Path, progress: Progress | None = None) -> list[Damage]:
    """Read every byte of an index; returns what is damaged.

    Raises:
        ArtifactDamaged: `index.json` itself is.
        ArtifactMissing: The first build is not finished.
    """
    journal = Journal.read(folder)
    require_finished(folder, journal)
    found: list[Damage] = []
    for number, shard in enumerate(journal.shards):
        ids = _file_damage(folder / shard.ids_file, shard.ids)
        if ids is not None:
            found.append(Damage(file=shard.ids_file, what=ids, shard=shard.number))
        wrong = _file_damage(folder / shard.rows_file, shard.rows)
        if wrong is not None:
            rows = bad_rows(folder / shard.rows_file, journal.layout(shard), shard)
            names = () if ids is not None else _names(folder, shard, rows)
            damage = Damage(
                file=shard.rows_file, what=wrong, shard=shard.number, rows=rows, ids=names
            )
            found.append(damage)
        if progress is not None:
            progress(number + 1, len(journal.shards), "verify")
    if journal.metric is not None:
        name = metric_name(journal.metric["number"])
        if (wrong := _file_damage(folder / name, journal.metric)) is not None:
            found.append(Damage(file=name, what=wrong))
    return found


def _file_damage(path: Path, facts: dict[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    if path.is_symlink() or not path.is_file():
        return "is missing" if not os.path.lexists(path) else "is not a regular file"
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"has {size:,} bytes instead of {facts['bytes']:,}"
    return None if file_digest(path) == facts["blake2b"] else "has changed since it was written"


def bad_rows(path: Path, layout: ShardLayout, shard: ShardFacts) -> Ranges:
    """Rows of the blocks that are not what was written."""
    bad: Ranges = []
    blocks = zip(spans(shard.blocks), shard.digests, _read_blocks(path, layout, shard), strict=True)
    for rows, digest, parts in blocks:
        if parts is not None and block_digest(parts) == digest:
            continue
        if bad and bad[-1][1] == rows.start:
            bad[-1][1] = rows.stop
        else:
            bad.append([rows.start, rows.stop])
    return bad


def _read_blocks(
    path: Path, layout: ShardLayout, shard: ShardFacts
) -> Iterator[dict[str, Tensor] | None]:
    """The blocks of a file that may be cut short; None where one is not there."""
    if not path.is_file() or path.is_symlink():
        yield from [None] * len(shard.blocks)
        return
    with path.open("rb", buffering=0) as file:
        for rows in spans(shard.blocks):
            yield _read_block(file.fileno(), layout, rows)


def _read_block(descriptor: int, layout: ShardLayout, rows: slice) -> dict[str, Tensor] | None:
    parts, n, end = {}, rows.stop - rows.start, os.fstat(descriptor).st_size
    for name, (dtype, shape) in layout.specs.items():
        size = n * layout.row_bytes(name)
        if layout.place(name, rows.stop) > end:
            return None
        data = bytearray(size)
        if os.preadv(descriptor, [data], layout.place(name, rows.start)) != size:
            return None
        parts[name] = torch.frombuffer(data, dtype=dtype).view(n, *shape[1:])
    return parts


def _names(folder: Path, shard: ShardFacts, rows: Ranges) -> tuple[str, ...]:
    import pyarrow.parquet

    if not rows:
        return ()
    ids = pyarrow.parquet.read_table(folder / shard.ids_file, columns=["id"])["id"].to_pylist()
    return tuple(name for a, b in rows for name in ids[a:b])


def repair(
    folder: Path, fit: Fit, space: Space, data: Examples, progress: Progress | None = None
) -> list[Damage]:
    """Make damaged rows, tables and second moments again; call it under the folder's lock.

    What was made from other data is left as it is; with several sources call it once with the data of each. Rows come
    from the same batches as before, so that on the machine that built the index they have the same bytes.

    Raises:
        ArtifactMismatch: All that is damaged was made from other data.
    """
    journal = Journal.read(folder)
    sources = {s.number: journal.sources[s.source] for s in journal.shards}
    whose = {number: source.data for number, source in sources.items()}
    fingerprint, damages, others = data.fingerprint(), [], []
    for damage in verify(folder, progress):
        if damage.shard is not None and sources[damage.shard].training:
            raise ArtifactError(
                f"{damage} was made while the model trained, at parameters that are gone, so it cannot be made "
                "again. Remove the damaged rows and compact the index (`headwater index remove … --compact`), or "
                "restore the file from a copy."
            )
        own = damage.shard is None or whose[damage.shard] == fingerprint
        (damages if own else others).append(damage)
    if {d.shard for d in others} & set((journal.metric or {}).get("shards", ())):
        damages = [d for d in damages if d.shard is not None]  # second moments wait for their rows
    if others and not damages:
        first = others[0]
        raise ArtifactMismatch(
            f"{first.file} was made from other data (saved {short(whose[first.shard or 0])}…, given "
            f"{short(fingerprint)}…); point to the data whose rows are damaged."
        )
    metric = None
    if journal.metric is not None and not any(d.file.startswith("metric") for d in damages):
        metric = ProjectedMetric.read(folder, journal)
    again = _Again(fit, space, data, progress)
    for damage in damages:
        if damage.shard is None:
            continue
        shard = {s.number: s for s in journal.shards}[damage.shard]
        plan = RowPlan.of(journal.sources[shard.source], data)
        if damage.file == shard.ids_file:
            offset = sum(s.n for s in journal.sources[: shard.source])
            order = plan.order[shard.plan_rows()].tolist()
            shard = replace(shard, ids=write_ids(folder, shard.number, data, order, offset))
        else:
            own = journal.metric is not None and shard.number not in journal.metric["shards"]
            made = again.rows(journal.encoding, shard, plan, damage.rows)
            shard = _mended(folder, journal, shard, made, metric if own else None)
        journal = journal.with_shard(shard)
        journal.write(folder)
    if journal.metric is not None and any(d.file.startswith("metric") for d in damages):
        journal = replace(journal, metric=fit_metric(folder, journal, again=True))
        journal.write(folder)
    return damages


def _mended(
    folder: Path,
    journal: Journal,
    shard: ShardFacts,
    made: Mapping[int, Tensor],
    metric: ProjectedMetric | None,
) -> ShardFacts:
    """A shard's file with the rows that were made again, by the first row of each block, in its old place."""
    place = folder / ".mending"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    layout, path = journal.layout(shard), folder / shard.rows_file
    with ShardWriter(place, shard.number, shard.blocks, journal.encoding) as writer:
        writer.open()
        for rows, parts in zip(spans(shard.blocks), _read_blocks(path, layout, shard), strict=True):
            if rows.start in made or parts is None:
                writer.write(made[rows.start], None if metric is None else metric.squares)
            else:
                writer.write_parts(parts)
        facts = writer.seal()
    os.replace(writer.final, path)
    sync_folder(folder)
    shutil.rmtree(place, ignore_errors=True)
    return replace(shard, rows=facts, digests=writer.digests)


@dataclass(frozen=True, eq=False)
class _Again:
    """What damaged rows are made again from."""

    fit: Fit
    space: Space
    data: Examples
    progress: Progress | None

    def rows(
        self, encoding: Encoding, shard: ShardFacts, plan: RowPlan, bad: Ranges
    ) -> dict[int, Tensor]:
        """Rows of the bad blocks, by the first row of each block."""
        wanted = {
            rows.start: rows
            for rows in spans(shard.blocks)
            if any(a <= rows.start < b for a, b in bad)
        }
        if not wanted:
            return {}
        of_plan = shard.plan_rows()
        needed = torch.cat([of_plan[rows] for rows in wanted.values()])
        numbers = plan.batches_with(needed)
        batches = [plan.batches[i] for i in numbers]
        found = BatchRows(self.space)
        sweep(
            self.space.capture(self.fit), self.data, [found], Loss(), batches=batches, progress=self.progress,
            note="repair",
        )  # fmt: skip
        return {
            start: found.of(plan.order[of_plan[rows]].tolist()) for start, rows in wanted.items()
        }
