"""`headwater calibrate ifcomp` hedges what a run folder holds, and says what is missing."""

import csv
import json

import pytest
import torch
from torch import nn

import headwater
from headwater.calibrate import Complexity, IFComp, complexity
from headwater.cli import main
from headwater.core.files import write_json
from headwater.core.task import Classification
from headwater.core.tempering import fit_at_temperature
from tests.cases import mlp_data


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    fit = headwater.fit(model, mlp_data(30), Classification(), curvature="identity")
    soft = fit_at_temperature(fit, 3.0)
    for name, n in (("validation", 40), ("test", 25)):
        found = complexity(soft, mlp_data(n), damping="0.001 relative")
        found.save(tmp_path / "complexity" / name)
    return tmp_path, soft


def test_what_is_printed_is_what_python_says(run, capsys):
    folder, _ = run
    assert main(["calibrate", "ifcomp", str(folder), "--json", "--bins", "5"]) == 0
    said = json.loads(capsys.readouterr().out)
    method = IFComp()
    validation, test = (Complexity.load(folder / "complexity" / n) for n in ("validation", "test"))
    strength, temperature = method.choose(validation)
    assert (said["strength"], said["temperature"]) == (strength, temperature)
    expected = method.predictions(test, strength, temperature)
    assert said["measures"]["test"]["IF-COMP"] == pytest.approx(expected.measures(n_bins=5))
    with (folder / "calibrated" / "test.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 25
    assert float(rows[3]["confidence"]) == pytest.approx(float(expected.confidence[3]))
    assert float(rows[3]["label_score"]) == pytest.approx(float(test.label_score()[3]))
    assert main(["calibrate", "ifcomp", str(folder)]) == 0
    assert "temperature scaling" in capsys.readouterr().out


def test_what_is_missing_is_said(run, tmp_path, capsys):
    folder, soft = run
    assert main(["calibrate", "ifcomp", str(folder / "nowhere")]) == 2
    assert "is not there; save some from Python" in capsys.readouterr().err
    (folder / "lm").mkdir()
    write_json(folder / "lm" / "run.json", {})
    assert main(["calibrate", "ifcomp", str(folder / "lm")]) == 2
    assert "language model" in capsys.readouterr().err
    assert main(["calibrate", "ifcomp", str(folder), "--validation", "dev"]) == 2
    assert "there are: test, validation" in capsys.readouterr().err
    complexity(soft, mlp_data(5), damping=0.5).save(folder / "complexity" / "other")
    assert main(["calibrate", "ifcomp", str(folder)]) == 2
    assert "2 different models, temperatures or dampings" in capsys.readouterr().err


def test_actions_are_listed_and_others_refused(capsys):
    assert main(["calibrate"]) == 0
    assert "ifcomp" in capsys.readouterr().out
    assert main(["calibrate", "magic"]) == 2
    assert "Expected one of" in capsys.readouterr().err
