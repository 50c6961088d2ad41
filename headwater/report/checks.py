"""What the doctor found and what a plan predicts, in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.core.doctor import Diagnosis
from headwater.core.plan import Plan

MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}
_SHOWN = 12  # layers listed before the rest is summed up


def show_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print the checks, the layers whose gradients are furthest off, and what is left out."""
    console = console or Console()
    checks = Table(box=None, padding=(0, 1), show_header=False)
    for check in diagnosis.checks:
        mark, color = MARKS[check.status]
        told = Text(check.detail)
        if check.status != "ok" and check.remedy:
            told.append(f"\n→ {check.remedy}", style="italic")
        checks.add_row(Text(mark, style=f"bold {color}"), Text(check.name, style="bold"), told)
    console.print(checks)
    worst = sorted(diagnosis.layers, key=lambda x: -x.relative_error)[:_SHOWN]
    if worst:
        rows = [
            {
                "layer": x.name,
                "kind": x.kind,
                "share": f"{100 * x.share:.1f} %",
                "error against autograd": f"{x.relative_error:.1e}",
                "": MARKS[x.status][0],
            }
            for x in worst
        ]
        console.print(
            _table(
                rows, f"The {len(worst)} of {len(diagnosis.layers)} layers with the largest error"
            )
        )
    left = sorted(diagnosis.left_out, key=lambda x: -x.numel)
    if left:
        total = sum(x.numel for x in left)
        most = "; ".join(f"{x.name} ({x.numel:,}, {x.why})" for x in left[:4])
        console.print(
            f"Followed: {100 * diagnosis.coverage:.1f} % of the parameters. Left out: {total:,} in {len(left)} "
            f"tensors, the largest {most}.",
            markup=False,
            highlight=False,
        )
    verdict = "All is well." if diagnosis.ok else "Something is wrong; see the lines marked ✗."
    console.print(Text(verdict, style="bold green" if diagnosis.ok else "bold red"))


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print time by stage, memory and disk, and what would not fit."""
    console = console or Console()
    console.print(str(plan), markup=False, highlight=False, style="" if plan.ok else "red")


def _table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
