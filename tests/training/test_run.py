import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactMismatch, FolderBusy
from headwater.core.locks import FolderLock
from headwater.core.task import CausalLM, Classification
from headwater.models.vision import mlp
from headwater.training import run as module
from headwater.training.loop import train
from headwater.training.optimizers import SGD, Adam, AdamW, Stage
from headwater.training.run import Run, train_model
from headwater.training.trajectory import Trajectory
from tests.curvature_cases import TinyLM, Tokens

RULES = [
    SGD(lr=0.1, weight_decay=0.01, batch_size=4, epochs=2),
    Adam(lr=0.01, batch_size=4, epochs=2, schedule="cosine"),
    AdamW(lr=0.01, batch_size=4, epochs=2, warmup=2),
]
every = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def examples(n=14):
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3
    return TensorExamples(x, y, ids=[f"e{i}" for i in range(n)])


def net(seed=0):
    return mlp([6, 5, 3], seed=seed).double()


@every
def test_the_plain_loop_is_that_of_stacked_training(rule, tmp_path):
    data, model = examples(), net()
    weights = torch.ones(14, dtype=torch.float64)
    weights[3] = 0
    stacked = train(
        [net()],
        *data.tensors,
        subsets=torch.arange(14)[None],
        seeds=[5],
        optimizer=rule,
        weights=weights[None],
    )
    train_model(model, data, Classification(), rule, seed=5, weights=weights)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), stacked[name][0], rtol=1e-10, atol=1e-12)


@every
def test_a_recorded_run_repeats_itself_bit_by_bit(rule, tmp_path):
    data, model = examples(), net()
    made = train_model(model, data, Classification(), rule, folder=tmp_path, seed=1)
    run = Run(model=net(7), task=Classification(), train=data, trajectory=Trajectory.load(tmp_path))
    again = run.repeat().parameters
    for name, value in model.named_parameters():
        assert torch.equal(again[name], value)
        assert torch.equal(made.load_checkpoint(-1)[name], value)
        assert torch.equal(made.load_checkpoint(0)[name], net().state_dict()[name])
    assert made.steps == run.steps == rule.steps(14)
    assert made.losses[0] == pytest.approx(
        cross_entropy(
            net()(data.tensors[0])[run.batches[0]], data.tensors[1][run.batches[0]]
        ).item()
    )


def test_weights_leave_the_rest_of_the_run_as_it_was(tmp_path):
    data = examples()
    trajectory = train_model(net(), data, Classification(), RULES[0], folder=tmp_path)
    run = Run(model=net(), task=Classification(), train=data, trajectory=trajectory)
    ones = torch.ones(14, dtype=torch.float64)
    for a, b in zip(*(run.repeat(w).parameters.values() for w in (ones, None)), strict=True):
        assert torch.equal(a, b)
    ones[2] = 0
    assert not torch.equal(
        run.repeat(ones).parameters["0.weight"], run.repeat().parameters["0.weight"]
    )


def test_two_stages_are_recorded_with_their_data_and_optimizers(tmp_path):
    data = examples()
    stages = [
        Stage(name="first", optimizer=RULES[0], examples=torch.arange(8)),
        Stage(name="second", optimizer=RULES[2], examples=torch.arange(6, 14)),
    ]
    made = train_model(net(), data, Classification(), stages, folder=tmp_path, checkpoints=4)
    assert [(s.name, s.start, s.stop, s.optimizer) for s in made.stages] == [
        ("first", 0, 4, "SGD"),
        ("second", 4, 8, "AdamW"),
    ]
    assert made.examples(0, 4) == {f"e{i}" for i in range(8)}
    assert made.examples(4) == {f"e{i}" for i in range(6, 14)}
    assert [c.step for c in made.checkpoints] == [0, 2, 4, 6, 8]
    assert [(s.start, s.stop, s.checkpoints, s.stage) for s in made.segments(2)] == [
        (0, 4, (1, 2), 0),
        (4, 8, (3, 4), 1),
    ]
    assert made.checkpoints[-1].lr_sum == pytest.approx(sum(made.lr))
    assert made.horizon == pytest.approx(sum(made.lr[:4]) / 0.1 + sum(made.lr[4:]))


def test_the_optimizers_moments_are_kept_on_request(tmp_path):
    made = train_model(
        net(), examples(), Classification(), RULES[2], folder=tmp_path, keep_optimizer=True
    )
    run = Run(model=net(), task=Classification(), train=examples(), trajectory=made)
    final = run.repeat().optimizer
    kept = made.load_optimizer(-1)
    assert kept.keys() == {"mean", "square"}
    assert kept["square"]["0.weight"].shape == final.moments["square"]["0.weight"].shape
    with pytest.raises(ValueError, match="keep_optimizer=True"):
        made.load_optimizer(0)


def test_losses_can_be_divided_by_tokens(tmp_path):
    data = Tokens([[1, 2, 3, 4], [2, 3], [5, 1, 2]])
    rule = SGD(lr=0.1, batch_size=2, epochs=1)
    made = train_model(TinyLM(), data, CausalLM(), rule, folder=tmp_path, normalize="tokens")
    scored = dict(zip(data.ids, (3, 1, 2), strict=True))
    assert made.normalizers == [sum(scored[i] for i in batch) for batch in made.batches]


def test_data_that_lacks_examples_of_the_run_is_refused(tmp_path):
    data = examples()
    made = train_model(net(), data, Classification(), RULES[0], folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"saw 1 examples that the data does not have, such as 'e3'"
    ):
        part = data.subset([i for i in range(14) if i != 3])
        Run(model=net(), task=Classification(), train=part, trajectory=made)


def test_a_record_without_initial_parameters_is_refused():
    bare = Trajectory(optimizer="SGD", lr=[], weight_decay=0.0, batches=[], losses=[], seed=0)
    with pytest.raises(ValueError, match="no initial parameters"):
        Run(model=net(), task=Classification(), train=examples(), trajectory=bare)


def test_training_that_diverges_names_the_step():
    wild = SGD(lr=1e200, batch_size=4, epochs=2)
    with pytest.raises(FloatingPointError, match=r"loss of step \d is (nan|inf); lower lr"):
        train_model(net(), examples(), Classification(), wild)


def test_frozen_parameters_stay_and_are_not_kept(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    made = train_model(model, examples(), Classification(), RULES[0], folder=tmp_path)
    assert torch.equal(model[0].weight, before)
    assert made.trained == ["2.weight", "2.bias"]


def test_another_model_is_refused(tmp_path):
    data = examples()
    made = train_model(net(), data, Classification(), RULES[0], folder=tmp_path)
    run = Run(model=mlp([6, 4, 3]).double(), task=Classification(), train=data, trajectory=made)
    with pytest.raises(ValueError, match=r"trained '0.bias' of shape \(5,\), which the model"):
        run.initial()


def test_a_weight_an_example_serves_for_all_its_tokens(tmp_path):
    data, model = (
        Tokens([[1, 2, 3, 4], [2, 4, 1, 3], [5, 1, 2, 6], [3, 1, 4, 1]]),
        TinyLM().double(),
    )
    rule = SGD(lr=0.1, batch_size=3, epochs=1)  # as many examples as scored positions
    made = train_model(model, data, CausalLM(), rule, folder=tmp_path, normalize="tokens")
    run = Run(model=model, task=CausalLM(), train=data, trajectory=made, per_token=True)
    each = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    one, several = (run.repeat(w).parameters for w in (each, each[:, None].expand(-1, 4)))
    for name, value in one.items():
        torch.testing.assert_close(value, several[name])


def test_weights_are_one_for_each_example_and_make_another_run(tmp_path):
    data, rule = examples(), RULES[0]

    def made_from(weights, folder):
        return train_model(
            net(), data, Classification(), rule, folder=tmp_path / folder, weights=weights
        ).made_from

    doubled = torch.ones(14, dtype=torch.float64).index_fill(0, torch.tensor([3]), 2.0)
    assert made_from(doubled, "a") == made_from(doubled, "b") != made_from(None, "c")
    with pytest.raises(ValueError, match="a weight for each of 14 examples; got 15"):
        train_model(net(), data, Classification(), rule, weights=torch.ones(15))


# Finished, killed, and other runs in the folder


STAGES = [
    Stage(name="first", optimizer=RULES[0], examples=torch.arange(8)),
    Stage(name="second", optimizer=RULES[2], examples=torch.arange(6, 14)),
]


def fixed():
    """Data that another process makes too."""
    x = torch.randn(14, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TensorExamples(x, torch.arange(14) % 3, ids=[f"e{i}" for i in range(14)])


def made(folder, model=None, data=None, optimizer=STAGES, **options):
    """A run that ends with its model and its record."""
    model = net() if model is None else model
    options = {"checkpoints": 5, "keep_optimizer": True, "seed": 3} | options
    data = fixed() if data is None else data
    return model, train_model(model, data, Classification(), optimizer, folder=folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


class Killed(BaseException):
    """Stands for whatever ends a process at once."""


def killed_at(step):
    def progress(done, total, note):
        if done == step:
            raise Killed

    return progress


def test_a_finished_run_is_read_and_not_made_again(tmp_path):
    model, first = made(tmp_path)
    before = contents(tmp_path)
    again, second = made(tmp_path, progress=lambda *step: pytest.fail("trained again"))
    assert second == first and contents(tmp_path) == before
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value)


@pytest.mark.parametrize("every", [0.0, 30.0])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(
    step, every, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "SAVE_EVERY", every)
    model, _ = made(tmp_path / "whole")
    with pytest.raises(Killed):
        made(tmp_path / "cut", progress=killed_at(step))
    steps = []
    again, _ = made(tmp_path / "cut", progress=lambda done, *_: steps.append(done))
    # The last state that is saved is that before the last step.
    assert steps == list(range(min(step, 7) + 1 if every == 0 else 1, 9))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value)


SCRIPT = """
import os, random, signal, sys, time
import headwater.training.run as module
from tests.training.test_run import made
module.SAVE_EVERY, kills = 0.0, 0
made(sys.argv[1] + "-first")  # so that children have nothing left to import
while True:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        made(sys.argv[1], progress=lambda *step: os.write(write, b"."))
        os._exit(0)
    os.close(write)
    if kills < 6:
        os.read(read, 1)
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    if os.WIFEXITED(status):
        break
    kills += 1
print(kills, os.WEXITSTATUS(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs kill -9 and fork")
def test_a_run_killed_at_any_moment_ends_bit_by_bit_as_one_that_was_not(tmp_path):
    """Killed while it computes, writes or clears away, again and again until it gets through."""
    _, whole = made(tmp_path / "whole")
    out = tmp_path / "out"
    path = os.pathsep.join([os.getcwd(), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}  # for the fork
    command = [sys.executable, "-c", SCRIPT, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    kills, status = map(int, done.stdout.split())
    assert status == 0 and kills >= 1, done.stderr
    assert contents(out) == contents(tmp_path / "whole")
    assert made(out)[1] == whole


def test_what_a_kill_after_the_last_step_leaves_is_cleared_away(tmp_path, monkeypatch):
    made(tmp_path / "whole")

    def dies(checkpoint):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.Checkpoint, "clear", dies)
        with pytest.raises(Killed):
            made(tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoint").exists()
    made(tmp_path / "cut", progress=lambda *step: pytest.fail("trained again"))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": net(1)}, "model"),
        ({"data": examples(13)}, "data"),
        ({"seed": 4}, "options"),
        ({"checkpoints": 4}, "options"),
        ({"keep_optimizer": False}, "options"),
        ({"weights": torch.ones(14)}, "options"),
        ({"optimizer": STAGES[:1]}, "options"),
        ({"optimizer": [STAGES[0], Stage(name="second", optimizer=RULES[2])]}, "options"),
        ({"model": net(1), "data": examples(13), "seed": 4}, "model and data and options"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(change, what, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    stopped = {} if "data" not in change else {"optimizer": RULES[0]}
    with pytest.raises(Killed):
        made(tmp_path, progress=killed_at(2), **stopped)
    for state in ("an unfinished", "a finished"):
        before = contents(tmp_path)
        other = stopped | change
        model = other.get("model", net())
        start = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(ArtifactMismatch, match=f"holds {state} run with other {what};"):
            made(tmp_path, **other)
        assert contents(tmp_path) == before
        assert all(torch.equal(model.get_parameter(n), value) for n, value in start.items())
        made(tmp_path, **stopped)


def test_a_run_that_diverged_leaves_the_folder_free(tmp_path):
    wild = SGD(lr=1e200, batch_size=4, epochs=2)
    with pytest.raises(FloatingPointError, match="lower lr"):
        made(tmp_path, optimizer=wild)
    assert made(tmp_path, optimizer=RULES[0])[1].steps == 8


def test_two_processes_do_not_write_one_run(tmp_path):
    with FolderLock(tmp_path), pytest.raises(FolderBusy):
        made(tmp_path)


def test_the_record_is_plain_json(tmp_path):
    made(tmp_path)
    facts = json.loads((tmp_path / "trajectory.json").read_text())
    assert sorted(facts["made_from"]) == ["data", "model", "options"]
