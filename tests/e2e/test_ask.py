"""Asking a tiny model through the page, from the prompt to the verification of what was marked."""

import json
import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("playwright", reason="needs Playwright: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs FastAPI: pip install -e '.[web]'")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from playwright.sync_api import expect

from headwater.cli import main
from headwater.core.evidence import Evidence
from tests.e2e.conftest import Place, serving, settle
from tests.language_cases import WORDS, saved

pytestmark = pytest.mark.thorough
PROMPT = " ".join(list(WORDS)[:2])
SLOW = 120_000  # milliseconds: a process that loads torch and a model, on a machine that does other things too


@pytest.fixture(scope="module")
def tuned(browser, tmp_path_factory):
    """A run folder of a tiny model that was fine-tuned here."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ask")
    words = list(WORDS)
    lines = [
        {
            "id": f"train-{i}",
            "text": " ".join(words[i * k % len(words)] for k in range(1, 5 + i % 4)),
            "topic": ("rivers", "hills")[i % 2],
        }
        for i in range(12)
    ]
    train, model, out = folder / "train.jsonl", folder / "adapted", folder / "run"
    train.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    saved(folder / "model")
    options = ["--lora-rank", "2", "--epochs", "2", "--lr", "0.02", "--batch-tokens", "16"]
    assert main(["finetune", str(folder / "model"), str(train), "--out", str(model), *options]) == 0
    assert main(["fit", str(model), str(train), "--out", str(out), "--curvature", "ekfac"]) == 0
    return out


@pytest.fixture(scope="module")
def server(tuned) -> Iterator[Place]:
    with serving(tuned) as place:
        yield place


def complete(page, prompt: str = PROMPT) -> str:
    """Let the model complete a prompt, and return what it said."""
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("button", name="Complete", exact=True).click()
    words = page.get_by_role("listbox", name="Words of the completion")
    words.wait_for(timeout=SLOW)
    return words.inner_text()


def test_from_a_prompt_to_a_verified_change(visit, server, tuned):
    page = visit(server, "ask")
    assert page.get_by_text("Asked before").count() == 0
    said = complete(page)
    assert said.strip()

    # A span by keys, and by dragging.
    words = page.get_by_role("listbox", name="Words of the completion")
    words.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    chosen = page.locator("[role=option][aria-selected=true]")
    expect(chosen).to_have_count(2)
    first, last = (page.get_by_role("option").nth(i).bounding_box() for i in (0, 2))
    page.mouse.move(first["x"] + 2, first["y"] + first["height"] / 2)
    page.mouse.down()
    page.mouse.move(last["x"] + last["width"] - 2, last["y"] + last["height"] / 2, steps=8)
    page.mouse.up()
    expect(chosen).to_have_count(3)
    span = page.locator(".chosen-text b").inner_text().strip("“”")
    assert span in said

    # The trace of it, stage by stage.
    page.get_by_label("Totals by").fill("topic")
    with page.expect_request(
        lambda r: r.method == "POST" and r.url.endswith("/api/jobs")
    ) as posted:
        page.get_by_role("button", name="Trace", exact=True).click()
    asked = posted.value.post_data_json
    start, stop = asked["span"]
    assert asked["completion"][start:stop] == span and asked["prompt"] == PROMPT
    expect(page.locator(".tracing .job.done")).to_have_count(1, timeout=SLOW)
    assert page.locator(".stages li").count() >= 1
    cards = page.locator(".card")
    cards.first.wait_for()
    page.get_by_role("link", name="its own page").click()
    settle(page)
    name = page.url.rpartition("/")[2]
    answer = Evidence.load(tuned / "traces" / name).answers[0]
    shown = set(cards.evaluate_all("cards => cards.map(c => c.dataset.card)"))
    assert shown == {i.example_id for _, _, i in answer.ranked()}
    assert page.locator(".sources tbody tr").count() == 2

    # Open one, mark it, and see whether the prediction was right.
    cards.first.locator(".open").click()
    page.get_by_role("dialog").locator(".full").wait_for()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Changes").click()
    page.get_by_role("complementary", name="Change set").get_by_role(
        "button", name="Verify", exact=True
    ).click()
    page.get_by_role("heading", name="Was the prediction right?").wait_for()
    rows = page.locator(".verified tbody tr:not(:first-child)")
    rows.first.wait_for(timeout=2 * SLOW)
    assert page.locator(".verified tbody.control").count() == 1
    assert page.locator(".square circle.dot-control").count() >= 1
    page.goto(server.at("ask"))
    expect(page.get_by_role("heading", name="Asked before")).to_be_visible()


def test_a_contrast_is_asked_of_a_completion_that_was_given(visit, server):
    page = visit(server, "ask")
    words = list(WORDS)
    page.get_by_role("textbox", name="Prompt").fill(PROMPT)
    page.get_by_role("button", name="Give a completion yourself").click()
    page.get_by_role("textbox", name="Completion").fill(f" {words[2]}")
    page.get_by_role("button", name="Done writing").click()
    page.get_by_role("textbox", name="Rather than").fill(f" {words[3]}")
    with page.expect_request(
        lambda r: r.method == "POST" and r.url.endswith("/api/jobs")
    ) as posted:
        page.get_by_role("button", name="Trace", exact=True).click()
    assert posted.value.post_data_json["rather_than"] == f" {words[3]}"
    expect(page.locator(".tracing .job.done")).to_have_count(1, timeout=SLOW)
    page.locator(".card").first.wait_for()


def test_a_trace_is_cancelled(visit, server):
    page = visit(server, "ask")
    complete(page)
    page.get_by_role("button", name="Trace", exact=True).click()
    page.locator(".tracing").get_by_role("button", name="Cancel").click()
    expect(page.locator(".tracing .job")).to_have_class(re.compile("cancelled|done"), timeout=SLOW)


def test_a_survey_is_started_from_the_page(visit, server):
    page = visit(server, "corpus")
    page.get_by_role("button", name="Survey it").click()
    page.locator(".chart-svg").first.wait_for(timeout=SLOW)
    expect(page.locator(".all p[role=status]")).to_have_text("12 examples")


def test_a_page_without_its_token_says_how_to_get_it(visit, server):
    bare = Place(server.address.partition("#")[0], live=True)
    page = visit(bare, expected="401")
    assert page.get_by_role("heading", name="This page needs its token").is_visible()
    page.get_by_label("Address or token").fill("wrong")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("does not know the token").wait_for()
    page.get_by_label("Address or token").fill(server.address)
    page.get_by_role("button", name="Open").click()
    page.get_by_role("heading", name="Why did the model say this?").wait_for()
    assert "token" not in page.url


def test_a_lost_server_is_said_and_found_again(visit, server):
    page = visit(server, "run", expected="ERR_INTERNET_DISCONNECTED")
    page.context.set_offline(True)
    page.get_by_role("link", name="Verify").click()
    page.get_by_role("link", name="Corpus").click()
    page.get_by_text("The server does not answer.").first.wait_for()
    page.get_by_role("button", name="Try again").wait_for()
    page.context.set_offline(False)
    expect(page.locator(".banner")).to_have_count(0, timeout=15_000)
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("heading", name="All examples").wait_for()
