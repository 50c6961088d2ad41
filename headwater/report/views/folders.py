"""The results of a run folder: by what each is asked for, whatever its name, and that it lies in the run."""

import os
from pathlib import Path

from headwater.core.files import ArtifactError


class LeadsOut(ArtifactError):
    """A link leads out of the run folder."""


def id_of(name: str) -> str:
    r"""What a folder is asked for by: its name, with the bytes of every character that cannot be seen.

    Two names never share an id, and an id can be shown as it is.

    Example:
        >>> id_of("lava"), id_of("la\u202eva, 5 %")
        ('lava', 'la%E2%80%AEva, 5 %25')
    """
    return "".join(c if c.isprintable() and c != "%" else _bytes(c) for c in name)


def _bytes(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))


def folders(place: Path) -> dict[str, Path]:
    """Folders of a folder by id; hidden ones are unfinished, and links are not followed."""
    if place.is_symlink() or not place.is_dir():
        return {}
    with os.scandir(place) as entries:
        found = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
    return {id_of(name): place / name for name in sorted(found) if not name.startswith(".")}


def inside(run: str | Path, place: Path) -> Path:
    """A file or folder of the run; one that leads out of it by a link, itself or a file in it, is not read.

    Raises:
        LeadsOut: It does.
    """
    root = Path(run).resolve()
    parts = [place, *place.rglob("*")] if place.is_dir() and not place.is_symlink() else [place]
    for part in parts:
        if not part.resolve().is_relative_to(root):
            raise LeadsOut(f"{part.name!r} is a link that leads out of the run; it is not read.")
    return place
