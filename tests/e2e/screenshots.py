"""Pictures of every state of the page over a run: python -m tests.e2e.screenshots RUN OUT [--prompt TEXT]

Only with a prompt is anything computed: the model completes it, and a part of what it said is traced.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Place, browsing, serving, settle

DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
PAGES = ("ask", "evidence", "verify", "corpus", "run", "timeline")
SLOW = 900_000  # milliseconds: a trace of a real model


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", help="let the model complete this, and trace what it said")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with browsing() as browser, serving(options.run) as place:
        take = Camera(browser, place, options.out)
        if options.prompt:
            _ask(take, options.prompt)
        _pages(take)
        _acts(take)
        _troubles(take)


class Camera:
    """Takes pictures of pages.

    Args:
        browser: The browser.
        place: Where the page is.
        out: Folder of the pictures.
    """

    def __init__(self, browser: Any, place: Place, out: Path):
        self.browser, self.place, self.out = browser, place, out

    def open(self, page: str, **options: Any) -> Any:
        """A page, when it is there."""
        context = self.browser.new_context(
            **{"viewport": DESKTOP, "reduced_motion": "reduce", **options}
        )
        shown = context.new_page()
        shown.goto(self.place.address)
        settle(shown)
        shown.goto(self.place.at(page))
        settle(shown)
        return shown

    def __call__(self, name: str, page: Any, *, close: bool = True, **options: Any) -> None:
        """Take one picture."""
        path = self.out / f"{name}.png"
        page.wait_for_timeout(150)
        page.screenshot(path=path, **options)
        print(f"{path} ({path.stat().st_size:,} bytes)", file=sys.stderr)
        if close:
            page.context.close()


def _pages(take: Camera) -> None:
    looks: dict[str, dict[str, Any]] = {
        "": {},
        "-dark": {"color_scheme": "dark"},
        "-phone": {"viewport": PHONE, "device_scale_factor": 2},
    }
    for suffix, options in looks.items():
        for page in PAGES:
            take(f"{page}{suffix}", take.open(page, **options))
    for name, part in (("answer", ".answer"), ("totals", ".totals"), ("methods", ".compare")):
        page = take.open("evidence", viewport={"width": 1240, "height": 1120})
        if page.locator(part).count():
            page.locator(part).first.evaluate("part => scrollTo(0, part.offsetTop - 16)")
            take(f"evidence-{name}", page)
    page = take.open("evidence")
    page.emulate_media(media="print")
    page.pdf(path=take.out / "evidence-printed.pdf", print_background=True)
    take("evidence-whole", page, full_page=True)


def _acts(take: Camera) -> None:
    def on(page: Any, act: Callable[[Any], None], name: str) -> None:
        act(page)
        take(name, page)

    if (page := take.open("evidence")).locator(".card").count():
        on(page, lambda p: p.locator(".card .open").first.click(), "example")
        on(take.open("evidence"), lambda p: p.get_by_label("Text").first.fill("zzz"), "no-match")
    on(take.open("evidence"), lambda p: p.get_by_role("button", name="Changes").click(), "changes")
    on(take.open("evidence"), lambda p: p.keyboard.press("?"), "keys")


def _troubles(take: Camera) -> None:
    bare = Camera(take.browser, Place(take.place.at(""), live=True), take.out)
    take("no-token", bare.open("ask"))
    page = take.open("run")
    page.context.set_offline(True)
    page.get_by_role("link", name="Corpus").click()
    page.get_by_role("button", name="Try again").wait_for()
    take("lost", page)
    page = take.open("run")
    page.route("**/api/**", lambda route: None)  # no answer comes
    page.get_by_role("link", name="Corpus").click()
    take("loading", page)


def _ask(take: Camera, prompt: str) -> None:
    page = take.open("ask", viewport={"width": 1280, "height": 1060})
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("button", name="Complete", exact=True).click()
    page.locator(".streaming").wait_for(timeout=SLOW)
    take("ask-completing", page, close=False)
    words = page.get_by_role("listbox", name="Words of the completion")
    words.wait_for(timeout=SLOW)
    words.focus()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowLeft")
    page.evaluate("document.activeElement.blur()")
    take("ask-chosen", page, close=False)
    page.get_by_role("button", name="Trace", exact=True).click()
    page.locator(".job progress").wait_for(timeout=SLOW)
    page.wait_for_timeout(3000)
    take("ask-tracing", page, close=False)
    page.locator(".job.done").wait_for(timeout=SLOW)
    page.locator(".card").first.wait_for()
    take("ask-done", page, full_page=True)


if __name__ == "__main__":
    main()
