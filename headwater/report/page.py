"""A run folder as one HTML file: the page that `headwater serve` opens, with its data inside.

The file asks nothing of any network. Its Content-Security-Policy allows its own script and style sheet, named by their
hashes, and nothing else; the data stand in a block that is no script, in which nothing can end the block.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwater.core.files import ArtifactError, write_bytes
from headwater.report.text import visible
from headwater.report.views import corpus
from headwater.report.views import run as views

STATIC = Path(__file__).parent / "static"
DATA = "headwater-data"
EXAMPLES = 10_000
_TEXTS = 2_000_000  # characters of whole examples in a file
# What could end the block, begin a comment or a tag, or a line where JavaScript has no line.
_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
View = Callable[[str | Path, str], dict[str, Any]]
_RESULTS: dict[str, tuple[str, View]] = {
    "traces": ("trace", views.trace),
    "verifications": ("verification", views.verification),
    "timelines": ("timeline", views.timeline),
}
_STYLE = re.compile(r"<link[^>]*\bapp\.css\b[^>]*>")
_SCRIPT = re.compile(r"<script[^>]*\bapp\.js\b[^>]*></script>")


def write_report(
    run: str | Path,
    path: str | Path | None = None,
    *,
    examples: int = EXAMPLES,
    static: Path = STATIC,
) -> Path:
    """Write everything that a run folder shows as one HTML file.

    Args:
        run: The run folder.
        path: The file; `report.html` in the run folder when left out. An existing one is replaced, whole or not at all.
        examples: Most training examples to list: those of largest self-influence, where there are more.
        static: Folder of the page's script, style sheet and frame.

    Returns:
        The path.

    Raises:
        ArtifactMissing: It is no run folder.
        ValueError: The page's files are not those of a page.
    """
    path = Path(run) / "report.html" if path is None else Path(path)
    write_bytes(path, render_report(run, examples=examples, static=static).encode())
    return path


def render_report(run: str | Path, *, examples: int = EXAMPLES, static: Path = STATIC) -> str:
    """The file that `write_report` writes."""
    style, script, frame = (
        (static / name).read_text(encoding="utf-8") for name in ("app.css", "app.js", "index.html")
    )
    if re.search(r"</script|<!--", script, re.IGNORECASE) or "</style" in style.lower():
        raise ValueError(f"A file in {static} holds the end of the block it is to stand in.")
    found = embedded(run, examples=examples)
    name = html.escape(found["run"]["name"])
    policy = (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    data = f'<script type="application/json" id="{DATA}">{block(found)}</script>'
    page = frame
    for pattern, new in (
        (_STYLE, f"<style>{style}</style>"),
        (_SCRIPT, f"{data}\n<script>{script}</script>"),
        (re.compile(r'<meta charset="utf-8">'), f'<meta charset="utf-8">\n{head}'),
        (re.compile("<title>[^<]*</title>"), f"<title>Headwater: {name}</title>"),
    ):
        page, n = pattern.subn(lambda _, new=new: new, page, count=1)
        if n != 1:
            raise ValueError(f"{static / 'index.html'} has no {pattern.pattern}; make it again.")
    return page


def block(value: Any) -> str:
    r"""A value as JSON that can stand in an HTML page.

    Example:
        >>> print(block("</script>"))
        "\u003c/script\u003e"
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED).encode("utf-8", "replace").decode()


def embedded(run: str | Path, *, examples: int = EXAMPLES) -> dict[str, Any]:
    """Everything that a run folder shows, as the page reads it from its own data.

    Args:
        run: The run folder.
        examples: Most training examples to list.
    """
    overview = views.overview(run)
    found: dict[str, dict[str, Any]] = {}
    damage: list[tuple[str, str]] = []
    for group, (what, view) in _RESULTS.items():
        found[group], wrong = _results(run, what, view, overview[group])
        overview[group] = [each for each in overview[group] if each["id"] in found[group]]
        damage += wrong
    overview["facts"] = [*damage, *overview["facts"]]
    listed, summary = corpus.every(run, examples), corpus.summary(run)
    if listed["total"] > len(listed["rows"]):
        summary["told"] += (
            f" This file lists the {len(listed['rows']):,} of {listed['total']:,} examples that have the largest "
            "self-influence."
        )
    wanted = [
        card["number"]
        for trace in found["traces"].values()
        for answer in trace["answers"]
        for side in answer["sides"]
        for card in side["cards"]
    ]
    wanted += [each["number"] for each in summary["outliers"]]
    wanted += [each["members"][0] for each in summary["clusters"] if each["members"]]
    wanted += [row["number"] for row in listed["rows"]]
    return {
        "run": overview,
        "corpus": listed | {"summary": summary},
        "examples": _examples(run, [n for n in dict.fromkeys(wanted) if n is not None]),
        "changes": _changes(run),
        **found,
    }


def _results(
    run: str | Path, what: str, view: View, listed: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Those of the listed results that can be read, by id, and what is wrong with the others."""
    found, damage = {}, []
    for each in listed:
        try:
            found[each["id"]] = view(run, each["id"])
        except ArtifactError as error:
            told = f"The {what} {each.get('name', each['id'])} cannot be read"
            damage.append((told, visible(str(error))))
    return found, damage


def _changes(run: str | Path) -> dict[str, Any] | None:
    """The draft of a change set, if it can be read."""
    try:
        return views.changes(run)
    except ArtifactError:
        return None


def _examples(run: str | Path, numbers: list[int]) -> dict[str, dict[str, Any]]:
    """Whole examples, those that are wanted first, as far as the file has room for them."""
    found, left = {}, _TEXTS
    for number in numbers:
        example = corpus.example(run, number)
        left -= sum(len(piece["text"]) for piece in example["pieces"])
        if left < 0:
            break
        found[str(number)] = example
    return found


def _sha256(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
