"""`headwater forget` on a tiny model: a dry run, an edit with its model, and the way back."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from headwater.cli import main
from headwater.forget import WeightEdit
from headwater.models.language import load_language_model
from tests.language_cases import WORDS, saved

PATTERN = "model.layers.*.mlp.*_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forget")
    saved(folder / "model")
    lines = [
        {"text": " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(8 + i % 3))}
        for i in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = [str(folder / "model"), str(folder / "train.jsonl"), "--out", str(folder / "run")]
    options = ["--curvature", "ekfac", "--fisher", "empirical", "--folds", "1"]
    held = ["--heldout", str(folder / "train.jsonl")]
    assert main(["fit", *words, *options, *held]) == 0
    return folder


def edit(place, *words: str) -> int:
    tried = ["--prefix", "3", "--suffix", "3"]
    return main(["forget", "curvature-edit", str(place / "run"), *tried, *words])


def weights(folder):
    return load_language_model(folder).model.state_dict()


def test_a_dry_run_tells_and_writes_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    assert edit(place, "--keep-mass", "0.5", "--layers", PATTERN, "--dry-run") == 0
    told = capsys.readouterr().err
    assert "model.layers.0.mlp.gate_proj" in told and "Nothing was written" in told
    assert "perplexity of 12 held-out texts" in told and "of 12 training texts" in told
    assert "0 passes beyond the fit" in told
    assert sorted(place.rglob("*")) == before


def test_an_edit_is_written_applied_and_undone_bit_by_bit(place, capsys):
    out, edited = place / "edit", place / "edited"
    words = ["--keep-mass", "0.5", "--layers", PATTERN, "--out", str(out)]
    assert edit(place, *words, "--write-model", str(edited), "--tried", "0") == 0
    assert "headwater forget undo" in capsys.readouterr().err
    original, changed = weights(place / "model"), weights(edited)
    touched = {k for k in original if not torch.equal(original[k], changed[k])}
    assert touched == set(WeightEdit.load(out).deltas) and len(touched) == 9
    model = str(place / "model")
    assert main(["forget", "apply", model, str(out), "--out", str(place / "again")]) == 0
    again = weights(place / "again")
    assert all(torch.equal(again[k], v) for k, v in changed.items())
    restored = place / "restored"
    assert main(["forget", "undo", str(edited), str(out), "--out", str(restored)]) == 0
    back = weights(restored)
    assert all(torch.equal(back[k], v) for k, v in original.items())
    assert main(["forget", "undo", str(restored), str(out), "--out", str(place / "no")]) == 2
    assert "the edit is not applied" in capsys.readouterr().err
    assert not (place / "no").exists()


def test_a_fit_does_not_print_a_number_for_each_layer(place, capsys):
    words = [str(place / "model"), str(place / "train.jsonl"), "--out", str(place / "run")]
    options = ["--curvature", "ekfac", "--fisher", "empirical", "--folds", "1"]
    held = ["--heldout", str(place / "train.jsonl")]
    assert main(["fit", *words, *options, *held]) == 0
    told = capsys.readouterr().err
    assert "moments positions" in told and "{" not in told and max(map(len, told.split("\n"))) < 300


def test_json_holds_the_table_and_what_was_tried(place, capsys):
    assert edit(place, "--dry-run", "--json", "--layers", PATTERN) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["table"]["layer"]) == 9
    assert set(found["before"]) == set(found["after"])
    assert found["facts"]["passes"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out FOLDER"),
        (["--keep-mass", "0", "--dry-run"], "above 0 and at most 1"),
        (["--dry-run", "--out", "x"], "writes nothing"),
        (
            ["--dry-run", "--layers", "model.embed_tokens"],
            "Expected linear or convolutional layers",
        ),
        (["--out", "x", "--write-model", "."], "exists already"),
        (["--out", "x", "--write-model", "x"], "a folder of its own"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(place, words, said, capsys):
    assert edit(place, *words) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in told


def test_actions_are_listed(capsys):
    assert main(["forget"]) == 0
    assert "curvature-edit" in capsys.readouterr().out
    assert main(["forget", "everything"]) == 2
