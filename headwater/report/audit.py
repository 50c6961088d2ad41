"""An audit's findings in the terminal, and as one self-contained HTML page.

The page is made as that of a trace is: no script, nothing from any network, and corpus text shown only as text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text
from torch import Tensor

from headwater.audit import Findings, Section
from headwater.report import text
from headwater.report.html import render_page, write_page
from headwater.report.pictures import data_uri
from headwater.report.terminal import Encodable

# Columns shown beside an example, where there are: of a section, and in which order.
_BESIDE: dict[str, tuple[str, ...]] = {
    "labels": (
        "label_score",
        "is_label_issue",
        "given_label",
        "predicted_label",
        "self_influence",
        "perplexity",
    ),
    "memorization": ("memorization", "recitation_distance", "given_label", "predicted_label"),
    "complexity": ("complexity", "complexity_score", "is_complexity_issue", "predicted_label"),
}
# Short heads of columns, as the terminal is narrow.
_HEADS = {
    "label_score": "score",
    "given_label": "given",
    "predicted_label": "predicted",
    "self_influence": "self-influence",
    "is_outlier_issue": "outlier",
    "ood_score": "score",
    "complexity_score": "score",
    "is_complexity_issue": "far out",
    "memorization": "owed to itself",
}
_NAME, _EXCERPT, _PAGE_EXCERPT, _CELL = 60, 160, 600, 200
_PAGE_TOP = 50
_PICTURE = 64  # pixels on the page


@dataclass(frozen=True)
class Row:
    """An example as a report shows it.

    Attributes:
        id: Its name.
        cells: Its values in the shown columns.
        text: How it begins, where it has a text.
        picture: How it looks, where it is an image: the address of a PNG, its width and height on the page.
    """

    id: str
    cells: tuple[str, ...]
    text: str
    picture: tuple[str, int, int] | None = None


def rows(
    findings: Findings, section: Section, top: int, excerpt: int, *, pictures: bool = False
) -> tuple[list[str], list[Row]]:
    """The columns and the examples to show of a section, the most doubtful first."""
    wanted = _BESIDE.get(section.name, section.columns)
    heads = [name for name in wanted if name in findings.columns]
    chosen = findings.top(top) if section.name == "labels" else section.shown[:top]
    named = _HEADS | {"is_label_issue": findings.verdict}
    titles = [named.get(name, name.replace("_", " ")) for name in heads]
    return titles, [
        Row(
            text.shortened(findings.ids[i], _NAME),
            tuple(value(findings.columns[name], i) for name in heads),
            text.shortened(findings.texts.get(i, ""), excerpt),
            _picture(findings.pictures.get(i)) if pictures else None,
        )
        for i in chosen
    ]


def _picture(pixels: Tensor | None) -> tuple[str, int, int] | None:
    """A picture's address and its size, small ones enlarged by a whole number."""
    if pixels is None:
        return None
    height, width = pixels.shape[1:]
    times = max(1, _PICTURE // max(height, width))
    return data_uri(pixels), times * width, times * height


def value(column: Tensor | list, i: int) -> str:
    """One value of a column as people read it.

    Example:
        >>> import torch
        >>> value(torch.tensor([True]), 0), value(torch.tensor([0.12345]), 0), value([None], 0)
        ('yes', '0.123', '')
    """
    found: Any = column[i]
    found = found.item() if isinstance(found, Tensor) else found
    if isinstance(found, bool):
        return "yes" if found else ""
    if isinstance(found, float):
        return f"{found:.3g}"
    return "" if found is None else text.shortened(str(found), _NAME)


def show_findings(findings: Findings, console: Console | None = None, *, top: int = 10) -> None:
    """Print the sections one after the other, and what they cost.

    Args:
        findings: What to show.
        console: Where to; standard output when left out.
        top: Examples of each section.
    """
    console = console or Console()
    for section in findings.sections:
        console.print(Encodable(Rule(Text(section.title), style="dim")))
        for number, sentence in enumerate(section.sentences):
            _print(console, Text(_clean(sentence, 2000), style="" if number else "bold"))
        heads, examples = rows(findings, section, top, _EXCERPT)
        if examples:
            titled = ["#", "example", *heads, *(["text"] if any(r.text for r in examples) else [])]
            lines = [
                [str(k), r.id, *r.cells, r.text][: len(titled)]
                for k, r in enumerate(examples, start=1)
            ]
            _print(console, _grid(titled, lines))
        for table in section.tables:
            lines = [[_told(v) for v in row] for row in table.rows()]
            _print(console, Text(f"\n{_clean(table.title, 200)}", style="dim"))
            _print(console, _grid(list(table.columns), lines))
        _print(console, Text(f"Cost beyond the fit: {_cost(section)}.\n", style="dim"))
    _print(console, Text(f"All of it cost {findings.passes} beyond the fit.", style="bold"))


def write_findings(findings: Findings, path: str | Path, *, top: int = _PAGE_TOP) -> Path:
    """Write the findings as one HTML file, which needs nothing else to be read.

    Args:
        findings: What to show.
        path: The file; an existing one is replaced.
        top: Examples of each section.
    """
    return write_page(path, render_findings(findings, top=top))


def render_findings(findings: Findings, *, top: int = _PAGE_TOP) -> str:
    """The page that `write_findings` writes."""
    return render_page(
        "audit.html.j2",
        n=f"{len(findings):,}",
        headlines=[
            ("Training examples", f"{len(findings):,}"),
            (
                f"{findings.judged.capitalize()} held to be {findings.verdict}",
                f"{len(findings.issues):,}",
            ),
            ("Cost beyond the fit", str(findings.passes)),
        ],
        sections=[_section(findings, section, top) for section in findings.sections],
        has_pictures=bool(findings.pictures),
        facts=[
            (name.replace("_", " "), text.shortened(_told(fact), 2_000))
            for name, fact in findings.facts.items()
            if not isinstance(fact, dict) and name not in ("question", "method")
        ],
    )


def _section(findings: Findings, section: Section, top: int) -> dict[str, Any]:
    heads, examples = rows(findings, section, top, _PAGE_EXCERPT, pictures=True)
    return {
        "name": section.name,
        "title": section.title,
        "sentences": list(section.sentences),
        "heads": heads,
        "shown": examples,
        "has_text": any(row.text for row in examples),
        "has_picture": any(row.picture for row in examples),
        "tables": [
            {
                "title": table.title,
                "heads": list(table.columns),
                "rows": [[_told(v) for v in row] for row in table.rows()],
            }
            for table in section.tables
        ],
        "cost": _cost(section),
    }


def _cost(section: Section) -> str:
    return f"{section.passes} ({text.duration(section.seconds)})"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return text.shortened(str(value), _CELL)


def _clean(content: str, width: int) -> str:
    return text.shortened(text.stripped(content), width)


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for head in heads:
        grid.add_column(head, overflow="fold", justify="right" if head == "#" else "left")
    for line in lines:
        grid.add_row(*(Text(_clean(cell, 400)) for cell in line))
    return grid


def _print(console: Console, content: Any) -> None:
    console.print(Encodable(content))
