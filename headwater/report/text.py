"""Corpus text and numbers, made fit to be shown.

Text from a corpus may hold anything. What would steer a terminal or rearrange a page (control
characters, escape sequences, characters that change the direction of writing or cannot be seen) is
replaced by something visible or removed.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

from headwater.core.display import title_of
from headwater.core.evidence import Answer, Evidence, Influencer

# Escape sequences of terminals: CSI, OSC and other strings up to their end, two-character ones.
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]{0,500}(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]"
)
_NAMES = {
    0x00: "NUL",
    0x07: "BEL",
    0x08: "BS",
    0x1B: "ESC",
    0x7F: "DEL",
    0x061C: "ALM",
    0x200B: "ZWSP",
    0x200E: "LRM",
    0x200F: "RLM",
    0x202A: "LRE",
    0x202B: "RLE",
    0x202C: "PDF",
    0x202D: "LRO",
    0x202E: "RLO",
    0x2066: "LRI",
    0x2067: "RLI",
    0x2068: "FSI",
    0x2069: "PDI",
    0xFEFF: "BOM",
}
_JOINERS = "\u00ad\u200c\u200d"  # soft hyphen and the two joiners: many scripts and emoji need them
_FACTS = {
    "model": "Model",
    "corpus": "Corpus",
    "method": "Method",
    "curvature": "Curvature",
    "damping": "Damping",
    "damping_ratio": "Damping / mean eigenvalue",
    "precision": "Products",
    "n_train": "Training examples",
    "n_heldout": "Held-out examples",
    "index": "Index",
    "scanned": "Rows looked up",
    "cost": "Cost",
    "seconds": "Time",
    "peak_memory": "Peak memory",
    "versions": "Versions",
    "paper": "Paper",
    "command": "Command",
}
NOISE_LEVEL = 0.05  # a rank counts as told apart from noise up to this p-value


class _Table(dict[int, str]):
    """What each character is shown as, worked out when it first occurs."""

    def __init__(self, *, controls: bool):
        self.controls = controls

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in "\n\t" or character in _JOINERS:
            shown = character
        elif category == "Cc" and not self.controls:
            shown = ""
        elif category in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown = f"⟨{_NAMES.get(code, f'U+{code:04X}')}⟩"
        else:
            shown = character
        self[code] = shown
        return shown


_VISIBLE, _STRIPPED = _Table(controls=True), _Table(controls=False)


def visible(text: str) -> str:
    r"""The text with every invisible character that could mislead shown as a placeholder.

    Example:
        >>> visible("a\x00b\u202ec")
        'a⟨NUL⟩b⟨RLO⟩c'
    """
    if text.isprintable():  # nothing to show otherwise
        return text
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def stripped(text: str) -> str:
    r"""The text on one line for a terminal: escape sequences and control characters removed.

    Characters that change the direction of writing stay visible, as in `visible`.

    Example:
        >>> stripped("\x1b[31mred\x1b[0m\nand \u202eback")
        'red and ⟨RLO⟩back'
    """
    return re.sub(r"\s+", " ", _ESCAPES.sub("", text)).translate(_STRIPPED)


def shortened(text: str, width: int) -> str:
    """The text cut to a number of characters, the last an ellipsis where some are missing."""
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def title(influencer: Influencer) -> str:
    """What to call an example: its title where the metadata has one, otherwise its id."""
    return title_of(influencer.example_id, influencer.metadata)


def source(influencer: Influencer, column: str | None) -> str | None:
    """The value of the metadata column that names the example's source."""
    value = influencer.metadata.get(column) if column else None
    return None if value is None else str(value)


def is_number(value: int | float | None) -> TypeGuard[float]:
    """Whether there is a value and it is finite."""
    return value is not None and math.isfinite(value)


def decimals(values: Iterable[float | None]) -> int:
    """Decimals that give the largest value three significant digits.

    Example:
        >>> decimals([0.4123, -0.02])
        3
    """
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return 3 if largest == 0 else min(max(2 - math.floor(math.log10(largest)), 0), 12)


def score_decimals(evidence: Evidence) -> int:
    """Decimals for the scores of all ranked examples, so that they line up."""
    return decimals(i.score for answer in evidence.answers for _, _, i in answer.ranked())


def signed(value: float | None, digits: int) -> str:
    """A number with its sign, or a dash where there is none."""
    if not is_number(value):
        return "–"
    return f"{value:+z.{digits}f}" if digits <= 7 else f"{value:+.2e}"


def number(value: float | None, digits: int) -> str:
    """A number with a minus sign where it needs one, or a dash where there is none."""
    return f"{value:z.{digits}f}" if is_number(value) else "–"


def percent(share: float) -> str:
    """A share as a percentage, or a dash where there is none."""
    return f"{share:.0%}" if is_number(share) else "–"


def interval(low: float | None, high: float | None, digits: int) -> str:
    """An interval such as `[0.35, 0.47]`; empty where an end is missing."""
    if not (is_number(low) and is_number(high)):
        return ""
    for n in (max(digits - 1, 0), digits, digits + 1):  # more where the ends would look the same
        ends = [f"{v:z.{n}f}" if n <= 6 else f"{v:.1e}" for v in (low, high)]
        if ends[0] != ends[1] or low == high:
            break
    return f"[{', '.join(ends)}]"


def p_value(p: float | None) -> str:
    """A p-value in two digits, or a dash where there is none."""
    if not is_number(p):
        return "–"
    return "<0.0001" if p < 0.0001 else f"{p:.2g}"


def quantity(value: object) -> str:
    """A value on one line: numbers in at most four digits, lists and tables spelt out."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return " · ".join(f"{name} {quantity(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(quantity(v) for v in value)
    return str(value)


def size(n_bytes: int | float) -> str:
    """Bytes in the unit that suits them, such as `1.9 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} GiB"


def duration(seconds: int | float) -> str:
    """Seconds in the units that suit them, such as `3 min 20 s`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def window(scores: Sequence[float], widths: Sequence[int], limit: int) -> tuple[int, int]:
    """The stretch of tokens, at most `limit` characters wide, that carries the most score.

    Without scores it is the beginning.

    Returns:
        The first token, and the one after the last.

    Example:
        >>> window([0.0, 0.0, 2.0, -3.0], [4, 4, 4, 4], 8)
        (2, 4)
    """
    weights = [abs(s) if math.isfinite(s) else 0.0 for s in scores] or [0.0] * len(widths)
    start, weight, width = 0, 0.0, 0
    best = (-1.0, 0, 0)  # weight, minus the start, stop: ties go to the earlier and longer stretch
    for stop in range(1, len(widths) + 1):
        weight, width = weight + weights[stop - 1], width + widths[stop - 1]
        while width > limit and start < stop - 1:
            weight, width = weight - weights[start], width - widths[start]
            start += 1
        best = max(best, (weight, -start, stop))
    return -best[1], best[2]


_FOR_MACHINES = ("copies", "made_from", "options", "papers", "question")


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """How the evidence came about: label and value of each fact, the known ones first."""
    left = {k: v for k, v in evidence.facts.items() if k not in _FOR_MACHINES}
    rows = [(f"Stage: {s['name']}", stage(s)) for s in left.pop("stages", [])]
    for name, label in _FACTS.items():
        if (value := left.pop(name, None)) is not None:
            rows.append((label, _fact(name, value, left)))
    return rows + [(name.replace("_", " "), quantity(value)) for name, value in left.items()]


def stage(facts: dict[str, Any]) -> str:
    """What a stage of a cascade looked at, what it cost, and what it may have left behind.

    Example:
        >>> stage({"name": "index", "examples": 1200, "only": 900, "seconds": 0.25, "passes": 0.002})
        '1,200 examples, 900 of them from here only; 0.25 s, 0.2 % of a pass over the data'
    """
    if "skipped" in facts:
        return f"left out: {facts['skipped']}"
    parts = [f"{facts['examples']:,} examples"]
    if "only" in facts:
        parts[0] += f", {facts['only']:,} of them from here only"
    passes = facts["passes"]
    share = f"{100 * passes:.2g} % of a pass" if passes < 1 else f"{passes:.3g} passes"
    parts.append(f"{duration(facts['seconds'])}, {share} over the data")
    if (lost := facts.get("missed")) is not None:
        k, level = lost["k"], f"{100 * lost['confidence_level']:.3g} %"
        part, high, most = (f"{k * lost[n]:.1f}" for n in ("estimate", "high", "at_most"))
        if lost["drawn"] < lost["outside"]:
            parts.append(
                f"about {part} of each top {k} left behind ({level}: no more than {high}), if the stage before errs on "
                f"the {lost['outside']:,} others as on {lost['drawn']:,} that were scored too; whatever it does, no "
                f"more than {most}"
            )
        else:
            parts.append("none left behind: all were scored")
    elif "missed" in facts:
        parts.append("its loss was not estimated")
    return "; ".join(parts)


def _fact(name: str, value: Any, others: dict[str, Any]) -> str:
    if name == "damping":
        ratio = others.pop("damping_ratio", None)
        return quantity(value) + (f" ({quantity(ratio)} × the mean eigenvalue)" if ratio else "")
    if name == "cost":
        return f"{quantity(value)} passes over the data"
    if name == "seconds":
        return _each(value, duration)
    if name == "peak_memory":
        return _each(value, size)
    if name == "index":
        return _index(value)
    if name == "precision":
        return "in the model's own precision" if value == "model" else f"in {quantity(value)}"
    return quantity(value)


def _index(value: dict[str, Any]) -> str:
    """What the rows of an index are, and how well they were found to rank.

    Example:
        >>> _index({"kind": "whitened", "dtype": "int8", "numbers_per_row": 1024, "error": None})
        'whitened, 1,024 numbers of int8 an example'
    """
    told = f"{value['kind']}, {value['numbers_per_row']:,} numbers of {value['dtype']} an example"
    if (error := value.get("error")) is not None:
        whole = error["whole"]
        told += f"; alone it finds {100 * whole['recall_10']:.0f} % of each top ten (Spearman {whole['spearman']:.3f})"
    return told


def _each(value: Any, form: Callable[[Any], str]) -> str:
    if isinstance(value, dict):
        return " · ".join(f"{name} {_each(v, form)}" for name, v in value.items())
    return form(value) if isinstance(value, int | float) and is_number(value) else quantity(value)


def noise(answer: Answer, digits: int) -> str:
    """One sentence on which ranks are told apart from noise."""
    parts = []
    if answer.n_distinguishable is not None:
        n = answer.n_distinguishable
        ranks = {0: "no rank is", 1: "the top rank is"}.get(n, f"the top {n} ranks are")
        parts.append(f"{ranks} told apart from noise")
    if is_number(answer.null_scale):
        reach = f"{1.96 * answer.null_scale:.{max(digits - 1, 0)}f}"
        parts.append(f"about 5 % of held-out examples reach ±{reach} nats")
    sentence = "; ".join(parts) or "no held-out examples were scored, so noise is not known"
    return f"{sentence[0].upper()}{sentence[1:]}."
