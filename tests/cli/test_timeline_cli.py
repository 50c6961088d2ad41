"""`headwater timeline` on a tiny model that is fine-tuned here, and what its record is good for from Python."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from headwater.cli import main
from headwater.core.curvature import EKFAC
from headwater.core.fit import fit, load
from headwater.core.task import CausalLM
from headwater.data.text import read_records
from headwater.data.tokens import completion_examples, tokenize
from headwater.models.language import load_language_model
from headwater.trace import Source, Unrolling
from headwater.trace.timeline import Timeline
from headwater.training.run import Run
from headwater.training.trajectory import Trajectory
from tests.language_cases import WORDS, saved

pytestmark = pytest.mark.thorough

ASKED = [
    "--prompt",
    "the river",
    "--completion",
    " runs",
    "--prompt",
    "a lake",
    "--completion",
    " by",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timeline")
    saved(folder / "model")
    lines = [
        {
            "id": f"t{i}",
            "text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 5 + i % 4)),
            "topic": ["[red]rivers", "hills\x1b[31m"][i % 2],
        }
        for i in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def tuned(place, name: str, *words: str) -> str:
    model, out = str(place / "model"), place / name
    options = ["--lora-rank", "2", "--epochs", "6", "--lr", "0.02", "--batch-tokens", "16"]
    train = str(place / "train.jsonl")
    assert main(["finetune", model, train, "--out", str(out), *options, *words]) == 0
    run = str(place / f"{name} run")
    assert main(["fit", str(out), train, "--out", run, "--curvature", "ekfac"]) == 0
    return run


@pytest.fixture(scope="module")
def run(place):
    return tuned(place, "tuned")


def examples(place):
    language = load_language_model(place / "tuned")
    records = read_records(place / "train.jsonl")
    return language, tokenize(records, language.tokenizer, max_length=language.context_length)


def test_a_timeline_is_printed_and_kept_with_a_plot(run, place, capsys):
    capsys.readouterr()
    assert (
        main(["timeline", run, *ASKED, "--segments", "2", "--top", "2", "--source", "topic"]) == 0
    )
    out = capsys.readouterr().out
    assert "the river → runs" in out and "[red]rivers" in out and "\x1b" not in out
    folder = place / "tuned run" / "timelines" / "timeline"
    found = Timeline.load(folder / "data")
    n = found.stages[-1].stop
    assert [(s.start, s.stop) for s in found.segments] == [(0, n // 2), (n // 2, n)]
    assert found.values.shape == (2, 2, 12) and bool(found.values.any())
    assert (found.measurement, found.stages[0].name) == ("log_prob", "fine-tune")
    assert all(found.texts[name] for k in (0, 1) for name, _ in found.strongest(k, 0, 2))
    if pytest.importorskip("matplotlib"):
        assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((place / "tuned run" / "run.json").read_text())
    assert record["timelines"]["timeline"]["segments"] == 2 and record["traces"] == {}


def test_a_finished_timeline_is_read_and_another_question_is_not(run, place, monkeypatch, capsys):
    from headwater.cli import timeline

    words = ["timeline", run, *ASKED, "--name", "again", "--json", "--source", "topic"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(timeline, "_timeline", refuse)
    plot = place / "tuned run" / "timelines" / "again" / "timeline.png"
    plot.unlink(missing_ok=True)  # as if killed before it was drawn
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert plot.is_file() and len(told["queries"]) == 2
    segments = told["queries"][0]["segments"]
    assert len(segments) == 3 and all(len(s["strongest"]) == 5 for s in segments)
    assert segments[0]["net"] == pytest.approx(sum(segments[0]["totals"].values()), rel=1e-4)
    assert {name for s in segments for name, _ in s["strongest"]} <= told["texts"].keys()
    with pytest.raises(AssertionError, match="computed again"):
        main([*words, "--segments", "2"])


def test_a_damaged_timeline_is_made_again_and_a_half_drawn_plot_is_none(
    run, place, monkeypatch, capsys
):
    from matplotlib.figure import Figure

    def killed(self, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    words = ["timeline", run, *ASKED, "--name", "harmed", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", killed)
        assert main(words) == 130
    assert not list((place / "tuned run" / "timelines" / "harmed").glob("*.png"))
    assert main(words) == 0
    folder = place / "tuned run" / "timelines" / "harmed"
    assert (folder / "timeline.png").read_bytes()[1:4] == b"PNG"
    told = capsys.readouterr().out.splitlines()[-1]
    for path in sorted((folder / "data").iterdir()):
        path.write_bytes(path.read_bytes()[:-5])
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert "made again" in err and path.name in err
        assert json.loads(out)["queries"] == json.loads(told)["queries"]


def test_the_record_leads_source_and_unrolling_from_beginning_to_end(run, place):
    language, train = examples(place)
    fitted = load(place / "tuned run" / "fit", language.model, train, CausalLM())
    record = Trajectory.load(place / "tuned")
    prompts, completions = ("the river", "a lake"), (" runs", " by")
    queries = completion_examples(language.tokenizer, prompts, completions)
    asked = {"trajectory": record, "measurement": "log_prob"}
    scores = Source(segments=3).attribute(fitted, queries, **asked)
    assert bool(scores.values.isfinite().all()) and bool(scores.values.any())
    kept = Source(segments=3).by_segment(fitted, queries, **asked)
    torch.testing.assert_close(kept.sum(0).float(), scores.values)
    end = Run(model=language.model, task=CausalLM(), train=train, trajectory=record).repeat()
    for name, p in end.parameters.items():
        # float32, through another kernel of attention and Adam's division
        torch.testing.assert_close(
            p, language.model.get_parameter(name).detach(), rtol=1e-3, atol=1e-4
        )
    exact = Unrolling(keep="sqrt").attribute(fitted, queries, **asked)
    assert exact.facts["replay_gap"] < 1e-3
    both = torch.stack([scores.values.flatten(), exact.values.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0


def test_the_fit_of_the_folder_is_that_of_python(run, place):
    language, train = examples(place)
    fitted = load(place / "tuned run" / "fit", language.model, train, CausalLM())
    again = fit(language.model, train, CausalLM(), curvature=EKFAC(), layers=["*lora_*"])
    assert again.made_from == fitted.made_from


def test_rerun_repeats_timelines_and_cite_names_their_paper(run, place, capsys):
    assert main(["timeline", run, *ASKED, "--name", "kept"]) == 0
    capsys.readouterr()
    assert main(["cite", run]) == 0
    assert "bae2024" in capsys.readouterr().out.lower()
    again = str(place / "again")
    assert main(["rerun", run, "--out", again, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["timelines"]["kept"]
    one, two = (Timeline.load(f"{r}/timelines/kept/data") for r in (run, again))
    assert told == f"{again}/timelines/kept" and torch.equal(one.values, two.values)


def test_a_fit_made_again_keeps_the_timelines_in_its_record(run, place):
    assert main(["timeline", run, *ASKED, "--name", "kept"]) == 0
    words = ["fit", str(place / "tuned"), str(place / "train.jsonl"), "--out", run]
    assert main([*words, "--curvature", "ekfac"]) == 0
    assert "kept" in json.loads((place / "tuned run" / "run.json").read_text())["timelines"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--prompt"),
        ([*ASKED, "--segments", "7"], "7 segments need a checkpoint each"),
        ([*ASKED, "--segments", "0"], "--segments must be at least 1"),
        ([*ASKED, "--name", "../up"], "plain name for the timeline"),
        ([*ASKED, "--source", "nothing"], "no metadata column 'nothing'; there are: topic"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(run, words, said, capsys):
    capsys.readouterr()
    assert main(["timeline", run, *words]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_models_without_checkpoints_or_without_a_record_are_said(place, capsys):
    assert main(["timeline", tuned(place, "none", "--checkpoints", "0"), *ASKED]) == 2
    assert "fine-tune again with --checkpoints 6 into a new folder" in capsys.readouterr().err
    out, train = str(place / "plain run"), str(place / "train.jsonl")
    assert main(["fit", str(place / "model"), train, "--out", out, "--curvature", "identity"]) == 0
    assert main(["timeline", out, *ASKED]) == 2
    said = capsys.readouterr().err
    assert "only runs of `headwater finetune` can be followed here" in said
    words = ["--max-length", "3", "--curvature", "ekfac"]
    cut = str(place / "cut run")
    assert main(["fit", str(place / "tuned"), train, "--out", cut, *words]) == 0
    assert main(["timeline", cut, *ASKED]) == 2
    assert "the fit was made on other examples" in capsys.readouterr().err
