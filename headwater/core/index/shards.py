"""Files of rows: written block by block where they will lie, sealed once whole, then never changed.

A shard is one safetensors file of as many rows as its plan says, so that the place of every block in it is known
before the first is written. While it is written a journal beside it holds the checksum of each block that the disk
has; a killed build goes on behind the last of them.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.files import disk_room, sync_folder
from headwater.core.fingerprint import DIGEST_BYTES
from headwater.core.index.encoding import Encoding
from headwater.core.manifest import check_size
from headwater.core.tensor_files import header_of

_SYNC_EVERY = 2.0  # seconds of work that a killed build may lose
_PIECE = 1 << 20


def shard_name(number: int) -> str:
    """File of a shard's rows."""
    return f"rows-{number:05}.safetensors"


def block_digest(parts: Mapping[str, Tensor]) -> str:
    """Checksum of a block of rows: 64 bits of the bytes of its parts, one after the other."""
    content = blake2b(digest_size=8)
    for name in sorted(parts):
        content.update(parts[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def file_digest(path: Path) -> str:
    """Checksum of a whole file."""
    content = blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            content.update(piece)
    return content.hexdigest()


@dataclass(frozen=True)
class ShardLayout:
    """Where everything lies in a shard's file.

    Attributes:
        n: Its rows.
        encoding: How they are stored.
    """

    n: int
    encoding: Encoding

    @cached_property
    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor."""
        rows = {k: (dtype, (self.n, m)) for k, (dtype, m) in self.encoding.parts.items()}
        return rows | {"squares": (torch.float32, (self.n,))}

    @cached_property
    def _placed(self) -> tuple[bytes, dict[str, int]]:
        return header_of(self.specs)

    @property
    def header(self) -> bytes:
        """The beginning of the file."""
        return self._placed[0]

    @property
    def starts(self) -> dict[str, int]:
        """Byte at which each tensor starts."""
        return self._placed[1]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.n * self.encoding.bytes_per_row

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor."""
        dtype, shape = self.specs[name]
        return dtype.itemsize * (shape[1] if len(shape) > 1 else 1)

    def place(self, name: str, row: int) -> int:
        """Byte at which a row of a tensor starts."""
        return self.starts[name] + row * self.row_bytes(name)


class ShardWriter:
    """Writes a shard's blocks in order, each where it will stay.

    Args:
        folder: The index.
        number: Number of the shard.
        blocks: Rows of each block.
        encoding: How rows are stored.
    """

    def __init__(self, folder: Path, number: int, blocks: Sequence[int], encoding: Encoding):
        self.folder, self.number, self.blocks = folder, number, list(blocks)
        self.layout = ShardLayout(sum(blocks), encoding)
        self.final = folder / shard_name(number)
        self.partial = folder / f".{self.final.name}.partial"
        self.journal = folder / f".{self.final.name}.journal"
        self.digests: list[str] = []
        self._unsynced: list[str] = []
        self._synced = monotonic()
        self._descriptor: int | None = None

    def open(self) -> int:
        """Begin, or go on where a killed writer stopped; returns how many blocks are already there."""
        if self.final.exists():  # sealed, but its index did not get to know
            os.replace(self.final, self.partial)
        whole = self._whole() if self.partial.exists() and self.journal.exists() else []
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with disk_room(self.folder, self.layout.size - sum(self._written(len(whole)))):
            self._descriptor = os.open(self.partial, flags, 0o644)
            os.ftruncate(self._descriptor, self.layout.size)
            self._write(0, self.layout.header)
        self.digests = whole
        self.journal.write_text("".join(f"{d}\n" for d in whole))
        return len(whole)

    def _written(self, n_blocks: int) -> Iterator[int]:
        return (n * self.layout.encoding.bytes_per_row for n in self.blocks[:n_blocks])

    def _whole(self) -> list[str]:
        """Checksums of the blocks that are on the disk as the journal says, up to the first that is not."""
        try:
            told = self.journal.read_text().splitlines()
            shard = Shard(self.partial, self.layout)
        except (OSError, ValueError):
            return []
        found = []
        for digest, rows in zip(told, spans(self.blocks), strict=False):
            if block_digest(shard.stored(rows)) != digest:
                break
            found.append(digest)
        return found

    def write(
        self, rows: Float[Tensor, "n dim"], squares: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Write the next block; `squares` gives squared lengths of stored rows where they are not the plain ones."""
        block = len(self.digests) + len(self._unsynced)
        if len(rows) != self.blocks[block]:
            raise ValueError(f"Block {block} has {self.blocks[block]} rows; got {len(rows)}.")
        parts = self.layout.encoding.encode(rows)
        stored = self.layout.encoding.decode(parts)
        each = stored.square().sum(1) if squares is None else squares(stored)
        self.write_parts(parts | {"squares": each.float()})

    def write_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Write the next block as it is stored."""
        start = sum(self.blocks[: len(self.digests) + len(self._unsynced)])
        with disk_room(self.folder, 0):
            for name, tensor in parts.items():
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                self._write(self.layout.place(name, start), data)
        self._unsynced.append(block_digest(parts))
        if monotonic() - self._synced > _SYNC_EVERY:
            self._sync()

    def _write(self, place: int, data: Any) -> None:
        view, descriptor = memoryview(data), self._descriptor
        if descriptor is None:
            raise ValueError("The shard is not open.")
        done = 0
        while done < len(view):  # the system may take only a part
            done += os.pwrite(descriptor, view[done:], place + done)

    def _sync(self) -> None:
        """The blocks reach the disk before the journal says so."""
        if self._descriptor is None:
            return
        os.fsync(self._descriptor)
        with self.journal.open("a") as file:
            file.write("".join(f"{d}\n" for d in self._unsynced))
            file.flush()
            os.fsync(file.fileno())
        self.digests += self._unsynced
        self._unsynced, self._synced = [], monotonic()

    def seal(self) -> dict[str, Any]:
        """Give the whole file its name; returns what the index writes down about it."""
        self._sync()
        self.close()
        if len(self.digests) != len(self.blocks):
            raise ValueError(f"{len(self.digests)} of {len(self.blocks)} blocks were written.")
        facts = {"bytes": self.layout.size, "blake2b": file_digest(self.partial)}
        os.replace(self.partial, self.final)
        sync_folder(self.folder)
        return facts

    def close(self) -> None:
        """Let go of the file; what was written stays for the next writer."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                self._sync()
        self.close()


def spans(sizes: Sequence[int]) -> Iterator[slice]:
    """Stretches of the given sizes, one after the other.

    Example:
        >>> list(spans([2, 3]))
        [slice(0, 2, None), slice(2, 5, None)]
    """
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


class Shard:
    """A shard's file, mapped into memory and read where it is asked for.

    Args:
        path: The file.
        layout: What lies where in it.

    Raises:
        ArtifactDamaged: The file is missing or of another size.
    """

    def __init__(self, path: Path, layout: ShardLayout):
        check_size(path, layout.size)
        self.path, self.layout = path, layout
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return self.layout.n

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """All tensors of the file, mapped."""
        found = {}
        for name, (dtype, shape) in self.layout.specs.items():
            count = self.layout.n * self.layout.row_bytes(name)
            raw = np.frombuffer(self._map, np.uint8, count, self.layout.starts[name])
            found[name] = torch.from_numpy(raw).view(dtype).view(shape)
        return found

    def stored(self, rows: slice | Tensor) -> dict[str, Tensor]:
        """Some rows as they are stored."""
        return {name: tensor[rows] for name, tensor in self.parts.items()}

    def rows(
        self, rows: slice | Tensor = slice(None), out: Float[Tensor, "n dim"] | None = None
    ) -> Float[Tensor, "n dim"]:
        """Some rows in float32, in `out` where it is given and they are stored in another type."""
        parts = {name: self.parts[name][rows] for name in self.layout.encoding.parts}
        return self.layout.encoding.decode(parts, out)

    def squares(self, rows: slice | Tensor = slice(None)) -> Float[Tensor, " n"]:
        """Squared lengths of some rows."""
        return self.parts["squares"][rows]

    def release(self) -> None:
        """Tell the system that the pages read so far are not needed in this process."""
        with suppress(OSError, AttributeError, ValueError):
            self._map.madvise(mmap.MADV_DONTNEED)
