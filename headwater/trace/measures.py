r"""Measures: how well scores predict what retraining does, or find what was planted.

Scores $\tau(q, n)$ claim what adding example n does to a measurement of query q. Each measure here holds such claims
against outcomes: of models retrained on subsets (a `RetrainingBank`), without single examples, or without a query's
strongest ones; or against examples that are known to be the cause.

Means over queries come with an interval from a bootstrap over queries and over retrainings together. Queries for
which a measure is not defined (constant predictions, constant outcomes) are left out of the mean and counted.

References:
    Ilyas, Park, Engstrom, Leclerc and Madry (2022), "Datamodels", arXiv:2202.00622; Park et al. (2023), "TRAK",
    arXiv:2303.14186 (linear datamodeling score); Bae et al. (2024), arXiv:2405.12186, and Choe et al. (2024),
    arXiv:2405.13954 (subset removal); Basu, Pope and Feizi (2021), arXiv:2006.14651, and Bae et al. (2022),
    arXiv:2209.05364 (what leaving one out can say).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headwater.core.scores import Scores
from headwater.numerics import spectral
from headwater.numerics.detection import auroc, detection_estimate
from headwater.numerics.ranks import (
    average_ranks,
    lds,
    pearson,
    spearman,
)
from headwater.numerics.resampling import Estimate, bootstrap, bootstrap_lds, noise_ceiling
from headwater.training.bank import RetrainingBank
from headwater.training.retraining import AS_IT_WAS, Change, Progress, Retrain, retrain_all

Side = Literal["proponents", "opponents"]

FEWEST_SUBSETS = 10
LOWEST_CEILING = 0.5


@dataclass(frozen=True, kw_only=True)
class OverQueries:
    """A mean over queries.

    Attributes:
        estimate: The mean with its interval; `n` counts the queries behind it.
        per_query: Each query's own value, NaN where it is not defined.
    """

    estimate: Estimate
    per_query: Float[Tensor, " query"]

    @property
    def left_out(self) -> int:
        """Queries without a value."""
        return int(self.per_query.isnan().sum())

    def __str__(self) -> str:
        return f"{self.estimate}, {self.left_out} queries left out"


# Against a bank of retrainings


@dataclass(frozen=True, kw_only=True)
class BankScore:
    """A linear datamodeling score with what is needed to read it.

    Attributes:
        lds: The score.
        ceiling: What a perfect prediction of the expected outcome would reach; None for a single retraining of each
            subset, or for a fixed run, which has no noise.
        protocol: "expected effect" (every retraining with its own seed) or "fixed run".
        alpha: Share of the examples in each subset.
        n_subsets: Subsets.
        n_repeats: Retrainings of each.
    """

    lds: OverQueries
    ceiling: Estimate | None
    protocol: str
    alpha: float
    n_subsets: int
    n_repeats: int


def linear_datamodeling_score(
    scores: Scores,
    bank: RetrainingBank,
    *,
    queries: Int[Tensor, " query"] | None = None,
    subsets: Int[Tensor, " subset"] | None = None,
    n_samples: int = 1000,
    seed: int = 0,
) -> BankScore:
    """Do scores rank retrained subsets rightly? Spearman correlation over subsets, mean over queries.

    Args:
        scores: Scores of all training examples, of a measurement that the bank holds.
        bank: The retrainings.
        queries: Numbers of the queries to report on, where knobs were tuned on others; all when left out.
        subsets: Numbers of the subsets, likewise.
        n_samples: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: Bank and scores do not belong together, or there are fewer than ten subsets.

    Warns:
        When the noise ceiling is below one half: such a bank cannot tell good scores from bad ones.
    """
    masks, outcomes = _matching(scores, bank)
    queries = torch.arange(len(scores)) if queries is None else queries
    subsets = torch.arange(len(masks)) if subsets is None else subsets
    _enough(len(subsets))
    masks, outcomes = masks[subsets], outcomes[subsets][:, :, queries].double()
    values, fixed = scores.values[queries].double(), bool(bank.meta.get("same_run"))
    ceiling = None
    if outcomes.shape[1] > 1 and not fixed:
        ceiling = noise_ceiling(outcomes, seed=seed)
        warn_low_ceiling(ceiling)
    mean = outcomes.mean(1)
    found = OverQueries(
        estimate=bootstrap_lds(values, masks, mean, n_samples=n_samples, seed=seed),
        per_query=lds(values, masks, mean),
    )
    return BankScore(
        lds=found,
        ceiling=ceiling,
        protocol="fixed run" if fixed else "expected effect",
        alpha=float(masks.double().mean()),
        n_subsets=len(masks),
        n_repeats=outcomes.shape[1],
    )


def warn_low_ceiling(ceiling: Estimate) -> None:
    """Say so where a bank's noise ceiling is too low to tell methods apart."""
    if ceiling.value < LOWEST_CEILING:
        warnings.warn(
            f"The noise ceiling of this bank is {ceiling.value:.2f}: seeds move its outcomes more than subsets do, and "
            "it cannot tell good scores from bad ones. Retrain every subset with more seeds.",
            stacklevel=3,
        )


def _matching(scores: Scores, bank: RetrainingBank) -> tuple[Tensor, Tensor]:
    """Masks and outcomes of a bank that the scores can be held against."""
    if scores.measurement not in bank.measurements:
        raise ValueError(
            f"The scores are of {scores.measurement!r} and the bank holds {sorted(bank.measurements)}: without a "
            "common measurement neither sign nor unit is known. Score with measurement=… as the bank has it."
        )
    outcomes = bank.outcomes(scores.measurement)
    shape = (bank.masks.shape[1], outcomes.shape[2])
    if scores.kept is not None or (len(scores.train_ids), len(scores)) != shape:
        raise ValueError(
            f"The bank's subsets are of {shape[0]} training examples, and it asked {shape[1]} queries; the scores are "
            f"{len(scores)} × {len(scores.train_ids)}. Score the bank's own examples and queries, with keep=None."
        )
    if not outcomes.shape[1]:
        raise ValueError("The bank has no finished round of retrainings; build it first.")
    return bank.masks, outcomes


def _enough(n_subsets: int) -> None:
    if n_subsets < FEWEST_SUBSETS:
        raise ValueError(
            f"A rank correlation over {n_subsets} subsets says nothing; {FEWEST_SUBSETS} are the fewest, and 100 are "
            "usual. Add subsets to the bank."
        )


def ridge_datamodel(
    masks: Bool[Tensor, "subset n_train"],
    outcomes: Float[Tensor, "subset query"],
    *,
    ridges: Sequence[float] = tuple(10.0**k for k in range(-3, 5)),
) -> Float[Tensor, "query n_train"]:
    r"""Scores learned from retrainings: ridge regression of outcomes on membership.

    $$\min_\tau \sum_k \big(y_k - c - \textstyle\sum_{m \in S_k} \tau_m\big)^2 + \rho \|\tau\|^2,$$

    solved in the space of subsets, with ρ chosen for each query by generalised cross-validation (Golub, Heath and
    Wahba 1979), $\min_\rho \|y - \hat y\|^2 / (K - \operatorname{tr} H_\rho)^2$.

    Args:
        masks: True where a subset holds an example.
        outcomes: The measurement after training on each subset.
        ridges: Choices of ρ, in units of the mean eigenvalue of the Gram matrix.
    """
    x = masks.double() - masks.double().mean(0)
    y = outcomes.double() - outcomes.double().mean(0)
    values, vectors = spectral.eigh(x @ x.T)
    values = values.clamp(min=0)
    along = vectors.T @ y
    best = torch.full((y.shape[1],), torch.inf, dtype=torch.float64)
    solved = torch.zeros_like(y)
    for ridge in ridges:
        left = 1 / (1 + values / (ridge * values.mean()))  # what H leaves of each direction
        criterion = (left[:, None] * along).square().sum(0) / (left.sum() / len(x)) ** 2
        better = criterion < best
        candidate = vectors @ (left[:, None] * along) / (ridge * values.mean())
        best, solved = (
            torch.where(better, criterion, best),
            torch.where(better, candidate, solved),
        )
    return (x.T @ solved).T


def additive_ceiling(
    masks: Bool[Tensor, "subset n_train"],
    outcomes: Float[Tensor, "subset query"],
    *,
    n_folds: int = 5,
    n_samples: int = 200,
    seed: int = 0,
) -> OverQueries:
    """What scores learned from retrainings themselves reach on retrainings held out.

    Scores that predict subsets by sums can do no better than the best of all sums. A `ridge_datamodel` fitted on the
    other folds comes near to it from below, the nearer the more subsets there are: with many more subsets than
    examples it is the ceiling of everything additive, and with few it shows how much retraining it takes to learn
    without a model what a method says for a few passes.

    Args:
        masks: True where a subset holds an example.
        outcomes: The measurement after training on each subset, a mean over seeds.
        n_folds: Parts of the subsets; each is predicted from all others.
        n_samples: Bootstrap draws, over queries and the subsets of each part.
        seed: Seed of the parts and the draws.

    Raises:
        ValueError: There are fewer than ten subsets in a part.
    """
    n_folds = min(n_folds, len(masks) // FEWEST_SUBSETS)
    if n_folds < 2:
        _enough(len(masks) // 2)
    order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed))
    found, estimates = [], []
    for part in order.tensor_split(n_folds):
        rest = order[~torch.isin(order, part)]
        scores = ridge_datamodel(masks[rest], outcomes[rest])
        found.append(lds(scores, masks[part], outcomes[part].double()))
        estimates.append(
            bootstrap_lds(
                scores, masks[part], outcomes[part].double(), n_samples=n_samples, seed=seed
            )
        )
    value = sum(e.value for e in estimates) / n_folds
    # Parts are predicted from overlapping others; their intervals are averaged in squares.
    low, high = (
        (sum((getattr(e, end) - e.value) ** 2 for e in estimates) ** 0.5) / n_folds
        for end in ("low", "high")
    )
    per_query = torch.stack(found).nanmean(0)
    n = int((~per_query.isnan()).sum())
    return OverQueries(estimate=Estimate(value, value - low, value + high, n), per_query=per_query)


# Against leaving one out


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """Predicted and actual effects of single examples.

    Attributes:
        pearson: Correlation over the examples left out, mean over queries.
        spearman: The same of ranks.
        signal_to_noise: For each pair, the absolute mean effect over its standard error from the seeds; NaN with one
            seed. Below 2 or so, the pair has no measurable effect, and a correlation is limited by that.
    """

    pearson: OverQueries
    spearman: OverQueries
    signal_to_noise: Float[Tensor, "query example"]


def leave_one_out(
    scores: Float[Tensor, "query example"],
    whole: Float[Tensor, "repeat query"],
    without: Float[Tensor, "example repeat query"],
    *,
    n_samples: int = 1000,
    seed: int = 0,
) -> LeaveOneOut:
    """Correlation of scores with what leaving single examples out does.

    Args:
        scores: Scores of the examples that are left out.
        whole: The measurement after training on everything, once a seed.
        without: The measurement after training without each of the examples, with the same seeds.
        n_samples: Bootstrap draws, over queries and examples together.
        seed: Seed of the draws.

    Raises:
        ValueError: Shapes do not fit together.
    """
    n_examples, n_repeats, n_queries = without.shape
    if scores.shape != (n_queries, n_examples) or whole.shape != (n_repeats, n_queries):
        raise ValueError(
            f"Expected scores ({n_queries}, {n_examples}) and whole ({n_repeats}, {n_queries}) for `without` of shape "
            f"{tuple(without.shape)}; got {tuple(scores.shape)} and {tuple(whole.shape)}."
        )
    effect = (whole.double() - without.double()).permute(
        2, 0, 1
    )  # of adding it (query, example, repeat)
    error = (
        effect.std(2) / n_repeats**0.5
        if n_repeats > 1
        else torch.full_like(effect[..., 0], torch.nan)
    )
    predicted, actual = scores.double(), effect.mean(2)
    return LeaveOneOut(
        pearson=_correlation(pearson, predicted, actual, n_samples, seed),
        spearman=_correlation(spearman, predicted, actual, n_samples, seed),
        signal_to_noise=actual.abs() / error,
    )


def _correlation(
    of: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, n_samples: int, seed: int
) -> OverQueries:
    """Mean over queries of a correlation over columns, drawn anew along both axes."""
    per_query = of(a, b)
    defined = ~per_query.isnan()
    n = int(defined.sum())
    if not n:
        raise ValueError(
            f"None of {len(defined)} queries has a correlation: predictions or outcomes are constant."
        )
    a, b = a[defined], b[defined]
    estimate = bootstrap(
        lambda row, column: of(a[row][:, column], b[row][:, column]).nanmean().item(),
        (n, a.shape[1]),
        n=n,
        n_samples=n_samples,
        seed=seed,
    )
    return OverQueries(estimate=estimate, per_query=per_query)


# Against removing what a query stands on


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What removing each query's strongest examples does, beside removing as many of the same classes at random.

    Attributes:
        ks: How many examples were removed.
        queries: Numbers of the queries that are asked about: those answered rightly with every seed.
        left_out: How many others there were.
        change: Change of the measurement (k, query, seed).
        control_change: The same after a removal at random.
        flipped: Whether the mean over seeds became wrong (k, query).
        control_flipped: The same after a removal at random.
    """

    ks: list[int]
    queries: list[int]
    left_out: int
    change: Float[Tensor, "k query seed"]
    control_change: Float[Tensor, "k query seed"]
    flipped: Bool[Tensor, "k query"]
    control_flipped: Bool[Tensor, "k query"]

    def mean_change(self, *, control: bool = False, n_samples: int = 1000) -> list[Estimate]:
        """Mean change of the measurement for every k, drawn over queries and seeds."""
        return [
            _mean(table, n_samples) for table in (self.control_change if control else self.change)
        ]

    def flipped_share(self, *, control: bool = False, n_samples: int = 1000) -> list[Estimate]:
        """Share of the queries that became wrong, for every k."""
        return [
            _mean(row.double()[:, None], n_samples)
            for row in (self.control_flipped if control else self.flipped)
        ]

    @property
    def smallest_k(self) -> Float[Tensor, " query"]:
        """The smallest k that makes each query wrong; NaN where none of those tried does."""
        ks = torch.tensor(self.ks, dtype=torch.float64)[:, None].expand(self.flipped.shape)
        least = torch.where(self.flipped, ks, torch.inf).amin(0)
        return least.masked_fill(least.isinf(), torch.nan)


def removal(
    retrain: Retrain,
    scores: Scores,
    ks: Sequence[int],
    *,
    labels: Shaped[Tensor, " train"] | None = None,
    seeds: Sequence[int] = (0,),
    right: Callable[[Tensor], Tensor] = lambda measurement: measurement > 0,
    queries: Sequence[int] | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Removal:
    """Brittleness: retrain without the examples that support each query most, more and more of them.

    Args:
        retrain: Trains with weights of the examples and a seed; returns the measurement of every query. An object that
            makes several runs at once will do (`headwater.training.retraining.StackedRetrain`).
        scores: Scores of all training examples.
        ks: How many to remove; examples that do not support the query are never removed.
        labels: Classes of the training examples: a removal at random has the same mix of them.
        seeds: Seeds of the runs.
        right: Whether measurements mean a right answer: a margin above zero, unless told otherwise.
        queries: Which queries to ask about; all when left out.
        seed: Seed of the removals at random.
        cache: Folder in which every finished run is kept, so that a killed measurement goes on, and scores that remove
            the same examples share their runs. Choose one for each `retrain`, unless it tells what it is made from.
        progress: Called with (runs done, runs in all, note).

    Raises:
        ValueError: No query is answered rightly with every seed.
        FloatingPointError: A run's measurements are not finite.
    """
    support, n = _support(scores), len(scores.train_ids)

    def outcomes(changes: list[Change]) -> Tensor:  # (change, seed, query)
        runs = [(change, s) for change in changes for s in seeds]
        kept: dict[str, Any] = {
            "n_train": n,
            "queries": scores.query_ids,
            "cache": cache,
            "progress": progress,
        }
        return retrain_all(retrain, runs, **kept).view(len(changes), len(seeds), -1)

    before = outcomes([AS_IT_WAS])[0]  # (seed, query)
    asked = range(len(scores)) if queries is None else queries
    chosen = [q for q in asked if bool(right(before[:, q]).all())]
    if not chosen:
        raise ValueError(
            "No query is answered rightly with every seed, so none can be made wrong; ask other queries."
        )
    generator = torch.Generator().manual_seed(seed)
    classes = torch.zeros(n, dtype=torch.long) if labels is None else labels
    planned = []
    for k in ks:
        for q in chosen:
            top = strongest(support[q], k)
            other = random_like(top, classes, generator)
            planned += [
                _without(top, f"without the top {len(top)} of {scores.query_ids[q]}"),
                _without(other, f"without {len(other)} like the top of {scores.query_ids[q]}"),
            ]
    own = torch.arange(len(chosen))
    table = outcomes(planned).view(len(ks), len(chosen), 2, len(seeds), -1)
    after = table[:, own, :, :, chosen].permute(2, 1, 0, 3)  # (top or control, k, query, seed)
    change = after - before[:, chosen].T
    flipped = ~right(after.mean(-1))
    return Removal(
        ks=list(ks),
        queries=chosen,
        left_out=len(asked) - len(chosen),
        change=change[0],
        control_change=change[1],
        flipped=flipped[0],
        control_flipped=flipped[1],
    )


def query_loss_difference(
    retrain: Retrain,
    scores: Scores,
    *,
    share: float = 0.01,
    side: Side = "proponents",
    seeds: Sequence[int] = (0,),
    queries: Sequence[int] | None = None,
    n_samples: int = 1000,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> OverQueries:
    """Loss of a query after retraining without its strongest examples, minus that without as many at random.

    Positive for proponents that matter, negative for opponents.

    Args:
        retrain: Trains with weights of the examples and a seed; returns the loss of every query. An object that makes
            several runs at once will do.
        scores: Scores of all training examples.
        share: Share of the examples to remove, at least one.
        side: Those that support the query's answer, or those that stand against it.
        seeds: Seeds of the runs.
        queries: Which queries to ask about; all when left out.
        n_samples: Bootstrap draws, over queries and seeds together.
        seed: Seed of the removals at random.
        cache: Folder in which every finished run is kept, as in `removal`.
        progress: Called with (runs done, runs in all, note).

    Raises:
        FloatingPointError: A run's losses are not finite.
    """
    n = len(scores.train_ids)
    support, k = _support(scores), max(1, round(share * n))
    asked = list(range(len(scores)) if queries is None else queries)
    generator = torch.Generator().manual_seed(seed)
    planned = []
    for q in asked:
        order = support[q] if side == "proponents" else -support[q]
        removed = order.topk(k).indices
        control = random_like(removed, torch.zeros(n, dtype=torch.long), generator)
        name = scores.query_ids[q]
        planned += [
            _without(removed, f"without the top {k} of {name}"),
            _without(control, f"without {k} at random for {name}"),
        ]
    runs = [(change, s) for change in planned for s in seeds]
    losses = retrain_all(
        retrain, runs, n_train=n, queries=scores.query_ids, cache=cache, progress=progress
    ).view(len(asked), 2, len(seeds), -1)
    own = losses[torch.arange(len(asked)), :, :, asked]  # (query, top or control, seed)
    difference = own[:, 0] - own[:, 1]
    return OverQueries(estimate=_mean(difference, n_samples), per_query=difference.mean(1))


def strongest(support: Float[Tensor, " train"], k: int) -> Int[Tensor, " chosen"]:
    """Numbers of the k examples with most support, none of them without any."""
    top = support.topk(min(k, len(support)))
    return top.indices[top.values > 0]


def random_like(
    chosen: Int[Tensor, " chosen"], classes: Shaped[Tensor, " train"], generator: torch.Generator
) -> Int[Tensor, " chosen"]:
    """As many examples at random, with the same number of each class, none of those chosen where others suffice.

    Example:
        >>> random_like(torch.tensor([0]), torch.tensor([0, 1, 0, 1]), torch.Generator()).tolist()
        [2]
    """
    free = torch.ones(len(classes), dtype=torch.bool)
    free[chosen] = False
    parts = []
    for label, count in zip(*classes[chosen].unique(return_counts=True), strict=True):
        pool = ((classes == label) & free).nonzero()[:, 0]
        if len(pool) < count:
            pool = (classes == label).nonzero()[:, 0]
        parts.append(pool[torch.randperm(len(pool), generator=generator)[:count]])
    return torch.cat(parts) if parts else chosen


def _support(scores: Scores) -> Tensor:
    """Positive where an example supports the query's answer: lowers its loss, raises any other measurement."""
    if scores.kept is not None:
        raise ValueError("Removal needs the scores of all training examples; score with keep=None.")
    return scores.values.double() * (-1 if scores.measurement == "loss" else 1)


def _without(removed: Int[Tensor, " removed"], name: str) -> Change:
    return Change(name=name, weights=dict.fromkeys(removed.tolist(), 0.0))


def _mean(table: Float[Tensor, "query repeat"], n_samples: int) -> Estimate:
    """Mean of a table, drawn over queries and repeats together."""
    return bootstrap(
        lambda row, column: table[row][:, column].mean().item(),
        (len(table), table.shape[1]),
        n=len(table),
        n_samples=n_samples,
    )


# Against planted truth


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How well scores find the examples that are known to matter. A proxy: what is alike need not be the cause.

    Attributes:
        recall: By k: share of a query's relevant examples among its k strongest.
        mrr: Mean of one over the rank of the first relevant example.
        auc: Chance that a relevant example has a higher score than another one.
    """

    recall: dict[int, OverQueries]
    mrr: OverQueries
    auc: OverQueries


def retrieval(
    scores: Float[Tensor, "query train"],
    relevant: Bool[Tensor, "query train"],
    *,
    ks: Sequence[int] = (1, 10, 100),
    n_samples: int = 1000,
) -> Retrieval:
    """Recall, reciprocal rank and AUC against planted truth.

    Equal scores share the mean of their ranks. Queries with nothing relevant, with nothing else, or with constant
    scores have no value.

    Args:
        scores: Higher where an example is held to matter more.
        relevant: The truth.
        ks: Lengths of the lists for recall.
        n_samples: Bootstrap draws over queries.
    """
    ranks = average_ranks(-scores)  # 1 is the strongest
    undefined = (
        ~relevant.any(1)
        | relevant.all(1)
        | (scores == scores[:, :1]).all(1)
        | scores.isnan().any(1)
    )
    first = torch.where(relevant, ranks, torch.inf).amin(1)
    counts = relevant.double().sum(1)

    def over(values: Tensor) -> OverQueries:
        values = values.masked_fill(undefined, torch.nan)
        known = values[~undefined]
        if not len(known):
            raise ValueError(
                "No query has something relevant, something else, and scores that differ; there is nothing to measure."
            )
        return OverQueries(estimate=_mean(known[:, None], n_samples), per_query=values)

    return Retrieval(
        recall={k: over((relevant & (ranks <= k)).sum(1) / counts) for k in ks},
        mrr=over(1 / first),
        auc=over(torch.stack([auroc(s, r) for s, r in zip(scores, relevant, strict=True)])),
    )


def mislabel_auc(
    suspicion: Float[Tensor, " train"],
    wrong: Bool[Tensor, " train"],
    *,
    n_samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """AUC of finding wrong labels, with an interval over wrong and right ones drawn anew.

    Args:
        suspicion: Higher where a label is held to be wrong: self-influence, or minus the summed scores of clean
            queries.
        wrong: Which labels are wrong.
        n_samples: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: All labels are wrong, or none is, or a value is NaN.
    """
    return detection_estimate(auroc, suspicion, wrong, n_samples=n_samples, seed=seed)
