"""An index open for reading: its rows, ids and metadata, mapped from their files."""

import json
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.core.capture import BatchPlan, plan_batches
from headwater.core.examples import Examples
from headwater.core.files import ArtifactDamaged, ArtifactError, ArtifactMissing, FolderBusy
from headwater.core.index.journal import JOURNAL, REMEDY, Journal, ShardFacts, Source
from headwater.core.index.shards import Shard
from headwater.core.manifest import check_size
from headwater.core.scores import from_column

if TYPE_CHECKING:
    import pyarrow

HOW_TO_MEND = "Run `headwater index verify` to see which rows are damaged, and with --repair to make them again."


def metric_name(number: int) -> str:
    """File of an index's second moments."""
    return f"metric-{number:05}.safetensors"


def source_batches(source: Source, examples: Examples) -> list[BatchPlan]:
    """The batches in which a source's rows were, or will be, made."""
    return plan_batches(examples, batch_size=source.batch_size, batch_tokens=source.batch_tokens)


def require_finished(folder: Path, journal: Journal) -> None:
    """Refuse an index whose first build was not finished.

    Raises:
        ArtifactMissing: It was not.
    """
    if not journal.sources:
        raise ArtifactMissing(
            f"The index in {folder} is not finished; the command that began it goes on where it stopped."
        )


def open_metric(folder: Path, journal: Journal) -> Any:
    """The file of second moments, or None where there is none."""
    from safetensors import SafetensorError, safe_open

    facts = journal.metric
    if facts is None:
        return None
    path = folder / metric_name(facts["number"])
    check_size(path, facts["bytes"])
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ArtifactDamaged(f"{path} cannot be read: {error}. {REMEDY}") from error


def _alike(tables: Sequence["pyarrow.Table"]) -> list["pyarrow.Table"]:
    """The tables with each column of metadata in one form: as JSON in all where its types do not go together."""
    import pyarrow
    from pyarrow import types

    def sort(form: str, kind: Any) -> str:
        number = types.is_integer(kind) or types.is_floating(kind)
        return form if form == "json" else "number" if number else str(kind)

    sorts: dict[str, set[str]] = {}
    for table in tables:
        for field in table.schema:
            form, _, name = field.name.partition(":")
            if name and not types.is_null(field.type):
                sorts.setdefault(name, set()).add(sort(form, field.type))
    found = []
    for table in tables:
        for name in (name for name, several in sorts.items() if len(several) > 1):
            if f"meta:{name}" in table.column_names:
                place = table.column_names.index(f"meta:{name}")
                values = [json.dumps(v, default=str) for v in table.column(place).to_pylist()]
                table = table.set_column(place, f"json:{name}", pyarrow.array(values))
        found.append(table)
    return found


class StoredRows:
    """The files of an index, opened for reading; nothing is written, so that read-only media will do.

    Args:
        folder: Where the index lies.

    Raises:
        ArtifactMissing: There is no index, or its first build is not finished.
        ArtifactDamaged: A file is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for _ in range(100):
            journal = Journal.read(self.folder)
            try:
                self._open(journal)
                return
            except ArtifactError:
                if Journal.read(self.folder) == journal:
                    raise
            time.sleep(0.01)  # a writer has put other files in their place meanwhile
        raise FolderBusy(f"{self.folder} is being changed again and again; try again later.")

    @classmethod
    def of(cls, folder: Path, journal: Journal) -> "StoredRows":
        """The rows that a journal lists, which `index.json` may not say yet."""
        stored = cls.__new__(cls)
        stored.folder = folder
        stored._open(journal)
        return stored

    def _open(self, journal: Journal) -> None:
        require_finished(self.folder, journal)
        self.journal, self.encoding = journal, journal.encoding
        try:
            self.shards = [
                Shard(self.folder / s.rows_file, journal.layout(s)) for s in journal.shards
            ]
            self._tables = [self._table(s) for s in journal.shards]
            self._metric = open_metric(self.folder, journal)
        except ArtifactDamaged as error:
            raise ArtifactDamaged(
                f"{str(error).replace('manifest.json', JOURNAL)} {HOW_TO_MEND}"
            ) from error
        for name in ("squares", "live", "columns"):
            self.__dict__.pop(name, None)

    def _table(self, shard: ShardFacts) -> Any:
        import pyarrow

        path = self.folder / shard.ids_file
        check_size(path, shard.ids["bytes"])
        return pyarrow.memory_map(str(path))

    def metric(self, name: str) -> Tensor | None:
        """A tensor of the file of second moments."""
        if self._metric is None or name not in self._metric.keys():  # noqa: SIM118
            return None
        return self._metric.get_tensor(name)

    @property
    def starts(self) -> list[int]:
        """Position of each shard's first row, and the number of all positions."""
        return list(accumulate((len(s) for s in self.shards), initial=0))

    @property
    def n_rows(self) -> int:
        """Positions: rows that are there, and rows that were removed but not compacted away."""
        return self.starts[-1]

    def __len__(self) -> int:
        return self.journal.n_live

    @cached_property
    def live(self) -> Bool[Tensor, " row"]:
        """Whether the row of each position is there."""
        return torch.cat([s.live() for s in self.journal.shards])

    @cached_property
    def squares(self) -> Float[Tensor, " row"]:
        """Squared length of each row under the index's own inner product: self-influence, but for a factor."""
        parts = []
        for facts, shard in zip(self.journal.shards, self.shards, strict=True):
            own = self.metric(f"squares:{facts.number}")
            own = shard.squares() if own is None else own
            if own.shape != (facts.n,):
                raise ArtifactDamaged(
                    f"{self.folder}: the second moments are not those of shard {facts.number}. {HOW_TO_MEND}"
                )
            parts.append(own)
        return torch.cat(parts)

    def table(self, number: int) -> "pyarrow.Table":
        """Ids and metadata of the number-th shard in the list."""
        import pyarrow
        import pyarrow.parquet

        facts = self.journal.shards[number]
        try:
            self._tables[number].seek(0)
            table = pyarrow.parquet.ParquetFile(self._tables[number]).read()
            kinds = {f.name: f.type for f in table.schema}
            named = kinds.get("id") == pyarrow.string() and kinds.get("number") == pyarrow.int64()
            if not named or table.num_rows != facts.n:
                raise ValueError(f"it is no table of {facts.n} ids and numbers")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            told = str(error).rstrip(".")
            path = self.folder / facts.ids_file
            raise ArtifactDamaged(f"{path} cannot be read: {told}. {HOW_TO_MEND}") from error
        return table

    @cached_property
    def columns(self) -> "pyarrow.Table":
        """Ids, example numbers and metadata of all positions."""
        import pyarrow

        tables = [self.table(i) for i in range(len(self.shards))]
        try:
            alike = _alike(tables)
            return pyarrow.concat_tables(alike, promote_options="permissive").combine_chunks()
        except pyarrow.ArrowException as error:
            raise ArtifactDamaged(
                f"The tables of ids in {self.folder} do not fit together ({error}). {REMEDY}"
            ) from error

    @cached_property
    def offsets(self) -> list[int]:
        """Number of the first example of each source."""
        return list(accumulate((s.n for s in self.journal.sources), initial=0))

    def ids(self, positions: Tensor | None = None) -> list[str]:
        """Ids of the rows at some positions, or of all that are there."""
        return self._taken("id", positions)

    def numbers(self, positions: Tensor | None = None) -> list[int]:
        """Numbers of the examples at some positions: the sources' examples, one source after the other."""
        return self._taken("number", positions)

    def metadata(self, positions: Tensor | None = None) -> dict[str, list]:
        """Columns of metadata at some positions."""
        names = [n for n in self.columns.column_names if n not in ("id", "number")]
        return dict(self.revived(n, self._taken(n, positions)) for n in names)

    def revived(self, name: str, values: list) -> tuple[str, list]:
        """The name and values of a stored column of metadata."""
        try:
            return from_column(name, values)
        except (ValueError, TypeError) as error:
            raise ArtifactDamaged(
                f"The metadata column {name!r} in {self.folder} is not what was written: {error}. {HOW_TO_MEND}"
            ) from error

    def _taken(self, column: str, positions: Tensor | None) -> list:
        positions = self.live.nonzero().flatten() if positions is None else positions
        return self.columns.column(column).take(positions.numpy()).to_pylist()

    def rows(self, positions: Tensor | Sequence[int]) -> Float[Tensor, "n dim"]:
        """Rows at some positions, in float32."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        found = torch.empty(len(positions), self.encoding.dim)
        for start, shard in zip(self.starts[:-1], self.shards, strict=True):
            here = (positions >= start) & (positions < start + len(shard))
            if bool(here.any()):
                found[here] = shard.rows(positions[here] - start)
        return found

    def positions_of(self, ids: Sequence[str]) -> Int[Tensor, " n"]:
        """Positions of the rows of some examples.

        Raises:
            ValueError: An id is not in the index.
        """
        live = self.live.nonzero().flatten()
        place = dict(zip(self.ids(live), live.tolist(), strict=True))
        missing = [i for i in ids if i not in place]
        if missing:
            raise ValueError(
                f"The index in {self.folder} has no example {missing[0]!r}"
                f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}; it holds {len(self):,} examples."
            )
        return torch.tensor([place[i] for i in ids], dtype=torch.int64)
