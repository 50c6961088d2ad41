"""The page's draft of a change set: `changes.json` in the run folder, a change set that training can read as it is."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from headwater.core.files import read_json, write_json
from headwater.training.changes import ChangeSet
from headwater.web.asks import Changes
from headwater.web.folders import inside

FILE = "changes.json"
ABOUT = "about"  # what only the page knows of the examples, in its order


def save(run: Path, changes: Changes) -> dict[str, Any]:
    """Keep a draft, and return it as the page will find it."""
    about = {c.id: {"number": c.number, "note": c.note} for c in changes.changes}
    write_json(run / FILE, asdict(changes.to_set()) | {ABOUT: about})
    return load(run)


def load(run: Path) -> dict[str, Any]:
    """The draft as the page shows it; an empty one where there is none."""
    place = run / FILE
    inside(run, place)
    if not place.is_file():
        return {"name": "changes", "changes": []}
    found, about = ChangeSet.load(place), read_json(place).get(ABOUT, {})
    actions = {
        **{i: {"action": "remove"} for i in found.remove},
        **{i: {"action": "relabel", "label": str(v)} for i, v in found.relabel.items()},
        **{i: {"action": "keep"} for i in found.keep},
        **{
            i: {"action": "duplicate" if v == 2 else "upweight", "weight": v}
            for i, v in found.weights.items()
        },
    }
    order = {name: i for i, name in enumerate(about)} if isinstance(about, dict) else {}
    changes = []
    for name in sorted(actions, key=lambda i: order.get(i, len(order))):
        known = about[name] if name in order and isinstance(about[name], dict) else {}
        number, note = known.get("number"), known.get("note")
        told = {"note": note} if isinstance(note, str) else {}
        number = number if isinstance(number, int) else None
        changes.append({"id": name, "number": number, **actions[name], **told})
    return {"name": found.name, "changes": changes}


def exported(run: Path) -> dict[str, Any]:
    """The draft as training and `headwater verify` take it."""
    place = run / FILE
    inside(run, place)
    return asdict(ChangeSet.load(place) if place.is_file() else ChangeSet())
