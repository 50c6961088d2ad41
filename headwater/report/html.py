"""Evidence as one self-contained HTML page.

The page asks nothing of any network, runs no script, and shows corpus text only as text: every
value passes through `visible` and is escaped, and its Content-Security-Policy allows one style
sheet, named by its hash, and nothing else.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from headwater.core.evidence import Evidence
from headwater.core.files import write_bytes
from headwater.extras import require
from headwater.report import text
from headwater.report.views.answer import LEVELS, Scale, heat_class, scale_for, trace_view

_TEMPLATES = Path(__file__).parent / "templates"


def write_html(evidence: Evidence, path: str | Path) -> Path:
    """Write evidence as one HTML file, which needs nothing else to be read.

    Args:
        evidence: What to show.
        path: The file; an existing one is replaced.

    Returns:
        The path.

    Raises:
        ImportError: jinja2 is missing; the message says how to install it.
    """
    return write_page(path, render(evidence))


def write_page(path: str | Path, content: str) -> Path:
    """Write a page whole or not at all."""
    path = Path(path)
    write_bytes(path, content.encode("utf-8", "replace"))
    return path


def render(evidence: Evidence) -> str:
    """The page that `write_html` writes."""
    view = trace_view(evidence)
    return render_page(
        "evidence.html.j2",
        answers=view["answers"],
        headlines=view["headlines"],
        facts=view["facts"],
        levels=range(1, LEVELS + 1),
    )


def render_page(template: str, **values: Any) -> str:
    """A template filled in, every value escaped and made visible; `css` is a style sheet of ours."""
    if "css" in values:
        values["css"] = require("markupsafe", extra="report").Markup(values["css"])
    return _environment().get_template(template).render(**values)


def stylesheet(template: str) -> str:
    """A style sheet of the pages."""
    return _environment().get_template(template).render()


def _environment() -> Any:
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256
    return environment


def _finalize(value: Any) -> Any:
    """Every string that a template prints, made visible; what the template made itself is kept."""
    return (
        text.visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
    )


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


__all__ = ["Scale", "heat_class", "render", "render_page", "scale_for", "write_html", "write_page"]
