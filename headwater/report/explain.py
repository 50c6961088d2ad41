"""From scores to evidence: what a person wants to see of a trace of language."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.damping import Damping
from headwater.core.evidence import Answer, Evidence, Influencer, Ranking, SourceTotal
from headwater.core.examples import Examples, to_device
from headwater.core.fit import Fit
from headwater.core.follow import evaluation_mode
from headwater.core.provenance import papers, versions
from headwater.core.scores import Scores
from headwater.report.text import NOISE_LEVEL
from headwater.trace.cascade import Cascade
from headwater.trace.indexed import Indexed
from headwater.trace.influence import Influence

_EFFECTS = 32  # completions of more tokens are told in so many stretches
_COPIES = 4  # times as many are looked at where texts occur more than once, which are shown as one
_EXCERPT = 300  # characters of an example in a ranking
Partial = Callable[[str, Evidence], None]


class Readable(Protocol):
    """Examples whose positions can be read."""

    def tokens(self, index: int) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another method, whose strongest examples are shown beside the answer's.

    Args:
        name: What to call it.
        about: What it looks at, in a few words.
        scores: Its scores of the queries; an `ImportError` leaves it out, with what it says as the reason.
    """

    name: str
    about: str
    scores: Callable[..., Scores]


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
    rivals: Sequence[Rival] = (),
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
    partial: Partial | None = None,
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
        rivals: Other methods to compare with.
        facts: More facts for the report.
        progress: Called with (done, total, note).
        partial: Called with the name of a stage and the evidence as far as it is known by then.

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
    copies = _copies(fit.train)
    if method.keep is None:
        several = min(max(map(len, copies), default=1), _COPIES)
        method = replace(method, keep=max(several * top, method.n_intervals))
    asked = _Asked(fit, queries, measurement, source, contrast, weights, copies)
    rankings = [_ranking(asked, rival, top, progress) for rival in rivals]

    def told(scores: Scores, found: Mapping[int, _Found]) -> Evidence:
        answers = tuple(
            asked.answer(scores, q, top, found, tuple(each[q] for each in rankings))
            for q in range(n_answers)
        )
        return Evidence(answers=answers)

    if partial is not None and isinstance(method, Cascade):
        method = replace(
            method,
            watch=lambda scores: partial("index", told(scores.only(asked.ends(scores, top)), {})),
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
    if partial is not None:
        partial("curvature", told(scores, {}))
    numbers = [scores.index(i) for i in asked.ends(scores, top)]
    parts, _ = method.tokens(
        fit, queries, numbers, measurement=measurement, weights=weights, progress=progress
    )
    losses = _losses(fit, fit.train.subset(numbers))
    effects = [asked.effects(method, scores, q, numbers, progress) for q in range(n_answers)]
    found = {
        number: _Found(
            parts[:, j], losses[j], [e[:, j].tolist() if e.numel() else [] for e in effects]
        )
        for j, number in enumerate(numbers)
    }
    known = _readable(scores.facts) | {"n_heldout": 0 if control is None else len(control)}
    if copies := scores.facts.get("copies", {}) | asked.told_copies(numbers):
        known["copies"] = copies
    return replace(told(scores, found), facts=known | {"versions": versions()} | (facts or {}))


def _copies(train: Examples) -> list[list[int]]:
    """Numbers of the training examples whose tokens are the same, for every text that is there more than once."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, tokens in enumerate(getattr(train, "input_ids", ())):
        groups[tokens.numpy().tobytes()].append(i)
    return [same for same in groups.values() if len(same) > 1]


@dataclass(frozen=True)
class _Found:
    """What is shown of a training example beside its scores.

    Attributes:
        parts: What its positions carry of the score of each query (query, pos).
        loss: Its training loss.
        effects: For each query, what it did to each token of the completion.
    """

    parts: Tensor
    loss: float
    effects: list[list[float]]


@dataclass(frozen=True)
class _Asked:
    """What was asked, of which model."""

    fit: Fit
    queries: Examples
    measurement: str
    source: str | None
    contrast: bool
    weights: Tensor | None
    copies: list[list[int]]

    def strongest(self, scores: Scores, top: int, *, lowest: bool = False) -> list[list[int]]:
        """Columns of the strongest of each query, of equal texts the strongest one."""
        first = {i: same[0] for same in self.copies for i in same}
        found = []
        for row in scores.top(_COPIES * top, lowest=lowest):
            distinct: dict[int, int] = {}
            for i in row:
                number = scores.index(i)
                distinct.setdefault(first.get(number, number), i)
            found.append(list(distinct.values())[:top])
        return found

    def ends(self, scores: Scores, top: int) -> list[int]:
        """Columns of the strongest on either side of any query."""
        sides = (self.strongest(scores, top, lowest=lowest) for lowest in (False, True))
        return sorted({i for side in sides for row in side for i in row})

    def told_copies(self, numbers: Sequence[int]) -> dict[str, list[str]]:
        """Ids of the examples whose text is that of one that is shown, by its id."""
        same = {i: group for group in self.copies for i in group}
        ids = self.fit.train.ids
        return {ids[n]: [ids[i] for i in same[n]] for n in numbers if n in same}

    def answer(
        self,
        scores: Scores,
        q: int,
        top: int,
        found: Mapping[int, _Found],
        rankings: tuple[Ranking, ...],
    ) -> Answer:
        """The answer to query `q`, from its scores."""
        sides = [
            tuple(
                _influencer(self.fit, scores, q, i, found.get(scores.index(i)))
                for i in self.strongest(scores, top, lowest=not positive)[q]
                if (float(scores.values[q, i]) > 0) == positive
            )
            for positive in (True, False)
        ]
        other = q + len(self.queries) // 2 if self.contrast else None
        made = _answer(
            self.fit, self.queries, scores, q, other, sides, self.measurement, self.source
        )
        return replace(made, rankings=rankings)

    def effects(
        self,
        method: Influence | Cascade | Indexed,
        scores: Scores,
        q: int,
        numbers: Sequence[int],
        progress: Progress | None,
    ) -> Tensor:
        """What the shown examples did to each token of a completion (token, example); empty where that is not known.

        Each token is a question of its own. Those of long completions are asked about in stretches, and share alike.
        """
        by_token = getattr(self.queries, "by_token", None)
        damping = scores.facts.get("damping")
        exact = getattr(method, "refine", 0) or (isinstance(method, Influence) and method.cg_steps)
        if by_token is None or damping is None or exact or isinstance(method, Indexed):
            return torch.empty(0)
        tokens = by_token(q, most=_EFFECTS)
        plain = Influence(damping=Damping(**damping), precision="model")
        effects = plain.on_queries(
            self.fit, tokens, numbers, measurement=self.measurement, progress=progress
        )
        if isinstance(method, Cascade):
            effects = effects * len(self.fit.train) / method.index.journal.n_train
        counts = torch.tensor([int((labels >= 0).sum()) for labels in tokens.labels])
        return (effects / counts[:, None]).repeat_interleave(counts, dim=0)


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


def _ranking(asked: _Asked, rival: Rival, top: int, progress: Progress | None) -> list[Ranking]:
    """Each query's strongest examples by another method."""
    n = len(asked.queries) // 2 if asked.contrast else len(asked.queries)
    named = functools.partial(Ranking, method=rival.name, about=rival.about)
    try:
        scores = rival.scores(
            asked.fit,
            asked.queries,
            measurement=asked.measurement,
            weights=asked.weights,
            names=asked.queries.ids[:n],
            progress=progress,
        )
    except ImportError as error:
        return [named(skipped=str(error))] * n
    train = asked.fit.train
    return [
        named(
            examples=tuple(
                Influencer(
                    example_id=scores.train_ids[i],
                    score=float(scores.values[q, i]),
                    tokens=("".join(train.tokens(scores.index(i)))[:_EXCERPT],),  # type: ignore[attr-defined]
                    metadata={k: v[scores.index(i)] for k, v in train.metadata.items()},
                )
                for i in row
                if scores.values[q, i] > 0
            ),
        )
        for q, row in enumerate(scores.top(top))
    ]


def _influencer(fit: Fit, scores: Scores, q: int, i: int, found: _Found | None) -> Influencer:
    tokens = tuple(fit.train.tokens(scores.index(i)))  # type: ignore[attr-defined]
    return Influencer(
        example_id=scores.train_ids[i],
        score=float(scores.values[q, i]),
        low=_number(scores.low, q, i),
        high=_number(scores.high, q, i),
        significance=_number(scores.significance, q, i),
        tokens=tokens,
        token_scores=() if found is None else tuple(found.parts[q, : len(tokens)].tolist()),
        metadata={k: v[i] for k, v in scores.metadata.items()},
        loss=None if found is None else found.loss,
        query_scores=() if found is None else tuple(found.effects[q]),
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
        layers=_layer_shares(scores, q, _block),
        modules=_layer_shares(scores, q, _module),
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


def _layer_shares(scores: Scores, q: int, group: Callable[[str], str]) -> dict[str, float]:
    """Share of the absolute score by groups of layers."""
    if scores.layer_totals is None:
        return {}
    sums: dict[str, float] = defaultdict(float)
    for name, part in zip(scores.layers, scores.layer_totals[:, q].tolist(), strict=True):
        sums[group(name)] += part
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total > 0 else {}


def _block(name: str) -> str:
    """The numbered part of a layer's name, or the name itself.

    Example:
        >>> _block("model.layers.3.mlp.up_proj"), _block("lm_head")
        ('block 3', 'lm_head')
    """
    block = re.search(r"\.(\d+)\.", name)
    return f"block {block.group(1)}" if block else name


def _module(name: str) -> str:
    """What a layer is within its block: its name after the number, or the name itself, without its adapter's part.

    Example:
        >>> _module("model.layers.3.mlp.up_proj.lora_A.default"), _module("lm_head")
        ('mlp.up_proj', 'lm_head')
    """
    return re.sub(r"\.lora_[AB]\..*", "", re.split(r"\.\d+\.", name)[-1])
