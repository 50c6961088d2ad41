"""`headwater rerun`: repeat a run from its run.json."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from headwater.cli.common import emit_json, open_session, say
from headwater.cli.flags import (
    RUN,
    CurvatureFlags,
    DataFlags,
    FollowFlags,
    ModelFlags,
    parse,
    restore,
)


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """Repeat a run's fit, traces and timelines from its record; what is finished and unchanged is kept.

    Example: headwater rerun runs/mine --out runs/again

    Args:
        run: The run folder whose run.json is repeated.
        out: Another run folder for the results; the same one when left out.
        json: Print where the results are as JSON.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Rerun, words, prog="rerun")
    from headwater.cli.fit import Fit, fit_session
    from headwater.cli.timeline import Timeline, timeline
    from headwater.cli.trace import InfluenceFlags, Trace, trace
    from headwater.core.files import read_json

    place = command.run / RUN
    if not place.is_file():
        raise FileNotFoundError(f"{command.run} is no run folder (it has no {RUN}).")
    record, out = read_json(place), command.out or command.run
    nested = {
        "kind": CurvatureFlags,
        "columns": DataFlags,
        "weights": ModelFlags,
        "follow": FollowFlags,
    }
    values = {k: restore(nested[k], v) if k in nested else v for k, v in record["fit"].items()}
    fit = restore(Fit, values | {"out": str(out)})
    session = open_session(fit, heldout=fit.heldout)
    say(str(fit_session(session, fit, quiet=command.json)))
    pages = {}
    for name, asked in record["traces"].items():
        question = {k: restore(InfluenceFlags, v) if k == "method" else v for k, v in asked.items()}
        _, page = trace(restore(Trace, question | {"run": str(out)}), quiet=command.json)
        say(f"{name}: {page}")
        pages[name] = str(page)
    folders = {}
    for name, asked in record.get("timelines", {}).items():
        _, folder = timeline(restore(Timeline, asked | {"run": str(out)}), quiet=command.json)
        say(f"{name}: {folder}")
        folders[name] = str(folder)
    if command.json:
        emit_json({"out": str(out), "traces": pages, "timelines": folders})
    return 0
