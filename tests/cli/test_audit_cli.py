"""`headwater audit` and `headwater verify --audit`: a classifier of a person's own program."""

import csv
import json

import pytest

pytest.importorskip("jinja2")

from headwater.audit import Findings
from headwater.cli import main
from headwater.training.changes import ChangeSet
from headwater.training.verify import Verification

PROGRAM = """
import torch, headwater
from headwater.models.vision import mlp
from headwater.training.optimizers import SGD
from headwater.training.run import train_model

def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    return torch.eye(3)[y].repeat(1, 2) + 0.3 * torch.randn(n, 6, generator=g), y

def noisy():
    x, y = data(90, 0)
    wrong = torch.arange(90) % 10 == 0
    return x, torch.where(wrong, (y + 1) % 3, y), wrong

def parts(run):
    x, y, _ = noisy()
    model = mlp([6, 8, 3])
    rule = SGD(lr=0.1, batch_size=15, epochs=8, weight_decay=1e-2)
    train_model(model, (x, y), headwater.Classification(), rule, folder=run, checkpoints=4)
    return model, (x, y), headwater.Classification(), data(60, 1)

def nothing(run):
    return 3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a fit of a classifier, and its program."""
    import runpy

    import headwater

    folder = tmp_path_factory.mktemp("audit")
    (folder / "program.py").write_text(PROGRAM)
    made = runpy.run_path(str(folder / "program.py"))
    model, data, task, _ = made["parts"](folder / "run")
    headwater.fit(
        model, data, task, curvature="ekfac", weight_decay=1e-2, folder=folder / "run" / "fit"
    )
    with (folder / "verified.csv").open("w", newline="") as file:
        rows = [(str(i), int(made["noisy"]()[2][i])) for i in range(0, 90, 2)]
        csv.writer(file).writerows([("id", "is_wrong"), *rows])
    return folder / "run"


def program(run) -> list[str]:
    return ["--program", f"{run.parent / 'program.py'}:parts"]


def test_an_audit_is_printed_and_kept_as_page_tables_and_changes(run, capsys):
    assert main(["audit", str(run), *program(run), "--top", "4"]) == 0
    out = capsys.readouterr().out
    assert "labels are held to be wrong" in out and "beyond the fit" in out
    assert "On 60 held-out labels the model is" in " ".join(out.split())
    place = run / "audits"
    found = Findings.load(place / "audit")
    assert found.facts["combined"] == ["self_influence", "aum", "neighbours"]
    rows = list(csv.DictReader((place / "audit.csv").open()))
    assert len(rows) == 90 and {"id", "label_score", "is_label_issue"} <= set(rows[0])
    assert (place / "audit.parquet").is_file()
    assert (place / "audit.html").read_text("utf-8").startswith("<!doctype html")
    changes = ChangeSet.load(place / "audit.changes.json")
    assert len(changes) == len(found.issues) > 0
    truly = {str(i) for i in range(0, 90, 10)}
    assert len({*changes.relabel, *changes.remove} & truly) > len(changes) / 2


def test_a_change_set_that_a_person_edited_is_kept(run, capsys):
    words = ["audit", str(run), *program(run), "--name", "edited"]
    assert main(words) == 0
    path = run / "audits" / "edited.changes.json"
    first = path.read_text()
    edited = first.replace('"keep": []', '"keep": ["3"]')
    assert edited != first
    path.write_text(edited)
    capsys.readouterr()
    assert main(words) == 0
    assert "kept as edited.changes.1.json" in capsys.readouterr().err
    assert path.with_suffix(".1.json").read_text() == edited and path.read_text() == first
    assert main(words) == 0 and not path.with_suffix(".2.json").exists()


def test_what_was_measured_is_not_measured_again_when_a_sample_is_verified(
    run, capsys, monkeypatch
):
    from headwater.cli import audit

    main(["audit", str(run), *program(run)])

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(audit, "_measure", refuse)
    more = ["--verified", str(run.parent / "verified.csv"), "--false-claims", "0.4"]
    assert main(["audit", str(run), *program(run), *more, "--confidence", "0.8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "45 of 90 examples were verified" in out and "Claims with error control" in out
    with pytest.raises(AssertionError, match="measured again"):
        main(["audit", str(run), *program(run), "--measures", "loss"])


def test_changes_are_held_against_the_repeated_run(run, capsys):
    main(["audit", str(run), *program(run)])
    words = ["verify", str(run), "--audit", "audit", *program(run), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["measurement"] == "loss" and len(told["outcomes"]) == 3
    relabelled, without, control = told["outcomes"]
    assert relabelled["actual"] < control["actual"] and control["control"]
    assert "relabelled" in relabelled["change"] and without["predicted"] < 0
    kept = list((run / "verify" / "audits").glob("*.json"))
    assert len(kept) == 1 and Verification.load(kept[0]).outcomes[0].actual == relabelled["actual"]
    assert main(words) == 0 and "read from" in capsys.readouterr().err
    assert main(words[:-1]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "relabelled (audit audit): lower than with as many left out at random in 1 of 1" in said
    assert "Leaving out" not in said


def test_a_sample_is_drawn_once_for_a_person(run, capsys):
    assert main(["audit", str(run), *program(run), "--sample", "10"]) == 0
    told = capsys.readouterr().err
    assert f"audit {run} {' '.join(program(run))} --verified" in told  # as it can be run
    rows = list(csv.DictReader((run / "audits" / "audit.to-verify.csv").open()))
    assert len(rows) == 10 and all(r["is_wrong"] == "" and r["given_label"] for r in rows)
    assert main(["audit", str(run), *program(run), "--sample", "10"]) == 2
    assert "may have been filled in" in capsys.readouterr().err


def test_out_of_fold_probabilities_are_read_from_a_file(run, tmp_path, capsys):
    pytest.importorskip("cleanlab")
    import numpy

    numpy.save(tmp_path / "p.npy", numpy.full((90, 3), 1 / 3))
    words = ["audit", str(run), *program(run), "--name", "oof", "--json", "--measures"]
    words += ["confident_learning", "neighbours", "--out-of-fold", str(tmp_path / "p.npy")]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["columns"]["confident_learning"] == pytest.approx([1 / 3] * 90)
    (tmp_path / "p.csv").write_text("a,b\n")
    assert main([*words[:-1], str(tmp_path / "p.csv")]) == 2
    assert "is no table of probabilities" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--program", "nowhere.py:parts"], "There is no file nowhere.py"),
        (["--program", "parts"], "Expected --program file.py:function"),
        ([], "its model is not known; name a function"),
        (["--confidence", "95"], "--confidence must be between 0 and 1"),
        (["--measures", "loes"], "There is no measure 'loes'"),
        (["--measures", "loss", "--issues", "91"], "at most 90 issues"),
        (["--verified", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--sample", "5", "--sample-seed", "-1"], "--sample-seed must be 0 or more"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(run, capsys, words, message):
    given = words if "--measures" not in words else [*program(run), *words]
    assert main(["audit", str(run), *given, "--name", "bad"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_program_must_give_what_is_asked_for(run, capsys):
    place = run.parent / "program.py"
    assert main(["audit", str(run), "--name", "x", "--program", f"{place}:nothing"]) == 2
    assert "must return (model, data, task)" in capsys.readouterr().err
    assert main(["audit", str(run), "--name", "x", "--program", f"{place}:none"]) == 2
    assert "has no function 'none'" in capsys.readouterr().err


def test_a_folder_without_a_fit_is_refused(tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 2
    assert "holds no fit; make one with" in capsys.readouterr().err


def test_verify_does_not_mix_traces_and_changes(run, capsys):
    assert main(["verify", str(run), "--audit", "audit", "--name", "trace"]) == 2
    assert "leave out --name" in capsys.readouterr().err
    assert main(["verify", str(run), "--changes", "x.json", "--query", "1"]) == 2
    assert "give its --name" in capsys.readouterr().err
    assert main(["verify", str(run), "--program", "x.py:f"]) == 2
    assert "go with --audit or --changes" in capsys.readouterr().err


def test_a_language_models_run_is_audited_with_its_held_out_texts(tmp_path, capsys):
    from tests.language_cases import WORDS, saved

    def write(name, shift):
        lines = [
            {
                "prompt": " ".join(WORDS[(i + k + shift) % len(WORDS)] for k in range(3)),
                "completion": " " + " ".join(WORDS[(i * k + 2) % len(WORDS)] for k in range(4)),
            }
            for i in range(12)
        ]
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return str(path)

    saved(tmp_path / "model")
    run = tmp_path / "run"
    fit = ["fit", str(tmp_path / "model"), write("train.jsonl", 0), "--out", str(run)]
    assert main([*fit, "--heldout", write("heldout.jsonl", 5), "--curvature", "ekfac"]) == 0
    assert (
        main(["audit", str(run), "--sections", "outliers", "memorization", "overconfidence"]) == 0
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "held-out tokens the model is" in told and "of 12 texts are held to be doubtful" in told
    found = Findings.load(run / "audits" / "audit")
    assert {"perplexity", "ifd", "self_influence", "recitation_distance"} <= set(found.columns)
    assert "given_label" not in found.columns and bool((found.columns["ifd"] > 0).all())
