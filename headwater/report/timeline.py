"""A timeline as a table in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.report.terminal import LOWERED, RAISED
from headwater.report.text import decimals, shortened, signed, stripped
from headwater.trace.timeline import Timeline


def show(
    found: Timeline, console: Console | None = None, *, top: int = 5, column: str | None = None
) -> None:
    """Print a table for each query: its segments with their sums and strongest examples.

    Args:
        found: What to show.
        console: Where to; standard output if left out.
        top: How many of the strongest examples of each segment.
        column: Metadata column to total by.
    """
    console = console or Console()
    for query, text in enumerate(found.queries):
        rows = found.rows(query, top=top, column=column)
        digits = decimals(row[key] for row in rows for key in ("raised", "lowered"))
        table = Table(title=Text(_clean(text, 300)), title_justify="left", show_lines=True)
        table.add_column("steps", no_wrap=True)
        for name in ("net", "raised", "lowered"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"by {column}" if column else "stage")
        table.add_column("strongest examples", ratio=1)
        for row in rows:
            about = Text(_clean(row["stage"], 24))
            if column:
                about = Text("\n").join(_totals(row["totals"], digits))
            table.add_row(
                f"{row['start']:,}–{row['stop']:,}",
                *(signed(row[key], digits) for key in ("net", "raised", "lowered")),
                about,
                Text("\n").join(
                    _example(found, name, score, digits) for name, score in row["strongest"]
                ),
            )
        sums = [sum(row[key] for row in rows) for key in ("net", "raised", "lowered")]
        table.add_row("all", *(signed(value, digits) for value in sums), "", "", style="bold")
        console.print(table)
    console.print(
        Text(
            f"Change of {found.measurement} at the end of training in nats, were an example counted once more in that "
            "stretch; expected over orders of the examples, by SOURCE.",
            style="dim",
        )
    )
    if found.gap is not None:
        told = f"The sum over segments is the attribution made as a whole, to {found.gap:.2g} nats."
        console.print(Text(told, style="dim"))


def _example(found: Timeline, name: str, score: float, digits: int) -> Text:
    line = Text(signed(score, digits), style=RAISED if score > 0 else LOWERED)
    line.append(f" {_clean(name, 40)}", style="default")
    if name in found.texts:
        line.append(f"  {_clean(found.texts[name], 60)}", style="dim default")
    return line


def _totals(totals: dict[str, float], digits: int, most: int = 5) -> list[Text]:
    """The sources with the largest totals."""
    ranked = sorted(totals.items(), key=lambda pair: -abs(pair[1]))[:most]
    return [Text(f"{signed(value, digits)} {_clean(name, 24)}") for name, value in ranked]


def _clean(value: str, width: int) -> str:
    return shortened(stripped(value[: 20 * width]), width)
