"""The page over the demo's run: a pretrained model, fine-tuned on real articles. Minutes, so it is a slow test.

It needs the folder that `make demo` fills, and leaves it as it is.
"""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs Playwright: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs FastAPI: pip install -e '.[web]'")

from playwright.sync_api import expect

from headwater.report.page import write_report
from headwater.training.changes import ChangeSet
from tests.e2e.conftest import Place, serving, settle

pytestmark = pytest.mark.slow
RUN = Path(__file__).parents[2] / "runs" / "demo" / "run"
PROMPT = "Amsterdam is the capital and largest city of the"
MINUTES = 60_000  # milliseconds


@pytest.fixture(scope="module")
def run(browser, tmp_path_factory):
    """A copy of the demo's run."""
    if not (RUN / "run.json").is_file():
        pytest.skip("needs the demo's run: make demo")
    return Path(shutil.copytree(RUN, tmp_path_factory.mktemp("demo") / "run"))


def look(page, place: Place, name: str, folder: Path) -> None:
    """Open an example, filter, compare methods, mark and export: the same on a server and from a file."""
    page.goto(place.at(f"evidence/{name}"))
    settle(page)
    cards = page.locator(".card")
    every = cards.count()
    assert every > 4
    cards.first.locator(".open").click()
    page.get_by_role("dialog").locator(".full mark").first.wait_for()
    page.keyboard.press("Escape")
    title = cards.first.locator("h4").inner_text()
    page.get_by_role("searchbox", name="Text").fill(title)
    expect(cards).not_to_have_count(every)
    assert title in cards.locator("h4").all_inner_texts()
    page.get_by_role("button", name="show all").click()
    assert page.locator(".ranking").count() == 3
    assert all(c.locator("li").count() for c in page.locator(".ranking").all())
    page.locator(".changes-button").click()
    drawer = page.get_by_role("complementary", name="Change set")
    if drawer.get_by_role("button", name="Take all off").count():
        drawer.get_by_role("button", name="Take all off").click()
    for i in range(3):
        cards.nth(i).get_by_role("button", name="Remove").click()
    with page.expect_download() as found:
        drawer.get_by_role("button", name="Export").click()
    path = folder / "changes.json"
    found.value.save_as(path)
    assert len(ChangeSet.load(path).remove) == 3
    page.locator(".changes-button").click()


def test_asked_traced_marked_and_verified_on_real_articles(visit, run, tmp_path):
    with serving(run) as place:
        page = visit(place, "ask", accept_downloads=True)
        page.get_by_role("textbox", name="Prompt").fill(PROMPT)
        page.get_by_role("button", name="Complete", exact=True).click()
        words = page.get_by_role("listbox", name="Words of the completion")
        words.wait_for(timeout=10 * MINUTES)
        words.focus()
        page.keyboard.press("Home")
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowLeft")
        page.get_by_role("button", name="Trace", exact=True).click()
        expect(page.locator(".tracing .job.done")).to_have_count(1, timeout=20 * MINUTES)
        page.get_by_role("link", name="its own page").click()
        settle(page)
        name = page.url.rpartition("/")[2]
        look(page, place, name, tmp_path)
        page.locator(".changes-button").click()
        page.get_by_role("complementary", name="Change set").get_by_role(
            "button", name="Verify", exact=True
        ).click()
        page.locator(".verified tbody.control").wait_for(timeout=60 * MINUTES)
        assert page.locator(".square circle.dot-change").count() >= 1
    file = Place(write_report(run, tmp_path / "report.html").as_uri(), live=False)
    page = visit(file, accept_downloads=True)
    look(page, file, name, tmp_path)
    page.goto(file.at("verify"))
    page.locator(".verified tbody.control").wait_for()
