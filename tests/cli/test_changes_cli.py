"""Change sets from the command line: training under one, and verifying one on a trace's completions."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from headwater.cli import main
from headwater.core.evidence import Evidence
from headwater.data.text import read_records
from headwater.data.tokens import tokenize
from headwater.models.language import load_language_model
from headwater.training.changes import ChangeSet
from headwater.training.finetune import finetune
from tests.language_cases import WORDS, saved

pytestmark = pytest.mark.thorough

OPTIONS = ["--lora-rank", "2", "--epochs", "4", "--lr", "0.02", "--batch-tokens", "16"]
MINE = ChangeSet(name="mine", remove=("t1", "t4"), keep=("t2",), weights={"t5": 2.0, "t6": 0.5})
ASKED = ["--prompt", "the river", "--completion", " runs", "--top", "12"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, data, a change set, and a run of a model that was fine-tuned without it."""
    folder = tmp_path_factory.mktemp("changes")
    saved(folder / "model")
    lines = [
        {"id": f"t{i}", "text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 5 + i % 4))}
        for i in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    MINE.save(folder / "mine.json")
    fitted(folder, "plain")
    return folder


def tuned(place, name: str, *words: str) -> int:
    model, train = str(place / "model"), str(place / "train.jsonl")
    return main(["finetune", model, train, "--out", str(place / name), *OPTIONS, *words])


def fitted(place, name: str, *words: str) -> str:
    """A run folder of a model that was fine-tuned so, with a trace."""
    assert tuned(place, name, *words) == 0
    run, train = str(place / f"{name} run"), str(place / "train.jsonl")
    assert main(["fit", str(place / name), train, "--out", run, "--curvature", "ekfac"]) == 0
    assert main(["trace", run, *ASKED]) == 0
    return run


def adapter(folder) -> dict:
    return dict(load_language_model(folder).model.named_parameters())


def log_prob(folder) -> float:
    """Of " runs" after "the river"."""
    language = load_language_model(folder)
    ids = torch.tensor([language.tokenizer("the river runs")["input_ids"]])
    with torch.no_grad():
        logits = language.model(input_ids=ids).logits[0]
    return float(logits[-2].double().log_softmax(-1)[ids[0, -1]])


def test_training_under_a_change_set_is_training_with_its_weights(place):
    assert tuned(place, "changed", "--changes", str(place / "mine.json")) == 0
    language = load_language_model(place / "model")
    records = read_records(place / "train.jsonl")
    examples = tokenize(records, language.tokenizer, max_length=language.context_length)
    expected = finetune(
        language,
        examples,
        out=place / "expected",
        lora_rank=2,
        layers_from=0,
        epochs=4,
        lr=0.02,
        weight_decay=0.0,
        batch_tokens=16,
        weights={"t1": 0.0, "t4": 0.0, "t5": 2.0, "t6": 0.5},
        checkpoints=0,
    )
    found, plain = adapter(place / "changed"), adapter(place / "plain")
    named = dict(expected.language.model.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in named.items())
    assert any(not torch.equal(found[name], p) for name, p in plain.items())
    assert ChangeSet.load(place / "changed" / "changes.json") == MINE


def test_a_training_under_a_change_set_is_found_again_and_another_is_refused(place, capsys):
    words = ["--changes", str(place / "mine.json")]
    assert tuned(place, "twice", *words) == 0
    before = (place / "twice" / "changes.json").stat().st_mtime_ns
    assert tuned(place, "twice", *words) == 0
    assert (place / "twice" / "changes.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert tuned(place, "twice") == 2
    assert "with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (ChangeSet(relabel={"t1": 1}), "A language model is trained on text and has no labels"),
        (ChangeSet(remove=("nobody",)), "'nobody', which is no training example"),
    ],
)
def test_a_change_set_that_cannot_be_trained_is_refused(place, capsys, changes, problem):
    changes.save(place / "odd.json")
    capsys.readouterr()
    assert tuned(place, "odd", "--changes", str(place / "odd.json")) == 2
    assert problem in capsys.readouterr().err
    run, words = str(place / "plain run"), ["--name", "trace", "--changes", str(place / "odd.json")]
    assert main(["verify", run, *words]) == 2
    assert ("nobody" if changes.remove else problem) in capsys.readouterr().err


def test_a_change_set_is_verified_on_the_completions_of_a_trace(place, capsys):
    run, words = place / "plain run", ["--name", "trace", "--changes", str(place / "mine.json")]
    assert tuned(place, "made", *words[2:]) == 0
    capsys.readouterr()
    assert main(["verify", str(run), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    change, control = found["outcomes"]
    assert change["change"] == "without 2, 2 weighted (mine)" and change["n_changed"] == 4
    assert control["control"] and control["n_changed"] == 4
    # what `finetune --changes` makes is what was measured
    moved = log_prob(place / "made") - log_prob(place / "plain")
    assert change["actual"] == pytest.approx(moved, abs=1e-4)
    ranked = Evidence.load(run / "traces" / "trace").answers[0].ranked()
    score = {x.example_id: x.score for _, _, x in ranked}
    predicted = -score["t1"] - score["t4"] + score["t5"] - 0.5 * score["t6"]
    assert change["predicted"] == pytest.approx(predicted, abs=1e-4)
    capsys.readouterr()
    assert main(["verify", str(run), *words]) == 0
    said = capsys.readouterr()
    assert "read from" in said.err and "than the same done to others at random" in said.out
    assert not list((run / "verify" / "trace" / "runs").glob("*"))


def test_what_was_made_under_a_change_set_is_repeated_under_it(place, capsys):
    run = fitted(place, "first", "--changes", str(place / "mine.json"))
    answer = Evidence.load(place / "first run" / "traces" / "trace").answers[0]
    ChangeSet(name="more", remove=("t8",), weights={"t5": 1.5}).save(place / "more.json")
    both = ChangeSet(remove=("t1", "t4", "t8"), weights={"t5": 3.0, "t6": 0.5})
    both.save(place / "both.json")
    assert tuned(place, "both", "--changes", str(place / "both.json")) == 0
    capsys.readouterr()
    words = ["--name", "trace", "--changes", str(place / "more.json"), "--json"]
    assert main(["verify", run, *words]) == 0
    change = json.loads(capsys.readouterr().out)["outcomes"][0]
    assert change["before"] == pytest.approx(answer.value, abs=1e-4)
    moved = log_prob(place / "both") - log_prob(place / "first")
    assert change["actual"] == pytest.approx(moved, abs=1e-4)
