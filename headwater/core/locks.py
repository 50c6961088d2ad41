"""Locks that keep a second writer out of a folder, and that end with their process."""

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headwater.core.files import FolderBusy

try:
    import fcntl
except ImportError:  # Windows has other locks; there a folder has only its owner's care
    fcntl = None


class FolderLock:
    """Keep a second writer out of a folder while the `with` block runs.

    The operating system lets go of the lock when its process ends, however it ends.

    Raises:
        FolderBusy: Another process holds it; the message names its number.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock = LockFile(self.folder / ".lock")

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class LockFile:
    """A lock file that names its holder; the operating system frees it with the process."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, folder: Path) -> None:
        descriptor = self._open(folder)
        while not self._is_at_path(descriptor):  # its last holder removed it in between
            os.close(descriptor)
            descriptor = self._open(folder)
        self._descriptor = descriptor
        with suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

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


@contextmanager
def waiting(path: Path, folder: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file while the `with` block runs, as soon as no other process does.

    Args:
        path: The lock file.
        folder: What it keeps others out of, for the message.
        seconds: How long to wait at most.

    Raises:
        FolderBusy: Another process held it all that time; the message names its number.
    """
    lock, until = LockFile(path), time.monotonic() + seconds
    while True:
        try:
            lock.acquire(folder)
            break
        except FolderBusy:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.release()


def _flock(descriptor: int) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network disks have no locks
        warnings.warn(f"The disk offers no locks ({error}); keep other writers away.", stacklevel=4)
