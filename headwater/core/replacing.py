"""How a new artifact takes the place of an old one, so that at every moment one of them is whole.

The new folder is written as a hidden sibling; the old one steps aside, the new one takes its name, and the old one is
removed. Whoever comes next after a writer was killed in between puts things in order.
"""

import errno
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from headwater.core.files import (
    ArtifactError,
    ArtifactMismatch,
    FolderBusy,
    disk_room,
    sibling,
    sync_folder,
)
from headwater.core.locks import LockFile
from headwater.core.manifest import FILE_NAME, MANIFEST, read_manifest


def swap(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`; at every moment one of them is whole on disk."""
    aside = sibling(folder, f"aside-{token_hex(4)}")
    replaces = folder.is_dir() and any(folder.iterdir())
    if replaces:
        os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except OSError:
        if replaces:
            os.rename(aside, folder)
        raise
    sync_folder(folder.parent)
    if replaces:
        _discard(aside)


def _discard(aside: Path) -> None:
    """Remove an artifact's own files, the manifest first, and nothing that others put there."""
    (aside / MANIFEST).unlink(missing_ok=True)  # from here on it is never put back
    for name in os.listdir(aside):
        if FILE_NAME.fullmatch(name):
            (aside / name).unlink()
    try:
        aside.rmdir()
    except OSError:
        warnings.warn(f"{aside} holds files that Headwater did not write; move them.", stacklevel=2)


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to be filled, which takes its name when the block ends: it is there whole or not at all.

    What a killed writer left of it is removed, and a full disk explained, whichever library met it.

    Args:
        folder: The folder.
        replace: Whether it may take the place of one that is there, which stands until then.

    Raises:
        FolderBusy: Another process writes it.
        OutOfDisk: The disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = LockFile(sibling(folder, "lock"))
    lock.acquire(folder)
    partial, aside = sibling(folder, "partial"), sibling(folder, "replaced")
    try:
        if (
            aside.exists() and not folder.exists()
        ):  # a writer was killed while the two changed places
            os.rename(aside, folder)
        for left in (partial, aside):
            shutil.rmtree(left, ignore_errors=True)
        with disk_room(folder, 0):
            partial.mkdir()
            try:
                yield partial
            except OSError:
                raise
            except Exception as error:  # writers in Rust say so in words alone
                if "No space left" in str(error):
                    raise OSError(errno.ENOSPC, "No space left on device") from error
                raise
        if replace and folder.exists():
            os.rename(folder, aside)
        os.rename(partial, folder)
        sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it has left this name where all went well
        lock.release()


def recover(folder: Path) -> None:
    """Clear up after a killed writer; the caller holds the lock."""
    for aside in _siblings(folder, "aside-"):
        lost = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if lost and (aside / MANIFEST).exists():
            os.rename(aside, folder)
        else:
            _discard(aside)
    for partial in _siblings(folder, "partial-"):
        shutil.rmtree(partial, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where the artifact of `folder` can be read: there, or aside if a writer was stopped."""
    folder = folder.resolve()
    for _ in range(500):
        asides = [a for a in _siblings(folder, "aside-") if (a / MANIFEST).exists()]
        if (folder / MANIFEST).exists() or not asides:
            return folder
        lock = LockFile(sibling(folder, "lock"))
        try:
            lock.acquire(folder)
        except FolderBusy:  # its writer lives, and is about to put the new one here
            time.sleep(0.01)
            continue
        except OSError:  # a disk that can only be read
            return asides[0]
        try:
            recover(folder)
        finally:
            lock.release()
    return folder


def stamp(place: Path) -> tuple[int, int, int] | None:
    """What tells one manifest in a place from the next."""
    try:
        found = os.stat(place / MANIFEST)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def refuse_other_content(folder: Path, kind: str) -> None:
    """Let a writer replace an artifact of its kind or an empty folder, and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; choose a folder for the {kind}.")
    names = sorted(os.listdir(folder))
    foreign = [n for n in names if n != MANIFEST and not FILE_NAME.fullmatch(n)]
    if foreign:
        raise ArtifactError(
            f"{folder} holds other files ({', '.join(foreign[:3])}{', …' * (len(foreign) > 3)}), "
            f"which writing the {kind} there would remove; choose another folder."
        )
    if MANIFEST in names:
        try:
            there = read_manifest(folder, folder)["kind"]
        except ArtifactError:
            return  # a damaged artifact, or of another version: made again
        if there != kind:
            raise ArtifactMismatch(
                f"{folder} holds {an(there)}, which writing {an(kind)} there would remove; choose "
                "another folder."
            )


def _siblings(path: Path, role: str) -> list[Path]:
    prefix = sibling(path, role).name
    try:
        return sorted(path.parent / n for n in os.listdir(path.parent) if n.startswith(prefix))
    except OSError:
        return []


def an(kind: str) -> str:
    """A kind of artifact with its article."""
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"
