"""`headwater rerun`: repeat a run from its run.json."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from headwater.cli.common import (
    RUN,
    DataFlags,
    FollowFlags,
    ModelFlags,
    open_session,
    parse,
    restore,
    say,
)


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """Repeat a run's fit and traces from its record; what is finished and unchanged is kept.

    Example: headwater rerun runs/mine --out runs/again

    Args:
        run: The run folder whose run.json is repeated.
        out: Another run folder for the results; the same one when left out.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None


def run(words: list[str]) -> int:
    command = parse(Rerun, words, prog="rerun")
    from headwater.cli.fit import CurvatureFlags, Fit, fit_session
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
    session = open_session(
        fit.model, fit.data, fit.columns, choose=fit.weights, follow=fit.follow, heldout=fit.heldout
    )
    say(str(fit_session(session, fit)))
    for name, asked in record["traces"].items():
        question = {k: restore(InfluenceFlags, v) if k == "method" else v for k, v in asked.items()}
        _, page = trace(restore(Trace, question | {"run": str(out)}))
        say(f"{name}: {page}")
    return 0
