"""An audit as a page and in the terminal: nothing of the corpus gets out of its place."""

import io

import pytest
from rich.console import Console

pytest.importorskip("jinja2")

from headwater.report.audit import render_findings, show_findings, write_findings
from tests.audit.test_base import findings

HOSTILE = "<script>alert(1)</script> \x1b[31m \u202e ☠"


def hostile():
    return findings(ids=["w", HOSTILE, "y", "z"], texts={1: HOSTILE, 2: "plain"})


def test_the_page_shows_the_findings_and_escapes_the_corpus(tmp_path):
    page = render_findings(hostile())
    assert "Two are wrong." in page and "2 forward" in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "http://" not in page and "https://" not in page
    assert write_findings(hostile(), tmp_path / "a" / "page.html").read_text("utf-8") == page


def test_the_terminal_shows_the_most_doubtful_first_and_the_cost():
    out = io.StringIO()
    show_findings(hostile(), Console(file=out, width=200), top=2)
    text = out.getvalue()
    assert "\x1b" not in text and "\u202e" not in text
    assert text.index("plain") < text.index("alert")  # example 2, then example 1
    assert "Cost beyond the fit: 2 forward" in text and "Two are wrong." in text


def test_no_example_is_listed_where_none_is_asked_for():
    out = io.StringIO()
    show_findings(hostile(), Console(file=out, width=200), top=0)
    assert "plain" not in out.getvalue() and "Two are wrong." in out.getvalue()
