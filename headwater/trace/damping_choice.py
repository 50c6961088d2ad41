r"""Automatic damping: chosen by what retraining does, or by the evidence, with the whole curve kept.

Damping decides the quality of an influence more than the kind of curvature does, and no rule knows it for every model.
Three criteria, from dear to free:

- a small bank of retrainings without a few examples each: the damping whose scores rank them best;
- a few retrainings under random weights $1 + hv$, $1 + 2hv$, $v \sim N(0, I)$: the damping whose predicted changes
  $h \sum_n v_n \tau(q, n)$ correlate best with the actual ones. The same runs tell how straight the response is
  (metasmoothness, Definition 2 of Engstrom et al. 2025, arXiv:2503.13751, taken of the measurements): where it bends,
  no derivative can predict it;
- the evidence of the trained parameters (MacKay 1992), which needs no retraining.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.damping import Damping, evidence, log_evidence
from headwater.core.examples import as_examples
from headwater.core.fit import Fit, moved
from headwater.core.scores import Scores
from headwater.extras import require
from headwater.numerics.ranks import pearson
from headwater.numerics.resampling import Estimate, bootstrap
from headwater.trace.influence import Influence
from headwater.trace.measures import linear_datamodeling_score
from headwater.training.bank import RetrainingBank
from headwater.training.retraining import AS_IT_WAS, Change, Retrain, retrain_all

ROUGH = 0.5  # metasmoothness below which a warning is given
_WIDENINGS = 4


@dataclass(frozen=True, kw_only=True)
class DampingChoice:
    """A damping, and the curve that it was chosen from.

    Attributes:
        chosen: The damping; its source says how it was found. Pass it as `Influence(damping=choice.chosen)`.
        criterion: What the curve shows; higher is better.
        dampings: Values tried, ascending, absolute.
        values: The criterion at each.
        low: Lower ends of its 95 % intervals; empty where there are none.
        high: Upper ends.
        facts: More that is worth telling.
    """

    chosen: Damping
    criterion: str
    dampings: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    facts: dict[str, Any]

    def of(self, fit: Fit) -> Fit:
        """The same fit with this damping as its automatic one, and the curve in its facts."""
        kept = {"chosen_damping": vars(self.chosen), "damping_curve": asdict(self)}
        return replace(fit, facts=fit.facts | kept)

    def plot(self):
        """The curve with its intervals and the choice; needs the extra `plots`."""
        pyplot = require("matplotlib.pyplot", extra="plots")
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        if self.low:
            axes.fill_between(self.dampings, self.low, self.high, alpha=0.2, lw=0)
        axes.plot(self.dampings, self.values, "o-", ms=4)
        axes.axvline(self.chosen.value, ls="--", lw=1, color="0.4")
        axes.set_xscale("log")
        axes.set_xlabel("damping")
        axes.set_ylabel(self.criterion)
        axes.set_title(f"chosen: {self.chosen.value:.2g}")
        return figure

    def __repr__(self) -> str:
        curve = ", ".join(
            f"{d:.2g}: {v:.3f}" for d, v in zip(self.dampings, self.values, strict=True)
        )
        return f"DampingChoice({self.chosen.value:.3g}, {self.chosen.source}; {self.criterion}: {curve})"


def dampings_for(fit: Fit, *, n: int = 9) -> list[float]:
    """Values to try: half-decades about the mean eigenvalue of the fit, from a tenth of it on."""
    mean = max(fit.curvature.mean_eigenvalue, 1e-30)
    return [mean * 10 ** (-1 + k / 2) for k in range(n)]


def choose_by_bank(
    fit: Fit,
    queries: Any,
    bank: RetrainingBank,
    *,
    method: Influence | None = None,
    dampings: Sequence[float] | None = None,
    n_samples: int = 200,
) -> DampingChoice:
    """The damping whose scores rank a bank's retrainings best.

    A small bank serves: thirty or so runs without some per cent of the examples each
    (`headwater.training.bank.build_bank(..., random_masks(n, 30, fraction=0.95), same_run=True)`), asked about queries
    other than those that scores will be judged on.

    Args:
        fit: The fit.
        queries: The bank's queries.
        bank: The bank, of a measurement with the task's name for it.
        method: How scores are made; plain influence when left out.
        dampings: Values to try; `dampings_for(fit)` when left out. Where the best is at an end, more are tried.
        n_samples: Bootstrap draws of the intervals, over queries and retrainings.

    Raises:
        ValueError: The bank is not one of this data and these queries, or holds fewer than ten subsets.
    """
    examples, score = as_examples(queries), _scorer(fit, queries, method)

    def criterion(damping: float) -> Estimate:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a low ceiling: told once, below
            found = linear_datamodeling_score(score(damping), bank, n_samples=n_samples)
        return found.lds.estimate

    tried = _curve(criterion, dampings_for(fit) if dampings is None else dampings)
    last = linear_datamodeling_score(score(min(tried)), bank, n_samples=2)
    runs = last.n_subsets * last.n_repeats
    facts = {
        "protocol": last.protocol,
        "alpha": last.alpha,
        "retrainings": runs,
        "queries": len(examples),
        "ceiling": None if last.ceiling is None else last.ceiling.value,
    }
    how = f"{runs} retrainings, {last.protocol}, alpha {last.alpha:.2g}, {len(examples)} queries"
    return _choice(tried, "LDS", how, facts)


def choose_by_reweighting(
    fit: Fit,
    queries: Any,
    retrain: Retrain,
    *,
    n_directions: int = 3,
    h: float = 0.1,
    method: Influence | None = None,
    dampings: Sequence[float] | None = None,
    seed: int = 0,
    run_seed: int = 0,
    n_samples: int = 200,
) -> DampingChoice:
    """The damping that predicts best what a few random reweightings of all examples do, in 2 n + 1 retrainings.

    Args:
        fit: The fit.
        queries: The queries that `retrain` measures.
        retrain: Trains with weights of the examples and a seed; returns the measurement of every query.
        n_directions: Random directions, each gone along twice as far as well.
        h: Size of the reweighting.
        method: How scores are made; plain influence when left out.
        dampings: Values to try; `dampings_for(fit)` when left out. Where the best is at an end, more are tried.
        seed: Seed of the directions.
        run_seed: Seed of the runs, that of the fit's model.
        n_samples: Bootstrap draws of the intervals, over queries and directions.

    Warns:
        When the response is so crooked (metasmoothness below one half) that no derivative predicts it.
    """
    n, score = len(fit.train), _scorer(fit, queries, method)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n_directions, n, generator=generator, dtype=torch.float64)
    along = [
        Change(
            name=f"{k} h along direction {i}",
            weights=dict(enumerate((1 + k * h * row.float()).tolist())),
        )
        for i, row in enumerate(v)
        for k in (1, 2)
    ]
    planned = [(change, run_seed) for change in [AS_IT_WAS, *along]]
    measured = retrain_all(retrain, planned, n_train=n, queries=as_examples(queries).ids)
    start, runs = measured[0], measured[1:].view(n_directions, 2, -1)  # (direction, 2, query)
    smooth = response_smoothness(start, runs[:, 0], runs[:, 1])
    if smooth < ROUGH:
        warnings.warn(
            f"The run's response to reweighting is crooked (metasmoothness {smooth:.2f}; near 1 is smooth): no "
            "derivative predicts it well, under any damping. Train with a lower learning rate or larger batches.",
            stacklevel=2,
        )
    actual = (runs[:, 1] - start).T  # (query, direction), the change at 2h

    def criterion(damping: float) -> Estimate:
        predicted = 2 * h * score(damping).values.double() @ v.T
        return _pooled_correlation(predicted, actual, n_samples)

    tried = _curve(criterion, dampings_for(fit) if dampings is None else dampings)
    facts = {"metasmoothness": smooth, "retrainings": 2 * n_directions + 1, "h": h}
    how = f"{2 * n_directions + 1} retrainings under random weights, metasmoothness {smooth:.2f}"
    return _choice(tried, "correlation of changes", how, facts)


def choose_by_evidence(fit: Fit, *, dampings: Sequence[float] | None = None) -> DampingChoice:
    """The damping under which the trained parameters are most probable, with the log evidence around it.

    Args:
        fit: The fit.
        dampings: Values of the curve; `dampings_for(fit)` when left out. The choice is the exact maximum, not the best
            of these.
    """
    spectra, n, distance = list(fit.curvature.spectra().values()), len(fit.train), moved(fit)
    best = evidence(spectra, n=n, distance=distance)
    every = sorted({*(dampings_for(fit) if dampings is None else dampings), best})
    values = [log_evidence(spectra, n=n, distance=distance, damping=d) for d in every]
    return DampingChoice(
        chosen=Damping(best, source="evidence of the trained parameters"),
        criterion="log evidence (nats, up to a constant)",
        dampings=every,
        values=values,
        low=[],
        high=[],
        facts={"distance": distance, "n_train": n},
    )


def response_smoothness(
    zero: Float[Tensor, " query"],
    one: Float[Tensor, "direction query"],
    two: Float[Tensor, "direction query"],
) -> float:
    r"""Metasmoothness of measurements: do they go on in the direction in which they set out?

    $$\sum_j \frac{d_j}{\|d\|_1} \operatorname{sign}(f_{2h} - f_h)_j \operatorname{sign}(f_h - f_0)_j, \qquad
    d = |f_{2h} - f_0|,$$

    over queries and directions; 1 for a straight response.

    Example:
        >>> zero = torch.zeros(2)
        >>> response_smoothness(zero, torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, -2.0]]))
        0.0
    """
    d = (two - zero).abs()
    agree = torch.sign(two - one) * torch.sign(one - zero)
    return float((d * agree).sum() / d.sum()) if d.sum() > 0 else math.nan


def _scorer(fit: Fit, queries: Any, method: Influence | None) -> Callable[[float], Scores]:
    plain, examples = method or Influence(n_intervals=0), as_examples(queries)
    return lambda damping: replace(plain, damping=damping).attribute(fit, examples)


def _pooled_correlation(predicted: Tensor, actual: Tensor, n_samples: int) -> Estimate:
    """Correlation over all pairs of query and direction, with both drawn anew."""

    def of(row: Tensor, column: Tensor) -> float:
        return pearson(predicted[row][:, column].flatten(), actual[row][:, column].flatten()).item()

    sizes = (predicted.shape[0], predicted.shape[1])
    return bootstrap(of, sizes, n=sizes[0], n_samples=n_samples)


def _curve(
    criterion: Callable[[float], Estimate], dampings: Sequence[float]
) -> dict[float, Estimate]:
    """The criterion at each value, and at further ones while the best is at an end."""
    if not dampings or min(dampings) <= 0:
        raise ValueError(f"Expected positive dampings to try; got {list(dampings)}.")
    tried = {float(d): criterion(float(d)) for d in sorted(dampings)}
    for _ in range(_WIDENINGS):
        ends = min(tried), max(tried)
        best = _best(tried)
        if best not in ends or len(tried) == 1:
            break
        beyond = best / 10**0.5 if best == ends[0] else best * 10**0.5
        tried[beyond] = criterion(beyond)
    return dict(sorted(tried.items()))


def _best(tried: dict[float, Estimate]) -> float:
    """The value with the highest criterion; of equal ones the largest, which is the safest to invert."""
    return max(
        tried, key=lambda d: (tried[d].value if tried[d].value == tried[d].value else -math.inf, d)
    )


def _choice(
    tried: dict[float, Estimate], criterion: str, how: str, facts: dict[str, Any]
) -> DampingChoice:
    best = _best(tried)
    if best in (min(tried), max(tried)) and len(tried) > 1:
        warnings.warn(
            f"The best damping, {best:.2g}, is at the end of those tried; pass dampings=… that reach further.",
            stacklevel=3,
        )
    source = f"best {criterion} of {len(tried)} values, {tried[best].value:.3f} ({how})"
    return DampingChoice(
        chosen=Damping(best, source=source),
        criterion=criterion,
        dampings=list(tried),
        values=[e.value for e in tried.values()],
        low=[e.low for e in tried.values()],
        high=[e.high for e in tried.values()],
        facts=facts,
    )
