"""`headwater survey` on a tiny model: kept, found again, and shown without the model."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from headwater.audit.survey import Survey
from headwater.cli import main
from headwater.report.views import corpus
from headwater.report.views import run as views
from tests.language_cases import WORDS, saved

pytestmark = pytest.mark.thorough

N = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("survey")
    saved(place / "model")
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 6 + i % 3)) for i in range(N)]
    texts[7] = texts[4]
    lines = [
        {"id": f"t{i}", "text": t, "topic": ["[red]rivers", "hills\x1b[31m"][i % 2]}
        for i, t in enumerate(texts)
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = str(place / "run")
    words = [str(place / "model"), str(place / "train.jsonl"), "--out", out, "--curvature", "ekfac"]
    assert main(["fit", *words, "--layers", "*mlp*"]) == 0
    return place / "run"


def test_a_survey_is_printed_and_kept_and_read_again(run, monkeypatch, capsys):
    capsys.readouterr()
    assert main(["survey", str(run), "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert f"of {N} examples are outliers" in out and "\x1b" not in out
    assert "near-duplicates, in 1 groups" in out and "Cost: 1 with gradients" in out
    found = Survey.load(run / "corpus")
    assert len(found) == N and found.source_column == "topic"
    assert found.n_copies[4] == found.n_copies[7] == 2 and found.first[7] == 4
    assert not (run / ".corpus.unfinished").exists()

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("headwater.audit.survey.survey", refuse)
    assert main(["survey", str(run), "--json", "--top", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["n"], told["copies"], len(told["top"])) == (N, 2, 3)
    with pytest.raises(AssertionError, match="computed again"):
        main(["survey", str(run), "--source", "topic"])


def test_the_training_data_are_shown_without_the_model(run, capsys):
    assert main(["survey", str(run), "--json"]) == 0
    capsys.readouterr()
    view = views.overview(run)
    assert view["has"]["survey"] and view["n_train"] == N and view["columns"] == ["topic"]
    assert view["coverage"]["share"] < 1 and len(view["spectrum"]) > 0
    rows = corpus.rows(run, sort="self_influence", descending=True)["rows"]
    own = [row["self_influence"] for row in rows]
    assert own == sorted(own, reverse=True) and len(rows) == N
    example = corpus.example(run, rows[0]["number"])
    lines = [json.loads(x) for x in (run.parent / "train.jsonl").read_text("utf-8").splitlines()]
    text = next(x["text"] for x in lines if x["id"] == rows[0]["id"])
    assert text in example["pieces"][0]["text"]
    assert {s["name"] for s in corpus.summary(run)["sources"]} == {
        "[red]rivers",
        "hills⟨ESC⟩[31m",
    }


def test_an_index_takes_the_place_of_gradients(run, capsys):
    assert main(["index", "build", str(run), "--json"]) == 0
    assert main(["survey", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["facts"]["passes"] == "1 forward" and "cosine" in told["facts"]["duplicates"]
    assert told["n"] == N


def test_a_folder_that_is_no_run_and_an_unknown_column_are_refused(run, tmp_path, capsys):
    assert main(["survey", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["survey", str(run), "--source", "year"]) == 2
    assert "no column 'year'; their columns are: topic" in capsys.readouterr().err
