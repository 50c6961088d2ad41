"""A verification as a table in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.training.verify import Outcome, Verification


def show(found: Verification, console: Console | None = None) -> None:
    """Print predicted and actual changes, query by query, with the random control in grey."""
    console = console or Console()
    several = any(o.low is not None for o in found.outcomes)
    table = Table(title=f"Change of {found.measurement} in nats, {found.protocol}")
    for name in ("query", "before", "change of the data"):
        table.add_column(name)
    for name in ("predicted", "actual"):
        table.add_column(name, justify="right")
    if several:
        table.add_column("95 % over seeds", justify="right")
    for _, rows in _by_query(found.outcomes):
        for i, o in enumerate(rows):
            cells = [
                Text(o.query_id if i == 0 else ""),
                f"{o.before:.2f}" if i == 0 else "",
                o.change,
                f"{o.predicted:+.3f}",
                f"{o.actual:+.3f}",
            ]
            if several:
                cells.append("" if o.low is None else f"{o.low:+.3f} … {o.high:+.3f}")
            table.add_row(*cells, style="dim" if o.control else "", end_section=i == len(rows) - 1)
    console.print(table)
    if "change_set" in found.facts:
        _beside_chance(found, console)
        return
    won = found.beats_chance
    if not won:
        return
    if "changes" in found.facts:
        _compare(found, console)
        return
    console.print(
        f"Leaving out the top examples moved {sum(won)} of {len(won)} measurements further down than leaving out as "
        "many at random did.",
        style="bold",
    )


def _compare(found: Verification, console: Console) -> None:
    """For each change of a change set, how often it lowered the loss more than random removals did."""
    rows = [rows for _, rows in _by_query(found.outcomes)]
    chance = [next((o.actual for o in each if o.control), float("nan")) for each in rows]
    for name in dict.fromkeys(o.change for each in rows for o in each if not o.control):
        made = [[o.actual for o in each if o.change == name] for each in rows]
        won = sum(x[0] < c for x, c in zip(made, chance, strict=True) if x)
        text = f"{name}: lower than with as many left out at random in {won} of {len(rows)} measurements."
        console.print(Text(text, style="bold"))


def _beside_chance(found: Verification, console: Console) -> None:
    """How often a change set moved a completion further than the like done to others at random, either way."""
    further = found.exceeds_chance
    text = (
        f"{found.facts['change_set']}: moved {sum(further)} of {len(further)} measurements further than the same done "
        "to others at random did."
    )
    console.print(Text(text, style="bold"))


def _by_query(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    names = list(dict.fromkeys(o.query_id for o in outcomes))
    return [(name, [o for o in outcomes if o.query_id == name]) for name in names]
