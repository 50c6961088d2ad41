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
    won = found.beats_chance
    if not won:
        return
    what = "the top" if "changes" not in found.facts else "these"
    console.print(
        f"Leaving out {what} examples moved {sum(won)} of {len(won)} measurements further down than leaving out as "
        "many at random did.",
        style="bold",
    )


def _by_query(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    names = list(dict.fromkeys(o.query_id for o in outcomes))
    return [(name, [o for o in outcomes if o.query_id == name]) for name in names]
