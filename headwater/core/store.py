"""Artifacts: what Headwater keeps on disk, to be read and written.

An artifact is a folder: tensors in sharded safetensors files, tables in Parquet, and one
`manifest.json` that says what they are, what they were made from, and the size and checksum of
every file. It is written under a temporary name, synced and renamed, so a reader sees the old
artifact or the new one, each whole. Reading never executes anything and never leaves the folder.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwater.core.files import (
    ArtifactDamaged,
    ArtifactError,
    ArtifactMismatch,
    ArtifactMissing,
    FolderBusy,
    HashedFile,
    disk_room,
    sibling,
    sync_folder,
)
from headwater.core.fingerprint import DIGEST_BYTES, portable, short
from headwater.core.locks import LockFile
from headwater.core.manifest import MANIFEST, REMEDY, check_size, encode_manifest, read_manifest
from headwater.core.replacing import an, recover, refuse_other_content, stamp, standing, swap
from headwater.core.tensor_files import DTYPES, check_name, check_tensor, write_tensors

if TYPE_CHECKING:
    import pyarrow

MAX_TENSORS_PER_SHARD = 1 << 14  # keeps a shard's header far below what safetensors accepts
_MADE_BY = {"fit": "headwater fit", "index": "headwater fit", "scores": "headwater trace"}


@dataclass(frozen=True, eq=False, repr=False)
class Artifact:
    """A saved artifact, open for reading.

    Its files are mapped into memory when it is opened and read when a value is asked for. An
    artifact that another process replaces meanwhile stays readable, as it was when opened.

    Attributes:
        folder: Where it lies.
        kind: What it is, such as "fit" or "scores".
        facts: What its maker wrote down about it: options, counts, costs.
        made_from: Fingerprints of what it was made from, such as `{"model": …, "data": …}`.
        tensor_names: Names of its tensors, in the order in which they were written.
        table_names: Names of its tables.
        manifest: All of `manifest.json`: versions, time, files, shapes.
    """

    folder: Path
    kind: str
    facts: dict[str, Any]
    made_from: dict[str, str]
    tensor_names: tuple[str, ...]
    table_names: tuple[str, ...]
    manifest: dict[str, Any]
    _shards: dict[str, Any]
    _tables: dict[str, Any]

    @classmethod
    def open(
        cls, folder: str | Path, kind: str | None = None, *, verify: bool = False
    ) -> "Artifact":
        """Open the artifact in `folder`; the sizes of all files are checked.

        Args:
            folder: Where it lies.
            kind: Refuse any other kind.
            verify: Read everything once and check it against the checksums as well.

        Raises:
            ArtifactMissing: There is no artifact.
            ArtifactDamaged: A file is missing, cut short or altered; the message names it.
            ArtifactMismatch: It is of another kind.
        """
        folder = Path(folder)
        for _ in range(100):
            place = standing(folder)
            before = stamp(place)
            try:
                artifact = cls._read(folder, place)
                if verify:
                    artifact.verify()
            except (ArtifactError, FileNotFoundError):
                if stamp(standing(folder)) == before:
                    raise
            else:
                if stamp(standing(folder)) == before:
                    break
            time.sleep(0.01)  # a writer has put another artifact in its place meanwhile
        else:
            raise FolderBusy(f"{folder} is being replaced again and again; try again later.")
        if kind is not None and artifact.kind != kind:
            raise ArtifactMismatch(
                f"{folder} holds {an(artifact.kind)}, not {an(kind)}; point to {an(kind)}."
            )
        return artifact

    @classmethod
    def _read(cls, folder: Path, place: Path) -> "Artifact":
        manifest = read_manifest(folder, place)
        shards: dict[str, Any] = {}
        tables: dict[str, Any] = {}
        for name, facts in manifest["files"].items():
            path = place / name
            check_size(path, facts["bytes"])
            try:
                if path.suffix == ".safetensors":
                    shards[name] = safe_open(path, framework="pt", device="cpu")
                else:
                    import pyarrow

                    tables[name] = pyarrow.memory_map(str(path))
            except (SafetensorError, OSError, ValueError) as error:
                raise ArtifactDamaged(f"{path} cannot be read: {error}. {REMEDY}") from error
        listed: dict[str, set[str]] = {shard: set() for shard in shards}
        for name, entry in manifest["tensors"].items():
            listed[entry["shard"]].add(name)
        for shard, file in shards.items():
            if listed[shard] != set(file.keys()):
                raise ArtifactDamaged(
                    f"{place / shard} does not hold the tensors that {MANIFEST} lists. {REMEDY}"
                )
        return cls(
            folder=folder,
            kind=manifest["kind"],
            facts=manifest["facts"],
            made_from=manifest["made_from"],
            tensor_names=tuple(manifest["tensors"]),
            table_names=tuple(manifest["tables"]),
            manifest=manifest,
            _shards=shards,
            _tables=tables,
        )

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, mapped from its file: memory is used as it is read."""
        entry = self._entry("tensors", name)
        tensor = self._shards[entry["shard"]].get_tensor(name)
        if list(tensor.shape) != entry["shape"] or DTYPES.get(tensor.dtype) != entry["dtype"]:
            raise ArtifactDamaged(
                f"{self.folder / entry['shard']} holds {name!r} as {DTYPES.get(tensor.dtype)} "
                f"{list(tensor.shape)}, {MANIFEST} says {entry['dtype']} "
                f"{entry['shape']}. {REMEDY}"
            )
        return tensor

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """The tensors whose names begin with `prefix`, one after another, under their names."""
        for name in self.tensor_names:
            if name.startswith(prefix):
                yield name, self.tensor(name)

    def table(self, name: str) -> "pyarrow.Table":
        """The table of that name."""
        import pyarrow
        import pyarrow.parquet

        file = self._entry("tables", name)
        try:
            return pyarrow.parquet.ParquetFile(self._tables[file]).read()
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactDamaged(
                f"{self.folder / file} cannot be read: {error}. {REMEDY}"
            ) from error

    def rows(self, name: str, start: int, stop: int) -> "pyarrow.Table":
        """Some rows of a table; only the groups of rows that hold them are read.

        Args:
            name: The table.
            start: Number of the first row, from 0.
            stop: Number after the last; rows beyond the table are left out.
        """
        import pyarrow
        import pyarrow.parquet

        file = self._entry("tables", name)
        try:
            parquet = pyarrow.parquet.ParquetFile(self._tables[file])
            groups, first, before = [], 0, 0
            for number in range(parquet.num_row_groups):
                after = before + parquet.metadata.row_group(number).num_rows
                if after > start and before < stop:
                    first = first if groups else before
                    groups.append(number)
                before = after
            found = parquet.read_row_groups(groups)
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactDamaged(
                f"{self.folder / file} cannot be read: {error}. {REMEDY}"
            ) from error
        return found.slice(max(start - first, 0), max(stop - max(start, 0), 0))

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            ArtifactDamaged: A file has changed since it was written; the message names it.
        """
        place = standing(self.folder)
        if read_manifest(self.folder, place)["blake2b"] != self.manifest["blake2b"]:
            raise ArtifactError(
                f"{self.folder} was written anew after this artifact was opened; open it again."
            )
        for name, facts in self.manifest["files"].items():
            path = place / name
            check_size(path, facts["bytes"])
            content = blake2b(digest_size=DIGEST_BYTES)
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(1 << 20):
                    content.update(chunk)
            if content.hexdigest() != facts["blake2b"]:
                raise ArtifactDamaged(
                    f"{path} has changed since it was written: its checksum is "
                    f"{short(content.hexdigest())}…, {MANIFEST} says "
                    f"{short(facts['blake2b'])}…. {REMEDY}"
                )

    def require(self, **fingerprints: str) -> None:
        """Refuse an artifact that was made from something else than what is at hand.

        Args:
            fingerprints: What is at hand, as in `require(model=fingerprint_model(model))`.

        Raises:
            ArtifactMismatch: A fingerprint differs; the message names all that do.
        """
        differ = {
            what: (self.made_from.get(what), given)
            for what, given in fingerprints.items()
            if self.made_from.get(what) != given
        }
        if differ:
            made_by = _MADE_BY.get(self.kind)
            again = f"run `{made_by}` again" if made_by else "make it again"
            names = " and ".join(
                f"{_other(what)} ({_saved(*pair)})" for what, pair in differ.items()
            )
            raise ArtifactMismatch(
                f"The {self.kind} in {self.folder} was made from {names}; {again}, or point to "
                f"the {' and '.join(differ)} it was made from."
            )

    def _entry(self, group: str, name: str) -> Any:
        entries = self.manifest[group]
        if name not in entries:
            some = ", ".join(list(entries)[:8]) + (", …" if len(entries) > 8 else "")
            raise ArtifactMissing(
                f"The {self.kind} in {self.folder} has no {group[:-1]} {name!r}; it has "
                f"{len(entries)} {group}{': ' * bool(some)}{some}."
            )
        return entries[name]

    def __repr__(self) -> str:
        gigabytes = sum(file["bytes"] for file in self.manifest["files"].values()) / 1e9
        return (
            f"Artifact({self.kind} in {self.folder}: {len(self.tensor_names)} tensors, "
            f"{len(self.table_names)} tables, {gigabytes:.3g} GB)"
        )


class ArtifactWriter:
    """Write an artifact, all or nothing.

    Tensors are copied into a buffer and written when a shard is full; one as large as a shard is
    written at once. Leaving the `with` block puts the artifact in its place, where it replaces an
    older one of the same kind; leaving it by an exception changes nothing. If the process is
    killed while the folders change places, the next reader or writer puts the old one back.

    Args:
        folder: Where the artifact goes; anything else in there is never overwritten.
        kind: What it is, such as "fit".
        facts: JSON values to keep with it; NaN and infinities are fine.
        made_from: Fingerprints of what it is made from, checked by `Artifact.require`.
        shard_bytes: Size at which a new shard is begun.

    Example:
        >>> with ArtifactWriter("runs/a/fit", kind="fit") as writer:  # doctest: +SKIP
        ...     writer.tensor("layer.A", torch.eye(3))
        ...     writer.table("layers", {"name": ["layer"], "parameters": [12]})
        ...     writer.fact("examples", 1000)
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        facts: Mapping[str, Any] | None = None,
        made_from: Mapping[str, str] | None = None,
        shard_bytes: int = 1 << 30,
    ):
        self.folder, self.kind, self.shard_bytes = Path(folder).resolve(), kind, shard_bytes
        self._facts: dict[str, Any] = portable(facts or {}, "facts")
        self._made_from = dict(made_from or {})
        for what, digest in self._made_from.items():
            if not isinstance(digest, str):
                raise TypeError(f"made_from[{what!r}] must be a fingerprint; got {digest!r}.")
        self._files: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, dict[str, Any]] = {}
        self._tables: dict[str, str] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._partial: Path | None = None
        self._lock = LockFile(sibling(self.folder, "lock"))

    def __enter__(self) -> "ArtifactWriter":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(self.folder)
        try:
            recover(self.folder)
            refuse_other_content(self.folder, self.kind)
            partial = sibling(self.folder, f"partial-{token_hex(4)}")
            partial.mkdir()
        except BaseException:
            self._lock.release()
            raise
        self._partial = partial
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        partial = self._open_partial()
        try:
            if error is None:
                self._flush()
                self._write_manifest(partial)
                swap(partial, self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # what was swapped in has left this name
            self._partial = None
            self._pending.clear()
            self._lock.release()

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; it may be changed afterwards."""
        self._open_partial()
        check_name(name, "tensor", self._tensors)
        check_tensor(name, tensor)
        if self._pending and (
            self._pending_bytes + tensor.nbytes > self.shard_bytes
            or len(self._pending) == MAX_TENSORS_PER_SHARD
        ):
            self._flush()
        at_once = tensor.nbytes >= self.shard_bytes
        tensor = tensor.detach()
        self._pending[name] = tensor if at_once else tensor.to("cpu", copy=True)
        self._pending_bytes += tensor.nbytes
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        self._tensors[name] = {"shard": self._shard_name(), "dtype": dtype, "shape": shape}
        if at_once:
            self._flush()

    def table(
        self,
        name: str,
        columns: "Mapping[str, Sequence] | pyarrow.Table",
        *,
        compression: str = "snappy",
        group: int | None = None,
    ) -> None:
        """Add a table, as columns of equal length.

        Args:
            name: Its name.
            columns: Its columns.
            compression: Codec of the Parquet file; "zstd" for long texts.
            group: Rows that are read together, of a table of which a few rows are asked for at a time.
        """
        import pyarrow
        import pyarrow.parquet

        partial = self._open_partial()
        check_name(name, "table", self._tables)
        try:
            given = columns if isinstance(columns, pyarrow.Table) else dict(columns)
            table: pyarrow.Table = pyarrow.table(given)
        except (pyarrow.ArrowException, TypeError) as error:
            raise ValueError(
                f"Table {name!r} cannot be stored: {error}. A column is a list of values of one "
                "type, and all columns are equally long."
            ) from error
        file_name = f"table-{len(self._tables):05}.parquet"
        with disk_room(self.folder, table.nbytes), HashedFile(partial / file_name) as file:
            pyarrow.parquet.write_table(table, file, compression=compression, row_group_size=group)
        self._files[file_name] = file.facts
        self._tables[name] = file_name

    def fact(self, key: str, value: Any) -> None:
        """Add a fact, or replace it."""
        self._facts[key] = portable(value, f"facts.{key}")

    def _flush(self) -> None:
        if not self._pending:
            return
        name = self._shard_name()
        with (
            disk_room(self.folder, self._pending_bytes),
            HashedFile(self._open_partial() / name) as file,
        ):
            write_tensors(file, self._pending)
        self._files[name] = file.facts
        self._pending, self._pending_bytes = {}, 0

    def _shard_name(self) -> str:
        return f"tensors-{len(self._files) - len(self._tables):05}.safetensors"

    def _write_manifest(self, partial: Path) -> None:
        content = {
            "kind": self.kind,
            "facts": self._facts,
            "made_from": self._made_from,
            "files": self._files,
            "tensors": self._tensors,
            "tables": self._tables,
        }
        text = encode_manifest(content, self.folder)
        with disk_room(self.folder, len(text)):
            with HashedFile(partial / MANIFEST) as file:
                file.write(text)
            sync_folder(partial)

    def _open_partial(self) -> Path:
        if self._partial is None:
            raise ArtifactError("The writer is not open; use it as `with ArtifactWriter(…) as w:`.")
        return self._partial


def _other(what: str) -> str:
    return "other data" if what == "data" else f"another {what}"


def _saved(saved: str | None, given: str) -> str:
    return f"saved {short(saved) + '…' if saved else 'nothing'}, given {short(given)}…"
