"""Questions to an index: queries become rows, and the strongest rows become scores."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.core.capture import Progress, sweep
from headwater.core.examples import Examples, as_examples
from headwater.core.files import ArtifactMismatch
from headwater.core.fit import Fit
from headwater.core.index.approximate import Approximate
from headwater.core.index.metric import ProjectedMetric
from headwater.core.index.search import Mode, Where, clusters, divided, matching, scan, shown_once
from headwater.core.index.spaces import Space
from headwater.core.index.stored import StoredRows
from headwater.core.index.writing import SpaceRows
from headwater.core.scores import GroupTotals, Scores, groups_of
from headwater.core.target import Measured, Target
from headwater.core.task import Measurement, measurement_name

if TYPE_CHECKING:
    from headwater.core.scoring import Strongest

PAPERS = {
    "whitened": ["arXiv:2308.03296", "arXiv:2405.13954"],
    "sketched": ["arXiv:2308.03296", "arXiv:2405.13954"],
    "logra": ["arXiv:2405.13954"],
}
_MORE = 4  # times as many hits are looked at where duplicates are shown as one


@dataclass(frozen=True, eq=False, kw_only=True)
class Asked:
    """Queries as rows of an index.

    Attributes:
        rows: (query, dim), ready for plain inner products with stored rows.
        squares: Squared length of each under the index's inner product.
        ids: Names of the queries.
        measurement: What was measured.
        projection: Fingerprint of the coordinates.
        seconds: Time it took to make them.
    """

    rows: Float[Tensor, "query dim"]
    squares: Float[Tensor, " query"]
    ids: list[str]
    measurement: str
    projection: str
    seconds: float = 0.0


def project(
    fit: Fit, space: Space, examples: Examples, target: Target, *, progress: Progress | None = None
) -> Float[Tensor, "n dim"]:
    """Rows of examples, in memory, in one sweep."""
    found = SpaceRows(space, len(examples))
    sweep(
        space.capture(fit),
        examples,
        [found],
        target,
        batches=fit.batches(examples),
        progress=progress,
        note="queries",
    )
    return found.finish()


class Answers(StoredRows, ABC):
    """What can be asked of an index."""

    @abstractmethod
    def space(self, fit: Fit) -> Space:
        """The coordinates of the rows, made again from the fit."""

    def ask(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Asked:
        """Queries as rows, to be looked up as often as wanted.

        Args:
            fit: The fit that the index was made with.
            queries: Examples, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those.
            progress: Called with (done, total, note).

        Raises:
            ArtifactMismatch: The fit is not the one that the index was made with.
            ValueError: The weights are not of these queries.
        """
        started, examples = time.perf_counter(), as_examples(queries)
        space = self.space(fit)
        if weights is not None and weights.shape[-1] != len(examples):
            raise ValueError(
                f"Expected weights (group, query) of {len(examples)} queries; got shape {tuple(weights.shape)}."
            )
        rows = project(fit, space, examples, Measured(measurement), progress=progress)
        if weights is not None:
            rows = weights.to(rows) @ rows
        metric = ProjectedMetric.read(self.folder, self.journal)
        ready = rows if metric is None else metric(rows)
        asked = fit.task.measurement_of if measurement is None else measurement
        return Asked(
            rows=ready,
            squares=(ready * rows).sum(1),
            ids=examples.ids if weights is None else list(names or map(str, range(len(rows)))),
            measurement=measurement_name(asked),
            projection=space.fingerprint,
            seconds=time.perf_counter() - started,
        )

    def search(
        self,
        asked: Asked,
        *,
        keep: int = 100,
        mode: Mode = "dot",
        where: Where | None = None,
        group_by: str | None = None,
        by_layer: bool = False,
        copies: float | None = None,
        content: Callable[[str], Any] | None = None,
        approximate: Approximate | None = None,
    ) -> Scores:
        r"""The strongest examples of each query, by an exact scan of all rows unless said otherwise.

        Args:
            asked: What `ask` made of the queries.
            keep: How many on each side of each query.
            mode: "dot" for influences, $-\frac1N \langle\varphi_q, \varphi_n\rangle$; "relatif" divides by the root of
                the training example's self-influence, "cosine" by the query's too.
            where: Metadata to look among: {"source": ["wiki"], "date": ("2020", "2021")}; a list names values, a pair
                the lowest and the highest.
            group_by: Metadata column to total by.
            by_layer: Also return each layer's part.
            copies: Cosine of rows from which hits count as duplicates of one another and are shown as one, with their
                number in the metadata column `copies`; None tells none.
            content: What an example of an id holds, such as its text; equal ones are duplicates too.
            approximate: A structure to look candidates up in instead of scanning; only for mode "dot" and without
                filters and totals.

        Raises:
            ArtifactMismatch: The queries are rows of other coordinates.
            ValueError: No row has the metadata asked for.
        """
        started = time.perf_counter()
        self._check(asked, keep, mode)
        wanted = None if where is None and len(self) == self.n_rows else matching(self, where)
        if wanted is not None and not bool(wanted.any()):
            raise ValueError(f"No example of the index in {self.folder} matches {where!r}.")
        names, groups = self._groups(group_by)
        queries = asked.rows
        if mode == "cosine":
            queries = divided(queries, asked.squares.clamp(min=0).sqrt()[:, None])
        merging = copies is not None or content is not None
        k = keep * (_MORE if merging else 1)
        if approximate is None:
            found = scan(self, queries, k, mode=mode, wanted=wanted, groups=groups)
        else:
            found = self._approximate(
                approximate, queries, k, plain=mode == "dot" and not (where or group_by)
            )
        kept, extra, counts = found.kept(), {}, None
        kept = kept[kept >= 0]
        rows = self.rows(kept)
        if merging:
            kept, rows, counts, extra = self._merged(
                found, kept, rows, keep, copies or 2.0, content
            )
        scale = -1 / self.journal.n_train if mode == "dot" else -1.0
        by = None if mode == "dot" else self.squares[kept].sqrt()

        def finished(products: Tensor) -> Tensor:
            return scale * (products if by is None else divided(products, by))

        result: dict[str, Any] = {"values": finished(queries.float() @ rows.mT)}
        if by_layer:
            widths = list(self.journal.layers.values())
            pairs = zip(queries.float().split(widths, 1), rows.split(widths, 1), strict=True)
            result["by_layer"] = torch.stack([finished(q @ r.mT) for q, r in pairs])
            result["layer_totals"] = result["by_layer"].abs().sum(2)
            result["layers"] = list(self.journal.layers)
        if group_by is not None and groups is not None:
            result["totals"] = self._totals(found, scale, group_by, names, groups, wanted)
        metadata = self.metadata(kept)
        if counts is not None:
            metadata["copies"] = counts
        facts = self._facts(mode, asked, time.perf_counter() - started) | extra
        if approximate is not None:
            facts["approximate"] = {
                "structure": approximate.structure,
                "recall": approximate.recall,
            }
        return Scores(
            **result,
            query_ids=asked.ids,
            train_ids=self.ids(kept),
            measurement=asked.measurement,
            kept=self.numbers(kept),
            n_train=len(self) if wanted is None else int(wanted.sum()),
            metadata=metadata,
            facts=facts,
        )

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Scores:
        """`ask`, then `search` with the options of that."""
        asked = self.ask(
            fit, queries, measurement=measurement, weights=weights, names=names, progress=progress
        )
        return self.search(asked, **options)

    def self_influence(self) -> Float[Tensor, " row"]:
        r"""$\frac1N \langle\varphi_n, \varphi_n\rangle$ of each row that is there, in the order of `ids()`."""
        return self.squares[self.live] / self.journal.n_train

    def check(self, asked: Asked) -> None:
        """Refuse queries that are rows of other coordinates.

        Raises:
            ArtifactMismatch: They are.
        """
        own = self.journal.made_from["projection"]
        if asked.projection != own:
            raise ArtifactMismatch(
                f"The queries are rows of another projection ({asked.projection[:12]}…) than the index in "
                f"{self.folder} ({own[:12]}…); ask it with its own `ask`."
            )

    def _check(self, asked: Asked, keep: int, mode: str) -> None:
        self.check(asked)
        if keep < 1:
            raise ValueError(f"keep must be 1 or more; got {keep}.")
        if mode not in ("dot", "cosine", "relatif"):
            raise ValueError(f"Expected a mode 'dot', 'cosine' or 'relatif'; got {mode!r}.")

    def _approximate(
        self, approximate: Approximate, queries: Tensor, keep: int, *, plain: bool
    ) -> "Strongest":
        if not plain:
            raise ValueError(
                "An approximate search has no other modes than 'dot', no filters and no totals; leave it out."
            )
        if approximate.n != self.n_rows:
            raise ValueError(
                f"The approximate structure was made of {approximate.n:,} rows, the index has {self.n_rows:,} now; "
                "make it again with Approximate.build(index)."
            )
        return approximate.strongest(queries, keep)

    def _groups(self, column: str | None) -> tuple[list[str], Int[Tensor, " row"] | None]:
        if column is None:
            return [], None
        return groups_of(self.metadata(torch.arange(self.n_rows)), column)

    def _totals(
        self,
        found: "Strongest",
        scale: float,
        column: str,
        names: list[str],
        groups: Tensor,
        wanted: Tensor | None,
    ) -> GroupTotals:
        counted = groups if wanted is None else groups[wanted]
        raised, lowered = (scale * found.totals + 0.0).flip(0).float()
        return GroupTotals(
            column=column,
            names=names,
            counts=counted.bincount(minlength=len(names)).tolist(),
            raised=raised,
            lowered=lowered,
        )

    def _merged(
        self,
        found: "Strongest",
        kept: Tensor,
        rows: Tensor,
        keep: int,
        least: float,
        content: Callable[[str], Any] | None,
    ) -> tuple[Tensor, Tensor, list[int], dict[str, Any]]:
        """Hits of which none is a near-duplicate of another, their rows, and how many each stands for."""
        ids = self.ids(kept)
        first = clusters(
            rows, least=least, content=None if content is None else [content(i) for i in ids]
        )
        ends = [torch.searchsorted(kept, x).where(x >= 0, -1) for x in found.index]
        chosen, counts = shown_once(first, ends, keep)
        picked = torch.tensor(chosen, dtype=torch.int64)
        members: dict[int, list[str]] = {}
        for name, leader in zip(ids, first.tolist(), strict=True):
            members.setdefault(leader, []).append(name)
        told = {ids[i]: members[i] for i in chosen if len(members[i]) > 1}
        return kept[picked], rows[picked], counts, {"copies": told}

    def _facts(self, mode: str, asked: Asked, seconds: float) -> dict[str, Any]:
        journal = self.journal
        return {
            "method": "index",
            "papers": PAPERS[journal.space["kind"]],
            "unit": "nats" if mode == "dot" else "",
            "mode": mode,
            "index": {
                "kind": journal.space["kind"],
                "dtype": journal.dtype,
                "numbers_per_row": self.encoding.dim,
            }
            | journal.facts,
            "damping": journal.space["damping"],
            "n_train": journal.n_train,
            "scanned": len(self),
            "seconds_queries": asked.seconds,
            "seconds_search": seconds,
            "made_from": journal.made_from,
        }
