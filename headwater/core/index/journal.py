"""`index.json`: what an index holds, replaced as a whole with every change.

Nothing in it depends on the clock or on how often a build was interrupted, so that the same work leaves the same bytes.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headwater import __version__
from headwater.core import files
from headwater.core.files import (
    ArtifactDamaged,
    ArtifactError,
    ArtifactMissing,
    read_json,
    write_json,
)
from headwater.core.fingerprint import fingerprint_json, portable
from headwater.core.index.encoding import Dtype, Encoding, encoding_of
from headwater.core.index.shards import ShardLayout, shard_name
from headwater.core.index.sound import require_sound
from headwater.core.manifest import FORMAT, check_format

JOURNAL = "index.json"
REMEDY = "Restore it from a copy, or remove the index and build it again."
Ranges = list[list[int]]  # [first, behind the last] of rows, ascending


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data whose examples are in the index, and how they were batched.

    Attributes:
        data: Fingerprint of the data.
        n: Its examples.
        batch_size: Most examples in a batch.
        batch_tokens: Most positions in a batch.
        block_rows: Least rows of a block, which has a checksum of its own.
        shard_rows: Least rows of a shard.
        training: Whether its rows were made in the passes of a training run, which cannot be made again.
    """

    data: str
    n: int
    batch_size: int
    batch_tokens: int
    block_rows: int
    shard_rows: int
    training: bool = False


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """A sealed shard.

    Attributes:
        number: Names its files.
        source: Number of the source its rows are of.
        first: Row of the source's plan that its first row was.
        last: Behind the last one.
        dropped: Rows of the plan in between that were compacted away.
        blocks: Rows of each block.
        digests: Checksum of each block.
        rows: Size and checksum of the file of rows.
        ids: Size and checksum of the table of ids and metadata.
        removed: Rows of the file that are no longer there.
    """

    number: int
    source: int
    first: int
    last: int
    blocks: list[int]
    digests: list[str]
    rows: dict[str, Any]
    ids: dict[str, Any]
    dropped: Ranges = field(default_factory=list)
    removed: Ranges = field(default_factory=list)

    @property
    def n(self) -> int:
        """Rows of the file."""
        return sum(self.blocks)

    @property
    def n_live(self) -> int:
        """Rows that are still there."""
        return self.n - sum(b - a for a, b in self.removed)

    @property
    def rows_file(self) -> str:
        """Name of the file of rows."""
        return shard_name(self.number)

    @property
    def ids_file(self) -> str:
        """Name of the table of ids."""
        return f"ids-{self.number:05}.parquet"

    def plan_rows(self) -> torch.Tensor:
        """Which rows of the source's plan the rows of the file are."""
        return _without(torch.arange(self.first, self.last), self.dropped, self.first)

    def live(self) -> torch.Tensor:
        """Which rows of the file are still there (row)."""
        return mask_of(self.removed, self.n).logical_not()


def mask_of(ranges: Ranges, n: int, start: int = 0) -> torch.Tensor:
    """Truth for the numbers in the ranges, out of n from `start` on."""
    mask = torch.zeros(n, dtype=torch.bool)
    for a, b in ranges:
        mask[a - start : b - start] = True
    return mask


def ranges_of(mask: torch.Tensor, start: int = 0) -> Ranges:
    """The inverse of `mask_of`.

    Example:
        >>> ranges_of(torch.tensor([True, True, False, True]))
        [[0, 2], [3, 4]]
    """
    edges = torch.diff(torch.nn.functional.pad(mask.int(), (1, 1)))
    first, behind = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [[a + start, b + start] for a, b in zip(first.tolist(), behind.tolist(), strict=True)]


def _without(x: torch.Tensor, ranges: Ranges, start: int) -> torch.Tensor:
    return x[~mask_of(ranges, len(x), start)]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A build or an addition that is not finished: its source and the shards that are sealed."""

    source: Source
    shards: list[ShardFacts] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The content of `index.json`.

    Attributes:
        made_from: Fingerprints of the model and of the coordinates, and the task's name.
        space: What the coordinates are.
        layers: Numbers of each layer in a row.
        dtype: How rows are stored.
        factors: Rank, and (groups, out, in) of each layer, where rows are stored as low-rank factors.
        n_train: Training examples of the fit, by which scores are divided.
        sources: Data in the index.
        shards: Sealed shards.
        pending: Work that is not finished.
        metric: Size and checksum of the file of second moments, for LoGra.
        following: Number of the next shard.
        facts: Measured errors and the like.
        versions: What wrote it.
    """

    made_from: dict[str, str]
    space: dict[str, Any]
    layers: dict[str, int]
    dtype: Dtype
    n_train: int
    factors: dict[str, Any] | None = None
    sources: list[Source] = field(default_factory=list)
    shards: list[ShardFacts] = field(default_factory=list)
    pending: Pending | None = None
    metric: dict[str, Any] | None = None
    following: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {"headwater": __version__, "torch": torch.__version__}
    )

    @property
    def encoding(self) -> Encoding:
        """How rows are stored."""
        return encoding_of(self.dtype, self.layers, self.factors)

    def layout(self, shard: ShardFacts) -> ShardLayout:
        """Where everything lies in a shard's file."""
        return ShardLayout(shard.n, self.encoding)

    @property
    def n_live(self) -> int:
        """Rows that can be found."""
        return sum(shard.n_live for shard in self.shards)

    def with_shard(self, changed: ShardFacts) -> "Journal":
        """The same with one shard's facts replaced."""
        shards = [changed if s.number == changed.number else s for s in self.shards]
        return replace(self, shards=shards)

    def write(self, folder: Path) -> None:
        """Put it in place, whole or not at all."""
        content = portable({"format": FORMAT, "kind": "index"} | asdict(self), "index")
        content |= {"blake2b": fingerprint_json(content)}
        if len(json.dumps(content)) > files.MAX_JSON_BYTES // 2:
            raise ArtifactError(
                f"The index in {folder} has too many shards for one {JOURNAL}; split the data into several indexes."
            )
        write_json(folder / JOURNAL, content)

    @classmethod
    def read(cls, folder: Path) -> "Journal":
        """What the index in a folder holds.

        Raises:
            ArtifactMissing: There is none.
            ArtifactDamaged: It is not what was written.
        """
        path = folder / JOURNAL
        if not path.is_file():
            state = f"it has no {JOURNAL}" if folder.is_dir() else "no such folder"
            raise ArtifactMissing(
                f"There is no index in {folder} ({state}); make one with `headwater index build`, or check the path."
            )
        try:
            body = read_json(path)
            check_format(body, path)
        except ArtifactDamaged as error:
            raise ArtifactDamaged(f"{error} {REMEDY}") from error
        try:
            if body.pop("kind") != "index":
                raise ValueError("it is of another kind")
            for extra in ("format", "blake2b"):
                del body[extra]
            require_sound(body)
            body["sources"] = [Source(**s) for s in body["sources"]]
            body["shards"] = [ShardFacts(**s) for s in body["shards"]]
            if (pending := body["pending"]) is not None:
                shards = [ShardFacts(**s) for s in pending["shards"]]
                body["pending"] = Pending(source=Source(**pending["source"]), shards=shards)
            return cls(**body)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactDamaged(f"{path} says nothing of use ({error}). {REMEDY}") from error
