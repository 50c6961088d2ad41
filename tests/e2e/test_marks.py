"""Relabelling, near-duplicates that are shown as one, names that cannot be seen, and questions taken up again."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs Playwright: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs FastAPI: pip install -e '.[web]'")

from playwright.sync_api import expect

from headwater.core.evidence import Evidence
from headwater.training.changes import ChangeSet
from headwater.web.jobs import ASKS, Jobs
from tests import runs
from tests.e2e.conftest import Place, standing

pytestmark = pytest.mark.thorough
FIRST = runs.survey().ids[0]
COPIES = [n for n in runs.survey().ids if n.startswith(f"{FIRST}-")]
SAID = " a dark rock"
TRACE = {
    "kind": "trace",
    "prompt": "When lava cools, it forms",
    "completion": SAID,
    "rather_than": " a bright one",
    "span": [3, len(SAID)],
    "chat": True,
    "source": "year",
    "top": 40,
    "thorough": True,
    "compare": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A classifier's run with a trace of folded duplicates, one of a name that reverses a line, and ended jobs."""
    run = runs.plain_run(tmp_path_factory.mktemp("marks") / "run")
    lava = run / "traces" / "lava"
    evidence = Evidence.load(lava)
    folded = evidence.facts | {"copies": {FIRST: [FIRST, *COPIES]}}
    replace(evidence, facts=folded).save(run / "traces" / "folded")
    shutil.copytree(lava, run / "traces" / "la\u202eva")
    jobs = Jobs(run / "jobs")
    jobs.end(jobs.add(ASKS.validate_python(TRACE)), "cancelled")
    asked = {k: TRACE[k] for k in ("prompt", "completion", "span", "chat")}
    jobs.end(jobs.add(ASKS.validate_python(asked | {"kind": "timeline"})), "failed", error="It.")
    return run


@pytest.fixture(scope="module", params=["served", "file"])
def marked(request, browser, run) -> Iterator[Place]:
    with standing(request.param, run) as found:
        yield found


@pytest.fixture(scope="module")
def served(browser, run) -> Iterator[Place]:
    with standing("served", run) as found:
        yield found


def emptied(page):
    """The open drawer of marks, with none in it."""
    page.get_by_role("button", name="Changes").click()
    drawer = page.get_by_role("complementary", name="Change set")
    if drawer.get_by_role("button", name="Take all off").count():
        drawer.get_by_role("button", name="Take all off").click()
    expect(drawer.locator(".changes li")).to_have_count(0)
    return drawer


def exported(page, drawer, place: Path) -> ChangeSet:
    with page.expect_download() as found:
        drawer.get_by_role("button", name="Export").click()
    found.value.save_as(place)
    return ChangeSet.load(place)


def test_an_example_is_given_another_label_and_another_and_none(visit, marked, tmp_path):
    page = visit(marked, "evidence/lava", accept_downloads=True)
    drawer = emptied(page)
    card = page.locator(".card").first
    name = card.get_attribute("data-card")
    for label in ("3", "0"):
        card.locator("[data-action=relabel]").click()
        expect(card.get_by_label("New label, a number")).to_be_focused()
        page.keyboard.type(label)
        page.keyboard.press("Enter")
        expect(card.locator("[data-action=relabel]")).to_have_text(f"Label {label}")
        expect(card.locator("[data-action=relabel]")).to_have_attribute("aria-pressed", "true")
        expect(drawer.locator(".changes .tag")).to_have_text([f"label {label}"])
    changes = exported(page, drawer, tmp_path / "changes.json")
    assert changes.relabel == {name: 0} and not changes.remove and not changes.weights
    page.wait_for_timeout(400)  # the draft is kept a moment after the last change
    page.reload()
    expect(card.locator("[data-action=relabel]")).to_have_text("Label 0")
    card.get_by_role("button", name="Remove").click()  # one thing is done with an example
    expect(card.locator("[data-action=relabel]")).to_have_attribute("aria-pressed", "false")
    assert "marked-remove" in card.get_attribute("class")


def test_near_duplicates_are_one_card_with_their_number_and_are_unfolded(visit, marked, tmp_path):
    page = visit(marked, "evidence/folded", accept_downloads=True)
    drawer = emptied(page)
    card = page.locator(f'.card[data-card="{FIRST}"]')
    chip = card.locator(".unfold")
    expect(chip).to_have_text(f"+ {len(COPIES)} near-duplicates")
    assert page.locator(".unfold").count() == 1 and len(COPIES) > 1
    folded = card.locator(".copies li")
    assert folded.count() == 0 and chip.get_attribute("aria-expanded") == "false"
    chip.click()
    shown = folded.evaluate_all("rows => rows.map(row => row.dataset.example)")
    assert shown == COPIES and chip.get_attribute("aria-expanded") == "true"
    folded.first.locator(".link").click()
    dialog = page.get_by_role("dialog")
    dialog.locator(".full").wait_for()
    whole = runs.survey()
    assert dialog.locator(".full").inner_text() == whole.texts[whole.ids.index(COPIES[0])]
    page.keyboard.press("Escape")
    for copy in (folded.nth(0), folded.nth(1)):
        copy.get_by_role("button", name="Remove").click()
    assert exported(page, drawer, tmp_path / "c.json").remove == tuple(COPIES[:2])
    chip.click()
    expect(folded).to_have_count(0)


def test_a_trace_whose_name_cannot_be_seen_opens(visit, marked):
    page = visit(marked, "run")
    page.get_by_role("link", name="la⟨RLO⟩va").click()
    page.locator(".card").first.wait_for()
    expect(page.get_by_role("combobox", name="Trace").locator(":checked")).to_have_text("la⟨RLO⟩va")
    assert page.url.endswith("#/evidence/la%25E2%2580%25AEva")


def test_a_question_is_taken_up_again_with_all_of_its_options(visit, served, run):
    page = visit(served, "ask")
    trace, timeline = sorted(
        (json.loads(p.read_text()) for p in (run / "jobs").glob("*.json")),
        key=lambda job: job["kind"] != "trace",
    )
    form = page.locator("section.ask")
    assert not form.get_by_label("as a chat").is_checked()
    page.get_by_role("link", name=trace["title"]).click()
    chosen = form.locator(".chosen-text b")
    expect(chosen).to_have_text("“dark rock”")
    assert form.get_by_role("textbox", name="Prompt").input_value() == TRACE["prompt"]
    assert form.get_by_label("as a chat").is_checked()
    assert not form.get_by_label("compare with BM25").is_checked()
    assert form.get_by_label("Rather than").input_value() == TRACE["rather_than"]
    assert form.get_by_label("Totals by").input_value() == "year"
    assert form.get_by_label("Examples a side").input_value() == "40"
    assert form.get_by_label("every example").is_checked()
    page.reload()  # the same from the address alone
    expect(chosen).to_have_text("“dark rock”")
    assert form.get_by_label("Examples a side").input_value() == "40"
    with page.expect_request(lambda r: r.method == "POST" and "/api/jobs" in r.url) as posted:
        form.get_by_role("button", name="Trace", exact=True).click()
    assert posted.value.post_data_json == TRACE | {"where": []}
    page.locator(".job .quiet").first.click(timeout=5_000)  # there is no model to ask
    page.goto(served.at(f"ask?job={timeline['id']}"))
    expect(form.locator(".chosen-text b")).to_have_text("“dark rock”")
    assert form.get_by_label("as a chat").is_checked()
