"""Training data that want to do harm: nothing of them runs, leaves the page or rearranges it."""

import pytest

from tests.e2e.conftest import settle

pytestmark = pytest.mark.thorough
PAGES = ("ask", "evidence", "verify", "corpus", "run", "timeline")
OVERRIDES = "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\x00\x1b\x07"
ELEMENTS = "[...document.querySelectorAll('main script, main img, main iframe, main object, main b *, main style')]"


def dangers(page) -> list[str]:
    """What of the corpus became an element or an attribute that acts, and what is shown but cannot be seen."""
    made = page.evaluate(f"{ELEMENTS}.map(e => e.tagName)")
    shown = page.evaluate("document.getElementById('app').textContent")
    attributes = page.evaluate(
        "[...document.querySelectorAll('main *')].flatMap(e => e.getAttributeNames())"
    )
    unseen = [repr(c) for c in OVERRIDES if c in shown]
    return made + unseen + [a for a in attributes if a.startswith("on")]


def test_hostile_texts_are_text_on_every_page(visit, hostile_place):
    page = visit(hostile_place)
    for name in PAGES:
        page.goto(hostile_place.at(name))
        settle(page)
        assert dangers(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280, name
    page.goto(hostile_place.at("evidence"))
    page.locator(".card").first.wait_for()
    shown = page.locator(".asked").inner_text()
    assert "<script>alert(1)</script>" in shown and "⟨RLO⟩" in shown and "⟨NUL⟩" in shown


def test_hostile_examples_open_are_marked_and_found(visit, hostile_place):
    page = visit(hostile_place, "evidence")
    page.locator(".card .open").first.click()
    page.get_by_role("dialog").locator(".full").wait_for()
    assert dangers(page) == []
    page.keyboard.press("Escape")
    page.locator(".card").first.get_by_role("button", name="Keep").click()
    page.get_by_role("button", name="Changes").click()
    page.locator(".changes li").first.wait_for()
    assert dangers(page) == []
    for pointed in page.locator("main mark").all()[:10]:
        pointed.hover()
    assert dangers(page) == []


def test_a_line_of_a_mebibyte_is_listed_and_opened(visit, hostile_place):
    page = visit(hostile_place, "corpus")
    row = page.locator('[data-row="3"]')
    row.wait_for()
    assert row.bounding_box()["height"] < 100
    row.locator(".what button").click()
    whole = page.get_by_role("dialog").locator(".full")
    whole.wait_for()
    assert whole.bounding_box()["height"] < 900
    assert whole.inner_text().startswith("<b>one line</b>")
    assert dangers(page) == []
