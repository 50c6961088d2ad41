"""An audit as a page and in the terminal: nothing of the corpus gets out of its place."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

pytest.importorskip("jinja2")

from headwater.audit import Findings, Section
from headwater.report.audit import render_findings, show_findings, write_findings
from headwater.report.pictures import data_uri
from tests.audit.test_base import findings, picture

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


def test_pictures_are_inside_the_page_and_nothing_else_is_allowed():
    plain = render_findings(hostile())
    assert "img-src" not in plain and "<img" not in plain
    page = render_findings(replace(hostile(), pictures={1: picture(), 2: picture()}))
    assert "img-src data:;" in page and page.count("<img ") == 2
    sources = re.findall(r'<img class="picture" src="([^"]*)"', page)
    assert sources == [data_uri(picture())] * 2
    assert 'width="64" height="48"' in page  # three rows of four pixels, sixteen times as large
    assert "<script" not in page and "\x1b" not in page and "http:" not in page
    assert 'alt="&lt;script&gt;' in page


def test_a_page_of_many_large_pictures_stays_small():
    n, side = 60, 64  # as large as an audit keeps them
    noise = {i: torch.randint(256, (3, side, side), dtype=torch.uint8) for i in range(n)}
    columns = {"label_score": torch.arange(n).double() / n}
    section = Section(name="labels", title="Labels", sentences=("None.",), shown=tuple(range(n)))
    ids = [str(i) for i in range(n)]
    found = Findings(ids=ids, columns=columns, sections=(section,), pictures=noise)
    page = render_findings(found)
    assert page.count("<img ") == 50 and len(page) < 1_000_000  # noise cannot be compressed
