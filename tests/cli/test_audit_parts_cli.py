"""`headwater audit structure` and `headwater audit drift`: what the weights use, and how far checkpoints have moved."""

import csv
import json
import runpy

import pytest

from headwater.audit.structure import InteractionBasis, degeneracy, interaction_basis
from headwater.cli import main
from headwater.core.function_space import function_space_distance, load_distance
from headwater.training.trajectory import Trajectory

PROGRAM = """
import torch, headwater
from headwater.core.examples import TensorExamples
from headwater.models.vision import mlp
from headwater.training.optimizers import SGD
from headwater.training.run import train_model

def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    x = torch.eye(3)[y].repeat(1, 2) + 0.3 * torch.randn(n, 6, generator=g)
    return TensorExamples(x, y, ids=[f"{seed}-{i}" for i in range(n)], metadata={"label": y.tolist()})

def parts(run):
    model = mlp([6, 8, 3])
    rule = SGD(lr=0.1, batch_size=15, epochs=8, weight_decay=1e-2)
    train_model(model, data(90, 0), headwater.Classification(), rule, folder=run, checkpoints=4)
    return model, data(90, 0), headwater.Classification(), data(60, 1)

def other(run):
    return torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.MaxPool1d(1)), *parts(run)[1:]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "program.py").write_text(PROGRAM)
    return folder


@pytest.fixture(scope="module")
def fitted(place):
    import headwater

    made = runpy.run_path(str(place / "program.py"))
    model, data, task, _ = made["parts"](place / "run")
    folder = place / "run" / "fit"
    return headwater.fit(model, data, task, curvature="ekfac", weight_decay=1e-2, folder=folder)


def part(place, name: str, *words: str) -> int:
    program = f"{place / 'program.py'}:parts"
    return main(["audit", name, str(place / "run"), "--program", program, *words])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_directions_that_do_nothing_are_counted_and_what_was_collected_is_kept(
    place, fitted, capsys, monkeypatch
):
    assert part(place, "structure") == 0
    told = capsys.readouterr()
    expected = degeneracy(fitted)
    assert f"at least {expected.free:,} free directions" in told.out.replace("\n", " ")
    assert f"{expected.passes:.1f} passes beyond the fit" in told.out and expected.passes > 1
    assert "--basis lib" in told.err
    kept = place / "run" / "structures" / "structure"
    assert [int(r["free"]) for r in rows(kept / "layers.csv")] == expected.table()["free"]

    from headwater.core.curvature import jacobian

    def refuse(*args, **kwargs):
        raise AssertionError("collected again")

    monkeypatch.setattr(jacobian, "jacobian_moments", refuse)
    assert part(place, "structure", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passes"] == pytest.approx(1 / 3)  # for the gates alone
    assert told["free"] == expected.free and told["parameters"] == expected.n_parameters
    with pytest.raises(AssertionError, match="collected again"):
        part(place, "structure", "--draws", "2")


def test_directions_that_matter_are_found_on_training_and_judged_on_held_out_data(
    place, fitted, capsys
):
    words = ["--basis", "lib", "--name", "lib"]
    assert part(place, "structure", *words) == 0
    told = capsys.readouterr()
    assert "measured on held-out examples" in told.err
    kept = place / "run" / "structures" / "lib"
    basis, own = InteractionBasis.load(kept / "lib"), interaction_basis(fitted)
    assert basis.table() == own.table()
    assert len(rows(kept / "lib-modules.csv")) == sum(x.directions.n_nodes for x in own.layers)
    assert {r["node_layer"] for r in rows(kept / "lib-nodes.csv")} == {"0", "2"}
    stamp = (kept / "lib" / "manifest.json").stat().st_mtime_ns
    assert part(place, "structure", *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["basis"] == own.table() and sum(told["modules"]["sizes"]) > 0
    assert (kept / "lib" / "manifest.json").stat().st_mtime_ns == stamp  # taken, not made
    assert part(place, "structure", *words, "--nodes", "2") == 0
    assert (kept / "lib" / "manifest.json").stat().st_mtime_ns != stamp


def test_checkpoints_are_compared_with_the_fitted_model(place, fitted, capsys):
    record = Trajectory.load(place / "run")
    assert part(place, "drift", "--by", "label") == 0
    told = capsys.readouterr()
    found = rows(place / "run" / "drifts" / "drift.csv")
    assert [r["checkpoint"] for r in found] == [f"step {c.step}" for c in record.checkpoints]
    assert float(found[-1]["distance"]) == pytest.approx(0, abs=1e-9)  # the model itself
    assert float(found[0]["distance"]) > float(found[-2]["distance"]) > 0
    assert "step 0" in told.out and "what was kept of the data" in told.err
    kept = load_distance(place / "run" / "drifts" / "drift", fitted.model)
    own = function_space_distance(fitted, by="label")
    first = record.load_checkpoint(0)
    assert float(kept(first)) == pytest.approx(float(own(first)))
    assert part(place, "drift", "--by", "label", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rho"] == "kl" and told["numbers_kept"] == own.n_numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["structure", "--delta", "0.5"], "--delta must be from 0 to below 0.5"),
        (["structure", "--nodes", "2"], "--nodes and --sources go with --basis"),
        (["structure", "--basis", "lib", "--nodes", "9"], "Expected node layers among 0, 1, 2"),
        (["structure", "--name", "a/b"], "a plain name for the result"),
        (["drift", "--by", "colour"], "no metadata column 'colour'; there are: label"),
        (["drift", "--trajectory", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, fitted, capsys, words, message):
    assert part(place, words[0], *words[1:]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_a_network_without_gates_and_a_folder_without_a_fit_are_refused(
    place, fitted, tmp_path, capsys
):
    program = f"{place / 'program.py'}:parts"
    for name in ("structure", "drift"):
        assert main(["audit", name, str(tmp_path), "--program", program]) == 2
        assert "holds no fit; make one with" in capsys.readouterr().err
        assert main(["audit", name, str(place / "run")]) == 2
        assert "its model is not known; name a function" in capsys.readouterr().err
        assert main(["audit", name, "--help"]) == 0
        assert f"headwater audit {name}" in capsys.readouterr().out
