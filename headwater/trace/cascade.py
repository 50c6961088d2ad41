"""The cascade: candidates from an index and other cheap sources, scored by the whole curvature.

The best can be scored once more by the exact matrix. Each stage looks at fewer examples. Candidates from a store of
projected gradients are those of Choe et al. (2024), arXiv:2405.13954, those by shared words of Grosse et al. (2023),
arXiv:2308.03296. What a stage leaves behind is sampled and scored in the same way, which tells what is missing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwater.core.capture import Progress
from headwater.core.damping import Damping
from headwater.core.examples import Examples, as_examples
from headwater.core.files import ArtifactMismatch
from headwater.core.fit import Fit
from headwater.core.index import Asked, GradientIndex
from headwater.core.index.search import clusters, matching, products, shown_once
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.numerics.recall import Guesses, Stratum, missed
from headwater.trace.base import Attributor
from headwater.trace.bm25 import BM25, is_text
from headwater.trace.indexed import index_damping
from headwater.trace.influence import Influence

NEAR = 4  # times as many as the candidates of each source: with those the stratum next to them
_VECTORS = 16  # that a product with the exact matrix takes in one pass
_COPIES = 4  # times as many are looked at where duplicates are shown as one


@dataclass(frozen=True, kw_only=True)
class Cascade(Attributor):
    """Scores of the strongest examples by the whole curvature, found without a pass over the training data.

    Args:
        index: The index of the training data.
        sources: Methods whose strongest examples are candidates too; BM25 where the data are text when left out.
        candidates: How many each source adds, for each query; the index adds as many on each side.
        damping: As for `Influence`; "auto" takes that of the index.
        refine: How many of the strongest on each side are scored again with the exact Gauss–Newton matrix; 0 leaves
            that out. Solving for it passes over all training data, several times.
        cg_steps: Most steps of that.
        cg_tolerance: Relative residual at which it stops.
        keep: How many are returned on each side of each query.
        k: The top of which the loss is estimated.
        sample: How many of those left behind are scored for that; 0 estimates nothing.
        where: Metadata to look among; see `GradientIndex.search`.
        copies: Cosine of rows from which examples count as duplicates and are shown as one; None tells none.
        content: What an example of an id holds; equal ones are duplicates too.
        n_intervals: How many of the strongest on each side get an interval; none after refinement.
        confidence_level: Of the intervals and of the estimated loss.
        seed: Of the sample.
        watch: Called with what the index found, before the curvature is asked.
    """

    paper: ClassVar[str] = "arXiv:2308.03296"

    index: GradientIndex
    sources: tuple[Attributor, ...] | None = None
    candidates: int = 300
    damping: str | float | Damping = "auto"
    refine: int = 0
    cg_steps: int = 20
    cg_tolerance: float = 1e-3
    keep: int | None = 100
    k: int = 10
    sample: int = 200
    where: Mapping[str, Any] | None = None
    copies: float | None = None
    content: Callable[[str], Any] | None = None
    n_intervals: int = 0
    confidence_level: float = 0.95
    seed: int = 0
    watch: Callable[[Scores], None] | None = None

    def __post_init__(self):
        least = {"candidates": 1, "k": 1, "refine": 0, "sample": 0, "cg_steps": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be {smallest} or more; got {getattr(self, name)}.")
        if not 0 < self.confidence_level < 1:
            raise ValueError(
                f"confidence_level must lie between 0 and 1; got {self.confidence_level}."
            )
        if 0 < self.refine < self.k:
            raise ValueError(
                f"refine must be 0, or k={self.k} and more, of which the loss is told; got {self.refine}."
            )

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        control: Any = None,
        by_layer: bool = False,
        group_by: str | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of the strongest examples, as `Influence(keep=…)` gives them, with the facts of every stage.

        Args:
            fit: The fit that the index was made with; its training data are all those of the index.
            queries: Examples, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those.
            control: Examples that were held out of training, scored for the significance.
            by_layer: Also return each layer's part; totals of layers are those of the scored examples.
            group_by: Metadata column to total by; totals over all examples are the index's.
            progress: Called with (done, total, note).

        Raises:
            ValueError: Refinement is asked for where the index holds more than the fit was made of.
            ArtifactMismatch: The training data are not those of the index.
        """
        started, examples = time.perf_counter(), as_examples(queries)
        n_train = self.index.journal.n_train
        if self.refine and len(fit.train) != n_train:
            raise ValueError(
                f"The exact matrix is that of the {n_train:,} examples of the fit, and the index has sources of "
                f"{len(fit.train):,}; leave out refine, or fit again with all."
            )
        question: dict[str, Any] = {
            "measurement": measurement,
            "weights": weights,
            "names": names,
            "progress": progress,
        }
        found = _Candidates(self, fit, examples, question, group_by)
        if self.watch is not None:
            self.watch(found.looked)
        every, sampled = found.drawn(self.sample, self.seed)
        damping = index_damping(self.index) if self.damping == "auto" else self.damping
        method = Influence(
            damping=damping,
            n_intervals=self.n_intervals * (1 if self._plain else _COPIES),
            confidence_level=self.confidence_level,
            precision="model",
        )
        options = question | {"control": control, "by_layer": by_layer}
        ratio = len(fit.train) / n_train
        before = time.perf_counter()
        scores = scaled(method.attribute(fit, examples, among=every, **options), ratio)
        stages = [
            *found.stages,
            _stage(fit, "curvature", len(every), before, examples, fit.train.subset(every), control)
            | {"damping": scores.facts["damping"], "missed": found.missed(scores, sampled)},
        ]
        keep = self.keep or len(every)
        shown, hidden = self._shown(scores, found, self.refine or keep)
        if self.refine:
            others = sorted(set(every) - set(shown.kept or []) - set(hidden))
            shown, stage = self._refined(fit, examples, scores, shown, others, method, options)
            stages.append(stage)
        facts = {
            "method": "cascade",
            "papers": list(
                dict.fromkeys([*shown.facts["papers"], "arXiv:2405.13954", *found.papers])
            ),
            "n_train": n_train,
            "index": found.looked.facts["index"],
            "scanned": found.looked.facts["scanned"],
            "stages": stages,
            "options": {"candidates": self.candidates, "sample": self.sample, "seed": self.seed},
            "seconds": time.perf_counter() - started,
        }
        return replace(
            shown,
            n_train=found.looked.n_train,
            totals=found.looked.totals,
            facts=shown.facts | facts,
        )

    @property
    def _plain(self) -> bool:
        return self.copies is None and self.content is None

    def _shown(self, scores: Scores, found: "_Candidates", keep: int) -> tuple[Scores, list[int]]:
        """The strongest on each side of each query, of duplicates one; and the numbers of those it stands for."""
        k = min(keep * (1 if self._plain else _COPIES), scores.values.shape[1])
        ends = [scores.values.topk(k, largest=largest).indices for largest in (True, False)]
        columns = torch.cat(ends, 1).unique()
        scores = scores.only(columns.tolist())
        if self._plain:
            return scores, []
        ids = scores.train_ids
        content = None if self.content is None else [self.content(i) for i in ids]
        rows = self.index.rows(found.positions(scores.kept or []))
        first = clusters(rows, least=self.copies or 2.0, content=content)
        chosen, counts = shown_once(first, [torch.searchsorted(columns, e) for e in ends], keep)
        leaders = first.tolist()
        hidden = [scores.index(i) for i, a in enumerate(leaders) if a != i and a in set(chosen)]
        scores = scores.only(chosen)
        same = {
            ids[a]: [ids[i] for i, leader in enumerate(leaders) if leader == a]
            for a in set(chosen)
            if leaders.count(a) > 1
        }
        facts = scores.facts | {"copies": same}
        return replace(scores, metadata=scores.metadata | {"copies": counts}, facts=facts), hidden

    def _refined(
        self,
        fit: Fit,
        queries: Examples,
        scores: Scores,
        best: Scores,
        others: Sequence[int],
        method: Influence,
        options: dict[str, Any],
    ) -> tuple[Scores, dict[str, Any]]:
        """The best by the exact matrix, with a sample of the other scored ones, and what that tells of the rest."""
        before, inside = time.perf_counter(), list(best.kept or [])
        column = {number: i for i, number in enumerate(scores.kept or [])}
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(others), generator=generator)[: self.sample]
        drawn = [others[i] for i in order.tolist()]
        method = replace(
            method, cg_steps=self.cg_steps, cg_tolerance=self.cg_tolerance, n_intervals=0
        )
        some = inside + drawn
        exact = method.attribute(fit, queries, among=some, **options)
        swept = (queries, fit.train.subset(some), options["control"])
        stage = _stage(fit, "exact matrix", len(some), before, *swept)
        products = (exact.facts["cg_steps"] + 1) * -(-len(exact) // _VECTORS)
        stage["passes"] += products
        stage |= {k: exact.facts[k] for k in ("cg_steps", "cg_residual", "damping")}
        stage["missed"] = None
        if drawn or not others:
            guess = _both(scores.values[:, [column[i] for i in drawn]])
            rest = [column[i] for i in others if i not in set(drawn)]
            left = _both(scores.values[:, rest])
            stratum = Stratum(
                size=len(others),
                drawn=_both(exact.values[:, len(inside) :]),
                guess=guess,
                scale=torch.ones(len(drawn)).double(),
                others=lambda: [(left, torch.ones(len(rest)))],
            )
            told = missed(
                _both(exact.values[:, : len(inside)]), [stratum] if drawn else [], **self._told
            )
            stage["missed"] = vars(told)
        if "copies" in best.metadata:
            counts = best.metadata["copies"] + [1] * len(drawn)
            exact = replace(exact, metadata=exact.metadata | {"copies": counts})
        return exact, stage

    @property
    def _told(self) -> dict[str, Any]:
        return {"k": self.k, "confidence_level": self.confidence_level, "seed": self.seed}

    def tokens(
        self,
        fit: Fit,
        queries: Any,
        chosen: Sequence[int],
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Float[Tensor, "asked chosen pos"], Float[Tensor, "asked chosen"]]:
        """What each position of some examples carries of their scores; see `Influence.tokens`."""
        damping = index_damping(self.index) if self.damping == "auto" else self.damping
        steps = self.cg_steps if self.refine else 0
        method = Influence(
            damping=damping, cg_steps=steps, cg_tolerance=self.cg_tolerance, precision="model"
        )
        parts = method.tokens(
            fit, queries, chosen, measurement=measurement, weights=weights, progress=progress
        )
        ratio = len(fit.train) / self.index.journal.n_train
        return parts[0] * ratio, parts[1] * ratio


def scaled(scores: Scores, ratio: float) -> Scores:
    """The scores times a number, as where the fit was made of fewer examples than are looked at."""
    if ratio == 1:
        return scores
    names = ("values", "low", "high", "control", "by_layer", "layer_totals")
    parts = {n: getattr(scores, n) for n in names}
    return replace(scores, **{n: p * ratio for n, p in parts.items() if p is not None})


def _stage(fit: Fit, name: str, n: int, started: float, *swept: Any) -> dict[str, Any]:
    """A stage's record: how many examples it scored, its time, and its sweeps in passes over the training data."""
    rows = sum(_positions(as_examples(some)) for some in swept if some is not None)
    seconds = time.perf_counter() - started
    return {"name": name, "examples": n, "seconds": seconds, "passes": rows / fit.n_rows}


def _positions(examples: Examples) -> int:
    return sum(examples.lengths) if examples.lengths else len(examples)


@contextmanager
def forward_calls(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows with every call of a model."""
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


class _Candidates:
    """What the sources propose, among the index's live rows that match the filter.

    Attributes:
        stages: Record of each source.
        numbers: Numbers of the candidates, ascending.
        looked: What the index found.
    """

    def __init__(
        self,
        method: Cascade,
        fit: Fit,
        queries: Examples,
        question: dict[str, Any],
        group_by: str | None,
    ):
        self.method, self.fit, self.index, self.stages = method, fit, method.index, []
        self.papers: list[str] = []
        before = time.perf_counter()
        self.asked: Asked = self.index.ask(fit, queries, **question)
        self.looked = self.index.search(
            self.asked,
            keep=NEAR * method.candidates,
            where=method.where,
            group_by=group_by,
        )
        self.place = torch.tensor(self.index.numbers(torch.arange(self.index.n_rows)))
        if int(self.place.max()) >= len(fit.train):
            raise ArtifactMismatch(
                f"The index holds example {int(self.place.max()):,}, the fit has {len(fit.train):,}; join the data of "
                "all its sources: replace(fit, train=joined)."
            )
        self.pool = matching(self.index, method.where)
        chosen, self.near = self._ends(self.looked, method.candidates), set(self.looked.kept or [])
        self.stages.append(_stage(fit, "index", len(chosen), before, queries) | {"only": 0})
        by = {"index": chosen}
        sources = method.sources
        if sources is None:
            sources = (BM25(),) if is_text(fit.train) else ()
        for source in sources:
            name, before = type(source).__name__, time.perf_counter()
            try:
                with forward_calls(fit.model) as calls:
                    scores = source.attribute(fit, queries, **question)  # type: ignore[call-arg]
            except ImportError as error:
                self.stages.append({"name": name, "skipped": str(error)})
                continue
            self.papers += scores.facts["papers"]
            by[name] = by.get(name, set()) | self._strongest(scores, method.candidates)
            self.near |= self._strongest(scores, NEAR * method.candidates)
            stage = _stage(fit, name, len(by[name]), before)
            self.stages.append(stage | {"passes": len(calls) / len(fit.batches(fit.train))})
        for stage in self.stages:
            if stage["name"] in by:
                others = (v for k, v in by.items() if k != stage["name"])
                stage["only"] = len(by[stage["name"]].difference(*others))
        self.numbers = sorted(set().union(*by.values()))

    def _ends(self, looked: Scores, n: int) -> set[int]:
        ends = (row for lowest in (False, True) for row in looked.top(n, lowest=lowest))
        return {looked.index(i) for row in ends for i in row}

    def _strongest(self, scores: Scores, n: int) -> set[int]:
        """The strongest of another source that the index has and the filter lets through."""
        pool = torch.zeros(len(self.fit.train), dtype=torch.bool)
        pool[self.place[self.pool]] = True
        sizes = scores.values.abs().masked_fill(~pool, 0)
        best = sizes.topk(min(n, sizes.shape[1]), dim=1)
        return set(best.indices[best.values > 0].tolist())

    def positions(self, numbers: Sequence[int]) -> Int[Tensor, " n"]:
        """Positions in the index of some training examples."""
        found = self._back[torch.tensor(numbers)]
        known, own = self.index.ids(found), [self.fit.train.ids[i] for i in numbers]
        if known != own:
            wrong = next(a for a, b in zip(known, own, strict=True) if a != b)
            raise ArtifactMismatch(
                f"The training data are not those of the index: example {wrong!r} is elsewhere or missing."
            )
        return found

    def drawn(self, n: int, seed: int) -> tuple[list[int], list[tuple[Tensor, list[int]]]]:
        """All numbers to score, and of each stratum the positions that it holds and the numbers drawn from it."""
        inside = torch.isin(self.place, torch.tensor(self.numbers))
        near = torch.isin(self.place, torch.tensor(sorted(self.near))) & self.pool & ~inside
        far = self.pool & ~inside & ~near
        generator, strata = torch.Generator().manual_seed(seed), []
        for mask in (near, far):
            there = self.place[mask]
            order = torch.randperm(len(there), generator=generator)[: -(-n // 2)]
            if len(there) and n:
                strata.append((mask, sorted(there[order].tolist())))
        every = sorted({*self.numbers, *(i for _, some in strata for i in some)})
        self.positions(every)  # the data are those of the index
        return every, strata

    def missed(
        self, scores: Scores, sampled: Sequence[tuple[Tensor, list[int]]]
    ) -> dict[str, Any] | None:
        """What the candidates lack of the top k, both sides together."""
        column = {number: i for i, number in enumerate(scores.kept or [])}
        inside = _both(scores.values[:, [column[i] for i in self.numbers]])
        if not sampled and int(self.pool.sum()) > len(self.numbers):
            return None
        strata = []
        for mask, some in sampled:
            positions = self.positions(some)
            guess = -(self.asked.rows.float() @ self.index.rows(positions).mT)
            others = mask.clone()
            others[positions] = False
            strata.append(
                Stratum(
                    size=int(mask.sum()),
                    drawn=_both(scores.values[:, [column[i] for i in some]]),
                    guess=_both(guess / self.index.journal.n_train),
                    scale=self.index.squares[positions].double().sqrt(),
                    others=partial(self._guesses, others),
                )
            )
        return vars(missed(inside, strata, **self.method._told))

    def _guesses(self, mask: Bool[Tensor, " row"]) -> Iterator[Guesses]:
        """The index's scores of some positions, and the lengths of their rows, by which it may err."""
        for part, places in products(self.index, self.asked.rows.float(), mask):
            scale = self.index.squares[places].double().sqrt()
            yield _both(-part / self.index.journal.n_train), scale

    @cached_property
    def _back(self) -> Int[Tensor, " number"]:
        """Positions in the index of the training examples in the pool; -1 for others."""
        back = torch.full((len(self.fit.train),), -1)
        back[self.place[self.pool]] = self.pool.nonzero().flatten()
        return back


def _both(values: Tensor) -> Float[Tensor, "row n"]:
    """Rows for the largest of each query, then for the smallest."""
    return torch.cat([values, -values]).double()
