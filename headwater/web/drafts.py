"""The page's draft of a change set: `changes.json` in the run folder, a change set that training can read as it is."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from headwater.core.files import write_json
from headwater.report.views.folders import inside
from headwater.report.views.run import changes as shown
from headwater.training.changes import ChangeSet
from headwater.web.asks import Changes

FILE = "changes.json"
ABOUT = "about"  # what only the page knows of the examples, in its order


def save(run: Path, changes: Changes) -> dict[str, Any]:
    """Keep a draft, and return it as the page will find it."""
    about = {c.id: {"number": c.number, "note": c.note} for c in changes.changes}
    write_json(run / FILE, asdict(changes.to_set()) | {ABOUT: about})
    return load(run)


def load(run: Path) -> dict[str, Any]:
    """The draft as the page shows it; an empty one where there is none."""
    return shown(run) or {"name": "changes", "changes": []}


def exported(run: Path) -> dict[str, Any]:
    """The draft as training and `headwater verify` take it."""
    place = inside(run, run / FILE)
    return asdict(ChangeSet.load(place) if place.is_file() else ChangeSet())
