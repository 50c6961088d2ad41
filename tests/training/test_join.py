import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import Dense
from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactMismatch
from headwater.core.task import Classification
from headwater.trace import Source, Unrolling
from headwater.training.join import join
from headwater.training.optimizers import SGD, AdamW, Stage
from headwater.training.record import record
from headwater.training.run import Run, train_model
from headwater.training.trajectory import Trajectory

FIRST, SECOND = list(range(12)), list(range(12, 20))
RULES = (
    SGD(lr=0.2, momentum=0.5, batch_size=4, epochs=3),
    AdamW(lr=0.02, eps_root=1e-6, batch_size=4, epochs=2),
)
KEEP = {"checkpoints": 2, "keep_optimizer": True}
TASK = Classification()


def net(hidden: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def data() -> TensorExamples:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorExamples(x, torch.arange(20) % 3, ids=[f"e{i}" for i in range(20)])


def trained(folder, rules=RULES, **options):
    """A model that was trained by gradient descent on some examples, then by AdamW on others."""
    model, train = net(), data()
    runs = [
        train_model(model, train.subset(part), TASK, rule, folder=folder / name, **KEEP | options)
        for part, rule, name in zip((FIRST, SECOND), rules, ("a", "b"), strict=True)
    ]
    return model, train, runs


@pytest.fixture
def two(tmp_path):
    return trained(tmp_path)


def test_two_runs_are_one_run_of_two_stages(two, tmp_path):
    model, train, runs = two
    whole = join(runs, tmp_path / "whole", names=["pretrain", "fine-tune"])
    assert whole == Trajectory.load(tmp_path / "whole")
    assert [(s.name, s.start, s.stop, s.optimizer) for s in whole.stages] == [
        ("pretrain", 0, 9, "SGD"),
        ("fine-tune", 9, 13, "AdamW"),
    ]
    for name in ("lr", "batches", "losses", "normalizers"):
        assert getattr(whole, name) == getattr(runs[0], name) + getattr(runs[1], name)
    assert [c.step for c in whole.checkpoints] == [0, 4, 9, 11, 13]
    assert [c.lr_sum for c in whole.checkpoints] == pytest.approx(
        [sum(whole.lr[: c.step]) for c in whole.checkpoints]
    )
    assert whole.horizon == pytest.approx(runs[0].horizon + runs[1].horizon)
    run = Run(model=model, task=TASK, train=train, trajectory=whole)
    final = run.repeat().parameters
    assert all(torch.equal(final[n], p.detach()) for n, p in model.named_parameters())
    start = net().state_dict()
    moved = sum((final[n] - start[n]).square().sum() for n in final)
    assert whole.distance == pytest.approx(float(moved))


def test_attribution_is_that_of_a_run_made_in_one_go(tmp_path):
    # Batches of all examples, so that the order in which they are drawn changes rounding alone.
    rules = (replace(RULES[0], batch_size=12, epochs=6), replace(RULES[1], batch_size=12, epochs=4))
    model, train, _ = trained(tmp_path, rules, checkpoints=1)
    whole = join([tmp_path / "a", tmp_path / "b"], tmp_path / "whole", names=["one", "two"])
    stages = [
        Stage(optimizer=rule, examples=torch.tensor(part), name=name)
        for rule, part, name in zip(rules, (FIRST, SECOND), ("one", "two"), strict=True)
    ]
    other = net()
    straight = train_model(
        other, train, TASK, stages, folder=tmp_path / "c", **KEEP | {"checkpoints": 1}
    )
    assert straight.stages == whole.stages
    for method in (Source(segments=2), Unrolling()):
        one, two = (
            method.attribute(
                headwater.fit(each, train, TASK, curvature=Dense()),
                train.subset([0, 15]),
                trajectory=run,
            ).values
            for each, run in ((model, whole), (other, straight))
        )
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)  # float32
        assert bool(one[:, FIRST].any()) and bool(one[:, SECOND].any())


def test_runs_of_loops_of_ones_own_are_joined_and_files_are_shared(tmp_path):
    model = net()
    for name in ("a", "b"):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with record(model, sgd, tmp_path / name) as recorder:
            model(torch.ones(1, 4).double()).sum().backward()
            sgd.step()
            recorder.step([name])  # no loss is told
    runs = [tmp_path / "a", tmp_path / "b"]
    whole = join(runs, tmp_path / "whole", names=["a", "b"])
    assert [c.step for c in whole.checkpoints] == [0, 1, 2]
    assert all(map(math.isnan, whole.losses))
    files = (tmp_path / "b", 1), (tmp_path / "whole", 2)
    one, other = (p / f"checkpoints/step-{k:08}.safetensors" for p, k in files)
    assert os.stat(one).st_ino == os.stat(other).st_ino
    assert join(runs, tmp_path / "whole", names=["a", "b"]).checkpoints == whole.checkpoints
    with pytest.raises(ArtifactMismatch, match="holds the record of another run"):
        join(runs, tmp_path / "whole", names=["a", "c"])


def test_where_there_are_no_links_files_are_copied(two, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    whole = join(two[2], tmp_path / "whole", names=["one", "two"])
    end = two[2][1].load_checkpoint(-1)
    assert all(torch.equal(whole.load_checkpoint(-1)[n], v) for n, v in end.items())
    assert not list((tmp_path / "whole").rglob("*.partial"))


def test_stages_of_a_joined_record_keep_their_names(two, tmp_path):
    whole = join(two[2], tmp_path / "whole", names=["one", "two"])
    third = train_model(two[0], data().subset(FIRST), TASK, RULES[0], folder=tmp_path / "c", **KEEP)
    longer = join([whole, third], tmp_path / "longer", names=["before", "after"])
    assert [s.name for s in longer.stages] == ["before: one", "before: two", "after"]
    assert [c.step for c in longer.checkpoints] == [0, 4, 9, 11, 13, 17, 22]


def test_runs_that_do_not_follow_one_another_are_refused(two, tmp_path):
    _, train, (first, second) = two
    names = ["one", "two"]
    with pytest.raises(ValueError, match=r"'two' begins [\d.]+ of the .* away from where 'one'"):
        join([second, first], tmp_path / "x", names=names)
    other = train_model(net(hidden=6), train, TASK, RULES[1], folder=tmp_path / "other", **KEEP)
    with pytest.raises(ValueError, match=r"'two' trained 3 parameters .* 0\.bias, 0\.weight, 2\.w"):
        join([first, other], tmp_path / "x", names=names)
    frozen = net()
    frozen[0].requires_grad_(False)
    part = train_model(frozen, train, TASK, RULES[1], folder=tmp_path / "part", **KEEP)
    with pytest.raises(ValueError, match=r"'one' trained 2 parameters that 'two' did not.* merge"):
        join([first, part], tmp_path / "x", names=names)
    open_end = replace(first, checkpoints=first.checkpoints[:-1])
    with pytest.raises(ValueError, match="'one' kept no parameters at its end, step 9"):
        join([open_end, second], tmp_path / "x", names=names)
    unkept = replace(second, checkpoints=second.checkpoints[1:])
    with pytest.raises(ValueError, match="'two' kept no initial parameters"):
        join([first, unkept], tmp_path / "x", names=names)
    with pytest.raises(ValueError, match="a name of its own for each"):
        join([first, second], tmp_path / "x", names=["one"])
    assert not (tmp_path / "x").exists()
