"""A person's own text files as records: JSON lines, JSON, CSV, Parquet, plain text, saved datasets.

A record is a text, a prompt with its completion, or a chat. Every other column travels along as
metadata, and every record has an id by which results name it.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from headwater.core.fingerprint import fingerprint_json

Row = tuple[str, dict[str, Any]]  # where it stands, such as "train.jsonl:17", and its columns
Message = dict[str, str]  # role and content
Unit = Literal["paragraph", "line", "file"]

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Records:
    """Texts, or prompts with completions, or chats; exactly one of the three is there.

    Attributes:
        ids: One unique name for each record.
        texts: Plain texts.
        prompts: What completions answer; as many as `completions`.
        completions: What was, or would be, said after each prompt.
        messages: Chats: lists of messages with a role and a content.
        spans: First character, and the one after the last, of what is scored of each completion or of a chat's last
            turn of the assistant, and None where that is all; what comes after a span is left out.
        metadata: Every other column, one value for each record.
        source: The file or folder they were read from.
    """

    ids: list[str]
    texts: list[str] | None = None
    prompts: list[str] | None = None
    completions: list[str] | None = None
    messages: list[list[Message]] | None = None
    metadata: dict[str, list] = field(default_factory=dict)
    source: str = ""
    spans: list[tuple[int, int] | None] | None = None

    def __post_init__(self):
        kinds = {"texts": self.texts, "prompts": self.prompts, "messages": self.messages}
        given = [name for name, column in kinds.items() if column is not None]
        if len(given) != 1 or (self.prompts is None) != (self.completions is None):
            raise ValueError(
                "Records hold texts, or prompts with completions, or messages: one of the three; "
                f"got {', '.join(given) or 'none'}."
            )
        given = kinds | {"completions": self.completions, "spans": self.spans}
        for name, column in (given | self.metadata).items():
            if column is not None and len(column) != len(self.ids):
                raise ValueError(
                    f"Expected {len(self.ids)} values in {name!r}, one for each id; "
                    f"got {len(column)}."
                )

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """A digest of ids, content and metadata; where the file lies does not matter."""
        content = [self.texts, self.prompts, self.completions, self.messages]
        return fingerprint_json([self.ids, content, self.metadata])


def read_records(
    path: str | Path,
    *,
    text: str = "text",
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    id: str | None = "id",
    unit: Unit = "paragraph",
    errors: Literal["strict", "replace"] = "strict",
    limit: int | None = None,
) -> Records:
    """Read .jsonl, .ndjson, .json, .csv, .parquet, .arrow or .txt, or a folder of those.

    A folder written by the `datasets` package (`save_to_disk`) is read as well. Without options, a
    column `messages` makes chats, columns `prompt` and `completion` make pairs, and else `text` is
    the text.

    Args:
        path: A file or a folder.
        text: Column of the text.
        prompt: Column of the prompt, together with `completion`.
        completion: Column of the completion.
        messages: Column of the chat, a list of `{"role": …, "content": …}`.
        id: Column of the ids where there is one, else records are named by file and number, as in
            "train.jsonl:17". None numbers them in any case.
        unit: What one record of a .txt file is: a paragraph (between blank lines), a line, all.
        errors: "replace" puts � for bytes that are not UTF-8 instead of refusing the file.
        limit: Read this many records at most.

    Raises:
        FileNotFoundError: There is no such file; the message names those with a similar name.
        ValueError: The content cannot be used; the message says where and what to do.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}.")
    rows = list(islice(_rows(path, unit, errors), limit))
    if not rows:
        raise ValueError(f"{path} is empty: it holds no examples.")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    chosen = _recognise(
        columns, path, text=text, prompt=prompt, completion=completion, messages=messages
    )
    content = {
        kind: [_content(kind, column, where, row) for where, row in rows]
        for kind, column in chosen.items()
    }
    id = id if id in columns else _no_id(id, columns, path)
    used = {*chosen.values(), id}
    return Records(
        ids=_ids(rows, id),
        metadata={
            name: _plain([row.get(name) for _, row in rows]) for name in columns if name not in used
        },
        source=str(path),
        **content,
    )


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a table as they stand, whatever their columns: .csv, .parquet, .jsonl and the others of `read_records`.

    Returns:
        For each row where it stands, such as "scores.csv:17", and its columns.

    Raises:
        FileNotFoundError: There is no such file; the message names those with a similar name.
        ValueError: The file cannot be read, or holds no rows.
    """
    path = Path(path)
    rows = list(_rows(path, "line", "strict"))
    if not rows:
        raise ValueError(f"{path} is empty: it holds no rows.")
    return rows


def csv_bytes(columns: Mapping[str, Sequence]) -> bytes:
    r"""Columns of equal length as a CSV file, with a heading.

    Example:
        >>> csv_bytes({"id": ["a"], "score": [0.5]})
        b'id,score\r\na,0.5\r\n'
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(columns)
    rows.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def cell(value: Any) -> Any:
    """The value as a spreadsheet shows it: text that would be run as a formula gets an apostrophe in front.

    Example:
        >>> cell("=1+1"), cell("-0.5"), cell("a = b"), cell(3)
        ("'=1+1", '-0.5', 'a = b', 3)
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


# Which columns


def _recognise(columns: Sequence[str], path: Path, *, text: str, **options: str | None) -> dict:
    """Field of `Records` to column."""
    prompt, completion, messages = (options[name] for name in ("prompt", "completion", "messages"))
    if (prompt is None) != (completion is None):
        raise ValueError("Pass prompt and completion together; got only one of them.")
    if messages is not None and prompt is not None:
        raise ValueError("Pass messages, or prompt and completion, not both.")
    if messages is None and prompt is None and text == "text":
        if "messages" in columns:
            messages = "messages"
        elif {"prompt", "completion"} <= set(columns):
            prompt, completion = "prompt", "completion"
    if messages is not None:
        chosen = {"messages": messages}
    elif prompt is not None:
        chosen = {"prompts": prompt, "completions": completion}
    else:
        chosen = {"texts": text}
    for kind, column in chosen.items():
        if column not in columns:
            option = kind.removesuffix("s") if kind != "messages" else kind
            near = difflib.get_close_matches(str(column), columns, n=1)
            raise ValueError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, columns))}. "
                f"Pass {option}={near[0] if near else 'the column to use'!r}."
            )
    return chosen


def _no_id(id: str | None, columns: Sequence[str], path: Path) -> None:
    if id not in (None, "id"):
        raise ValueError(
            f"{path} has no column {id!r}; it has {', '.join(map(repr, columns))}. "
            "Pass id=None to number the records."
        )


def _content(kind: str, column: str, where: str, row: dict[str, Any]) -> Any:
    value = row.get(column)
    if kind == "messages":
        return _chat(value, column, where)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {column!r} must be text; got {_name(value)}. Correct the record, or name "
            "another column."
        )
    return value


def _chat(value: Any, column: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {column!r} must be a list of messages; got {_name(value)}.")
    for number, message in enumerate(value, start=1):
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") not in ROLES or not isinstance(fields.get("content"), str):
            raise ValueError(
                f"{where}: message {number} of {column!r} must have a 'role' among "
                f"{', '.join(ROLES)} and a text as 'content'; got {_shown(message)}."
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _ids(rows: Sequence[Row], id: str | None) -> list[str]:
    first: dict[str, str] = {}
    for where, row in rows:
        value = where if id is None else row.get(id)
        if not isinstance(value, str | int) or value == "":
            raise ValueError(
                f"{where} has no usable {id!r} ({_name(value)}); complete the column, or pass "
                "id=None to number the records."
            )
        if str(value) in first:
            raise ValueError(
                f"{where} has the id {str(value)!r}, as {first[str(value)]} has; make ids unique, "
                "or pass id=None to number the records."
            )
        first[str(value)] = where
    return list(first)


def _plain(column: list) -> list:
    """Values that tables and JSON can hold: numbers, texts and None, of one type a column."""
    kinds = {type(value) for value in column if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {int, float}:
        return column
    return [
        value if value is None or isinstance(value, str) else json.dumps(value, default=str)
        for value in column
    ]


def _name(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {_shown(value)}"


def _shown(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:60]}…"


# Files to rows


def _rows(path: Path, unit: Unit, errors: str) -> Iterator[Row]:
    if not path.exists():
        raise FileNotFoundError(_missing(path))
    if path.is_file():
        yield from _read_file(path, path.name, unit, errors)
    elif (path / "dataset_dict.json").exists():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise ValueError(
            f"{path} holds several datasets: {', '.join(splits)}. Point to one, as in "
            f"{path / splits[0] if splits else path}."
        )
    elif (path / "state.json").exists():
        yield from _saved_dataset(path)
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise ValueError(
                f"{path} holds no file of a kind that can be read: {', '.join(READERS)}."
            )
        for file in files:
            yield from _read_file(file, file.relative_to(path).as_posix(), unit, errors)


def _read_file(path: Path, name: str, unit: Unit, errors: str) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} is of no kind that can be read; expected a name that ends in one of "
            f"{', '.join(READERS)}."
        )
    options = {"unit": unit} if reader is _text_file else {}
    yield from reader(path, name, partial(_decode, path=path, errors=errors), **options)


def _decode(data: bytes, *, path: Path, errors: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}. "
            "Convert the file, or pass errors='replace'."
        ) from error


Decode = Callable[..., str]


def _json_lines(path: Path, name: str, decode: Decode) -> Iterator[Row]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decode(line, offset=offset).removeprefix("\ufeff").strip()
            offset += len(line)
            if not text:
                continue
            where = f"{name}:{number}"
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                place = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                what = getattr(error, "msg", str(error))
                raise ValueError(
                    f"{path}:{number}: not valid JSON{place} ({what}): {_shown(text)}"
                ) from error
            yield where, _object(row, f"{path}:{number}")


def _json_list(path: Path, name: str, decode: Decode) -> Iterator[Row]:
    text = decode(path.read_bytes()).removeprefix("\ufeff")
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON, column {error.colno} ({error.msg}). If every "
            "line is an object of its own, name the file .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects; it holds {_name(rows)}.")
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", _object(row, f"{path}, item {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"text": …}}; got {_name(row)}.')
    return row


def _csv(path: Path, name: str, decode: Decode) -> Iterator[Row]:
    text = decode(path.read_bytes()).removeprefix("\ufeff")
    with _long_fields():
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            header = next(lines, None)
            for number, values in enumerate((v for v in lines if v), start=1):
                if len(values) != len(header or ()):
                    raise ValueError(
                        f"{path}:{lines.line_num}: {len(values)} fields where the header has "
                        f"{len(header or ())}; put texts that hold commas or line breaks in quotes."
                    )
                yield f"{name}:{number}", dict(zip(header or (), values, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}:{lines.line_num}: not valid CSV ({error}).") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)  # the module's limit of 128 KiB is short for texts
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _text_file(path: Path, name: str, decode: Decode, *, unit: Unit) -> Iterator[Row]:
    text = decode(path.read_bytes()).removeprefix("\ufeff").replace("\r\n", "\n")
    lines = text.split("\n")
    if unit == "file":
        pieces = [text.strip()]
    elif unit == "line":
        pieces = [line.strip() for line in lines]
    elif unit == "paragraph":
        pieces = "\n".join(line if line.strip() else "" for line in lines).split("\n\n")
        pieces = [piece.strip() for piece in pieces]
    else:
        raise ValueError(f"Expected unit 'paragraph', 'line' or 'file'; got {unit!r}.")
    for number, piece in enumerate(filter(None, pieces), start=1):
        yield f"{name}:{number}", {"text": piece}


def _parquet(path: Path, name: str, decode: Decode) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if not path.stat().st_size:
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}.") from error


def _arrow(path: Path, name: str, decode: Decode) -> Iterator[Row]:
    import pyarrow

    if not path.stat().st_size:
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            try:
                yield from _batches(pyarrow.ipc.open_stream(source), name)
            except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
                source.seek(0)
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                yield from _batches(batches, name)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no Arrow file that can be read: {error}.") from error


def _batches(batches: Any, name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{name}:{number}", row


def _saved_dataset(path: Path) -> Iterator[Row]:
    """A folder of the `datasets` package: `state.json` names its Arrow files in order."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{path} is a selection from another dataset; save it with "
            "dataset.flatten_indices().save_to_disk(…)."
        )
    number = 0
    for entry in state.get("_data_files", []):
        file = path / Path(entry["filename"]).name
        if not file.exists():
            raise ValueError(f"{path} lacks its file {file.name}; copy the whole folder.")
        for _, row in _arrow(file, file.name, _decode):
            number += 1
            yield f"{path.name}:{number}", row


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, and neither does the folder {path.parent}; check the path."
    names = [p.name for p in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"{path} does not exist; " + (
        f"did you mean {' or '.join(near)}?" if near else "check the path."
    )


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text_file,
}
