"""A survey of the training data as a table in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.audit.survey import Survey
from headwater.report.terminal import Encodable
from headwater.report.text import duration, shortened, stripped


def show(found: Survey, console: Console | None = None, *, top: int = 10) -> None:
    """Print the examples of largest self-influence, and how many stand out or are there more than once.

    Args:
        found: What to show.
        console: Where to; standard output when left out.
        top: How many examples.
    """
    console = console or Console()
    rows, copies = found.table(), found.n_copies
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("self-influence", "loss", "copies", "example", "text"):
        table.add_column(name, justify="left" if name in ("example", "text") else "right")
    for i in found.top(top):
        loss = rows["loss"][i]
        table.add_row(
            f"{rows['self_influence'][i]:.3g}",
            "" if loss is None else f"{loss:.4g}",
            str(copies[i]) if copies[i] > 1 else "",
            Text(_clean(rows["title"][i], 40), style="bold" if rows["outlier"][i] else ""),
            Text(_clean(rows["excerpt"][i], 60), style="dim"),
        )
    console.print(Encodable(table))
    several = [i for i, k in enumerate(copies) if k > 1]
    groups = len({int(found.first[i]) for i in several})
    spent = found.facts.get("seconds")
    cost = f"{found.facts.get('passes', 'not known')}" + (f", {duration(spent)}" if spent else "")
    told = (
        f"{int(found.outlier.sum()):,} of {len(found):,} examples are outliers (bold above); {len(several):,} are "
        f"near-duplicates, in {groups:,} groups. Cost: {cost}."
    )
    console.print(Encodable(Text(told)))


def _clean(value: str, width: int) -> str:
    return shortened(stripped(value[: 20 * width]), width)
