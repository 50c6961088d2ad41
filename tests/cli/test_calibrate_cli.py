"""`headwater calibrate`: from a table of scores to claims with a promise."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from headwater.calibrate import select
from headwater.cli import main

TOTAL = 400


@pytest.fixture(scope="module")
def truth():
    generator = torch.Generator().manual_seed(0)
    bad = torch.rand(TOTAL, generator=generator) < 0.2
    scores = torch.randn(TOTAL, generator=generator, dtype=torch.float64) + 5 * bad
    return scores, bad


@pytest.fixture
def place(tmp_path, truth):
    scores, _ = truth
    write(
        tmp_path / "scores.csv",
        {
            "id": [f"e{i}" for i in range(TOTAL)],
            "score": scores.tolist(),
            "text": ["a, b"] * TOTAL,
        },
    )
    return tmp_path


def write(path, columns):
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verify(path, truth, answers=("yes", "no")):
    """Fill in the column wrong as a person would."""
    rows = read(path)
    for row in rows:
        number = int(next(iter(row.values()))[1:])
        row["wrong"] = answers[0] if truth[1][number] else answers[1]
    write(path, {name: [row[name] for row in rows] for name in rows[0]})


def test_examples_are_drawn_verified_and_claimed(place, truth, capsys):
    table, drawn = str(place / "scores.csv"), place / "to-verify.csv"
    assert main(["calibrate", "draw", table, "--n", "200", "--out", str(drawn)]) == 0
    rows = read(drawn)
    assert len({row["id"] for row in rows}) == 200 and set(rows[0]) == {"id", "wrong", "text"}
    verify(drawn, truth)
    capsys.readouterr()
    assert main(["calibrate", "select", table, "--verified", str(drawn), "--eta", "5"]) == 0
    printed = capsys.readouterr()
    verified = torch.tensor([int(row["id"][1:]) for row in rows])
    found = select(truth[0], verified, truth[1][verified], eta=5)
    assert printed.out.strip() == found.sentence and "at most 5 of them are false" in printed.out
    kept = read(place / "scores-claims.csv")
    assert [float(r["score"]) for r in kept] == sorted(truth[0].tolist(), reverse=True)
    claimed = {r["id"] for r in kept if r["selected"] == "True"}
    assert claimed == {f"e{i}" for i in found.selected.nonzero().squeeze(1).tolist()}
    assert {r["wrong"] for r in kept if r["verified"] == "False"} == {""}


def test_claims_that_are_there_are_replaced_only_where_that_is_asked_for(place, capsys):
    write(place / "v.csv", {"id": [f"e{i}" for i in range(0, 400, 2)], "wrong": ["no"] * 200})
    words = ["calibrate", "select", str(place / "scores.csv"), "--verified", str(place / "v.csv")]
    out = place / "scores-claims.csv"
    out.write_text("somebody's own")
    assert main([*words, "--eta", "5"]) == 2
    assert "scores-claims.csv exists and holds something else" in capsys.readouterr().err
    assert out.read_text() == "somebody's own"
    assert main([*words, "--eta", "5", "--replace"]) == 0
    kept = out.read_bytes()
    assert main([*words, "--eta", "5"]) == 0 and out.read_bytes() == kept  # the same table
    for name in ("named.csv", "named.parquet"):
        assert main([*words, "--eta", "5", "--out", str(place / name)]) == 0
        assert main([*words, "--eta", "5", "--out", str(place / name)]) == 0
    (place / "named.csv").write_text("")
    assert main([*words, "--eta", "5", "--out", str(place / "named.csv")]) == 2
    assert main([*words, "--eta", "5", "--out", str(place)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert not list(place.glob(".*"))


def test_a_confidence_is_never_rounded_up(place, capsys):
    write(place / "v.csv", {"id": [f"e{i}" for i in range(0, 400, 2)], "wrong": ["no"] * 200})
    words = ["calibrate", "select", str(place / "scores.csv"), "--verified", str(place / "v.csv")]
    assert main([*words, "--eta", "3", "--alpha", "1e-300"]) == 0
    told = capsys.readouterr().out
    assert "with more than 99.99999999 % confidence" in told and "100 %" not in told


def test_a_pool_of_suspicious_examples_in_parquet_and_json(place, truth, capsys):
    scores, _ = truth
    table, drawn = place / "scores.parquet", place / "drawn.csv"
    ids = [f"e{i}" for i in range(TOTAL)]
    columns = {"name": ids, "label_score": (-scores).sigmoid().tolist()}  # low is suspicious
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    pool = ["--id", "name", "--among", "150"]
    out = ["--n", "80", "--out", str(drawn), "--json"]
    assert main(["calibrate", "draw", str(table), *pool, *out]) == 0
    told = json.loads(capsys.readouterr().out)
    suspicious = scores.topk(150).indices.tolist()
    assert told["of"] == 150 and {int(i[1:]) for i in told["ids"]} <= set(suspicious)
    verify(drawn, truth, ("1", "0"))
    flags = ["--verified", str(drawn), "--share", "0.3", "--out", str(place / "c.parquet")]
    assert main(["calibrate", "select", str(table), *pool, *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["suspicious"] == "low" and told["examples"] == 150 and told["claims"] > 0
    assert told["claims"] == len(told["ids"]) and "at most 30 %" in told["sentence"]
    kept = pyarrow.parquet.read_table(place / "c.parquet").to_pydict()
    assert len(kept["name"]) == 150 and sum(kept["selected"]) == told["claims"]


def test_ids_may_be_numbers_and_rows_json_lines(tmp_path, capsys):
    lines = [{"id": i, "score": float(i)} for i in range(60)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write(tmp_path / "v.csv", {"id": list(range(0, 60, 2)), "wrong": [0] * 30})
    words = ["--verified", str(tmp_path / "v.csv"), "--eta", "4", "--json"]
    assert main(["calibrate", "select", str(tmp_path / "s.jsonl"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eta", "3", "--share", "0.1"], "Give --eta"),
        ([], "Give --eta"),
        (["--eta", "3", "--alpha", "0"], "--alpha must be above 0"),
        (["--eta", "3", "--score", "points"], "no column 'points'; it has 'id', 'score', 'text'"),
        (["--eta", "3", "--id", "name"], "no column 'name'"),
        (["--eta", "3", "--wrong", "bad"], "no column 'bad'"),
        (["--eta", "3", "--among", "3"], "not among the examples"),
        (["--eta", "3", "--among", "1"], "at least 2"),
        (["--eta", "500"], "eta must be 0 or more and below"),
        (["--eta", "3", "--out", "x.txt"], "named .csv or .parquet"),
        (["--eta", "3", "--out", "{verified}"], "written over what is read"),
    ],
)
def test_mistakes_are_told_in_a_line(place, truth, capsys, words, message):
    words = [word.format(verified=place / "v.csv") for word in words]
    write(place / "v.csv", {"id": [f"e{i}" for i in range(0, 400, 2)], "wrong": ["no"] * 200})
    verified = ["--verified", str(place / "v.csv")]
    assert main(["calibrate", "select", str(place / "scores.csv"), *verified, *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_unfinished_and_damaged_tables_are_refused(place, truth, capsys):
    table = str(place / "scores.csv")
    write(place / "open.csv", {"id": ["e1", "e2"], "wrong": ["no", ""]})
    words = ["--verified", str(place / "open.csv"), "--eta", "3"]
    assert main(["calibrate", "select", table, *words]) == 2
    assert "Every example that was drawn must be verified" in capsys.readouterr().err
    write(place / "twice.csv", {"id": ["e1", "e1"], "wrong": ["no", "no"]})
    assert main(["calibrate", "select", table, "--verified", str(place / "twice.csv"), *words[2:]])
    assert "has the id 'e1', as" in capsys.readouterr().err
    write(place / "words.csv", {"id": ["a"], "score": ["high"]})
    assert main(["calibrate", "draw", str(place / "words.csv"), "--n", "1", "--out", "o.csv"]) == 2
    assert "words.csv:1: 'score' must be a number; got 'high'" in capsys.readouterr().err
    assert main(["calibrate", "draw", table, "--n", "9", "--out", str(place / "open.csv")]) == 2
    assert "open.csv exists" in capsys.readouterr().err
    assert main(["calibrate", "pick"]) == 2 and "draw, select" in capsys.readouterr().err


def test_a_draw_is_repeatable_and_help_is_printed(place, capsys):
    table = str(place / "scores.csv")
    for name in ("a.csv", "b.csv"):
        assert main(["calibrate", "draw", table, "--n", "20", "--out", str(place / name)]) == 0
    assert (place / "a.csv").read_text() == (place / "b.csv").read_text()
    assert main(["calibrate"]) == 0 and "draw" in capsys.readouterr().out
    assert main(["calibrate", "select", "--help"]) == 0
    assert "Most of the claims that may be false" in capsys.readouterr().out
