"""The evidence page in a browser, over a run of 100,000 examples: first paint, and frames while its list is scrolled.

    python benchmarks/page.py [--examples 100000] [--seconds 10]

Prints a table in Markdown. The run is written into a temporary folder: hostile texts, no model.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import runs
from tests.e2e.conftest import Place, browsing, serving, settle

PAINT = """() => new Promise((resolve) => {
  const paint = () => performance.getEntriesByName("first-contentful-paint")[0];
  const wait = () => (paint() ? resolve(paint().startTime) : setTimeout(wait, 5));
  wait();
})"""
# Scrolls as a wheel does, a step each frame, and gives the time between frames and how often rows were not there yet.
SCROLL = """([pixels, seconds]) => new Promise((resolve) => {
  const body = document.querySelector(".list-body"), frames = [], waiting = [];
  const start = performance.now();
  let before = start;
  const step = (now) => {
    frames.push(now - before);
    before = now;
    waiting.push(document.querySelectorAll(".list-row.waiting").length);
    body.scrollTop += pixels;
    if (now - start < 1000 * seconds) requestAnimationFrame(step);
    else resolve([frames.slice(1), waiting, body.scrollTop]);
  };
  requestAnimationFrame(step);
})"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to scroll each way")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = runs.large_run(Path(folder) / "run", options.examples)
        with browsing() as browser, serving(run) as place:
            rows = _paints(browser, place, options.repeats)
            rows += _scrolls(browser, place, options.seconds)
    print(f"| over {options.examples:,} examples | |\n|---|---:|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def _page(browser: Any, place: Place) -> Any:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(120_000)
    return page


def _paints(browser: Any, place: Place, repeats: int) -> list[tuple[str, str]]:
    """Until something stands on the page, until its content does, and until the list of examples does."""
    times: dict[str, list[float]] = {"first paint": [], "content": [], "rows of the list": []}
    for _ in range(repeats + 1):
        page = _page(browser, place)
        start = time.perf_counter()
        page.goto(place.address, wait_until="commit")
        times["first paint"].append(page.evaluate(PAINT))
        settle(page)
        times["content"].append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        page.goto(place.at("corpus"))
        page.locator("[data-row]").first.wait_for()
        times["rows of the list"].append(1000 * (time.perf_counter() - start))
        page.context.close()
    return [
        (f"{name}, {when}", f"{value:.0f} ms")
        for name, (cold, *warm) in times.items()
        for when, value in (("the first time", cold), ("again (median)", statistics.median(warm)))
    ]


def _scrolls(browser: Any, place: Place, seconds: float) -> list[tuple[str, str]]:
    rows = []
    page = _page(browser, place)
    page.goto(place.address)
    settle(page)
    page.goto(place.at("corpus"))
    page.locator("[data-row]").first.wait_for()
    for name, pixels in (("reading (2,400 px/s)", 40), ("flinging (24,000 px/s)", 400)):
        page.locator(".list-body").evaluate("body => (body.scrollTop = 0)")
        page.wait_for_timeout(1000)
        frames, waiting, _ = page.evaluate(SCROLL, [pixels, seconds])
        ordered = sorted(frames)
        p95 = ordered[int(0.95 * len(ordered))]
        dropped = sum(max(round(f / (1000 / 60)) - 1, 0) for f in frames)
        share = dropped / (dropped + len(frames))
        empty = sum(map(bool, waiting)) / len(waiting)
        rows += [
            (f"{name}: time of a frame, median", f"{statistics.median(frames):.1f} ms"),
            (f"{name}: time of a frame, 95 of 100", f"{p95:.1f} ms"),
            (f"{name}: frames dropped", f"{dropped} of {dropped + len(frames)} ({share:.1%})"),
            (f"{name}: frames with a row still on its way", f"{empty:.1%}"),
        ]
    page.locator(".list-body").evaluate("body => (body.scrollTop = body.scrollHeight)")
    start = time.perf_counter()
    page.locator(f'[data-row="{99_999}"]').wait_for()
    rows.append(("a jump to the last row", f"{1000 * (time.perf_counter() - start):.0f} ms"))
    return rows


if __name__ == "__main__":
    main()
