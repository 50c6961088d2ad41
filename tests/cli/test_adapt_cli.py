"""`headwater adapt quip` on a tiny model: a folder that every other command reads."""

import json

import pytest

pytest.importorskip("transformers")

from headwater.cli import main
from headwater.core.quantized import quantized_layers
from headwater.models.language import load_language_model
from tests.language_cases import WORDS, gpt2, saved


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt")
    saved(folder / "model")
    saved(folder / "gpt2", gpt2())
    for name, shift in (("train", 0), ("heldout", 5)):
        lines = [
            {
                "id": f"t{i}",
                "text": " ".join(WORDS[(i * k + shift) % len(WORDS)] for k in range(1, 9)),
            }
            for i in range(10)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    train, heldout = str(folder / "train.jsonl"), str(folder / "heldout.jsonl")
    for model, curvature in (("model", "ekfac"), ("gpt2", "kfac")):
        words = [str(folder / model), train, "--out", str(folder / f"run {model}")]
        assert main(["fit", *words, "--heldout", heldout, "--curvature", curvature]) == 0
    return folder


def quip(place, name: str, *words: str, model: str = "model") -> int:
    run = str(place / f"run {model}")
    return main(["adapt", "quip", run, "--out", str(place / name), *words])


@pytest.mark.parametrize("model", ["model", "gpt2"])
def test_a_quantized_model_is_told_of_saved_and_traced(place, capsys, model):
    assert quip(place, f"small {model}", "--bits", "4", "--json", model=model) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["statistics"] == "the fit" and told["passes_beyond_fit"] == 0
    before, after = told["losses"]["held-out data"]
    assert before != after and abs(before - after) < 0.5
    made = load_language_model(place / f"small {model}")
    layers = quantized_layers(made.model)
    assert list(layers) == [row["layer"] for row in told["layers"]]
    assert all(layer.bits == 4 for layer in layers.values())

    run = str(place / f"again {model}")
    train = str(place / "train.jsonl")
    words = [str(place / f"small {model}"), train, "--out", run, "--curvature", "ekfac"]
    assert main(["fit", *words]) == 0
    assert "100.0 % of the model" in capsys.readouterr().err
    assert main(["trace", run, "--prompt", "the river", "--completion", " runs"]) == 0


def test_examples_can_be_run_block_by_block(place, capsys):
    words = ["--bits", "3", "--statistics", "blocks", "--calibration", "4", "--sample", "0"]
    assert quip(place, "blocks", *words, "--no-incoherence", "--rounding", "ldlq") == 0
    told = capsys.readouterr().err
    assert "block by block" in told and "0.67 passes beyond the fit" in told
    assert "layers whose outputs changed most" in told


def test_an_adapter_is_merged(place, capsys):
    pytest.importorskip("peft")
    train = str(place / "train.jsonl")
    tuned = ["--lora-rank", "2", "--epochs", "1", "--checkpoints", "0"]
    assert (
        main(["finetune", str(place / "model"), train, "--out", str(place / "tuned"), *tuned]) == 0
    )
    run = str(place / "run tuned")
    assert main(["fit", str(place / "tuned"), train, "--out", run, "--curvature", "ekfac"]) == 0
    assert quip(place, "merged", "--bits", "4", "--statistics", "fit", model="tuned") == 2
    assert "--statistics blocks" in capsys.readouterr().err
    assert quip(place, "merged", "--bits", "4", model="tuned") == 0
    assert not [
        n for n, _ in load_language_model(place / "merged").model.named_parameters() if "lora" in n
    ]


def test_mistakes_become_one_line(place, capsys):
    for words, message in (
        (["--bits", "5"], "--bits must be 2, 3 or 4; got 5"),
        (["--layers", "nothing"], "no linear layers of nothing to quantize"),
    ):
        assert quip(place, "no", *words) == 2
        assert message in capsys.readouterr().err
    assert quip(place, "model") == 2
    assert "holds something else than a quantized model" in capsys.readouterr().err
    assert main(["adapt", "gptq"]) == 2
    assert "Expected one of quip" in capsys.readouterr().err
    assert main(["adapt"]) == 0
    assert "quip" in capsys.readouterr().out
