"""A real browser, and the two places where the page stands: a server on loopback, and a file.

Without Playwright or a Chromium these tests are skipped; the reason says what to install. `CHROMIUM` names the browser
where it is not found.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from headwater.core.evidence import Evidence, Ranking
from tests import runs

# Only what the tests ask for: no other window, no connection of the browser's own.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """The browser's program."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Place:
    """Where the page is opened.

    Attributes:
        address: What to open first.
        live: Whether there is a server.
    """

    address: str
    live: bool

    def at(self, page: str) -> str:
        """The address of one of its pages."""
        return f"{self.address.partition('#')[0]}#/{page}"


@contextmanager
def serving(run: Path) -> Iterator[Place]:
    """`headwater serve` over a run folder, in a process of its own."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "headwater", "serve", str(run), "--port", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        assert server.stdout is not None
        address = next((line.strip() for line in server.stdout if line.startswith("http")), "")
        assert address, "the server did not start"
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield Place(address, live=True)
    finally:
        server.terminate()
        server.wait(20)


def settle(page: Any) -> None:
    """Wait until what was loading is there."""
    from playwright.sync_api import expect

    page.locator("main h1").wait_for()
    expect(page.locator(".skeleton")).to_have_count(0)


@dataclass
class Watch:
    """What a page did that it should not: asked another place, complained, opened a dialog."""

    origin: str
    wrong: list[str] = field(default_factory=list)

    def over(self, page: Any) -> None:
        """Look on from now on."""
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)
        page.on("popup", lambda _: self.wrong.append("opened a window"))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text}")

    def _dialog(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:,", f"blob:{self.origin}", "blob:null")):
            self.wrong.append(f"asked {request.url}")


@pytest.fixture(
    scope="module"
)  # Playwright keeps an event loop running, which other tests must not meet
def browser():
    pytest.importorskip("playwright", reason="needs Playwright: pip install -e '.[dev]'")
    if not chromium():
        pytest.skip("needs a Chromium: install the package chromium, or name one by CHROMIUM")
    with browsing() as found:
        yield found


@pytest.fixture
def visit(browser):
    """Open a place, and see to it that nothing goes wrong there."""
    opened = []

    def visit(place: Place, page: str = "", *, expected: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(15_000)
        if not place.live:
            context.set_offline(True)
        shown = context.new_page()
        watch = Watch(place.address.partition("#")[0])
        watch.over(shown)
        opened.append((context, watch, expected))
        shown.goto(place.address)
        settle(shown)
        if page:
            shown.goto(place.at(page))
            settle(shown)
        return shown

    yield visit
    for context, watch, expected in opened:
        context.close()
        assert not [w for w in watch.wrong if not (expected and expected in w)]


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A run folder with everything in it, made without training."""
    run = runs.plain_run(tmp_path_factory.mktemp("plain") / "run")
    _compared(Evidence.load(run / "traces" / "lava")).save(run / "traces" / "compared")
    return run


def _compared(evidence: Evidence) -> Evidence:
    """The same evidence beside another ranking and one that could not be made, with heat on the completion."""
    (answer,) = evidence.answers
    listed = [replace(i, tokens=(i.text[:80],), token_scores=()) for _, _, i in answer.ranked()]
    n = len(answer.completion_tokens)
    told = tuple(0.1 * (-1) ** k for k in range(n))
    rankings = (
        Ranking(method="BM25", about="shared words", examples=(listed[2], listed[5], listed[0])),
        Ranking(method="embedding", about="hidden states", skipped="it needs the model"),
    )
    first = replace(answer.raised[0], query_scores=told)
    answer = replace(answer, raised=(first, *answer.raised[1:]), rankings=rankings)
    return replace(evidence, answers=(answer,))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Path:
    """The same, of hostile texts."""
    return runs.hostile_run(tmp_path_factory.mktemp("hostile") / "run")


@contextmanager
def standing(kind: str, run: Path) -> Iterator[Place]:
    """The page of a run, served or as a file."""
    if kind == "served":
        pytest.importorskip("fastapi", reason="needs FastAPI: pip install -e '.[web]'")
        pytest.importorskip("uvicorn", reason="needs uvicorn: pip install -e '.[web]'")
        with serving(run) as place:
            yield place
    else:
        from headwater.report.page import write_report

        yield Place(write_report(run, run.parent / "report.html").as_uri(), live=False)


@pytest.fixture(scope="module", params=["served", "file"])
def place(request, browser, plain) -> Iterator[Place]:
    """The page of the plain run."""
    with standing(request.param, plain) as found:
        yield found


@pytest.fixture(scope="module", params=["served", "file"])
def hostile_place(request, browser, hostile) -> Iterator[Place]:
    """The page of the hostile run."""
    with standing(request.param, hostile) as found:
        yield found
