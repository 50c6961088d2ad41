"""The state of a running job on disk, two generations deep, and how often it is saved."""

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwater.core.files import (
    ArtifactDamaged,
    ArtifactError,
    HashedFile,
    disk_room,
    parse_json,
    sync_folder,
)
from headwater.core.fingerprint import fingerprint_json, fingerprint_tensors, portable
from headwater.core.manifest import FORMAT, check_format, check_size
from headwater.core.tensor_files import check_name, check_tensor, write_tensors

SAVE_EVERY = 30.0  # seconds between two states, at least
_WORK_PER_SAVE = 20  # seconds of work for each second that a save took


class Cadence:
    """When to save the state of a job: saving takes a twentieth of the time at most.

    Args:
        every: Seconds between two states, at least; 0 saves whenever asked.
    """

    def __init__(self, every: float = SAVE_EVERY):
        self.every, self._wait, self._saved = every, every, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > self._wait

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Put around saving, which it measures."""
        began = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._wait = self.every and max(self.every, _WORK_PER_SAVE * (self._saved - began))


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
            check_name(name, "tensor", ())
            check_tensor(name, tensor)
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
            with disk_room(self.folder, sum(t.nbytes for t in tensors.values())):
                with HashedFile(partial) as file:
                    write_tensors(file, tensors, {"headwater": header})
                os.replace(partial, path)
                sync_folder(self.folder)
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
        check_size(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            body = parse_json((file.metadata() or {})["headwater"].encode(), path)
            check_format(body, path)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if body["tensors"] != fingerprint_tensors(tensors.items()):
            raise ArtifactDamaged("its content has changed since it was written")
        return tensors, body["facts"]

    def _path(self, number: int) -> Path:
        return self.folder / f"generation-{number:06}.safetensors"

    def _generations(self) -> list[Path]:
        return sorted(self.folder.glob("generation-*.safetensors"), key=_number)


def _number(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdecimal() else -1
