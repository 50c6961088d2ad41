"""What Headwater keeps on disk: artifacts, checkpoints of running jobs, locks, JSON files.

An artifact is a folder: tensors in sharded safetensors files, tables in Parquet, and one
`manifest.json` that says what they are, what they were made from, and the size and checksum of
every file. It is written under a temporary name, synced and renamed, so a reader sees the old
artifact or the new one, each whole. Reading never executes anything and never leaves the folder.
"""

import errno
import io
import json
import os
import re
import shutil
import socket
import stat
import struct
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwater import __version__
from headwater.core.fingerprint import (
    DIGEST_BYTES,
    byte_chunks,
    fingerprint_json,
    fingerprint_tensors,
    portable,
    require_dense,
    revive,
    short,
)

try:
    import fcntl
except ImportError:  # Windows has other locks; there a folder has only its owner's care
    fcntl = None

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 26
MAX_TENSORS_PER_SHARD = 1 << 14  # keeps a shard's header far below what safetensors accepts
MAX_NAME_LENGTH = 1000

_FILE_NAME = re.compile(r"(tensors-\d{5,}\.safetensors|table-\d{5,}\.parquet)")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_MADE_BY = {"fit": "headwater fit", "index": "headwater fit", "scores": "headwater trace"}


class ArtifactError(ValueError):
    """Something on disk cannot be used as asked."""


class ArtifactMismatch(ArtifactError):
    """The artifact was made from something else than what is at hand."""


class ArtifactDamaged(ArtifactError):
    """A file is missing, cut short, altered, or not what it should be."""


class ArtifactMissing(FileNotFoundError, ArtifactError):
    """There is nothing of that name."""


class FolderBusy(ArtifactError):
    """Another process is writing the folder."""


class OutOfDisk(OSError, ArtifactError):
    """There is too little room to write; `errno` is `ENOSPC`."""

    def __str__(self) -> str:
        return str(self.strerror)


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
            place = _standing(folder)
            before = _stamp(place)
            try:
                artifact = cls._read(folder, place)
                if verify:
                    artifact.verify()
            except (ArtifactError, FileNotFoundError):
                if _stamp(_standing(folder)) == before:
                    raise
            else:
                if _stamp(_standing(folder)) == before:
                    break
            time.sleep(0.01)  # a writer has put another artifact in its place meanwhile
        else:
            raise FolderBusy(f"{folder} is being replaced again and again; try again later.")
        if kind is not None and artifact.kind != kind:
            raise ArtifactMismatch(
                f"{folder} holds {_a(artifact.kind)}, not {_a(kind)}; point to {_a(kind)}."
            )
        return artifact

    @classmethod
    def _read(cls, folder: Path, place: Path) -> "Artifact":
        manifest = _read_manifest(folder, place)
        shards: dict[str, Any] = {}
        tables: dict[str, Any] = {}
        for name, facts in manifest["files"].items():
            path = place / name
            _check_size(path, facts["bytes"])
            try:
                if path.suffix == ".safetensors":
                    shards[name] = safe_open(path, framework="pt", device="cpu")
                else:
                    import pyarrow

                    tables[name] = pyarrow.memory_map(str(path))
            except (SafetensorError, OSError, ValueError) as error:
                raise ArtifactDamaged(f"{path} cannot be read: {error}. {_REMEDY}") from error
        listed: dict[str, set[str]] = {shard: set() for shard in shards}
        for name, entry in manifest["tensors"].items():
            listed[entry["shard"]].add(name)
        for shard, file in shards.items():
            if listed[shard] != set(file.keys()):
                raise ArtifactDamaged(
                    f"{place / shard} does not hold the tensors that {MANIFEST} lists. {_REMEDY}"
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
        if list(tensor.shape) != entry["shape"] or _DTYPES.get(tensor.dtype) != entry["dtype"]:
            raise ArtifactDamaged(
                f"{self.folder / entry['shard']} holds {name!r} as {_DTYPES.get(tensor.dtype)} "
                f"{list(tensor.shape)}, {MANIFEST} says {entry['dtype']} "
                f"{entry['shape']}. {_REMEDY}"
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
                f"{self.folder / file} cannot be read: {error}. {_REMEDY}"
            ) from error

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            ArtifactDamaged: A file has changed since it was written; the message names it.
        """
        place = _standing(self.folder)
        if _read_manifest(self.folder, place)["blake2b"] != self.manifest["blake2b"]:
            raise ArtifactError(
                f"{self.folder} was written anew after this artifact was opened; open it again."
            )
        for name, facts in self.manifest["files"].items():
            path = place / name
            _check_size(path, facts["bytes"])
            content = blake2b(digest_size=DIGEST_BYTES)
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(1 << 20):
                    content.update(chunk)
            if content.hexdigest() != facts["blake2b"]:
                raise ArtifactDamaged(
                    f"{path} has changed since it was written: its checksum is "
                    f"{short(content.hexdigest())}…, {MANIFEST} says "
                    f"{short(facts['blake2b'])}…. {_REMEDY}"
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
        self._lock = _Lock(_sibling(self.folder, "lock"))

    def __enter__(self) -> "ArtifactWriter":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(self.folder)
        try:
            _recover(self.folder)
            _refuse_other_content(self.folder, self.kind)
            partial = _sibling(self.folder, f"partial-{token_hex(4)}")
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
                _swap(partial, self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # what was swapped in has left this name
            self._partial = None
            self._pending.clear()
            self._lock.release()

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; it may be changed afterwards."""
        self._open_partial()
        _check_name(name, "tensor", self._tensors)
        _check_tensor(name, tensor)
        if self._pending and (
            self._pending_bytes + tensor.nbytes > self.shard_bytes
            or len(self._pending) == MAX_TENSORS_PER_SHARD
        ):
            self._flush()
        at_once = tensor.nbytes >= self.shard_bytes
        tensor = tensor.detach()
        self._pending[name] = tensor if at_once else tensor.to("cpu", copy=True)
        self._pending_bytes += tensor.nbytes
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        self._tensors[name] = {"shard": self._shard_name(), "dtype": dtype, "shape": shape}
        if at_once:
            self._flush()

    def table(self, name: str, columns: "Mapping[str, Sequence] | pyarrow.Table") -> None:
        """Add a table, as columns of equal length."""
        import pyarrow
        import pyarrow.parquet

        partial = self._open_partial()
        _check_name(name, "table", self._tables)
        try:
            given = columns if isinstance(columns, pyarrow.Table) else dict(columns)
            table: pyarrow.Table = pyarrow.table(given)
        except (pyarrow.ArrowException, TypeError) as error:
            raise ValueError(
                f"Table {name!r} cannot be stored: {error}. A column is a list of values of one "
                "type, and all columns are equally long."
            ) from error
        file_name = f"table-{len(self._tables):05}.parquet"
        with _disk(self.folder, table.nbytes), _HashedFile(partial / file_name) as file:
            pyarrow.parquet.write_table(table, file)
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
            _disk(self.folder, self._pending_bytes),
            _HashedFile(self._open_partial() / name) as file,
        ):
            _write_tensors(file, self._pending)
        self._files[name] = file.facts
        self._pending, self._pending_bytes = {}, 0

    def _shard_name(self) -> str:
        return f"tensors-{len(self._files) - len(self._tables):05}.safetensors"

    def _write_manifest(self, partial: Path) -> None:
        manifest = {
            "format": FORMAT,
            "headwater": __version__,
            "torch": torch.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": self.kind,
            "facts": self._facts,
            "made_from": self._made_from,
            "files": self._files,
            "tensors": self._tensors,
            "tables": self._tables,
        }
        text = json.dumps(manifest | {"blake2b": fingerprint_json(manifest)}, indent=1).encode()
        if len(text) > MAX_JSON_BYTES:
            raise ArtifactError(
                f"The {MANIFEST} of {self.folder} would have {len(text):,} bytes, more than "
                f"{MAX_JSON_BYTES:,}; keep long lists in a table instead of in facts, and many "
                "small tensors in one."
            )
        with _disk(self.folder, len(text)):
            with _HashedFile(partial / MANIFEST) as file:
                file.write(text)
            _sync_folder(partial)

    def _open_partial(self) -> Path:
        if self._partial is None:
            raise ArtifactError("The writer is not open; use it as `with ArtifactWriter(…) as w:`.")
        return self._partial


class Checkpoint:
    """The state of a running job, saved so that a killed job goes on where it stopped.

    Two generations are kept, each one file that is whole or absent. Call it under a `FolderLock`
    where two jobs could meet.

    Args:
        folder: A folder of its own.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the older generation; a crash at any point leaves the newer one whole."""
        for name, tensor in tensors.items():
            _check_name(name, "tensor", ())
            _check_tensor(name, tensor)
        body = {
            "format": FORMAT,
            "facts": portable(facts, "facts"),
            "tensors": fingerprint_tensors(tensors.items()),
        }
        header = json.dumps(body | {"blake2b": fingerprint_json(body)})
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".saving-*"):
            left.unlink()
        kept = self._generations()
        number = _number(kept[-1]) + 1 if kept else 0
        path, partial = self._path(number), self.folder / f".saving-{number}"
        try:
            with _disk(self.folder, sum(t.nbytes for t in tensors.values())):
                with _HashedFile(partial) as file:
                    _write_tensors(file, tensors, {"headwater": header})
                os.replace(partial, path)
                _sync_folder(self.folder)
        finally:
            partial.unlink(missing_ok=True)
        for old in kept[:-1]:
            old.unlink()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest generation that is whole, as (tensors, facts); None if there is none."""
        for path in reversed(self._generations()):
            try:
                return self._read(path)
            except (ArtifactError, SafetensorError, OSError, KeyError, TypeError) as error:
                warnings.warn(
                    f"The checkpoint {path} cannot be used ({error}); the one before it is tried.",
                    stacklevel=2,
                )
        return None

    def clear(self) -> None:
        """Remove all generations, and the folder if nothing else is in it."""
        for path in [*self._generations(), *self.folder.glob(".saving-*")]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        _check_size(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            body = _parse_json((file.metadata() or {})["headwater"].encode(), path)
            _check_format(body, path)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if body["tensors"] != fingerprint_tensors(tensors.items()):
            raise ArtifactDamaged("its content has changed since it was written")
        return tensors, body["facts"]

    def _path(self, number: int) -> Path:
        return self.folder / f"generation-{number:06}.safetensors"

    def _generations(self) -> list[Path]:
        return sorted(self.folder.glob("generation-*.safetensors"), key=_number)


class FolderLock:
    """Keep a second writer out of a folder while the `with` block runs.

    The operating system lets go of the lock when its process ends, however it ends.

    Raises:
        FolderBusy: Another process holds it; the message names its number.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock = _Lock(self.folder / ".lock")

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; NaN and infinities come back from `read_json`."""
    path = Path(path)
    text = json.dumps(portable(value, path.stem), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path, f"partial-{token_hex(4)}")
    try:
        with _disk(path.parent, len(text)):
            with _HashedFile(partial) as file:
                file.write(text.encode())
            os.replace(partial, path)
            _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactMissing: There is no such file.
        ArtifactDamaged: It is not JSON; the message names the line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise ArtifactMissing(f"{path} does not exist.") from error
    return _parse_json(data, path)


def _parse_json(data: bytes, path: Path) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise ArtifactDamaged(f"{path} is larger than {MAX_JSON_BYTES:,} bytes, the most allowed.")
    try:
        return json.loads(data.decode(), object_hook=revive)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ArtifactDamaged(f"{path} is not valid JSON at {where}: {error.msg}.") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ArtifactDamaged(f"{path} is not valid UTF-8 at line {line}.") from error
    except (ValueError, TypeError, RecursionError) as error:  # absurd numbers, absurd nesting
        raise ArtifactDamaged(f"{path} is not JSON that can be read: {error}.") from error


# What a manifest may say


_REMEDY = "Make it again, or restore it from a copy."


def _read_manifest(folder: Path, place: Path) -> dict[str, Any]:
    path = place / MANIFEST
    if not os.path.lexists(path):
        state = "it has no manifest.json" if folder.is_dir() else "no such folder"
        raise ArtifactMissing(
            f"There is no artifact in {folder} ({state}); make it first, or check the path."
        )
    _check_size(path)
    manifest = read_json(path)
    _check_format(manifest, path)
    files = manifest.get("files")
    shape_of = {"files": dict, "tensors": dict, "tables": dict, "facts": dict, "made_from": dict}
    wrong = [key for key, kind in shape_of.items() if not isinstance(manifest.get(key), kind)]
    if wrong or not isinstance(manifest.get("kind"), str):
        raise ArtifactDamaged(f"{path} lacks {', '.join(wrong) or 'its kind'}. {_REMEDY}")
    for name, facts in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise ArtifactDamaged(
                f"{path} names the file {name!r}, which is no file of an artifact; it is refused, "
                "as a path could lead out of the folder."
            )
        if not (_has(facts, bytes=int, blake2b=str) and facts["bytes"] >= 0):
            raise ArtifactDamaged(f"{path} says nothing of use on the file {name!r}. {_REMEDY}")
    for name, entry in manifest["tensors"].items():
        if not (
            _has(entry, shard=str, dtype=str, shape=list)
            and entry["shard"] in files
            and entry["shard"].endswith(".safetensors")
        ):
            raise ArtifactDamaged(f"{path} says nothing of use on the tensor {name!r}. {_REMEDY}")
    for name, file in manifest["tables"].items():
        if not isinstance(file, str) or file not in files or not file.endswith(".parquet"):
            raise ArtifactDamaged(f"{path} says nothing of use on the table {name!r}. {_REMEDY}")
    if not all(isinstance(digest, str) for digest in manifest["made_from"].values()):
        raise ArtifactDamaged(f"{path}: made_from must hold fingerprints. {_REMEDY}")
    return manifest


def _check_format(body: Any, path: Path) -> None:
    """Refuse what another version wrote, and what has changed since it was written."""
    if not isinstance(body, dict) or "format" not in body:
        raise ArtifactDamaged(f"{path} was not written by Headwater: it names no format.")
    if body["format"] != FORMAT:
        raise ArtifactError(
            f"{path} has format {body['format']!r}; Headwater {__version__} reads format {FORMAT}. "
            "Read it with the version that wrote it, or make it again."
        )
    content = {key: value for key, value in body.items() if key != "blake2b"}
    try:
        whole = body.get("blake2b") == fingerprint_json(content)
    except TypeError:  # a NaN that `portable` did not write
        whole = False
    if not whole:
        raise ArtifactDamaged(f"{path} has changed since it was written. {_REMEDY}")


def _has(entry: Any, **kinds: type) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items())


def _check_size(path: Path, expected: int | None = None) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError as error:
        raise ArtifactDamaged(f"{path} is missing. {_REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactDamaged(f"{path} is not a regular file; links and the like are refused.")
    if expected is not None and found.st_size != expected:
        raise ArtifactDamaged(
            f"{path} has {found.st_size:,} bytes, {MANIFEST} says {expected:,}. {_REMEDY}"
        )


def _check_name(name: str, what: str, taken: Mapping | tuple) -> None:
    if name in taken:
        raise ValueError(f"A {what} named {name!r} was written already; choose another name.")
    if not 0 < len(name) <= MAX_NAME_LENGTH or name == "__metadata__" or not _is_text(name):
        raise ValueError(
            f"{name[:50]!r} cannot name a {what}; expected 1 to {MAX_NAME_LENGTH} characters of "
            "valid Unicode other than '__metadata__'."
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    require_dense(tensor)
    if tensor.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"Tensor {name!r} is {tensor.dtype}, which cannot be stored; expected one of {known}."
        )


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


# Writing files


class _HashedFile(io.FileIO):
    """A new file that knows its size and checksum, and is synced before it is closed."""

    def __init__(self, path: Path):
        super().__init__(path, "xb")
        self._content = blake2b(digest_size=DIGEST_BYTES)
        self._bytes = 0

    def write(self, data: Any, /) -> int:
        view = memoryview(data)  # of single bytes
        self._content.update(view)
        self._bytes += view.nbytes
        done = 0
        while done < view.nbytes:  # the system may take only a part
            done += super().write(view[done:]) or 0
        return done

    def close(self) -> None:
        if not self.closed:
            try:
                os.fsync(self.fileno())
            finally:
                super().close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()
        if error is not None:
            os.unlink(self.name)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        return {"bytes": self._bytes, "blake2b": self._content.hexdigest()}


def _write_tensors(
    file: _HashedFile, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write the safetensors format: length of the header, header, bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    # The widest numbers come first, so that each tensor begins at a multiple of its item's size.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for name in ordered:
        for chunk in byte_chunks(tensors[name]):
            file.write(chunk)


@contextmanager
def _disk(folder: Path, needed: int) -> Iterator[None]:
    """Check for room before writing `needed` bytes in or beside `folder`; explain a full disk."""
    place = folder if folder.is_dir() else folder.parent
    message = (
        f"Writing {folder} needs {_amount(needed)}, but the disk of {place} has {{free}} free. "
        "Make room there, or choose a folder on another disk."
    )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutOfDisk(errno.ENOSPC, message.format(free=_amount(free)))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise
        free = _amount(shutil.disk_usage(place).free)
        raise OutOfDisk(errno.ENOSPC, message.format(free=free)) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Changing places


def _sibling(path: Path, role: str) -> Path:
    """Where the partial, aside or lock of `path` lies: next to it, hidden."""
    return path.parent / f".{path.name}.{role}"


def _siblings(path: Path, role: str) -> list[Path]:
    prefix = _sibling(path, role).name
    try:
        return sorted(path.parent / n for n in os.listdir(path.parent) if n.startswith(prefix))
    except OSError:
        return []


def _swap(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`; at every moment one of them is whole on disk."""
    aside = _sibling(folder, f"aside-{token_hex(4)}")
    replaces = folder.is_dir() and any(folder.iterdir())
    if replaces:
        os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except OSError:
        if replaces:
            os.rename(aside, folder)
        raise
    _sync_folder(folder.parent)
    if replaces:
        _discard(aside)


def _discard(aside: Path) -> None:
    """Remove an artifact's own files, the manifest first, and nothing that others put there."""
    (aside / MANIFEST).unlink(missing_ok=True)  # from here on it is never put back
    for name in os.listdir(aside):
        if _FILE_NAME.fullmatch(name):
            (aside / name).unlink()
    try:
        aside.rmdir()
    except OSError:
        warnings.warn(f"{aside} holds files that Headwater did not write; move them.", stacklevel=2)


def _recover(folder: Path) -> None:
    """Clear up after a killed writer; the caller holds the lock."""
    for aside in _siblings(folder, "aside-"):
        lost = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if lost and (aside / MANIFEST).exists():
            os.rename(aside, folder)
        else:
            _discard(aside)
    for partial in _siblings(folder, "partial-"):
        shutil.rmtree(partial, ignore_errors=True)


def _standing(folder: Path) -> Path:
    """Where the artifact of `folder` can be read: there, or aside if a writer was stopped."""
    folder = folder.resolve()
    for _ in range(500):
        asides = [a for a in _siblings(folder, "aside-") if (a / MANIFEST).exists()]
        if (folder / MANIFEST).exists() or not asides:
            return folder
        lock = _Lock(_sibling(folder, "lock"))
        try:
            lock.acquire(folder)
        except FolderBusy:  # its writer lives, and is about to put the new one here
            time.sleep(0.01)
            continue
        except OSError:  # a disk that can only be read
            return asides[0]
        try:
            _recover(folder)
        finally:
            lock.release()
    return folder


def _stamp(place: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(place / MANIFEST)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _refuse_other_content(folder: Path, kind: str) -> None:
    """Let a writer replace an artifact of its kind or an empty folder, and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; choose a folder for the {kind}.")
    names = sorted(os.listdir(folder))
    foreign = [n for n in names if n != MANIFEST and not _FILE_NAME.fullmatch(n)]
    if foreign:
        raise ArtifactError(
            f"{folder} holds other files ({', '.join(foreign[:3])}{', …' * (len(foreign) > 3)}), "
            f"which writing the {kind} there would remove; choose another folder."
        )
    if MANIFEST in names:
        try:
            there = _read_manifest(folder, folder)["kind"]
        except ArtifactError:
            return  # a damaged artifact, or of another version: made again
        if there != kind:
            raise ArtifactMismatch(
                f"{folder} holds {_a(there)}, which writing {_a(kind)} there would remove; choose "
                "another folder."
            )


class _Lock:
    """A lock file that names its holder; the operating system frees it with the process."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, folder: Path) -> None:
        descriptor = self._open(folder)
        while not self._is_at_path(descriptor):  # its last holder removed it in between
            os.close(descriptor)
            descriptor = self._open(folder)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, folder: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o644)
        try:
            _flock(descriptor)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise FolderBusy(
                f"{folder} is being written by {holder}; wait until it has finished, or stop it, "
                "and try again."
            ) from error
        return descriptor

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def _flock(descriptor: int) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network disks have no locks
        warnings.warn(f"The disk offers no locks ({error}); keep other writers away.", stacklevel=4)


# Words of the messages


def _number(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _a(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _other(what: str) -> str:
    return "other data" if what == "data" else f"another {what}"


def _saved(saved: str | None, given: str) -> str:
    return f"saved {short(saved) + '…' if saved else 'nothing'}, given {short(given)}…"


def _amount(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"
