import csv
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.data.text import Records, read_records

ROWS = [
    {"text": "The river runs, to the sea.", "topic": "water", "year": 1901},
    {"text": "A hill\nrises.", "topic": "land", "year": 1902},
    {"text": "“Old” city \u2028 Zürich", "topic": "land", "year": 1903},
]


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, rows=ROWS):
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text(lines(rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    records = read_records(write(tmp_path / name))
    assert records.texts == [row["text"] for row in ROWS]
    assert records.ids == [f"{name}:{i}" for i in (1, 2, 3)]
    assert records.metadata["topic"] == ["water", "land", "land"]
    assert [int(year) for year in records.metadata["year"]] == [1901, 1902, 1903]
    assert records.source == str(tmp_path / name)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_survives_json_lines_and_csv(tmp_path_factory, texts):
    rows = [{"text": text, "n": str(i)} for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("any")
    assert read_records(write(folder / "a.jsonl", rows)).texts == texts
    if not any("\0" in text for text in texts):
        assert read_records(write(folder / "a.csv", rows)).texts == texts


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("paragraph", ["One\ntwo", "three"]),
        ("line", ["One", "two", "three"]),
        ("file", ["One\ntwo\n \n\nthree"]),
    ],
)
def test_plain_text_is_cut_into_paragraphs_lines_or_not_at_all(tmp_path, unit, texts):
    (tmp_path / "a.txt").write_bytes(b"One\r\ntwo\r\n \r\n\r\nthree\r\n")
    assert read_records(tmp_path / "a.txt", unit=unit).texts == texts


def test_pairs_and_chats_are_recognised_and_a_named_column_wins(tmp_path):
    pair = {"prompt": "To the", "completion": " sea", "text": "x", "k": 1}
    found = read_records(write(tmp_path / "pairs.jsonl", [pair]))
    assert (found.prompts, found.completions, found.texts) == (["To the"], [" sea"], None)
    assert found.metadata == {"text": ["x"], "k": [1]}
    assert read_records(tmp_path / "pairs.jsonl", text="completion").texts == [" sea"]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = read_records(write(tmp_path / "chat.parquet", [{"messages": chat}]))
    assert found.messages == [chat]
    swapped = read_records(tmp_path / "pairs.jsonl", prompt="completion", completion="prompt")
    assert (swapped.prompts, swapped.completions) == ([" sea"], ["To the"])


def test_an_id_column_names_the_records_unless_it_is_declined(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": 7, "text": "a"}, {"id": "x", "text": "b"}])
    assert read_records(path).ids == ["7", "x"]
    assert read_records(path, id=None).ids == ["a.jsonl:1", "a.jsonl:2"]
    assert read_records(path, id=None).metadata == {"id": ["7", "x"]}


def test_a_number_is_that_of_the_line_so_blank_lines_count(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_records(tmp_path / "a.jsonl").ids == ["a.jsonl:1", "a.jsonl:3"]


def test_a_folder_is_read_file_by_file_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "z.jsonl", ROWS[:1])
    write(tmp_path / "a.csv", ROWS[1:])
    (tmp_path / "notes.md").write_text("not data")
    records = read_records(tmp_path)
    assert records.ids == ["a.csv:1", "a.csv:2", "b/z.jsonl:1"]
    assert read_records(tmp_path, limit=2).ids == ["a.csv:1", "a.csv:2"]


def test_a_saved_dataset_is_read_in_the_order_of_its_state(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, rows in (("data-b.arrow", ROWS[:1]), ("data-a.arrow", ROWS[1:])):
        write(folder / name, rows)
    files = [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text("{}")
    records = read_records(folder)
    assert records.texts == [row["text"] for row in ROWS]
    assert records.ids == ["saved:1", "saved:2", "saved:3"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
    with pytest.raises(ValueError, match=r"several datasets: saved"):
        read_records(tmp_path)


def test_metadata_become_values_that_a_table_can_hold(tmp_path):
    rows = [{"text": "a", "tags": ["x"], "n": 1}, {"text": "b", "n": "two"}]
    found = read_records(write(tmp_path / "a.jsonl", rows)).metadata
    assert found == {"tags": ['["x"]', None], "n": ["1", "two"]}
    assert len(pa.table(found)) == 2


def test_the_fingerprint_knows_content_and_not_the_place(tmp_path):
    (tmp_path / "x").mkdir()
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "x" / "a.jsonl")
    assert read_records(one).fingerprint() == read_records(two).fingerprint()
    write(two, [*ROWS[:2], ROWS[2] | {"text": "changed"}])
    assert read_records(one).fingerprint() != read_records(two).fingerprint()


def check(path, error, *parts, **options):
    with pytest.raises(error) as caught:
        read_records(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_is_answered_with_similar_names(tmp_path):
    write(tmp_path / "train.jsonl")
    check(tmp_path / "trian.jsonl", FileNotFoundError, "did you mean train.jsonl")
    check(tmp_path / "no" / "x.jsonl", FileNotFoundError, "neither does the folder")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    check(tmp_path / name, ValueError, name, "empty")


def test_a_broken_line_is_named_with_what_is_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    check(path, ValueError, "a.jsonl:2", "column 13", '{"text": "b"')
    path.write_text('{"text": "a"}\n["b"]\n')
    check(path, ValueError, "a.jsonl:2", "expected an object", "list")
    (tmp_path / "b.json").write_text('{"text": "a"}\n{"text": "b"}')
    check(tmp_path / "b.json", ValueError, "b.json:2", "name the file .jsonl")
    (tmp_path / "c.csv").write_text("text,topic\nA hill, a river,land\n")
    check(tmp_path / "c.csv", ValueError, "c.csv:2", "3 fields where the header has 2")
    (tmp_path / "d.parquet").write_bytes(b"not parquet")
    check(tmp_path / "d.parquet", ValueError, "d.parquet", "no Parquet file")


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "a", "Text": "b"}])
    check(path, ValueError, "no column 'text'", "'body', 'Text'", "text='Text'")
    check(path, ValueError, "no column 'key'", "id=None", id="key", text="body")
    check(path, ValueError, "together", prompt="body")


def test_bytes_that_are_not_utf8_are_placed_and_can_be_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "Z\xfcrich"}\n')
    check(path, ValueError, "not UTF-8", "0xfc", "offset 25", "errors='replace'")
    assert read_records(path, errors="replace").texts == ["a", "Z�rich"]


def test_values_of_the_wrong_type_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 3}])
    check(path, ValueError, "a.jsonl:2", "'text' must be text", "int 3")
    path = write(tmp_path / "b.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}])
    check(path, ValueError, "b.jsonl:1", "message 1", "'role'", "robot")


def test_an_id_that_comes_twice_is_named_with_both_places(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": k, "text": "t"} for k in ("a", "b", "a")])
    check(path, ValueError, "a.jsonl:3", "a.jsonl:1", "'a'")
    path = write(tmp_path / "b.jsonl", [{"id": "a", "text": "t"}, {"text": "t"}])
    check(path, ValueError, "b.jsonl:2", "no usable 'id'")


def test_an_unknown_kind_of_file_lists_those_that_can_be_read(tmp_path):
    (tmp_path / "a.docx").touch()
    check(tmp_path / "a.docx", ValueError, ".jsonl", ".parquet")
    check(tmp_path, ValueError, "no file of a kind")


def test_records_hold_one_kind_of_content():
    with pytest.raises(ValueError, match="one of the three"):
        Records(ids=["a"], texts=["x"], prompts=["y"], completions=["z"])
    with pytest.raises(ValueError, match="Expected 1 values in 'topic'"):
        Records(ids=["a"], texts=["x"], metadata={"topic": []})
