"""Evidence as one self-contained HTML page.

The page asks nothing of any network, runs no script, and shows corpus text only as text: every
value passes through `visible` and is escaped, and its Content-Security-Policy allows one style
sheet, named by its hash, and nothing else.
"""

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.core.evidence import Answer, Evidence, Influencer, SourceTotal
from headwater.core.files import write_bytes
from headwater.extras import require
from headwater.report import text

_TEMPLATES = Path(__file__).parent / "templates"
_EXCERPT, _FULL = 420, 20_000  # characters of an example: on its card, and when opened
_PROMPT, _NAME, _CELL = 700, 90, 2_000
_SOURCES = 12
_LEVELS = 4
_HEADLINES = ("Model", "Corpus", "Method", "Damping", "Training examples", "Cost")


def write_html(evidence: Evidence, path: str | Path) -> Path:
    """Write evidence as one HTML file, which needs nothing else to be read.

    Args:
        evidence: What to show.
        path: The file; an existing one is replaced.

    Returns:
        The path.

    Raises:
        ImportError: jinja2 is missing; the message says how to install it.
    """
    return write_page(path, render(evidence))


def write_page(path: str | Path, content: str) -> Path:
    """Write a page whole or not at all."""
    path = Path(path)
    write_bytes(path, content.encode())
    return path


def render(evidence: Evidence) -> str:
    """The page that `write_html` writes."""
    facts = text.facts(evidence)
    digits = text.score_decimals(evidence)
    answers = [_answer(answer, digits) for answer in evidence.answers]
    return render_page(
        "evidence.html.j2",
        answers=answers,
        headlines=[
            (label, text.shortened(value, 2 * _NAME))
            for label, value in facts
            if label in _HEADLINES
        ],
        facts=[(label, text.shortened(value, _CELL)) for label, value in facts],
        levels=range(1, _LEVELS + 1),
    )


def render_page(template: str, **values: Any) -> str:
    """A template filled in, every value escaped and made visible."""
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256
    return environment.get_template(template).render(**values)


def _finalize(value: Any) -> Any:
    """Every string that a template prints, made visible; what the template made itself is kept."""
    return (
        text.visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
    )


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


@dataclass(frozen=True)
class Scale:
    """A common scale for bars: zero in the middle, `limit` at either end, in per cent of the width.

    Example:
        >>> Scale(limit=0.5).at(0.25)
        75.0
    """

    limit: float

    def at(self, value: float) -> float:
        """Where a value lies, kept within the bar."""
        return round(min(max(50 + 50 * value / self.limit, 0.0), 100.0), 3)

    def span(self, start: float | None, stop: float | None) -> dict[str, float] | None:
        """Position and width of a stretch; None unless both ends are finite."""
        if not (text.is_number(start) and text.is_number(stop)):
            return None
        x = self.at(min(start, stop))
        return {"x": x, "width": round(self.at(max(start, stop)) - x, 3)}


def scale_for(values: Iterable[float | None]) -> Scale:
    """The scale on which all of the values fit, with a little room at the ends."""
    largest = max((abs(v) for v in values if text.is_number(v)), default=0.0)
    return Scale(1.04 * largest or 1.0)


def _answer(answer: Answer, digits: int) -> dict[str, Any]:
    ranked = [influencer for _, _, influencer in answer.ranked()]
    noise = 1.96 * answer.null_scale if text.is_number(answer.null_scale) else None
    scale = scale_for([noise, *(v for i in ranked for v in (i.score, i.low, i.high))])
    band = scale.span(-noise, noise) if noise else None
    heat = _heat_reference(ranked)

    def cards(influencers: Sequence[Influencer]) -> list[dict[str, Any]]:
        return [_card(i, answer.source_column, scale, heat, digits) for i in influencers]

    prompt = answer.prompt
    return {
        "query_id": text.shortened(answer.query_id, _NAME),
        "prompt": f"…{prompt[-_PROMPT:]}" if len(prompt) > _PROMPT else prompt,
        "label": f"…{prompt[-_NAME:]}" if len(prompt) > _NAME else prompt,
        "brief": text.shortened(answer.completion, _NAME),
        "whole_prompt": text.shortened(prompt, _FULL) if len(prompt) > _PROMPT else None,
        "completion": text.shortened(answer.completion, _FULL),
        "tokens": _completion(answer),
        "measurement": text.shortened(answer.measurement, _NAME).replace("_", "-"),
        "value": _minus(text.number(answer.value, max(digits - 1, 2))),
        "n_tokens": len(answer.completion_tokens),
        "n_train": f"{answer.n_train:,}",
        "noise": text.noise(answer, digits),
        "limit": f"{scale.limit:.{max(digits - 1, 0)}f}",
        "band": band,
        "sides": [
            {"name": "raised", "heading": "Raised it", "cards": cards(answer.raised)},
            {"name": "lowered", "heading": "Lowered it", "cards": cards(answer.lowered)},
        ],
        "source_column": text.shortened(answer.source_column or "source", _NAME),
        "sources": _sources(answer.sources),
        "layers": _layers(answer.layers),
    }


def _completion(answer: Answer) -> list[dict[str, Any]]:
    """The completion's tokens, each with a level of surprise and its log-probability."""
    log_probs = answer.completion_log_probs or (math.nan,) * len(answer.completion_tokens)
    return [
        {
            "space": _split_space(token)[0][:_NAME],
            "text": text.shortened(token.lstrip(), _NAME),
            "level": _surprise(log_prob),
            "title": f"{_minus(f'{log_prob:.3f}')} nats, probability {math.exp(log_prob):.2g}"
            if math.isfinite(log_prob)
            else "no log-probability",
        }
        for token, log_prob in zip(answer.completion_tokens, log_probs, strict=True)
    ][:_CELL]


def _surprise(log_prob: float) -> int:
    """0 for a token more likely than not, then one level more at 1/2, 1/10 and 1/100."""
    return sum(log_prob < math.log(p) for p in (0.5, 0.1, 0.01))


def _card(
    influencer: Influencer, column: str | None, scale: Scale, heat: float, digits: int
) -> dict[str, Any]:
    tokens, scores = influencer.tokens, influencer.token_scores or (0.0,) * len(influencer.tokens)
    start, stop = text.window(scores, [len(t) for t in tokens], _EXCERPT)
    whole = start == 0 and stop == len(tokens)
    source = text.source(influencer, column)
    score = influencer.score
    return {
        "title": text.shortened(text.title(influencer), _NAME),
        "source": source and text.shortened(source, _NAME),
        "score": _minus(text.signed(score, digits)),
        "interval": _minus(text.interval(influencer.low, influencer.high, digits)),
        "p": text.p_value(influencer.significance),
        "at": scale.at(score) if text.is_number(score) else None,
        "span": scale.span(influencer.low, influencer.high),
        "before": start > 0,
        "after": stop < len(tokens),
        "excerpt": _pieces(tokens[start:stop], scores[start:stop], heat, digits, _EXCERPT),
        "full": [] if whole else _pieces(tokens, scores, heat, digits, _FULL),
        "strongest": _strongest_tokens(influencer, digits),
        "metadata": _metadata(influencer),
    }


def _metadata(influencer: Influencer) -> list[tuple[str, str]]:
    rows = [("example", influencer.example_id)]
    rows += [(name, text.quantity(value)) for name, value in influencer.metadata.items()]
    if influencer.tokens:
        rows.append(("length", f"{len(influencer.tokens):,} tokens"))
    if text.is_number(influencer.loss):
        rows.append(("training loss", f"{influencer.loss:.4g} nats"))
    return [(text.shortened(name, _NAME), text.shortened(v, _CELL)) for name, v in rows]


def _strongest_tokens(influencer: Influencer, digits: int, n: int = 6) -> list[tuple[str, str]]:
    pairs = zip(influencer.tokens, influencer.token_scores, strict=False)
    ranked = sorted((p for p in pairs if text.is_number(p[1])), key=lambda p: -abs(p[1]))
    return [
        (text.shortened(token.strip(), 30) or "␣", _minus(text.signed(score, digits + 1)))
        for token, score in ranked[:n]
    ]


def _heat_reference(influencers: Sequence[Influencer]) -> float:
    """The token score that gets the full colour: one that only a few in a hundred exceed."""
    sizes = sorted(abs(s) for i in influencers for s in i.token_scores if s and math.isfinite(s))
    return sizes[min(int(0.98 * len(sizes)), len(sizes) - 1)] if sizes else 0.0


def heat_class(score: float, reference: float) -> str:
    """Class of a token: `u1` to `u4` raised the measurement, `d1` to `d4` lowered it, "" is faint.

    Example:
        >>> [heat_class(s, 1.0) for s in (0.05, 0.3, -2.0)]
        ['', 'u2', 'd4']
    """
    if not (math.isfinite(score) and reference > 0) or abs(score) < 0.1 * reference:
        return ""
    return f"{'u' if score > 0 else 'd'}{min(math.ceil(_LEVELS * abs(score) / reference), _LEVELS)}"


def _pieces(
    tokens: Sequence[str], scores: Sequence[float], reference: float, digits: int, limit: int
) -> list[dict[str, Any]]:
    """Tokens as stretches of text with a class and a title, cut to `limit` characters in all."""
    pieces, left = [], limit
    for token, score in zip(tokens, scores, strict=True):
        if left <= 0:
            return [*pieces, {"text": "…", "heat": ""}]
        heat = heat_class(score, reference)
        token = text.shortened(token, left)
        lead, word = _split_space(token) if heat else (token, "")
        if pieces and not pieces[-1]["heat"]:
            pieces[-1]["text"] += lead
        elif lead:
            pieces.append({"text": lead, "heat": ""})
        if word:
            title = f"{_minus(text.signed(score, digits + 1))} nats"
            pieces.append({"text": word, "heat": heat, "title": title})
        left -= len(token)
    return pieces


def _split_space(token: str) -> tuple[str, str]:
    """The white space a token begins with, and the rest."""
    word = token.lstrip()
    return token[: len(token) - len(word)], word


def _sources(totals: Sequence[SourceTotal]) -> dict[str, Any]:
    """Rows of the chart of sources, strongest first; what is left is added up."""
    ranked = sorted(totals, key=lambda t: _size(t.net), reverse=True)
    shown, others = ranked[:_SOURCES], ranked[_SOURCES:]
    if others:
        names = ("raised", "lowered", "net", "n")
        sums = {name: sum(getattr(t, name) for t in others) for name in names}
        shown.append(SourceTotal(name=f"{len(others)} others", **sums))
    scale = scale_for(v for t in shown for v in (t.raised, t.lowered))
    digits = text.decimals(v for t in shown for v in (t.raised, t.lowered, t.net))
    return {
        "rows": [
            {
                "name": text.shortened(total.name, _NAME),
                "n": f"{total.n:,}",
                "raised": scale.span(0.0, total.raised),
                "lowered": scale.span(total.lowered, 0.0),
                "at": scale.at(total.net) if text.is_number(total.net) else None,
                "numbers": [
                    _minus(text.signed(v, digits)) for v in (total.raised, total.lowered, total.net)
                ],
            }
            for total in shown
        ]
    }


def _layers(layers: dict[str, float]) -> list[dict[str, Any]]:
    largest = max((v for v in layers.values() if text.is_number(v)), default=0.0)
    return [
        {
            "name": text.shortened(name, _NAME),
            "share": text.percent(share),
            "width": round(100 * share / largest, 3) if text.is_number(share) and largest else 0.0,
        }
        for name, share in layers.items()
    ]


def _size(value: float) -> float:
    return abs(value) if text.is_number(value) else 0.0


def _minus(number: str) -> str:
    return number.replace("-", "−")
