"""Files that are written whole or not at all: JSON, checksums, room on the disk, and what can be wrong."""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import Any

from headwater.core.fingerprint import DIGEST_BYTES, portable, revive

MAX_JSON_BYTES = 1 << 26


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


def require_same(saved: Mapping[str, str], given: Mapping[str, str], what: str) -> None:
    """Refuse to go on with what was made from other things, by the names of those that differ.

    Args:
        saved: Fingerprints of what it was made from.
        given: Those of what is at hand.
        what: What was found, as the message begins.

    Raises:
        ArtifactMismatch: One of `given` differs.
    """
    differ = [name for name in given if saved.get(name) != given[name]]
    if differ:
        raise ArtifactMismatch(
            f"{what} with other {' and '.join(differ)}; choose another folder, or remove that one."
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; NaN and infinities come back from `read_json`."""
    path = Path(path)
    text = json.dumps(portable(value, path.stem), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = sibling(path, f"partial-{token_hex(4)}")
    try:
        with disk_room(path, len(text)):
            with HashedFile(partial) as file:
                file.write(text.encode())
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all; what a killed writer left beside it is used up by the next."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = sibling(path, "partial")
    try:
        with disk_room(path, len(content)):
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
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
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> Any:
    """The value of JSON text that was read from `path`."""
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


class HashedFile(io.FileIO):
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


@contextmanager
def disk_room(path: Path, needed: int) -> Iterator[None]:
    """Check for room before writing `needed` bytes of a file, or in or beside a folder; explain a full disk."""
    place = path if path.is_dir() else path.parent
    message = (
        f"Writing {path} needs {_amount(needed)}, but the disk of {place} has {{free}} free. "
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


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows the names in a folder."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sibling(path: Path, role: str) -> Path:
    """Where the partial, aside or lock of `path` lies: next to it, hidden."""
    return path.parent / f".{path.name}.{role}"


def _amount(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"
