"""From scores to evidence: what a person wants to see of a trace of language."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.evidence import Answer, Evidence, Influencer, SourceTotal
from headwater.core.examples import Examples, to_device
from headwater.core.fit import Fit
from headwater.core.follow import evaluation_mode
from headwater.core.provenance import papers, versions
from headwater.core.scores import Scores
from headwater.report.text import NOISE_LEVEL
from headwater.trace.cascade import Cascade
from headwater.trace.indexed import Indexed
from headwater.trace.influence import Influence


class Readable(Protocol):
    """Examples whose positions can be read."""

    def tokens(self, index: int) -> list[str]: ...


def explain(
    fit: Fit,
    queries: Examples,
    *,
    influence: Influence | Cascade | Indexed | None = None,
    measurement: str = "log_prob",
    top: int = 8,
    control: Examples | None = None,
    source: str | None = None,
    contrast: bool = False,
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Trace queries to training examples and gather what a report shows.

    Args:
        fit: The fitted model; its training examples must be readable, with `tokens(index)`.
        queries: Prompts with completions, readable too; metadata `prompt` and `completion` are shown where present.
        influence: The method and its options.
        measurement: What is asked of the completion.
        top: How many examples to show on each side.
        control: Examples held out of training, for the significance.
        source: Metadata column to total by.
        contrast: The second half of the queries are alternatives: ask why the first half rather than these.
        facts: More facts for the report.
        progress: Called with (done, total, note).

    Returns:
        The evidence: one answer a query.
    """
    if source is not None and source not in fit.train.metadata:
        columns = ", ".join(fit.train.metadata) or "none"
        raise ValueError(
            f"The training data have no column {source!r}; their columns are: {columns}."
        )
    method = influence or Influence(n_intervals=top)
    n_answers = len(queries) // 2 if contrast else len(queries)
    weights = torch.cat([torch.eye(n_answers), -torch.eye(n_answers)], dim=1) if contrast else None
    method = (
        method if method.keep is not None else replace(method, keep=max(top, method.n_intervals))
    )
    scores = method.attribute(
        fit,
        queries,
        measurement=measurement,
        weights=weights,
        names=queries.ids[:n_answers],
        control=control,
        by_layer=True,
        group_by=source,
        progress=progress,
    )
    raised, lowered = scores.top(top), scores.top(top, lowest=True)
    chosen = sorted({i for side in (raised, lowered) for row in side for i in row})
    numbers = [scores.index(i) for i in chosen]
    parts, _ = method.tokens(
        fit, queries, numbers, measurement=measurement, weights=weights, progress=progress
    )
    place = {example: j for j, example in enumerate(chosen)}
    losses = _losses(fit, fit.train.subset(numbers))
    answers = []
    for q in range(n_answers):
        sides = [
            tuple(
                _influencer(fit, scores, q, i, parts[q, place[i]], losses[place[i]])
                for i in side[q]
                if (float(scores.values[q, i]) > 0) == positive
            )
            for side, positive in ((raised, True), (lowered, False))
        ]
        other = q + n_answers if contrast else None
        answers.append(_answer(fit, queries, scores, q, other, sides, measurement, source))
    known = _readable(scores.facts) | {"n_heldout": 0 if control is None else len(control)}
    return Evidence(answers=tuple(answers), facts=known | {"versions": versions()} | (facts or {}))


def _readable(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of scores as a report shows them."""
    damping, curvature = facts["damping"], facts["curvature"]
    labels = {
        "mc": "labels drawn from the model",
        "exact": "all labels",
        "empirical": "given labels",
    }
    how = labels.get(curvature.get("fisher", ""), "")
    told = {
        "papers": papers(facts),
        "curvature": curvature["kind"] + (f", {how}" if how else ""),
        "damping": f"{damping['value']:.3g} {damping['unit']}, {damping['source']}",
    }
    return facts | told


def _influencer(fit: Fit, scores: Scores, q: int, i: int, parts: Tensor, loss: float) -> Influencer:
    tokens = tuple(fit.train.tokens(scores.index(i)))  # type: ignore[attr-defined]
    return Influencer(
        example_id=scores.train_ids[i],
        score=float(scores.values[q, i]),
        low=_number(scores.low, q, i),
        high=_number(scores.high, q, i),
        significance=_number(scores.significance, q, i),
        tokens=tokens,
        token_scores=tuple(parts[: len(tokens)].tolist()),
        metadata={k: v[i] for k, v in scores.metadata.items()},
        loss=loss,
    )


def _number(values: Tensor | None, q: int, i: int) -> float | None:
    if values is None or bool(values[q, i].isnan()):
        return None
    return float(values[q, i])


def _answer(
    fit: Fit,
    queries: Examples,
    scores: Scores,
    q: int,
    other: int | None,
    sides: Sequence[tuple[Influencer, ...]],
    measurement: str,
    source: str | None,
) -> Answer:
    tokens, log_probs = _completion(fit, queries, q)
    pieces = queries.tokens(q)  # type: ignore[attr-defined]
    said = queries.metadata
    prompt = said["prompt"][q] if "prompt" in said else "".join(pieces[: len(pieces) - len(tokens)])
    completion = said["completion"][q] if "completion" in said else "".join(tokens)
    value = sum(log_probs)
    if other is not None:
        alternative, its_log_probs = _completion(fit, queries, other)
        value -= sum(its_log_probs)
        against = said["completion"][other] if "completion" in said else "".join(alternative)
        measurement = f"{measurement} rather than of “{against.strip()}”"
    significant = [x.significance is not None and x.significance <= NOISE_LEVEL for x in sides[0]]
    return Answer(
        query_id=queries.ids[q],
        prompt=prompt,
        completion=completion,
        completion_tokens=tuple(tokens),
        completion_log_probs=tuple(log_probs),
        measurement=measurement,
        value=float(value) * (-1.0 if measurement.startswith("loss") else 1.0),
        raised=sides[0],
        lowered=sides[1],
        sources=_totals(scores, q, source),
        source_column=source,
        layers=_layer_shares(scores, q),
        null_scale=None if scores.control is None else float(scores.control[q].double().std()),
        n_distinguishable=None
        if scores.control is None
        else next((r for r, yes in enumerate(significant) if not yes), len(significant)),
        n_train=len(fit.train),
    )


def _completion(fit: Fit, queries: Examples, q: int) -> tuple[list[str], list[float]]:
    """The scored tokens of a query with their log-probabilities."""
    batch = to_device(queries.batch([q]), next(fit.model.parameters()).device)
    with torch.no_grad(), evaluation_mode(fit.model):
        prediction = fit.task.predict(fit.model, batch)
    pieces = queries.tokens(q)  # type: ignore[attr-defined]
    shift = (
        batch["labels"].shape[1] - prediction.mask.shape[1]
    )  # a causal model predicts the next token
    scored = prediction.mask[0].nonzero().squeeze(1).tolist()
    losses = prediction.token_loss()[0]
    return [pieces[t + shift] for t in scored], [-float(losses[t]) for t in scored]


def _losses(fit: Fit, examples: Examples) -> list[float]:
    device = next(fit.model.parameters()).device
    found = [0.0] * len(examples)
    with torch.no_grad(), evaluation_mode(fit.model):
        for plan in fit.batches(examples):
            losses = fit.task.loss(fit.model, to_device(examples.batch(plan.indices), device))
            for i, value in zip(plan.indices, losses.tolist(), strict=True):
                found[i] = value
    return found


def _totals(scores: Scores, q: int, source: str | None) -> tuple[SourceTotal, ...]:
    if source is None:
        return ()
    groups = scores.by(source)
    columns = zip(
        groups.names,
        groups.counts,
        groups.raised[q].tolist(),
        groups.lowered[q].tolist(),
        strict=True,
    )
    totals = [
        SourceTotal(name=name, raised=raised, lowered=lowered + 0.0, net=raised + lowered, n=n)
        for name, n, raised, lowered in columns
    ]
    return tuple(sorted(totals, key=lambda t: -abs(t.net)))


def _layer_shares(scores: Scores, q: int) -> dict[str, float]:
    """Share of the absolute score by block of layers: the numbered part of a layer's name, or the name itself."""
    if scores.layer_totals is None:
        return {}
    sums: dict[str, float] = defaultdict(float)
    for name, part in zip(scores.layers, scores.layer_totals[:, q].tolist(), strict=True):
        block = re.search(r"\.(\d+)\.", name)
        sums[f"block {block.group(1)}" if block else name] += part
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total > 0 else {}
