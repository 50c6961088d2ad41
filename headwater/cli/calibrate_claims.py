"""`headwater calibrate draw` and `select`: claims with error control, from scores and a few verified examples."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from headwater.cli.common import emit_json, say
from headwater.cli.flags import require

if TYPE_CHECKING:
    from headwater.calibrate import Selection
    from headwater.data.text import Row

SCORE_COLUMNS = ("score", "label_score")  # tried in this order where --score is left out
YES, NO = ("true", "yes", "y", "1", "wrong"), ("false", "no", "n", "0", "right")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of scores, and which of its rows are asked about.

    Args:
        scores: CSV, Parquet or JSONL with a row for each example.
        score: Column of the scores; score or label_score when left out.
        id: Column of the ids.
        suspicious: Which scores are suspicious; low for a column named label_score and else high when left out.
        among: Ask only about so many of the most suspicious examples.
    """

    scores: tyro.conf.Positional[Path]
    score: str | None = None
    id: str = "id"
    suspicious: Literal["high", "low"] | None = None
    among: int | None = None

    def check(self) -> None:
        """Refuse to ask about fewer examples than one can be verified and one claimed of."""
        require("--among", self.among, "at least 2", self.among is None or self.among >= 2)


@dataclass(frozen=True, kw_only=True)
class Draw(Table):
    """Draw the examples to verify, at random.

    The table it writes has a column `wrong` to be filled with yes or no; scores are not in it, so as to sway no one.

    Example: headwater calibrate draw scores.csv --n 300 --among 1000 --out to-verify.csv

    Args:
        n: How many.
        out: The table to write, CSV or Parquet.
        seed: Seed of the draw.
        json: Print the ids as JSON.
    """

    n: int
    out: Path
    seed: int = 0
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Select(Table):
    """Claim examples to be wrong, with a promise about false claims.

    Give --eta or --share before looking at what was verified, and --among as for the draw.

    Example: headwater calibrate select scores.csv --verified to-verify.csv --among 1000 --share 0.1

    Args:
        verified: CSV, Parquet or JSONL with the ids that were drawn and what was found.
        wrong: Its column of outcomes: yes or no, true or false, 1 or 0.
        eta: Most false claims that there may be.
        share: Most of the claims that may be false, as a share of them: 0.1 is 10 %.
        alpha: Probability of more: 0.05 is 95 % confidence.
        out: The table to write, CSV or Parquet; beside the scores when left out.
        replace: Replace a table that is there and holds something else.
        json: Print the result as JSON.
    """

    verified: Path
    wrong: str = "wrong"
    eta: int | None = None
    share: float | None = None
    alpha: float = 0.05
    out: Path | None = None
    replace: bool = False
    json: bool = False

    def check(self) -> None:
        """Refuse promises that are none, before anything is read."""
        super().check()
        if (self.eta is None) == (self.share is None):
            raise ValueError("Give --eta, a number of false claims, or --share, a share of them.")
        require("--alpha", self.alpha, "above 0 and below 1", 0 < self.alpha < 1)
        given = (self.scores.resolve(), self.verified.resolve())
        if self.out is not None and self.out.resolve() in given:
            raise ValueError(
                f"--out {self.out} would be written over what is read; choose another."
            )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The rows that are asked about, with their scores."""

    rows: "list[Row]"
    ids: list[str]
    scores: list[float]
    suspicious: Literal["high", "low"]


def draw(command: Draw) -> int:
    from headwater.calibrate import draw_sample
    from headwater.data.text import cell

    if command.out.exists():  # it may hold what someone has verified
        raise ValueError(f"{command.out} exists; choose another --out, or remove it first.")
    pool = _pool(command)
    chosen = draw_sample(len(pool.ids), command.n, seed=command.seed).tolist()
    hidden = {command.id, _score_column(command, pool.rows), "wrong"}
    others = [name for name in pool.rows[0][1] if name not in hidden]
    ids = [pool.ids[i] for i in chosen]
    columns: dict[str, list] = {command.id: ids, "wrong": [""] * len(chosen)}
    columns |= {name: [cell(pool.rows[i][1].get(name)) for i in chosen] for name in others}
    _write(command.out, columns, replace=False)
    if command.json:
        emit_json({"ids": ids, "of": len(pool.ids), "out": command.out})
        return 0
    say(
        f"{command.n:,} of {len(pool.ids):,} examples drawn; fill in the column wrong of {command.out}."
    )
    return 0


def select(command: Select) -> int:
    import torch

    from headwater.calibrate import select

    pool = _pool(command)
    verified, wrong = _outcomes(command, pool.ids)
    found = select(
        torch.tensor(pool.scores, dtype=torch.float64),
        torch.tensor(verified),
        torch.tensor(wrong),
        eta=command.eta,
        share=command.share,
        alpha=command.alpha,
        suspicious=pool.suspicious,
    )
    out = command.out or command.scores.with_name(f"{command.scores.stem}-claims.csv")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; choose another --out for the table.")
    columns = {command.id: pool.ids} | found.table()
    order = sorted(range(len(pool.ids)), key=pool.scores.__getitem__)
    order = order if pool.suspicious == "low" else order[::-1]
    columns = {name: [values[i] for i in order] for name, values in columns.items()}
    _write(out, columns, replace=command.replace)
    if command.json:
        claimed = [
            i for i, yes in zip(columns[command.id], columns["selected"], strict=True) if yes
        ]
        emit_json({"sentence": found.sentence} | _plain(found) | {"ids": claimed, "out": out})
        return 0
    print(found.sentence)
    say(f"Kept in {out}.")
    return 0


def _plain(found: "Selection") -> dict[str, Any]:
    return {k: v for k, v in found.facts.items() if k != "papers"}


def _score_column(command: Table, rows: "list[Row]") -> str:
    names = list(rows[0][1])
    if command.score is None and (known := [c for c in SCORE_COLUMNS if c in names]):
        return known[0]
    return _column(command.scores, names, command.score or "score", "--score")


def _column(path: Path, names: list[str], wanted: str, flag: str) -> str:
    if wanted not in names:
        raise ValueError(
            f"{path} has no column {wanted!r}; it has {', '.join(map(repr, names))}. Name it with {flag}."
        )
    return wanted


def _pool(command: Table) -> Pool:
    """Rows of the table with their scores, the most suspicious ones where only those are asked about."""
    from headwater.data.text import read_rows

    rows = read_rows(command.scores)
    column = _score_column(command, rows)
    suspicious = command.suspicious or ("low" if column == "label_score" else "high")
    scores = [_number(where, column, row.get(column)) for where, row in rows]
    if command.among is not None:
        sign = 1 if suspicious == "low" else -1
        order = sorted(range(len(rows)), key=lambda i: sign * scores[i])
        chosen = sorted(order[: command.among])
        rows, scores = [rows[i] for i in chosen], [scores[i] for i in chosen]
    ids = _ids(command.scores, rows, command.id)
    return Pool(rows=rows, ids=ids, scores=scores, suspicious=suspicious)


def _number(where: str, column: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{where}: {column!r} must be a number; got {value!r}.")
    return number


def _ids(path: Path, rows: "list[Row]", column: str) -> list[str]:
    _column(path, list(rows[0][1]), column, "--id")
    first: dict[str, str] = {}
    for where, row in rows:
        name = str(row.get(column))
        if name in first:
            raise ValueError(f"{where} has the id {name!r}, as {first[name]} has; make ids unique.")
        first[name] = where
    return list(first)


def _outcomes(command: Select, ids: list[str]) -> tuple[list[int], list[bool]]:
    """Numbers of the verified examples, and whether each is wrong."""
    from headwater.data.text import read_rows

    rows = read_rows(command.verified)
    column = _column(command.verified, list(rows[0][1]), command.wrong, "--wrong")
    places = {name: i for i, name in enumerate(ids)}
    verified, wrong = [], []
    for (where, row), name in zip(rows, _ids(command.verified, rows, command.id), strict=True):
        if name not in places:
            hint = ", or --among is not that of the draw" if command.among else ""
            raise ValueError(
                f"{where}: {name!r} is not among the examples of {command.scores}{hint}."
            )
        answer = str(row.get(column)).strip().lower()
        if answer not in YES + NO:
            raise ValueError(
                f"{where}: {column!r} must be yes or no, true or false, 1 or 0; got {row.get(column)!r}. Every example "
                "that was drawn must be verified: leaving out the hard ones would void the promise."
            )
        verified.append(places[name])
        wrong.append(answer in YES)
    return verified, wrong


def _write(path: Path, columns: dict[str, list], *, replace: bool) -> None:
    """A table, whole or not at all; the same one may be there already.

    Raises:
        ValueError: There is another table, or the name does not say how to write it.
    """
    from headwater.core.files import write_bytes

    content = _encoded(path, columns)
    if path.is_file() and not replace:
        if path.read_bytes() == content:
            return
        raise ValueError(
            f"{path} exists and holds something else; choose another --out, or replace it with --replace."
        )
    write_bytes(path, content)


def _encoded(path: Path, columns: dict[str, list]) -> bytes:
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()
    if path.suffix.lower() == ".csv":
        from headwater.data.text import csv_bytes

        return csv_bytes(columns)
    raise ValueError(f"{path} must be named .csv or .parquet, to say how it is to be written.")
