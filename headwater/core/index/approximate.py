"""Approximate search by FAISS, with the recall that was measured against the exact scan.

An inner product of rows is an influence, so that a nearest-neighbour structure for inner products finds the strongest
examples without looking at all: worth it from millions of rows on. Both ends are asked for, one with the query negated.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.core.index.search import blocks, scan
from headwater.core.index.stored import StoredRows
from headwater.core.scoring import Strongest
from headwater.extras import require

Structure = Literal["ivf", "hnsw"]
_SEED = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Approximate:
    """A FAISS structure over the rows of an index, in memory.

    Attributes:
        index: The FAISS index, whose numbers are positions.
        n: Positions of the index that it was made of.
        recall: Share of the ten largest and ten smallest products that it found, over sampled rows as queries.
        structure: "ivf" (lists of like rows, some of which are looked through) or "hnsw" (a graph).
    """

    index: Any
    n: int
    recall: float
    structure: Structure

    @classmethod
    def build(
        cls,
        stored: StoredRows,
        structure: Structure = "ivf",
        *,
        probes: int = 16,
        sample: int = 64,
    ) -> "Approximate":
        """Make the structure and measure its recall; needs the extra `faiss`.

        Args:
            stored: The index.
            structure: Which.
            probes: Lists that are looked through, for "ivf"; four times as many neighbours are for "hnsw".
            sample: Rows that serve as queries to measure the recall; 0 measures none.

        Raises:
            ImportError: FAISS is not installed.
        """
        faiss = require("faiss", extra="faiss")
        dim, n = stored.encoding.dim, len(stored)
        wanted = stored.live
        if structure == "hnsw":
            made = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
            made.hnsw.efSearch = 4 * probes
            made = faiss.IndexIDMap2(made)
        elif structure == "ivf":
            lists = max(1, min(4096, round(4 * n**0.5), n // 39))
            coarse = faiss.IndexFlatIP(dim)
            made = faiss.IndexIVFFlat(coarse, dim, lists, faiss.METRIC_INNER_PRODUCT)
            made.own_fields = True
            coarse.this.disown()
            made.nprobe = min(probes, lists)
            chosen = _some(wanted, 40 * lists)
            made.train(stored.rows(chosen).numpy())
        else:
            raise ValueError(f"Expected a structure 'ivf' or 'hnsw'; got {structure!r}.")
        for rows, index, first in blocks(stored, wanted, once=True):
            places = first + (torch.arange(len(rows)) if index is None else index)
            made.add_with_ids(rows.numpy(), places.numpy())
        recall = _recall(stored, made, sample) if sample else float("nan")
        return cls(index=made, n=stored.n_rows, recall=recall, structure=structure)

    def strongest(self, queries: Float[Tensor, "query dim"], keep: int) -> Strongest:
        """The strongest rows that it finds, as the exact scan would tell them, without totals."""
        return _strongest(self.index, queries, keep)


def _some(live: Tensor, n: int) -> Int[Tensor, " some"]:
    """Some positions of rows that are there, ascending."""
    there = live.nonzero().flatten()
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(_SEED))
    return there[order[:n].sort().values]


def _strongest(index: Any, queries: Tensor, keep: int) -> Strongest:
    found = Strongest(len(queries), keep)
    rows = queries.float().contiguous()
    for side, sign in enumerate((1.0, -1.0)):
        scores, places = (torch.from_numpy(x) for x in index.search((sign * rows).numpy(), keep))
        # a query that found too few has places of -1, which no row has
        found.ends[side] = torch.where(places < 0, -sign * float("inf"), sign * scores).double()
        found.index[side] = places
    return found


def _recall(stored: StoredRows, index: Any, sample: int) -> float:
    queries = stored.rows(_some(stored.live, sample))
    k = min(10, len(stored))
    exact, found = scan(stored, queries, k), _strongest(index, queries, k)
    shares = [
        len(set(a.tolist()) & set(b.tolist())) / k
        for side in range(2)
        for a, b in zip(exact.index[side], found.index[side], strict=True)
    ]
    return sum(shares) / len(shares)
