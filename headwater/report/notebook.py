"""Results as cards in a notebook: those of the evidence page, without a script, in a style that touches nothing else.

`headwater.core.display.Shown` finds `html` by the name of this module, as core lies below it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from headwater.audit.base import Findings
from headwater.audit.survey import Survey
from headwater.core.evidence import Evidence
from headwater.core.scores import Scores
from headwater.report import text
from headwater.report.audit import rows as audited
from headwater.report.html import render_page, stylesheet
from headwater.report.views.answer import NAME, minus, scale_for, trace_view
from headwater.report.views.run import timeline_view, verification_view
from headwater.trace.timeline import Timeline
from headwater.training.verify import Verification

_ANSWERS, _CARDS, _ROWS, _QUERIES = 4, 3, 10, 4
_EXCERPT = 160


def html(result: Any) -> str:
    """A result as HTML that a notebook shows.

    Args:
        result: Evidence, scores, a verification, findings, a timeline or a survey.

    Raises:
        ImportError: jinja2 is missing.
        TypeError: There are no cards for a result of this kind.
    """
    for kind, view in _VIEWS.items():
        if isinstance(result, kind):
            shown = {"answers": [], "tables": [], "told": [], "most": _CARDS} | view(result)
            return render_page("notebook.html.j2", css=_style(), **shown)
    raise TypeError(f"Expected a result of Headwater; got a {type(result).__name__}.")


def _style() -> str:
    """The page's style sheet within the class `headwater`: what it says of the page, it says of that box."""
    whole = stylesheet("style.css.j2") + stylesheet("notebook.css.j2")
    whole = re.sub(r"(?m)^(\s*)(?::root|body|html) \{", r"\1& {", whole)
    return f".headwater {{\n{whole}\n}}"


def _evidence(found: Evidence) -> dict[str, Any]:
    view = trace_view(found)
    n = len(view["answers"])
    more = [f"The first {_ANSWERS} of {n} answers."] if n > _ANSWERS else []
    told = " · ".join(f"{label}: {value}" for label, value in view["headlines"])
    answers = view["answers"][:_ANSWERS]
    title = "Where this answer came from" if n == 1 else "Where these answers came from"
    return {"title": title, "answers": answers, "told": [told, *more]}


def _scores(found: Scores) -> dict[str, Any]:
    most, least = found.top(_ROWS // 2), found.top(_ROWS // 2, lowest=True)
    tables = []
    for q, query in list(enumerate(found.query_ids))[:_QUERIES]:
        chosen = list(dict.fromkeys([*most[q], *reversed(least[q])]))
        values = [float(found.values[q, i]) for i in chosen]
        ends = [_ends(found, q, i) for i in chosen]
        scale = scale_for([*values, *(v for pair in ends for v in pair)])
        digits = text.decimals(values)
        rows = [
            (
                found.train_ids[i],
                minus(text.signed(value, digits)),
                {"at": scale.at(value), "span": scale.span(*pair), "down": value < 0},
                minus(text.interval(*pair, digits)),
            )
            for i, value, pair in zip(chosen, values, ends, strict=True)
        ]
        tables.append(_table(query, ("example", "score", "", "95 % interval"), rows))
    of = "" if len(found.train_ids) == found.n_train else f" of {found.n_train:,}"
    unit = f"in {found.unit}" if found.unit else "without unit: only their order counts"
    told = (
        f"{len(found):,} queries × {len(found.train_ids):,}{of} training examples, change of {found.measurement} "
        f"{unit}."
    )
    return {"title": "Scores", "told": [told], "tables": tables}


def _ends(found: Scores, q: int, i: int) -> tuple[float | None, float | None]:
    if found.low is None or found.high is None:
        return None, None
    return float(found.low[q, i]), float(found.high[q, i])


def _verification(found: Verification) -> dict[str, Any]:
    view = verification_view(found)
    values = [v for row in view["rows"] for v in (row["predicted_value"], row["actual_value"])]
    scale = scale_for(values)
    rows = [
        (
            row["query"],
            row["change"],
            row["predicted"],
            _point(scale, row["predicted_value"]),
            row["actual"],
            _point(scale, row["actual_value"]),
            row["spread"],
        )
        for row in view["rows"]
    ]
    heads = ("query", "change of the data", "predicted", "", "actual", "", "95 % over seeds")
    faint = [row["control"] for row in view["rows"]]
    return {
        "title": "Predicted beside actual",
        "told": [view["told"]],
        "tables": [_table("", heads, rows, faint)],
    }


def _point(scale: Any, value: float | None) -> dict[str, Any]:
    known = value if text.is_number(value) else None
    return {
        "at": None if known is None else scale.at(known),
        "span": None,
        "down": (known or 0) < 0,
    }


def _findings(found: Findings) -> dict[str, Any]:
    tables = []
    for section in found.sections:
        heads, examples = audited(found, section, _ROWS, _EXCERPT)
        rows = [(row.id, *row.cells, row.text) for row in examples]
        tables.append(_table(section.title, ("example", *heads, "text"), rows))
    told = [s.sentences[0] for s in found.sections if s.sentences]
    return {
        "title": f"What is wrong with {len(found):,} training examples",
        "told": [*told, f"Cost beyond the fit: {found.passes}."],
        "tables": tables,
    }


def _timeline(found: Timeline) -> dict[str, Any]:
    view = timeline_view(found)
    tables = []
    for query in view["queries"][:_QUERIES]:
        sums = [s[key] for s in query["segments"] for key in ("raised", "lowered")]
        scale, digits = scale_for(sums), text.decimals(sums)
        rows = [
            (
                f"{s['start']:,}–{s['stop']:,}",
                s["stage"],
                *(minus(text.signed(s[key], digits)) for key in ("net", "raised", "lowered")),
                {
                    "at": scale.at(s["net"]),
                    "span": scale.span(s["lowered"], s["raised"]),
                    "down": s["net"] < 0,
                },
                ", ".join(f"{name} {score}" for name, score in s["strongest"][:3]),
            )
            for s in query["segments"]
        ]
        heads = ("steps", "stage", "net", "raised", "lowered", "", "strongest examples")
        tables.append(_table(query["text"], heads, rows))
    return {"title": "When it was learnt", "told": [view["told"]], "tables": tables}


def _survey(found: Survey) -> dict[str, Any]:
    chosen, copies = found.top(_ROWS), found.n_copies
    values = [float(found.self_influence[i]) for i in chosen]
    scale = scale_for(values)
    rows = [
        (
            found.title(i),
            f"{value:.3g}",
            {"at": scale.at(value), "span": scale.span(0.0, value), "down": False},
            "outlier" if bool(found.outlier[i]) else "",
            f"{copies[i]}" if copies[i] > 1 else "",
            text.shortened(found.texts[i], _EXCERPT) if found.texts else "",
        )
        for i, value in zip(chosen, values, strict=True)
    ]
    heads = ("example", "self-influence (nats)", "", "", "copies", "text")
    told = (
        f"{int(found.outlier.sum()):,} outliers; {sum(k > 1 for k in copies):,} examples have near-duplicates. "
        f"Cost: {found.facts.get('passes', 'not known')}."
    )
    return {
        "title": f"Survey of {len(found):,} training examples",
        "told": [told],
        "tables": [_table("", heads, rows)],
    }


def _table(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    faint: Sequence[bool] | None = None,
) -> dict[str, Any]:
    rows = list(rows)
    return {
        "title": text.shortened(title, 2 * NAME),
        "heads": [text.shortened(head, NAME) for head in heads],
        "rows": [
            {"cells": [_cell(cell) for cell in row], "faint": bool(faint and faint[k])}
            for k, row in enumerate(rows)
        ],
    }


def _cell(cell: Any) -> Any:
    return cell if isinstance(cell, dict) else text.shortened(str(cell), 2 * NAME)


_VIEWS: dict[type, Callable[[Any], dict[str, Any]]] = {
    Evidence: _evidence,
    Scores: _scores,
    Verification: _verification,
    Findings: _findings,
    Timeline: _timeline,
    Survey: _survey,
}
