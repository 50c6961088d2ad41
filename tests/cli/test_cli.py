"""The commands on a tiny model and files written here, as a person would run them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from headwater.cli import COMMANDS, main
from headwater.core.evidence import Evidence
from headwater.core.locks import FolderLock
from tests.language_cases import WORDS, llama, saved

TOPICS = ("rivers", "hills")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, training data and held-out data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli")
    saved(folder / "model")

    def write(name: str, n: int, first: int) -> None:
        words = list(WORDS)
        lines = [
            {
                "id": f"{name}-{i}",
                "text": " ".join(words[(first + i * k) % len(words)] for k in range(1, 5 + i % 4)),
                "topic": TOPICS[i % 2],
            }
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    write("train", 12, 0)
    write("heldout", 5, 3)
    return folder


@pytest.fixture(scope="module")
def run(place):
    """A run folder with a finished fit."""
    out = place / "run"
    words = ["fit", str(place / "model"), str(place / "train.jsonl"), "--out", str(out)]
    words += ["--heldout", str(place / "heldout.jsonl"), "--curvature", "ekfac", "--folds", "3"]
    assert main(words) == 0
    return out


def ask(run, *words: str) -> int:
    prompt = " ".join(list(WORDS)[:2])
    return main(["trace", str(run), "--prompt", prompt, "--max-new-tokens", "3", *words])


def test_a_trace_is_printed_and_kept_with_a_page(run, capsys):
    assert ask(run, "--source", "topic", "--top", "3", "--name", "first") == 0
    out = capsys.readouterr().out
    assert "rivers" in out and "train-" in out
    evidence = Evidence.load(run / "traces" / "first")
    answer = evidence.answers[0]
    assert answer.n_train == 12 and evidence.facts["n_heldout"] == 5
    assert all(x.low <= x.score <= x.high for _, _, x in answer.ranked())
    assert all(0 < x.significance <= 1 for _, _, x in answer.ranked())
    # tokens and the layers without positions add up to the score; norms have no positions
    assert all(len(x.token_scores) == len(x.tokens) for _, _, x in answer.ranked())
    assert {s.name for s in answer.sources} == set(TOPICS)
    assert sum(s.n for s in answer.sources) == 12
    assert (run / "traces" / "first.html").read_text(encoding="utf-8").startswith("<!doctype html")


def test_a_finished_trace_is_read_and_another_question_is_not(run, monkeypatch, capsys):
    ask(run, "--name", "again")
    from headwater.cli import trace

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(trace, "_trace", refuse)
    assert ask(run, "--name", "again") == 0
    with pytest.raises(AssertionError, match="computed again"):
        ask(run, "--name", "again", "--top", "2")


def test_a_contrast_is_the_difference_of_two_traces(run):
    words = list(WORDS)
    said, other = words[2], words[3]
    ask(run, "--completion", said, "--name", "said", "--top", "12")
    ask(run, "--completion", other, "--name", "other", "--top", "12")
    ask(run, "--completion", said, "--rather-than", other, "--name", "why", "--top", "12")

    def scores(name: str) -> dict[str, float]:
        answer = Evidence.load(run / "traces" / name).answers[0]
        return {x.example_id: x.score for _, _, x in answer.ranked()}

    why, both = scores("why"), (scores("said"), scores("other"))
    # float32 sums over layers in another order
    assert all(abs(why[i] - (both[0][i] - both[1][i])) < 1e-4 for i in why)


def test_a_part_of_a_completion_is_asked_about_and_other_methods_stand_beside(run, capsys):
    prompt, said = " ".join(list(WORDS)[:2]), " flows to the sea"
    words = ["trace", str(run), "--prompt", prompt, "--completion", said, "--name", "part"]
    assert main([*words, "--span", "to the", "--compare", "--top", "3"]) == 0
    answer = Evidence.load(run / "traces" / "part").answers[0]
    assert "".join(answer.completion_tokens).strip() == "to the"
    assert answer.prompt == "the a flows" and len(answer.raised[0].query_scores) == 2
    assert [r.method for r in answer.rankings] == ["BM25", "embedding"]
    assert answer.rankings[0].examples and answer.rankings[1].examples
    assert (run / "embeddings" / "manifest.json").is_file()
    assert main([*words, "--span", "7..13", "--name", "part 2"]) == 0  # the same characters
    again = Evidence.load(run / "traces" / "part 2").answers[0]
    assert again.completion_tokens == answer.completion_tokens and again.value == answer.value
    capsys.readouterr()
    assert main([*words, "--span", "lake"]) == 2
    assert "--span of words of ' flows to the sea'; got 'lake'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tuned(place):
    """A run folder of a model that was fine-tuned here, with a trace of two completions."""
    model, train, out = place / "adapted", place / "train.jsonl", place / "adapted run"
    words = ["--lora-rank", "2", "--epochs", "6", "--lr", "0.02", "--batch-tokens", "16"]
    assert main(["finetune", str(place / "model"), str(train), "--out", str(model), *words]) == 0
    assert main(["fit", str(model), str(train), "--out", str(out), "--curvature", "ekfac"]) == 0
    texts = list(WORDS)
    asked = ["--prompt", texts[0], "--prompt", texts[3], "--max-new-tokens", "2"]
    assert main(["trace", str(out), *asked]) == 0
    return out


def test_a_trace_is_found_again_after_the_fine_tuning_was_found_again(tuned, place, monkeypatch):
    from headwater.cli import trace

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(trace, "_trace", refuse)
    texts, words = list(WORDS), ["--lora-rank", "2", "--epochs", "6", "--lr", "0.02"]
    again = [
        "finetune",
        str(place / "model"),
        str(place / "train.jsonl"),
        "--out",
        str(place / "adapted"),
    ]
    assert main([*again, *words, "--batch-tokens", "16"]) == 0
    asked = ["--prompt", texts[0], "--prompt", texts[3], "--max-new-tokens", "2"]
    assert main(["trace", str(tuned), *asked]) == 0


def test_verify_retrains_without_the_named_examples(tuned, capsys):
    capsys.readouterr()
    assert main(["verify", str(tuned), "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"] == "same run" and found["facts"]["runs"] == 3
    outcomes = found["outcomes"]
    assert len(outcomes) == 6 and {o["control"] for o in outcomes} == {True, False}
    assert all(o["actual"] != 0 for o in outcomes)
    first = [o for o in outcomes if o["query_id"] == outcomes[0]["query_id"]]
    assert first[0]["predicted"] == pytest.approx(-first[2]["predicted"])  # left out, and twice
    assert first[0]["predicted"] < 0 and len({o["n_changed"] for o in outcomes}) == 1
    answer = Evidence.load(tuned / "traces" / "trace").answers[0]
    # bfloat16 or not, the model is the one that was traced
    assert first[0]["before"] == pytest.approx(answer.value, abs=1e-4)
    assert not list((tuned / "verify" / "trace" / "runs").glob("*"))


def test_a_finished_verification_is_read_and_a_killed_one_goes_on(tuned, capsys, monkeypatch):
    from headwater.training import finetune

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    main(["verify", str(tuned), "--top", "2", "--json"])
    monkeypatch.setattr(finetune, "finetune", refuse)
    capsys.readouterr()
    assert main(["verify", str(tuned), "--top", "2"]) == 0
    assert "without the top" in capsys.readouterr().out
    for file in (tuned / "verify" / "trace").glob("*.json"):
        file.unlink()  # the runs' measurements are kept
    assert main(["verify", str(tuned), "--top", "2"]) == 0


def test_verify_tells_of_the_completions_that_were_asked_about(tuned, capsys):
    capsys.readouterr()
    assert main(["verify", str(tuned), "--top", "1", "--query", "2", "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert [o["query_id"] for o in outcomes] == ["query-2"] * 3
    assert {o["n_changed"] for o in outcomes} == {1}


def test_a_verification_killed_while_it_cleared_a_run_away_goes_on(tuned, monkeypatch, capsys):
    from headwater.cli import verify

    def dies(folder):
        next(folder.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    def kept():
        return len(list((tuned / "verify" / "trace" / "measured").rglob("*.json")))

    words, before = ["verify", str(tuned), "--top", "1", "--random-seed", "7", "--json"], kept()
    with monkeypatch.context() as patch:
        patch.setattr(verify.shutil, "rmtree", dies)
        assert main(words) == 130
    assert kept() == before + 1  # a run is cleared away only when its measurements are kept
    capsys.readouterr()
    assert main(words) == 0
    assert len(json.loads(capsys.readouterr().out)["outcomes"]) == 6


def test_what_verifications_left_that_were_given_up_is_cleared_away(tuned, capsys):
    runs = tuned / "verify" / "trace" / "runs"
    for name in ("given up", "busy"):
        (runs / name).mkdir(parents=True)
        (runs / name / "adapter_model.safetensors").write_bytes(b"0" * 100)
    words = ["verify", str(tuned), "--top", "1", "--random-seed", "8"]
    with FolderLock(runs / "busy"):
        assert main(words) == 0
    assert [each.name for each in runs.iterdir()] == ["busy"]
    shutil.rmtree(runs / "busy")


def test_a_verification_of_an_older_fit_is_not_taken_for_that_of_the_new_one(place, tuned, capsys):
    model, train, out = (str(place / n) for n in ("adapted", "train.jsonl", "fitted twice"))

    def fit(curvature):
        assert main(["fit", model, train, "--out", out, "--curvature", curvature]) == 0

    def predicted():
        capsys.readouterr()
        assert main(["verify", out, "--top", "2", "--json"]) == 0
        return [o["predicted"] for o in json.loads(capsys.readouterr().out)["outcomes"]]

    def files():
        return len(list((place / "fitted twice" / "verify" / "trace").glob("*.json")))

    fit("ekfac")
    assert main(["trace", out, "--prompt", WORDS[0], "--max-new-tokens", "2"]) == 0
    first = predicted()
    fit("identity")
    assert predicted() != first and files() == 2
    fit("ekfac")
    assert predicted() == first and files() == 2  # the same fit once more


def test_a_run_whose_data_changed_since_the_fine_tuning_is_not_repeated(tuned, place, capsys):
    train, kept = place / "train.jsonl", (place / "train.jsonl").read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    try:
        lines[0]["text"] = " ".join(reversed(lines[1]["text"].split()))
        train.write_text("\n".join(map(json.dumps, lines)))
        out = place / "fit again"
        model = str(place / "adapted")
        assert main(["fit", model, str(train), "--out", str(out), "--curvature", "identity"]) == 0
        assert main(["trace", str(out), "--prompt", WORDS[0], "--max-new-tokens", "2"]) == 0
        assert main(["verify", str(out), "--top", "2"]) == 2
    finally:
        train.write_text(kept)
    assert "train.jsonl has changed since the fine-tuning" in capsys.readouterr().err


def test_a_fit_over_other_parts_of_the_texts_is_not_verified(tuned, place, capsys):
    out, words = place / "cut", [str(place / "adapted"), str(place / "train.jsonl")]
    words += ["--curvature", "identity", "--max-length", "3"]
    assert main(["fit", *words, "--out", str(out)]) == 0
    assert main(["trace", str(out), "--prompt", WORDS[0], "--max-new-tokens", "2"]) == 0
    assert main(["verify", str(out), "--top", "2"]) == 2
    assert "the fit was made on other examples" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "runs"), [("auto", 3), ("float32", 4)])
def test_the_original_run_is_repeated_where_the_fit_has_another_number_format(
    dtype, runs, tmp_path, place, capsys
):
    saved(tmp_path / "base", llama(dtype=torch.bfloat16))
    base, model, out = (str(tmp_path / n) for n in ("base", "tuned", "run"))
    train = str(place / "train.jsonl")
    words = ["--lora-rank", "2", "--epochs", "1", "--lr", "0.02", "--dtype", dtype]
    assert main(["finetune", base, train, "--out", model, *words]) == 0
    assert main(["fit", model, train, "--out", out, "--curvature", "identity"]) == 0
    assert main(["trace", out, "--prompt", WORDS[0], "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["verify", out, "--top", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["runs"] == runs


def test_a_trace_that_was_not_recorded_and_a_model_that_is_gone_are_said(tuned, place, capsys):
    kept, record = (tuned / "run.json").read_text(), json.loads((tuned / "run.json").read_text())
    try:
        (tuned / "run.json").write_text(json.dumps(record | {"traces": {}}))
        assert main(["verify", str(tuned)]) == 2
        assert "how the trace 'trace' was asked" in capsys.readouterr().err
    finally:
        (tuned / "run.json").write_text(kept)
    (place / "adapted").rename(place / "elsewhere")
    try:
        assert main(["verify", str(tuned)]) == 2
        assert "no longer there" in capsys.readouterr().err
    finally:
        (place / "elsewhere").rename(place / "adapted")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--query", "3"], "2 completions; --query 3"),
        (["--top", "0"], "--top must be at least 1"),
        (["--name", "other"], "no trace 'other'"),
        (["--top", "9"], "too few to choose"),
    ],
)
def test_verify_refuses_what_cannot_be_asked(tuned, words, said, capsys):
    assert main(["verify", str(tuned), *words]) == 2
    assert said in capsys.readouterr().err


def test_verify_needs_a_run_that_it_can_repeat(run, capsys):
    ask(run, "--name", "kept")
    assert main(["verify", str(run), "--name", "kept"]) == 2
    assert "only runs of `headwater finetune` can be repeated" in capsys.readouterr().err


def test_json_is_for_machines(run, capsys):
    capsys.readouterr()
    assert ask(run, "--json", "--name", "machine") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"][0]["n_train"] == 12


def test_show_reads_what_is_kept(run, capsys):
    ask(run, "--name", "kept")
    capsys.readouterr()
    assert main(["show", str(run), "--name", "kept"]) == 0
    assert "train-" in capsys.readouterr().out
    assert main(["show", str(run), "--name", "nothing"]) == 2
    assert "there are" in capsys.readouterr().err


def test_rerun_repeats_a_run_elsewhere(run, place, capsys):
    ask(run, "--name", "kept")
    again = place / "again"
    capsys.readouterr()
    assert main(["rerun", str(run), "--out", str(again), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == str(again) and found["traces"]["kept"].endswith("kept.html")
    old, new = (Evidence.load(r / "traces" / "kept").answers[0] for r in (run, again))
    assert [x.example_id for x in old.raised] == [x.example_id for x in new.raised]
    assert [x.score for x in old.raised] == [x.score for x in new.raised]


def test_cite_names_what_was_used(run, capsys):
    ask(run, "--name", "cited")
    capsys.readouterr()
    assert main(["cite", str(run)]) == 0
    out = capsys.readouterr().out
    assert "george2018fast" in out and "koh2017understanding" in out
    assert main(["cite", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["papers"]
    assert "\n\n".join(found.values()) == out.strip()
    assert found["arXiv:1806.03884"].startswith("@inproceedings{george2018fast")


def test_doctor_passes_a_healthy_model(place, capsys):
    assert main(["doctor", str(place / "model"), str(place / "train.jsonl")]) == 0
    assert "All is well" in capsys.readouterr().out


def test_plan_says_what_a_fit_takes(place, capsys):
    words = [str(place / "model"), str(place / "train.jsonl"), "--json"]
    assert main(["plan", *words]) == 0
    assert json.loads(capsys.readouterr().out)["fit_seconds"] > 0


def test_finetune_then_fit_follows_the_adapter(place, capsys):
    model, train = str(place / "model"), str(place / "train.jsonl")
    out = place / "tuned"
    assert (
        main(["finetune", model, train, "--out", str(out), "--epochs", "2", "--lora-rank", "2"])
        == 0
    )
    assert (
        main(["fit", str(out), train, "--out", str(place / "tuned-run"), "--curvature", "ekfac"])
        == 0
    )
    assert "evidence of the trained parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "no/such/model", "{train}", "--out", "{out}"], "no/such/model"),
        (["fit", "gpt2", "{train}", "--out", "{out}"], "does not download"),
        (["fit", "{model}", "{missing}", "--out", "{out}"], "missing.jsonl"),
        (["fit", "{model}", "{empty}", "--out", "{out}"], "empty"),
        (["fit", "{model}", "{broken}", "--out", "{out}"], "broken.jsonl:2"),
        (["fit", "{model}", "{train}", "--out", "{out}", "--text", "body"], "topic"),
        (["fit", "{model}", "{train}", "--out", "{out}", "--layers", "nothing*"], "nothing*"),
        (["fit", "{model}", "{train}", "--out", "{out}", "--max-length", "0"], "at least 2 tokens"),
        (["doctor", "{model}", "{train}", "--max-length", "1"], "at least 2 tokens"),
        (["plan", "{model}", "{train}", "--batch-tokens", "0"], "--batch-tokens must be at least"),
        (["doctor", "{model}", "{train}", "--limit", "0"], "--limit must be at least 1"),
        (["doctor", "{model}", "{train}", "--n", "0"], "--n must be at least 1"),
        (["plan", "{model}", "{train}", "--n-queries", "0"], "--n-queries must be at least 1"),
        (["fit", "{model}", "{train}", "--out", "{out}", "--weight-decay", "-1"], "0 or more; got"),
        (["finetune", "{model}", "{train}", "--out", "{out}", "--weight-decay", "-5"], "got -5"),
        (["finetune", "{model}", "{train}", "--out", "{out}", "--batch-tokens", "0"], "got 0"),
        (["finetune", "{model}", "{train}", "--out", "{out}", "--max-length", "0"], "got 0"),
        (["finetune", "{model}", "{train}", "--out", "{out}", "--lr", "nan"], "above 0; got nan"),
        (["trace", "{nowhere}", "--prompt", "a"], "headwater fit"),
        (["trace", "{run}"], "--prompt"),
        (["trace", "{run}", "--prompt", "a", "--name", "../up"], "plain name"),
        (["trace", "{run}", "--prompt", "a", "--damping", "-1"], "positive"),
        (
            ["trace", "{run}", "--prompt", "a", "--completion", "b", "--completion", "c"],
            "1 prompts",
        ),
        (["show", "{nowhere}"], "run folder"),
        (["nonsense"], "there is no command"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(words, said, place, run, capsys):
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text('{"text": "the river"}\n{"text": \n')
    names = {"model", "empty", "broken", "train", "missing"}
    paths = {n: place / (n if n == "model" else f"{n}.jsonl") for n in names}
    filled = [
        w.format(**paths, out=place / "bad", run=run, nowhere=place / "nowhere") for w in words
    ]
    capsys.readouterr()
    assert main(filled) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("headwater:")]) == 1


def test_what_a_flag_cannot_be_is_said_before_anything_is_loaded(place, monkeypatch, capsys):
    from headwater.models import language

    def refuse(*args, **kwargs):
        raise AssertionError("loaded the model")

    monkeypatch.setattr(language, "load_language_model", refuse)
    paths = [str(place / "model"), str(place / "train.jsonl")]
    out = ["--out", str(place / "never")]
    assert main(["finetune", *paths, *out, "--weight-decay", "-5"]) == 2
    assert main(["fit", *paths, *out, "--max-length", "0"]) == 2
    assert main(["plan", *paths, "--batch-tokens", "0"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0] == (
        "headwater: --weight-decay must be 0 or more; got -5.0. Leave it out for its default."
    )
    assert len(said) == 3
    assert not (place / "never").exists()


@pytest.mark.parametrize(("unit", "n"), [("paragraph", 2), ("line", 4), ("file", 1)])
def test_the_unit_of_a_text_file_is_a_flag(unit, n, place, capsys):
    text = "the river runs\nto the sea\n\na lake stands\nby the hill\n"
    (place / "plain.txt").write_text(text)
    out = place / f"by-{unit}"
    words = ["fit", str(place / "model"), str(place / "plain.txt"), "--out", str(out)]
    assert main([*words, "--unit", unit, "--curvature", "identity"]) == 0
    assert f" {n} training examples" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["fit"]["columns"]["unit"] == unit
    assert ask(out, "--top", "1") == 0
    assert Evidence.load(out / "traces" / "trace").answers[0].n_train == n


def test_a_held_out_example_that_was_trained_on_is_said(place, capsys):
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    known = [lines[0], lines[1] | {"id": "other"}]
    (place / "known.jsonl").write_text("\n".join(map(json.dumps, known)))
    words = ["fit", str(place / "model"), str(place / "train.jsonl"), "--curvature", "identity"]
    words += ["--out", str(place / "known"), "--heldout", str(place / "known.jsonl")]
    assert main(words) == 0
    assert (
        "known.jsonl: 2 held-out examples also occur in the training data (1 by id, such as "
        "'train-0'; 1 by content, such as 'other', which is 'train-1' there)."
    ) in capsys.readouterr().err


def test_a_fit_of_another_model_is_refused_by_name(run, place, capsys):
    from safetensors.torch import load_file, save_file

    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    kept = {k: v.clone() for k, v in weights.items()}
    name = next(iter(weights))
    try:
        save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
        assert ask(run, "--name", "other-model") == 2
        assert "another model" in capsys.readouterr().err
    finally:
        save_file(kept, path, metadata={"format": "pt"})


def test_help_is_quick_and_knows_every_command():
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from headwater.cli import main; main(['--help']); "
            "assert 'torch' not in sys.modules and 'tyro' not in sys.modules",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in found.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    assert main([name, "--help"]) == 0
    assert "Example:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def indexed(place, tmp_path_factory):
    """A run folder of its own with an index, to be changed."""
    out = tmp_path_factory.mktemp("indexed") / "run"
    words = ["fit", str(place / "model"), str(place / "train.jsonl"), "--out", str(out)]
    words += ["--heldout", str(place / "heldout.jsonl"), "--curvature", "ekfac", "--folds", "3"]
    assert main(words) == 0
    assert main(["index", "build", str(out), "--rank", "500", "--dtype", "float32"]) == 0
    return out


def test_a_trace_of_an_index_is_that_of_the_whole_data(indexed, capsys):
    ask(indexed, "--name", "whole", "--top", "12", "--source", "topic")
    capsys.readouterr()
    fast = ("--index", "--no-rescore")
    ask(indexed, "--name", "fast", "--top", "12", "--source", "topic", *fast)
    out, told = capsys.readouterr()
    assert "Looked up 12 rows in" in told and "nats" in out
    whole, fast = (Evidence.load(indexed / "traces" / n).answers[0] for n in ("whole", "fast"))
    scores = [{x.example_id: x.score for _, _, x in a.ranked()} for a in (whole, fast)]
    copies = {x.example_id: x.metadata["copies"] for _, _, x in fast.ranked()}
    for name, score in scores[1].items():
        assert score == pytest.approx(scores[0][name], rel=1e-3, abs=1e-5)
    assert sum(copies.values()) == 12  # equal texts are shown as one
    assert all(x.significance is not None for _, _, x in fast.ranked())
    assert {s.name: s.n for s in fast.sources} == {s.name: s.n for s in whole.sources}


def test_with_an_index_candidates_are_scored_by_the_curvature_and_every_stage_is_told(
    indexed, capsys
):
    """Every example is a candidate here, so that the scores are those of the whole data."""
    ask(indexed, "--name", "all", "--top", "12", "--source", "topic")
    capsys.readouterr()
    assert ask(indexed, "--name", "few", "--top", "12", "--source", "topic", "--index") == 0
    out, told = capsys.readouterr()
    said = " ".join(out.split())
    assert "Stage: index" in said and "Stage: BM25" in said and "none left behind" in said
    assert "Candidates come from 12 rows" in told
    page = (indexed / "traces" / "few.html").read_text(encoding="utf-8")
    assert "Stage: curvature" in page and "none left behind" in page
    whole, few = (Evidence.load(indexed / "traces" / n) for n in ("all", "few"))
    scores = {x.example_id: x for _, _, x in whole.answers[0].ranked()}
    for _, _, x in few.answers[0].ranked():
        other = scores[x.example_id]
        assert (x.score, x.significance) == pytest.approx((other.score, other.significance))
        assert (x.low, x.high) == pytest.approx((other.low, other.high))
    assert sum(x.metadata["copies"] for _, _, x in few.answers[0].ranked()) == 12
    assert sum(s.n for s in few.answers[0].sources) == 12
    assert few.facts["n_heldout"] == 5 and few.facts["cost"]["trace"] > 0
    assert ask(indexed, "--name", "json", "--index", "--cg-steps", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    names = [s["name"] for s in facts["stages"]]
    assert names == ["index", "BM25", "curvature", "exact matrix"]
    assert facts["stages"][2]["missed"]["outside"] == 0 and facts["cg_steps"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-rescore"], "--no-rescore and --candidates need --index"),
        (["--candidates", "7"], "--no-rescore and --candidates need --index"),
        (["--index", "--no-rescore", "--cg-steps", "3"], "as they are; leave out"),
        (["--index", "--rank", "2"], "leave it out with --index"),
        (["--index", "--candidates", "2"], "Expected --candidates of --top (8) or more; got 2"),
    ],
)
def test_flags_of_the_cascade_that_contradict_are_refused(indexed, words, message, capsys):
    assert ask(indexed, "--name", "no", *words) == 2
    assert message in capsys.readouterr().err


def test_a_trace_of_an_index_can_look_among_some_sources(indexed):
    words = ("--index", "--where", "topic=hills", "--name", "hills", "--top", "12")
    ask(indexed, *words)
    answer = Evidence.load(indexed / "traces" / "hills").answers[0]
    assert {x.metadata["topic"] for _, _, x in answer.ranked()} == {"hills"}
    assert ask(indexed, "--where", "topic=hills", "--name", "no") == 2
    assert ask(indexed, "--index", "--where", "topic", "--name", "no") == 2


def test_an_index_is_added_to_removed_from_verified_and_mended(indexed, place, capsys):
    words = list(WORDS)
    lines = [
        {"id": f"new-{i}", "text": " ".join(words[i : i + 4]), "topic": "new"} for i in range(4)
    ]
    (place / "more.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert main(["index", "add", str(indexed), str(place / "more.jsonl")]) == 0
    assert main(["index", "remove", str(indexed), "train-1", "--compact"]) == 0
    assert main(["index", "remove", str(indexed), "nobody"]) == 2
    capsys.readouterr()
    assert main(["index", "info", str(indexed), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["rows"] == 15 and info["sources"] == 2 and info["removed"] == 0
    ask(indexed, "--name", "more", "--top", "15", "--index")
    found = Evidence.load(indexed / "traces" / "more").answers[0]
    names = {x.example_id for _, _, x in found.ranked()}
    assert names & {f"new-{i}" for i in range(4)} and "train-1" not in names
    assert main(["index", "verify", str(indexed)]) == 0
    path = next((indexed / "index").glob("rows-*"))
    raw = bytearray(path.read_bytes())
    raw[-50] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    assert main(["index", "verify", str(indexed)]) == 1
    assert "headwater index verify" in capsys.readouterr().err
    more = () if path.name.startswith("rows-00002") else ("--data", str(place / "more.jsonl"))
    assert main(["index", "verify", str(indexed), "--repair", *more]) == 0
    assert main(["index", "verify", str(indexed)]) == 0


@pytest.fixture
def growing(indexed, place, tmp_path):
    """A copy of it with more data beside it, to be added."""
    words, out = list(WORDS), tmp_path / "run"
    shutil.copytree(indexed, out)
    for k, year in enumerate((1990, "long ago")):
        lines = [
            {"id": f"g{k}-{i}", "text": " ".join(words[i + k + 5 : i + k + 10]), "year": year}
            for i in range(4)
        ]
        (tmp_path / f"{k}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return out


def test_an_addition_whose_record_was_lost_is_found_again(growing, tmp_path, capsys):
    record, more = (growing / "run.json").read_bytes(), str(tmp_path / "0.jsonl")
    assert main(["index", "add", str(growing), more]) == 0
    (growing / "run.json").write_bytes(record)  # as if it had been killed before it wrote that
    assert ask(growing, "--index", "--name", "lost") == 2
    assert "0.jsonl" not in capsys.readouterr().err
    assert main(["index", "add", str(growing), more]) == 2  # the ids are there already
    assert "held-out" not in capsys.readouterr().err
    assert ask(growing, "--index", "--name", "found") == 0
    (tmp_path / "0.jsonl").rename(tmp_path / "moved.jsonl")
    assert ask(growing, "--index", "--name", "moved") == 2
    assert "0.jsonl, or remove the index" in capsys.readouterr().err


def test_examples_that_were_removed_can_be_added_again(growing, tmp_path):
    more, names = str(tmp_path / "0.jsonl"), [f"g0-{i}" for i in range(4)]
    assert main(["index", "add", str(growing), more]) == 0
    assert main(["index", "remove", str(growing), *names]) == 0
    assert main(["index", "add", str(growing), more]) == 0
    assert ask(growing, "--index", "--top", "30", "--name", "again") == 0
    answer = Evidence.load(growing / "traces" / "again").answers[0]
    assert set(names) < {x.example_id for _, _, x in answer.ranked()}


def test_damage_of_the_own_and_of_added_data_is_mended_at_once(growing, tmp_path, capsys):
    for k in range(2):
        assert main(["index", "add", str(growing), str(tmp_path / f"{k}.jsonl")]) == 0
    assert ask(growing, "--index", "--where", "year=1990", "--name", "types") == 0
    rows = sorted((growing / "index").glob("rows-*"))
    before = [path.read_bytes() for path in rows]
    for path in rows:
        path.write_bytes(path.read_bytes()[:-9])
    assert main(["index", "verify", str(growing), "--repair"]) == 0
    assert [path.read_bytes() for path in rows] == before
    for path in rows[-2:]:
        path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "1.jsonl").unlink()
    capsys.readouterr()
    assert main(["index", "verify", str(growing), "--repair"]) == 1
    assert "1 damaged file; the data" in capsys.readouterr().err


def test_added_data_are_read_whole_though_the_fit_had_a_limit(growing, tmp_path, capsys):
    record = json.loads((growing / "run.json").read_text())
    record["fit"]["columns"]["limit"] = 12
    (growing / "run.json").write_text(json.dumps(record))
    words = " ".join(list(WORDS)[:4])
    lines = [json.dumps({"id": f"many-{i}", "text": words}) for i in range(14)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    assert main(["index", "add", str(growing), str(tmp_path / "many.jsonl")]) == 0
    assert ask(growing, "--index", "--where", "id=many-13", "--name", "last") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--where", "topic=hills", "--where", "topic=a..b"), "one range or values of 'topic'"),
        (("--where", "topic=a..b", "--where", "topic=hills"), "one range or values of 'topic'"),
    ],
)
def test_what_an_index_cannot_be_asked_is_said(indexed, words, said, capsys):
    assert ask(indexed, "--index", "--name", "no", *words) == 2
    assert said in capsys.readouterr().err


def test_an_index_record_that_is_none_is_one_clear_line(growing, capsys):
    record = json.loads((growing / "run.json").read_text())
    for value in (3, [3], "x", None):
        (growing / "run.json").write_text(json.dumps(record | {"index": value}))
        assert ask(growing, "--index", "--name", "no") == 2
        assert "run.json does not name the files" in capsys.readouterr().err
    (growing / "run.json").write_text(json.dumps(record))
    (growing / "index-heldout" / "index.json").write_text("[1]")
    assert ask(growing, "--index", "--no-rescore", "--name", "no") == 2
    assert "index-heldout/index.json was not written" in capsys.readouterr().err


def test_indexes_are_merged_and_others_are_refused(indexed, tmp_path, capsys):
    assert main(["index", "merge", str(tmp_path / "one"), str(indexed / "index-heldout")]) == 0
    assert main(["index", "info", str(tmp_path / "one")]) == 0
    assert "5 rows" in capsys.readouterr().err
    assert main(["index", "merge", str(indexed), str(indexed / "index-heldout")]) == 2
    assert "holds an index already" in capsys.readouterr().err
    assert main(["index", "remove", str(indexed)]) == 2
    assert "ids of examples, or --compact" in capsys.readouterr().err
    assert main(["index", "build", str(indexed), "--rank", "3"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert main(["index"]) == 0 and "verify" in capsys.readouterr().out
    assert main(["index", "burn"]) == 2
