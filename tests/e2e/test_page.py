"""The evidence page in a browser: the same of a server and of a file that was opened from disk without a network."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs Playwright: pip install -e '.[dev]'")

from playwright.sync_api import expect

from headwater.training.changes import ChangeSet
from tests.e2e.conftest import settle

pytestmark = pytest.mark.thorough
PAGES = ("ask", "evidence", "verify", "corpus", "run", "timeline")
AXE = Path(__file__).parents[2] / "frontend" / "node_modules" / "axe-core" / "axe.min.js"


def number(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("−", "-"))


def test_raised_and_lowered_examples_stand_side_by_side(visit, place):
    page = visit(place, "evidence/lava")
    raised, lowered = (page.locator(f"section.{side}") for side in ("raised", "lowered"))
    left, right = (side.bounding_box() for side in (raised, lowered))
    assert abs(left["y"] - right["y"]) < 2 and left["x"] + left["width"] < right["x"]
    up = [number(s.split()[0]) for s in raised.locator(".score").all_inner_texts()]
    down = [number(s.split()[0]) for s in lowered.locator(".score").all_inner_texts()]
    assert up and all(s > 0 for s in up) and up == sorted(up, reverse=True)
    assert down and all(s < 0 for s in down) and down == sorted(down)
    first = raised.locator(".card").first
    assert first.locator("mark").count() > 0  # heat on its tokens
    assert re.search(r"\[.+, .+\]", first.locator(".meta").inner_text())
    assert page.locator(".asked .completion").inner_text().strip()


def test_examples_are_filtered_by_text_side_and_source(visit, place):
    page = visit(place, "evidence/lava")
    cards, told = page.locator(".card"), page.locator(".filters [role=status]")
    every = cards.count()
    title = cards.nth(1).locator("h4").inner_text()
    page.keyboard.press("/")
    page.keyboard.type(title.lower())
    expect(cards).not_to_have_count(every)
    assert title in cards.locator("h4").all_inner_texts()
    assert f"of {every} examples" in told.inner_text()
    page.get_by_role("button", name="show all").click()
    assert cards.count() == every
    page.get_by_role("combobox", name="Side").select_option("lowered")
    assert page.locator("section.raised").count() == 0 < cards.count() < every
    page.get_by_role("combobox", name="Side").select_option("both")
    source = page.locator(".card .chip").first.inner_text()
    page.locator(".filters select").nth(1).select_option(source)
    assert set(page.locator(".card .chips .chip:first-child").all_inner_texts()) == {source}
    page.get_by_role("searchbox", name="Text").fill("nothing holds this")
    assert cards.count() == 0
    assert page.get_by_text("No example passes the filter.").count() == 2


def test_an_example_is_found_and_opened_by_keys_alone(visit, place):
    page = visit(place, "evidence/lava")
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.locator(".card").nth(1)
    assert second.evaluate("card => card === document.activeElement")
    page.keyboard.press("o")
    dialog = page.get_by_role("dialog")
    dialog.locator(".full").wait_for()
    assert dialog.get_by_role("heading").inner_text() == second.locator("h4").inner_text()
    excerpt = second.locator(".passage").inner_text().strip("… ")
    whole = dialog.locator(".full").inner_text()
    assert " ".join(excerpt.split())[:60] in " ".join(whole.split())
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert second.evaluate("card => card === document.activeElement")
    page.keyboard.press("k")
    assert page.locator(".card").first.evaluate("card => card === document.activeElement")


def test_every_control_shows_its_focus_and_the_content_can_be_skipped_to(visit, place):
    page = visit(place, "evidence/lava")
    page.reload()
    settle(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(12):
        page.keyboard.press("Tab")
        outline = page.evaluate(
            "(({outlineStyle: s, outlineWidth: w}) => [s, parseFloat(w)])(getComputedStyle(document.activeElement))"
        )
        assert outline[0] == "solid" and outline[1] >= 2


def test_methods_stand_next_to_one_another_and_what_they_share_is_marked(visit, place):
    page = visit(place, "evidence/compared")
    columns = page.locator(".ranking")
    assert len({round(c.bounding_box()["y"]) for c in columns.all()}) == 1
    listed = [
        c.locator("li").evaluate_all("rows => rows.map(r => r.dataset.example)")
        for c in columns.all()
    ]
    assert len(listed[0]) > 3 and [len(ids) for ids in listed[1:]] == [3, 0]
    for i, column in enumerate(columns.all()):
        others = set().union(*listed[:i], *listed[i + 1 :])
        marked = column.locator("li.shared").evaluate_all(
            "rows => rows.map(r => r.dataset.example)"
        )
        assert set(marked) == set(listed[i]) & others
    assert columns.nth(2).get_by_text("it needs the model").is_visible()
    shared = columns.nth(0).locator("li.shared").first
    shared.hover()
    assert page.locator("li.pointed").count() == 2  # in both columns
    shared.get_by_role("button").click()
    page.get_by_role("dialog").locator(".full").wait_for()


def test_what_an_example_did_to_each_token_of_the_completion_is_shown(visit, place):
    page = visit(place, "evidence/compared")
    first = page.locator(".card").first
    first.get_by_role("button", name="Details").click()
    effect = first.locator(".effect")
    completion = page.locator(".asked .completion").inner_text()
    assert "".join(effect.inner_text().split()) == "".join(completion.split())
    assert effect.locator("mark[class^=u]").count() and effect.locator("mark[class^=d]").count()
    assert first.locator(".carried li").count() and first.locator(".pairs tr").count()


def test_marks_are_collected_undone_and_exported(visit, place, tmp_path):
    page = visit(place, "evidence/lava", accept_downloads=True)
    page.get_by_role("button", name="Changes").click()
    drawer = page.get_by_role("complementary", name="Change set")
    if drawer.get_by_role("button", name="Take all off").count():
        drawer.get_by_role("button", name="Take all off").click()
    cards = page.locator(".card")
    ids = [cards.nth(i).get_attribute("data-card") for i in range(4)]
    cards.nth(0).focus()
    page.keyboard.press("x")
    cards.nth(1).get_by_role("button", name="Duplicate").click()
    cards.nth(2).get_by_role("button", name="Weight…").click()
    expect(cards.nth(2).get_by_label("Counts so many times")).to_be_focused()
    page.keyboard.type("3.5")
    page.keyboard.press("Enter")
    cards.nth(3).get_by_role("button", name="Keep").click()
    assert cards.nth(0).get_by_role("button", name="Remove").get_attribute("aria-pressed") == "true"
    assert drawer.locator(".changes li").count() == 4
    drawer.get_by_role("button", name="Undo").click()
    assert drawer.locator(".changes li").count() == 3
    drawer.get_by_role("textbox", name="Name").fill("less lava")
    with page.expect_download() as found:
        drawer.get_by_role("button", name="Export").click()
    assert found.value.suggested_filename == "less-lava.json"
    path = tmp_path / "changes.json"
    found.value.save_as(path)
    changes = ChangeSet.load(path)
    assert changes.name == "less lava" and changes.remove == (ids[0],)
    assert json.loads(path.read_text())["weights"] == {ids[1]: 2, ids[2]: 3.5}
    page.wait_for_timeout(400)  # the draft is kept a moment after the last change
    page.reload()
    page.locator(".changes-button .count").wait_for()
    assert page.locator(".changes-button .count").inner_text() == "3"


def test_the_training_data_are_searched_sorted_and_opened(visit, place):
    page = visit(place, "corpus")
    rows = page.locator(".list-inner [data-row]")
    rows.first.wait_for()
    told = page.locator(".all p[role=status]")
    expect(told).to_have_text("48 examples")
    page.get_by_role("combobox", name="Sort by").select_option("self_influence")
    expect(rows.first).to_have_attribute("data-row", "5")
    assert rows.first.get_by_text("outlier").is_visible()
    page.get_by_role("searchbox", name="Search").fill("kepler")
    expect(told).not_to_have_text("48 examples")
    expect(told).to_have_text(re.compile("[0-9]+ examples?"))
    rows.first.wait_for()
    found = rows.first.locator(".what").inner_text()
    assert "kepler" in found.lower()
    rows.first.locator(".what button").click()
    page.get_by_role("dialog").locator(".full").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("searchbox", name="Search").fill("")
    expect(told).to_have_text("48 examples")
    body = page.locator(".list-body")
    body.focus()
    page.keyboard.press("End")
    page.locator(".list-row.current").wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").locator(".full").wait_for()
    page.keyboard.press("Escape")
    assert page.locator(".chart-svg").count() == 2  # self-influence and loss
    assert page.get_by_role("heading", name="Sources and questions").is_visible()


def test_predicted_stands_beside_actual_with_the_random_control(visit, place):
    page = visit(place, "verify")
    rows = page.locator(".verified tbody tr:not(:first-child)")
    rows.first.wait_for()
    control = page.locator(".verified tbody.control tr:not(:first-child)")
    assert rows.count() == 9 and control.count() == 3
    assert page.locator(".square circle.dot-change").count() == 6
    assert page.locator(".square circle.dot-control").count() == 3
    cells = rows.first.locator("td").all_inner_texts()
    assert [number(c) for c in cells[1:3]] == [-0.41, -0.38]


def test_the_run_tells_its_spectrum_coverage_and_costs(visit, place):
    page = visit(place, "run")
    assert page.locator("path.spectrum").count() == 2
    assert page.locator(".coverage tbody tr").count() == 3
    assert page.locator(".costs tbody tr").count() > 1
    page.get_by_role("combobox", name="Layer").select_option(index=1)
    assert page.locator("path.spectrum.picked").count() == 1
    page.get_by_role("link", name="timeline").click()
    page.get_by_role("heading", name="When it was learnt").wait_for()
    settle(page)
    assert page.locator(".timeline").count() == 2
    assert page.title().startswith("When it was learnt")


def test_what_needs_a_server_is_said_where_there_is_none(visit, place):
    page = visit(place, "ask")
    if place.live:
        assert page.get_by_role("textbox", name="Prompt").is_visible()
    else:
        assert page.get_by_text("headwater serve RUN").is_visible()
        assert page.get_by_role("textbox", name="Prompt").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(visit, place, scheme):
    page = visit(place, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for name in PAGES:
        page.goto(place.at(name))
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
    page.goto(place.at("evidence/lava"))
    page.locator(".card").first.wait_for()
    boxes = [page.locator(f"section.{side}").bounding_box() for side in ("raised", "lowered")]
    assert abs(boxes[0]["x"] - boxes[1]["x"]) < 1 and boxes[0]["y"] < boxes[1]["y"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")


def test_printed_pages_hold_the_evidence_and_no_controls(visit, place):
    page = visit(place, "evidence/lava")
    page.emulate_media(media="print")
    assert page.locator(".card").first.is_visible()
    assert page.locator(".totals svg").first.is_visible()
    for control in (".filters", ".acts", "nav.pages", ".changes-button", ".foot"):
        assert not page.locator(control).first.is_visible()


def test_reduced_motion_is_heeded(visit, place):
    page = visit(place, reduced_motion="reduce")
    moving = "[...document.querySelectorAll('*')].some(e => getComputedStyle(e).animationName !== 'none')"
    assert not page.evaluate(moving)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_object_to(visit, place, scheme):
    if not AXE.is_file():
        pytest.skip("needs axe-core: npm ci in frontend")
    page = visit(place, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    for name in PAGES:
        page.goto(place.at(name))
        settle(page)
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert not [(name, v["id"], v["nodes"][0]["html"][:200]) for v in found]
