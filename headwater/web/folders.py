"""Files of a run folder by names that came in a request: looked up among those that are there, never put together."""

from pathlib import Path

from headwater.web.guard import Refused


def named(run: Path, group: str, name: str, what: str) -> Path:
    """The folder or file of that name in a part of the run.

    Args:
        run: The run folder.
        group: The part: a folder in it.
        name: The name asked for.
        what: What it is, for the message.

    Raises:
        Refused: There is none of that name, or it lies outside of the run.
    """
    there = {p.name: p for p in _entries(run / group)}
    if name not in there:
        raise Refused(404, f"There is no {what} of that name in this run.")
    inside(run, there[name])
    return there[name]


def inside(run: Path, path: Path) -> None:
    """Refuse what leads out of the run by a link, itself or a file in it.

    Raises:
        Refused: It does.
    """
    root = run.resolve()
    parts = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    for part in parts:
        if not part.resolve().is_relative_to(root):
            raise Refused(
                403, f"{part.name!r} is a link that leads out of the run; it is not read."
            )


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if not p.name.startswith(".")]
