"""The exact scan: blocks of rows from the memory map, matrix products with all queries, the strongest kept.

Memory is that of one block, however many rows there are: pages of the files belong to the system, which takes them
back when it needs them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.core.cost import available_memory_bytes
from headwater.core.index.stored import StoredRows
from headwater.core.scoring import Strongest

Mode = Literal["dot", "cosine", "relatif"]
Where = Mapping[str, Any]
_BLOCK_BYTES = 1 << 22  # of float32 rows, which stay in the processor's cache meanwhile
_SCORE_ROWS = 1 << 13
_NEAR = 1 << 10  # rows held against all others at once


def lengths(stored: StoredRows, mode: Mode) -> Float[Tensor, " row"] | None:
    r"""What the inner product with each row is divided by; None for plain products.

    "relatif" divides by the root of the row's self-influence (Barshan, Brunet and Dziugaite 2020, arXiv:2003.11630),
    "cosine" by that of the query as well.
    """
    return None if mode == "dot" else stored.squares.sqrt()


def divided(scores: Tensor, by: Tensor) -> Tensor:
    """Quotients; zero where a row is zero."""
    return torch.where(by > 0, scores / by.clamp(min=torch.finfo(by.dtype).tiny), 0.0)


def blocks(
    stored: StoredRows, wanted: Bool[Tensor, " row"] | None = None, *, once: bool = False
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Decoded rows block by block: the rows, which of the block's they are (None for all), and its first position.

    The rows are good until the next block, which comes in the same memory.

    Args:
        stored: The index.
        wanted: Rows to look at, all when left out.
        once: Each row is read a single time, so that rows which lie ready need not fit the processor's cache.
    """
    plain = stored.encoding.in_place
    step = max(16, _BLOCK_BYTES // (4 * stored.encoding.dim))
    if plain and once:
        step = max(step, _SCORE_ROWS)
    buffer = None if plain else torch.empty(step, stored.encoding.dim)
    total = sum(s.layout.size for s in stored.shards)
    resident = total < available_memory_bytes() // 4
    for first, shard in zip(stored.starts[:-1], stored.shards, strict=True):
        for start in range(0, len(shard), step):
            stop = min(start + step, len(shard))
            some = None if wanted is None else wanted[first + start : first + stop]
            if some is None or bool(some.all()):
                yield (
                    shard.rows(slice(start, stop), _part(buffer, stop - start)),
                    None,
                    first + start,
                )
            elif bool(some.any()):
                index = some.nonzero().flatten()
                yield shard.rows(start + index, _part(buffer, len(index))), index, first + start
        if not resident:
            shard.release()


def _part(buffer: Tensor | None, n: int) -> Tensor | None:
    return None if buffer is None else buffer[:n]


def products(
    stored: StoredRows, queries: Float[Tensor, "query dim"], wanted: Bool[Tensor, " row"] | None
) -> Iterator[tuple[Float[Tensor, "query row"], Int[Tensor, " row"]]]:
    """Inner products of the queries with the wanted rows, several blocks at once, and the rows' positions."""
    parts: list[Tensor] = []
    places: list[Tensor] = []
    held = 0
    for rows, index, first in blocks(stored, wanted, once=len(queries) == 1):
        parts.append(_product(queries, rows))
        places.append(first + (torch.arange(len(rows)) if index is None else index))
        held += len(rows)
        if held >= _SCORE_ROWS:
            yield torch.cat(parts, dim=1), torch.cat(places)
            parts, places, held = [], [], 0
    if parts:
        yield torch.cat(parts, dim=1), torch.cat(places)


def _product(queries: Tensor, rows: Tensor) -> Tensor:
    if len(queries) == 1:
        return torch.mv(rows, queries[0])[None]
    return queries @ rows.mT


def scan(
    stored: StoredRows,
    queries: Float[Tensor, "query dim"],
    keep: int,
    *,
    mode: Mode = "dot",
    wanted: Bool[Tensor, " row"] | None = None,
    groups: Int[Tensor, " row"] | None = None,
) -> Strongest:
    """The strongest rows of each query on both sides, and totals over all, with positions for names.

    Args:
        stored: The index.
        queries: Rows of the queries, ready for plain inner products.
        keep: How many to keep on each side.
        mode: What the products are divided by; queries are divided by the caller.
        wanted: Rows to look at, those that are there when left out.
        groups: Group of each position, for totals.
    """
    if wanted is None and len(stored) < stored.n_rows:
        wanted = stored.live
    found = Strongest(len(queries), keep, groups)
    by = lengths(stored, mode)
    for scores, places in products(stored, queries.float(), wanted):
        found.add(scores if by is None else divided(scores, by[places]), places)
    return found


def matching(stored: StoredRows, where: Where | None) -> Bool[Tensor, " row"]:
    """Which rows are there and have the metadata asked for.

    Args:
        stored: The index.
        where: For each column a value, a list or set of values, or a pair (lowest, highest), both included, in which
            None stands for no limit.

    Raises:
        ValueError: There is no such column, or its values cannot be compared with the limits.
    """
    mask = stored.live
    for column, asked in (where or {}).items():
        values = _column(stored, column, asked)
        mask = mask & _compare(values, column, asked)
    return mask


def _column(stored: StoredRows, name: str, asked: Any) -> Any:
    import pyarrow

    columns = {n.partition(":")[2]: n for n in stored.columns.column_names if ":" in n}
    if name == "id":
        return stored.columns.column("id")
    if name not in columns:
        there = ", ".join(["id", *columns])
        raise ValueError(f"There is no metadata column {name!r} in the index; there are: {there}.")
    full = columns[name]
    column = stored.columns.column(full)
    if full.startswith("meta:"):
        return column
    values = stored.revived(full, column.to_pylist())[1]
    sorts = {type(v) for v in values if v is not None}
    if sorts and sorts <= {int, float}:
        return pyarrow.array(values, type=pyarrow.float64())
    if sorts != {str}:
        if isinstance(asked, tuple):
            raise ValueError(
                f"The metadata column {name!r} holds values of several types, which have no order; name the values "
                "instead of a range."
            )
        values = [str(v) for v in values]
    return pyarrow.array(values)


def _compare(values: Any, name: str, asked: Any) -> Tensor:
    import pyarrow
    import pyarrow.compute as pc

    try:
        if isinstance(asked, tuple):
            if len(asked) != 2:
                raise ValueError("a range is a pair (lowest, highest)")
            low, high = asked
            mask = pc.is_valid(values)  # type: ignore[attr-defined]
            for limit, compare in ((low, pc.greater_equal), (high, pc.less_equal)):  # type: ignore[attr-defined]
                if limit is not None:
                    inside = compare(values, pyarrow.scalar(limit).cast(values.type))
                    mask = pc.and_kleene(mask, inside)  # type: ignore[attr-defined]
        else:
            single = isinstance(asked, str) or not isinstance(asked, Collection)
            wanted = pyarrow.array([asked] if single else list(asked)).cast(values.type)
            mask = pc.is_in(values, value_set=wanted)  # type: ignore[attr-defined]
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise ValueError(
            f"The metadata column {name!r} (of {values.type}) cannot be compared with {asked!r}: {error}."
        ) from error
    return torch.tensor(mask.fill_null(False).to_pylist(), dtype=torch.bool)


def clusters(
    rows: Float[Tensor, "n dim"], *, least: float, content: list[Any] | None = None
) -> Int[Tensor, " n"]:
    """For each row the first of those that are near-duplicates of it, straight or through others.

    Args:
        rows: Rows.
        least: Cosine from which two rows count as duplicates.
        content: What the examples hold, such as their texts; equal ones are duplicates too.

    Example:
        >>> clusters(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), least=0.999).tolist()
        [0, 1, 0]
    """
    first = torch.arange(len(rows))
    same: dict[Any, int] = {}
    for i, what in enumerate(content or []):
        first[i] = same.setdefault(what, i)
    unit = divided(rows, rows.norm(dim=1, keepdim=True))
    for start in range(0, len(rows), _NEAR):
        block = slice(start, start + _NEAR)
        near = (unit[block] @ unit[start:].mT >= least) & (
            first[block, None] != first[None, start:]
        )
        first = _united(first, start + near.nonzero().mT)
    return first


def _united(first: Int[Tensor, " n"], pairs: Int[Tensor, "2 m"]) -> Int[Tensor, " n"]:
    """Groups, each named by its first member, with those of each pair made one."""
    while True:
        names = first[pairs]
        lower = names.amin(0).expand(2, -1)
        first = first.scatter_reduce(0, names.flatten(), lower.flatten(), "amin")
        while not torch.equal(first, first[first]):
            first = first[first]
        if torch.equal(*first[pairs]):
            return first


def shown_once(
    first: Int[Tensor, " n"], ends: Sequence[Int[Tensor, "query hit"]], keep: int
) -> tuple[list[int], list[int]]:
    """Which of n hits to show where duplicates are shown as one, and how many each stands for.

    Args:
        first: The one that stands for each, of `clusters`.
        ends: Hits of each query, the strongest first; -1 for none.
        keep: How many to show for each query.
    """
    chosen: set[int] = set()
    for end in ends:
        for row in end.tolist():
            chosen |= set(list(dict.fromkeys(int(first[i]) for i in row if i >= 0))[:keep])
    counts = first.bincount(minlength=len(first)).tolist()
    return sorted(chosen), [counts[i] for i in sorted(chosen)]
