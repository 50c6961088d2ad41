"""Every byte of an index looked at, and damaged rows made again, only those."""

import os
import shutil
from collections.abc import Iterator
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
from headwater.core.index.journal import Journal, Ranges, ShardFacts, ranges_of
from headwater.core.index.metric import ProjectedMetric, fit_metric
from headwater.core.index.shards import (
    ShardLayout,
    ShardWriter,
    block_digest,
    file_digest,
    spans,
)
from headwater.core.index.spaces import Space
from headwater.core.index.stored import metric_name
from headwater.core.index.writing import RowPlan, StreamedRows, write_ids
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
    """
    journal = Journal.read(folder)
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
    bad = torch.zeros(shard.n, dtype=torch.bool)
    blocks = zip(spans(shard.blocks), shard.digests, _read_blocks(path, layout, shard), strict=True)
    for rows, digest, parts in blocks:
        bad[rows] = parts is None or block_digest(parts) != digest
    return ranges_of(bad)


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
    parts, n = {}, rows.stop - rows.start
    for name, (dtype, shape) in layout.specs.items():
        size = n * layout.row_bytes(name)
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

    Rows come from the same batches as before, so that on the machine that built the index they have the same bytes.

    Raises:
        ArtifactMismatch: What is damaged was made from other data.
    """
    journal = Journal.read(folder)
    damages = verify(folder, progress)
    whose = {s.number: s for s in journal.shards}
    fingerprint = data.fingerprint()
    for damage in damages:
        if damage.shard is not None:
            source = journal.sources[whose[damage.shard].source]
            known = source.data
            if source.training:
                raise ArtifactError(
                    f"{damage} was made while the model trained, at parameters that are gone, so it cannot be made "
                    "again. Remove the damaged rows and compact the index (`headwater index remove … --compact`), or "
                    "restore the file from a copy."
                )
            if known != fingerprint:
                raise ArtifactMismatch(
                    f"{damage.file} was made from other data (saved {short(known)}…, given {short(fingerprint)}…); "
                    "point to the data whose rows are damaged."
                )
    metric = None
    if journal.metric is not None and not any(d.file.startswith("metric") for d in damages):
        metric = ProjectedMetric.read(folder, journal)
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
            shard = _mended(
                folder, journal, shard, plan, damage.rows, fit, space, data,
                metric if own else None, progress,
            )  # fmt: skip
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
    plan: RowPlan,
    bad: Ranges,
    fit: Fit,
    space: Space,
    data: Examples,
    metric: ProjectedMetric | None,
    progress: Progress | None,
) -> ShardFacts:
    """A shard's file with its bad rows made again, in its old place."""
    made = _made_again(journal.encoding, shard, plan, bad, fit, space, data, progress)
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


def _made_again(
    encoding: Encoding,
    shard: ShardFacts,
    plan: RowPlan,
    bad: Ranges,
    fit: Fit,
    space: Space,
    data: Examples,
    progress: Progress | None,
) -> dict[int, Tensor]:
    """Rows of the bad blocks, by the first row of each block."""
    wanted = {
        rows.start: rows for rows in spans(shard.blocks) if any(a <= rows.start < b for a, b in bad)
    }
    if not wanted:
        return {}
    of_plan = shard.plan_rows()
    needed = torch.cat([of_plan[rows] for rows in wanted.values()])
    numbers = plan.batches_with(needed)
    batches = [plan.batches[i] for i in numbers]
    found: dict[int, Tensor] = {}

    def keep(indices: Tensor, rows: Tensor) -> None:
        for i, row in zip(indices.tolist(), rows, strict=True):
            found[i] = row

    sweep(
        space.capture(fit), data, [StreamedRows(space, keep)], Loss(), batches=batches,
        progress=progress, note="repair",
    )  # fmt: skip
    if not found:
        raise ArtifactError("No row came out of the pass that was to make damaged rows again.")
    return {
        start: torch.stack([found[int(plan.order[i])] for i in of_plan[rows]])
        for start, rows in wanted.items()
    }
