"""The committed page is what its committed sources make, and its colours can be read."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRONTEND = ROOT / "frontend"
STATIC = ROOT / "headwater" / "report" / "static"
LOOK = "../headwater/report/templates/style.css.j2"
OTHERS = ["build.mjs", "index.html", "package.json", "package-lock.json", "tsconfig.json", LOOK]

needs_sources = pytest.mark.skipif(not FRONTEND.is_dir(), reason="the page's sources are not here")


@needs_sources
@pytest.mark.parametrize("name", ["app.js", "app.css"])
def test_the_page_was_built_from_its_sources(name: str):
    parts = [str(p.relative_to(FRONTEND)) for p in FRONTEND.glob("src/**/*") if p.is_file()]
    digest = hashlib.sha256()
    for part in sorted([*OTHERS, *parts]):
        digest.update(f"{part}\0".encode() + (FRONTEND / part).read_bytes() + b"\0")
    first = (STATIC / name).read_text(encoding="utf-8").splitlines()[0]
    assert f"sha256 {digest.hexdigest()}." in first, "run make frontend"


@needs_sources
def test_no_license_of_a_bundled_package_is_missing():
    packages = json.loads((FRONTEND / "package-lock.json").read_text())["packages"]
    shown = (STATIC / "LICENSES.txt").read_text(encoding="utf-8")
    assert shown in (STATIC / "app.js").read_text(encoding="utf-8")  # an exported file holds it too
    bundled = {path: about for path, about in packages.items() if path and not about.get("dev")}
    assert bundled
    for path, about in bundled.items():
        name = path.rpartition("node_modules/")[2]
        heading = f"{name} {about['version']} ({about['license']})"
        assert heading in shown
        assert about["license"] in ("MIT", "ISC", "BSD-3-Clause", "Apache-2.0")


@needs_sources
def test_the_lock_names_no_place_to_download_from():
    assert '"resolved"' not in (FRONTEND / "package-lock.json").read_text()


def test_the_page_is_small_and_asks_nothing_of_other_places():
    files = {
        name: re.sub(
            r"\A(/\*.*?\*/\s*)+", "", (STATIC / name).read_text(encoding="utf-8"), flags=re.S
        )
        for name in ("app.js", "app.css")
    }
    assert sum(map(len, files.values())) < 2**20
    places = {
        p
        for content in files.values()
        for p in re.findall(r"\b(?:https?|wss?)://[^\"'` )]*", content)
    }
    assert places <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/1999/xhtml",
    }
    assert "@import" not in files["app.css"] and "url(" not in files["app.css"]


def test_the_page_can_stand_whole_in_an_html_file():
    for name in ("app.js", "app.css"):
        content = (STATIC / name).read_text(encoding="utf-8")
        assert not re.search(r"</(script|style)|<!--", content, re.IGNORECASE)
        assert "\r" not in content  # a browser would drop it, and the hash would not fit


def test_the_shell_has_one_style_sheet_and_one_script():
    shell = (STATIC / "index.html").read_text(encoding="utf-8")
    assert shell.count('<link rel="stylesheet" href="/static/app.css">') == 1
    assert shell.count('<script src="/static/app.js"></script>') == 1
    assert "style=" not in shell and "onload" not in shell


def colours(css: str) -> dict[str, dict[str, str]]:
    """The colours of the light and the dark page, by name."""
    light, dark = {}, {}
    for match in re.finditer(
        r"(@media \(prefers-color-scheme: dark\) \{\s*)?:root \{([^}]*)\}", css
    ):
        found = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{3,6})\b", match[2]))
        (dark if match[1] else light).update(found)
    return {"light": light, "dark": light | dark}


def contrast(one: str, other: str) -> float:
    """The ratio that the Web Content Accessibility Guidelines ask for.

    The two extremes:

    >>> round(contrast("#000000", "#ffffff"), 3)
    21.0
    """
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_sources
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: str):
    css = (FRONTEND / LOOK).read_text() + (FRONTEND / "src" / "app.css").read_text()
    of = colours(css)[scheme]
    heats = [f"{side}{level}" for side in "ud" for level in range(1, 5)]
    surprises = ["t1", "t2", "t3"]
    pairs = [
        *itertools.product(["ink", "soft", "up", "down"], ["paper", "card", "fill"]),
        *itertools.product(["ink"], [*heats, *surprises, "wash"]),
        *itertools.product(["danger"], ["paper", "card", "fill"]),
        ("paper", "ink"),
        ("soft", "t1"),
        ("up", "t1"),
        ("up", "wash"),
    ]
    weak = {p: round(contrast(of[p[0]], of[p[1]]), 2) for p in pairs}
    assert not {p: c for p, c in weak.items() if c < 4.5}


@needs_sources
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_and_edges_of_controls_stand_out(scheme: str):
    css = (FRONTEND / LOOK).read_text() + (FRONTEND / "src" / "app.css").read_text()
    of = colours(css)[scheme]
    pairs = itertools.product(["up-bar", "down-bar", "edge", "focus"], ["paper", "card"])
    weak = {p: round(contrast(of[p[0]], of[p[1]]), 2) for p in pairs}
    assert not {p: c for p, c in weak.items() if c < 3}
