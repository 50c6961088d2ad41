"""How much an index loses: its scores beside the unprojected ones, on a sample, when it is built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress, sweep
from headwater.core.cost import available_memory_bytes
from headwater.core.damping import Damping, Inverse
from headwater.core.distributed import current
from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.core.gradients import CollectGradients
from headwater.core.index.encoding import Encoding
from headwater.core.index.metric import ProjectedMetric
from headwater.core.index.spaces import Space, numel
from headwater.core.index.writing import SpaceRows
from headwater.core.scoring import PairScores
from headwater.core.target import Loss
from headwater.numerics.ranks import spearman

QUERIES = 64
_SEED = 0


def recall(exact: Float[Tensor, "query n"], found: Float[Tensor, "query n"], k: int) -> float:
    """Share of the k largest and k smallest of each query that are among those of `found`, mean over both sides.

    Example:
        >>> recall(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 1.0, 2.0]]), 1)
        0.5
    """
    shares = []
    for largest in (True, False):
        own, other = (
            torch.zeros_like(x, dtype=torch.bool).scatter_(
                1, x.topk(k, dim=1, largest=largest).indices, True
            )
            for x in (exact, found)
        )
        shares.append(float((own & other).sum()) / (k * len(exact)))
    return sum(shares) / 2


@dataclass(frozen=True)
class Agreement:
    """How well some scores stand for others.

    Attributes:
        spearman: Rank correlation over the sample, mean over queries.
        recall_10: Share of each top ten that is found.
        recall_100: Share of each top hundred, or None where the sample is below two hundred.
    """

    spearman: float
    recall_10: float
    recall_100: float | None

    @classmethod
    def of(cls, exact: Float[Tensor, "query n"], found: Float[Tensor, "query n"]) -> "Agreement":
        """The agreement of scores with exact ones."""
        n = exact.shape[1]
        correlation = spearman(exact, found)
        return cls(
            spearman=float(correlation.nanmean()),
            recall_10=recall(exact, found, min(10, max(1, n // 2))),
            recall_100=recall(exact, found, 100) if n >= 200 else None,
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """Unprojected scores of some pairs, and the rows of the same examples in some coordinates.

    Attributes:
        truth: (query, train), inner products.
        queries: Rows of the queries in each space.
        train: Rows of the training examples in each space.
    """

    truth: Float[Tensor, "query train"]
    queries: list[Tensor]
    train: list[Tensor]
    kind: str

    def error(
        self, space: int, encoding: Encoding, metric: ProjectedMetric | None = None
    ) -> dict[str, Any]:
        """How far the scores of a space are from the unprojected ones, and what of it comes from the storage."""
        queries, rows = self.queries[space], self.train[space]
        ready = (queries if metric is None else metric(queries)).float()
        kept = encoding.decode(encoding.encode(rows))
        stored = (ready @ kept.mT).double()
        return {
            "rows": self.truth.shape[1],
            "queries": self.truth.shape[0],
            "curvature": self.kind,
            "whole": vars(Agreement.of(self.truth, stored)),
            "dtype_alone": vars(Agreement.of((ready @ rows.float().mT).double(), stored)),
        }


def take_sample(
    fit: Fit,
    spaces: Sequence[Space],
    data: Examples,
    damping: Damping,
    n: int,
    progress: Progress | None = None,
) -> Sample | None:
    """Scores of some of the data through the fit's whole curvature, with others as queries about their own loss.

    None where there are too few examples, or too many parameters to hold a few whole gradients.
    """
    layers = list(fit.followed)
    whole = 4 * numel(layers)
    room = current().agreed(available_memory_bytes)
    n_queries = min(QUERIES, len(data) // 4, int(room / 6 // whole))
    if n < 1 or n_queries < 4 or len(data) < 20:
        return None
    n = min(n, len(data) - n_queries)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(_SEED))
    rows, asked = (sorted(part.tolist()) for part in (order[:n], order[n : n + n_queries]))
    some, queries = data.subset(rows), data.subset(asked)
    collected = CollectGradients(layers)
    projected = [SpaceRows(space, len(queries)) for space in spaces]
    _sweep(fit, queries, [collected, *projected], progress)
    gradients = collected.finish()[0]
    n_positions = sum(some.lengths) if some.lengths else len(some)
    exact = PairScores(fit.curvature.prepare(gradients, Inverse(damping), n_positions), len(some))
    train = [SpaceRows(space, len(some)) for space in spaces]
    _sweep(fit, some, [exact, *train], progress)
    return Sample(
        exact.finish(),
        [p.finish() for p in projected],
        [t.finish() for t in train],
        fit.curvature.kind,
    )


def _sweep(
    fit: Fit, examples: Examples, accumulators: Sequence[Any], progress: Progress | None
) -> None:
    sweep(
        fit.capture(),
        examples,
        accumulators,
        Loss(),
        batches=fit.batches(examples),
        progress=progress,
        note="measured error",
    )
