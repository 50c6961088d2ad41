"""A saved trace as a page shows it: positions of bars, classes of heat, excerpts, and numbers as they are read.

What comes out is made of what JSON has. Every string is harmless (`headwater.report.text.visible`), but for the ids of
examples, which name them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.core.evidence import Answer, Evidence, Influencer, Ranking, SourceTotal, plain
from headwater.report import text

EXCERPT, FULL = 420, 20_000  # characters of an example: on its card, and when opened
NAME, CELL = 90, 2_000
LEVELS = 4
_PROMPT, _VALUE = 700, 200
_SOURCES = 12
_FEW = 24  # most values of a metadata column that is worth filtering by
_HEADLINES = ("Model", "Corpus", "Method", "Damping", "Training examples", "Cost")


class Named(str):
    """The id of an example, which stays as it is: it names the example to whoever acts on it."""


def trace_view(
    evidence: Evidence, name: str = "", numbers: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A trace as pages show it.

    Args:
        evidence: What was found.
        name: Name of the trace.
        numbers: Numbers of the training examples by id, where they are known.

    Returns:
        Its name, answers, headlines and facts, and for each metadata column with few values those values.
    """
    facts, digits = text.facts(evidence), text.score_decimals(evidence)
    stages = [
        {"name": str(s["name"]), "told": text.stage(s)} for s in evidence.facts.get("stages", [])
    ]
    copies = evidence.facts.get("copies")
    known = _Known(digits, numbers or {}, copies if isinstance(copies, dict) else {})
    answers = [_answer(answer, known) | {"stages": stages} for answer in evidence.answers]
    return harmless(
        {
            "name": name,
            "answers": answers,
            "headlines": [(k, text.shortened(v, 2 * NAME)) for k, v in facts if k in _HEADLINES],
            "facts": [(k, text.shortened(v, CELL)) for k, v in facts],
            "columns": _columns(answers),
        }
    )


def harmless(value: Any) -> Any:
    """The same value as JSON has it, with every string made visible but for the ids of examples."""
    if isinstance(value, str):
        return str(value) if isinstance(value, Named) else text.visible(value)
    if isinstance(value, list | tuple):
        return [harmless(v) for v in value]
    if isinstance(value, dict):
        return {text.visible(str(k)): harmless(v) for k, v in value.items()}
    return plain(value)


@dataclass(frozen=True)
class _Known:
    """What all answers of a trace share.

    Attributes:
        digits: Decimals of scores.
        numbers: Numbers of examples by id.
        copies: Ids of near-duplicates that an example stands for, by its id.
    """

    digits: int
    numbers: Mapping[str, int]
    copies: Mapping[str, Sequence[str]]


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


def _answer(answer: Answer, known: _Known) -> dict[str, Any]:
    digits, ranked = known.digits, [influencer for _, _, influencer in answer.ranked()]
    noise = 1.96 * answer.null_scale if text.is_number(answer.null_scale) else None
    scale = scale_for([noise, *(v for i in ranked for v in (i.score, i.low, i.high))])
    shown = _Shown(
        answer=answer,
        known=known,
        scale=scale,
        heat=_heat_reference(i.token_scores for i in ranked),
        query_heat=_heat_reference(i.query_scores for i in ranked),
    )
    prompt = answer.prompt
    return {
        "query_id": text.shortened(answer.query_id, NAME),
        "prompt": f"…{prompt[-_PROMPT:]}" if len(prompt) > _PROMPT else prompt,
        "label": f"…{prompt[-NAME:]}" if len(prompt) > NAME else prompt,
        "brief": text.shortened(answer.completion, NAME),
        "whole_prompt": text.shortened(prompt, FULL) if len(prompt) > _PROMPT else None,
        "completion": text.shortened(answer.completion, FULL),
        "tokens": _completion(answer),
        "measurement": text.shortened(answer.measurement, NAME).replace("_", "-"),
        "value": minus(text.number(answer.value, max(digits - 1, 2))),
        "n_tokens": len(answer.completion_tokens),
        "n_train": f"{answer.n_train:,}",
        "noise": text.noise(answer, digits),
        "limit": f"{scale.limit:.{max(digits - 1, 0)}f}",
        "band": scale.span(-noise, noise) if noise else None,
        "sides": [
            {"name": "raised", "heading": "Raised it", "cards": shown.cards(answer.raised)},
            {"name": "lowered", "heading": "Lowered it", "cards": shown.cards(answer.lowered)},
        ],
        "source_column": text.shortened(answer.source_column or "source", NAME),
        "sources": _sources(answer.sources),
        "layers": _shares(answer.layers),
        "modules": _shares(answer.modules),
        "rankings": _rankings(answer, known),
    }


def _completion(answer: Answer) -> list[dict[str, Any]]:
    """The completion's tokens, each with a level of surprise and its log-probability."""
    log_probs = answer.completion_log_probs or (math.nan,) * len(answer.completion_tokens)
    return [
        {
            "space": _split_space(token)[0][:NAME],
            "text": text.shortened(token.lstrip(), NAME),
            "level": _surprise(log_prob),
            "title": f"{minus(f'{log_prob:.3f}')} nats, probability {math.exp(log_prob):.2g}"
            if math.isfinite(log_prob)
            else "no log-probability",
        }
        for token, log_prob in zip(answer.completion_tokens, log_probs, strict=True)
    ][:CELL]


def _surprise(log_prob: float) -> int:
    """0 for a token more likely than not, then one level more at 1/2, 1/10 and 1/100."""
    return sum(log_prob < math.log(p) for p in (0.5, 0.1, 0.01))


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What all cards of an answer share.

    Attributes:
        answer: The answer.
        known: What the answers share.
        scale: The scale of the bars.
        heat: The token score that gets the full colour.
        query_heat: The same, of scores of the completion's tokens.
    """

    answer: Answer
    known: _Known
    scale: "Scale"
    heat: float
    query_heat: float

    def cards(self, influencers: Sequence[Influencer]) -> list[dict[str, Any]]:
        """Cards of one side; examples of the same text are one, the strongest of them."""
        groups: dict[Any, list[Influencer]] = {}
        for n, influencer in enumerate(influencers):
            groups.setdefault(influencer.text or n, []).append(influencer)
        return [self.card(same) for same in groups.values()]

    def card(self, same: Sequence[Influencer]) -> dict[str, Any]:
        influencer, digits, scale = same[0], self.known.digits, self.scale
        tokens, scores = influencer.tokens, influencer.token_scores
        scores = scores or (0.0,) * len(tokens)
        start, stop = text.window(scores, [len(t) for t in tokens], EXCERPT)
        whole = start == 0 and stop == len(tokens)
        source = text.source(influencer, self.answer.source_column)
        score, p = influencer.score, influencer.significance
        copies = self.copies(same)
        return {
            "id": Named(influencer.example_id),
            "number": self.known.numbers.get(influencer.example_id),
            "title": text.shortened(text.title(influencer), NAME),
            "source": source and text.shortened(source, NAME),
            "score": minus(text.signed(score, digits)),
            "score_value": score,
            "interval": minus(text.interval(influencer.low, influencer.high, digits)),
            "p": text.p_value(p),
            "significant": p <= text.NOISE_LEVEL if text.is_number(p) else None,
            "at": scale.at(score) if text.is_number(score) else None,
            "span": scale.span(influencer.low, influencer.high),
            "before": start > 0,
            "after": stop < len(tokens),
            "excerpt": _pieces(tokens[start:stop], scores[start:stop], self.heat, digits, EXCERPT),
            "full": [] if whole else _pieces(tokens, scores, self.heat, digits, FULL),
            "strongest": _strongest_tokens(influencer, digits),
            "metadata": _metadata(influencer, copies),
            "raw_metadata": {
                text.shortened(k, NAME): text.shortened(str(v), _VALUE)
                for k, v in influencer.metadata.items()
                if v is not None
            },
            "copies": max(len(copies), 1),
            "copy_ids": [Named(name) for name in copies],
            "copy_numbers": [self.known.numbers.get(name) for name in copies],
            "query_heat": self.query_pieces(influencer),
        }

    def copies(self, same: Sequence[Influencer]) -> list[str]:
        """Ids of all examples that a card stands for; empty where it stands for its own alone."""
        named = [i for each in same for i in self.known.copies.get(each.example_id, ())]
        every = list(dict.fromkeys([*(each.example_id for each in same), *named]))
        return every if len(every) > 1 else []

    def query_pieces(self, influencer: Influencer) -> list[dict[str, Any]]:
        scores = influencer.query_scores
        if not scores or len(scores) != len(self.answer.completion_tokens):
            return []
        tokens = self.answer.completion_tokens
        return _pieces(tokens, scores, self.query_heat, self.known.digits, FULL)


def _metadata(influencer: Influencer, copies: Sequence[str]) -> list[tuple[str, str]]:
    rows = [("example", influencer.example_id)]
    if copies:
        rows.append(("near-duplicates", f"{len(copies)}: {', '.join(copies)}"))
    rows += [(name, text.quantity(value)) for name, value in influencer.metadata.items()]
    if influencer.tokens:
        rows.append(("length", f"{len(influencer.tokens):,} tokens"))
    if text.is_number(influencer.loss):
        rows.append(("training loss", f"{influencer.loss:.4g} nats"))
    return [(text.shortened(name, NAME), text.shortened(v, CELL)) for name, v in rows]


def _strongest_tokens(influencer: Influencer, digits: int, n: int = 6) -> list[tuple[str, str]]:
    pairs = zip(influencer.tokens, influencer.token_scores, strict=False)
    ranked = sorted((p for p in pairs if text.is_number(p[1])), key=lambda p: -abs(p[1]))
    return [
        (text.shortened(token.strip(), 30) or "␣", minus(text.signed(score, digits + 1)))
        for token, score in ranked[:n]
    ]


def _heat_reference(scores: Iterable[Sequence[float]]) -> float:
    """The token score that gets the full colour: one that only a few in a hundred exceed."""
    sizes = sorted(abs(s) for each in scores for s in each if s and math.isfinite(s))
    return sizes[min(int(0.98 * len(sizes)), len(sizes) - 1)] if sizes else 0.0


def heat_class(score: float, reference: float) -> str:
    """Class of a token: `u1` to `u4` raised the measurement, `d1` to `d4` lowered it, "" is faint.

    Example:
        >>> [heat_class(s, 1.0) for s in (0.05, 0.3, -2.0)]
        ['', 'u2', 'd4']
    """
    if not (math.isfinite(score) and reference > 0) or abs(score) < 0.1 * reference:
        return ""
    return f"{'u' if score > 0 else 'd'}{min(math.ceil(LEVELS * abs(score) / reference), LEVELS)}"


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
            title = f"{minus(text.signed(score, digits + 1))} nats"
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
                "name": text.shortened(total.name, NAME),
                "n": f"{total.n:,}",
                "raised": scale.span(0.0, total.raised),
                "lowered": scale.span(total.lowered, 0.0),
                "at": scale.at(total.net) if text.is_number(total.net) else None,
                "numbers": [
                    minus(text.signed(v, digits)) for v in (total.raised, total.lowered, total.net)
                ],
                "values": [total.raised, total.lowered, total.net],
            }
            for total in shown
        ]
    }


def _shares(layers: Mapping[str, float]) -> list[dict[str, Any]]:
    largest = max((v for v in layers.values() if text.is_number(v)), default=0.0)
    return [
        {
            "name": text.shortened(name, NAME),
            "share": text.percent(share),
            "width": round(100 * share / largest, 3) if text.is_number(share) and largest else 0.0,
        }
        for name, share in layers.items()
    ]


def _rankings(answer: Answer, known: _Known) -> list[dict[str, Any]]:
    """The same question under other methods, each with the ids that the others list too."""
    own = Ranking(
        method="influence",
        about="predicted change of the answer, from the gradients and the curvature",
        unit="nats",
        examples=answer.raised,
    )
    rankings = [own, *answer.rankings] if answer.rankings else []
    listed = {r.method: {x.example_id for x in r.examples} for r in rankings}
    return [
        {
            "method": ranking.method,
            "about": ranking.about,
            "unit": ranking.unit,
            "skipped": ranking.skipped,
            "rows": [_ranked(x, ranking, answer, known, listed) for x in ranking.examples],
        }
        for ranking in rankings
    ]


def _ranked(
    influencer: Influencer, ranking: Ranking, answer: Answer, known: _Known, listed: dict[str, set]
) -> dict[str, Any]:
    digits = text.decimals(x.score for x in ranking.examples)
    source = text.source(influencer, answer.source_column)
    return {
        "id": Named(influencer.example_id),
        "number": known.numbers.get(influencer.example_id),
        "title": text.shortened(text.title(influencer), NAME),
        "source": source and text.shortened(source, NAME),
        "score": minus(text.signed(influencer.score, digits)),
        "excerpt": text.shortened(influencer.text.strip(), EXCERPT),
        "also": [
            name
            for name, ids in listed.items()
            if name != ranking.method and influencer.example_id in ids
        ],
    }


def _columns(answers: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Metadata columns with two values or more, but few, among the cards."""
    values: dict[str, set[str]] = {}
    for card in (c for a in answers for side in a["sides"] for c in side["cards"]):
        for name, value in card["raw_metadata"].items():
            values.setdefault(name, set()).add(value)
    return {name: sorted(found) for name, found in values.items() if 1 < len(found) <= _FEW}


def _size(value: float) -> float:
    return abs(value) if text.is_number(value) else 0.0


def minus(number: str) -> str:
    """The number with a minus sign in place of its hyphen."""
    return number.replace("-", "−")
