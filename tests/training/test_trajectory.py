import json

import pytest
import torch

from headwater.core.files import ArtifactDamaged, ArtifactMissing, write_json
from headwater.training.trajectory import (
    CheckpointRecord,
    StageRecord,
    Trajectory,
    write_tensors,
)


def record(**changes) -> Trajectory:
    facts = {
        "optimizer": "AdamW",
        "lr": [0.1, 0.05],
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "batches": [["a", "b"], ["c"]],
        "losses": [2.0, float("nan")],
        "seed": 3,
    }
    return Trajectory(**(facts | changes))


def test_what_is_saved_is_what_is_read(tmp_path):
    before = record(losses=[2.0, 1.5], trained=["w"], distance=0.5, made_from={"model": "ab"})
    before.save(tmp_path)
    assert Trajectory.load(tmp_path) == before
    assert Trajectory.load(tmp_path / "trajectory.json") == before


def test_losses_that_are_not_finite_survive_the_file(tmp_path):
    record().save(tmp_path)
    assert str(Trajectory.load(tmp_path).losses) == "[2.0, nan]"


def test_the_horizon_is_how_far_momentum_carries_a_constant_gradient():
    lr, mu = 0.1, 0.8
    theta = velocity = 0.0
    for step in range(400):  # gradient 1 for 100 steps at the learning rate, then none
        velocity = mu * velocity + (1.0 if step < 100 else 0.0)
        theta += lr * velocity
    run = record(optimizer="SGD", lr=[lr] * 100, momentum=mu)
    assert run.horizon == pytest.approx(theta, rel=1e-9)  # 0.8^300 of the last velocity is left


@pytest.mark.parametrize(
    ("optimizer", "adaptive"), [("AdamW", True), ("Adam", True), ("SGD", False)]
)
def test_adaptive_optimizers_are_told_from_plain_ones(optimizer, adaptive):
    assert record(optimizer=optimizer).adaptive is adaptive


def test_a_file_that_is_no_record_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactMissing):
        Trajectory.load(tmp_path)
    (tmp_path / "trajectory.json").write_text(json.dumps({"optimizer": "SGD"}))
    with pytest.raises(ArtifactDamaged, match=r"trajectory\.json"):
        Trajectory.load(tmp_path)


def long_run(steps, *, stages=None, momentum=0.5):
    """A run with checkpoints after these steps, at learning rates 1, 2, 3, ..."""
    n = steps[-1]
    return record(
        optimizer="SGD",
        momentum=momentum,
        lr=[float(k + 1) for k in range(n)],
        batches=[[f"e{k}"] for k in range(n)],
        losses=[0.0] * n,
        stages=stages or [],
        checkpoints=[CheckpointRecord(step=k, path=f"{k}", lr_sum=0.0) for k in [0, *steps]],
    )


def test_records_from_before_there_were_stages_have_one():
    run = Trajectory(
        optimizer="SGD",
        lr=[0.1, 0.1],
        weight_decay=0.2,
        batches=[["a", "b"], ["c"]],
        losses=[1.0, 1.0],
        seed=0,
        momentum=0.9,
    )
    assert run.stages == [StageRecord(stop=2, optimizer="SGD", weight_decay=0.2, momentum=0.9)]
    assert run.normalizers == [2.0, 1.0]
    assert run.checkpoints == []


def test_an_old_file_is_read(tmp_path):
    old = {
        "optimizer": "AdamW",
        "lr": [0.1],
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "momentum": 0.0,
        "batches": [["a"]],
        "losses": [2.0],
        "seed": 3,
        "trained": ["w"],
        "distance": 0.5,
        "made_from": {"model": "ab"},
    }
    (tmp_path / "trajectory.json").write_text(json.dumps(old))
    run = Trajectory.load(tmp_path)
    assert (run.trained, run.distance, run.stages[0].betas) == (["w"], 0.5, [0.9, 0.999])


def test_segments_end_at_checkpoints_and_cover_the_run():
    run = long_run([2, 4, 6, 8, 10, 12])
    found = run.segments(3)
    assert [(s.start, s.stop) for s in found] == [(0, 4), (4, 8), (8, 12)]
    assert [s.checkpoints for s in found] == [(1, 2), (3, 4), (5, 6)]
    assert [s.lr_sum for s in found] == [10.0, 26.0, 42.0]
    assert found[0].steps == 4
    assert found[0].horizon == 20.0
    assert sum(s.horizon for s in found) == run.horizon
    (whole,) = run.segments(1)
    assert (whole.start, whole.stop, whole.checkpoints) == (0, 12, (1, 2, 3, 4, 5, 6))


def test_segments_stay_within_stages():
    stages = [StageRecord(stop=3, momentum=0.5), StageRecord(start=3, stop=12, momentum=0.9)]
    run = long_run([3, 6, 9, 12], stages=stages)
    assert [(s.start, s.stop, s.stage, s.momentum) for s in run.segments(2)] == [
        (0, 3, 0, 0.5),
        (3, 12, 1, 0.9),
    ]
    assert [(s.start, s.stop) for s in run.segments(3)] == [(0, 3), (3, 6), (6, 12)]
    with pytest.raises(ValueError, match=r"1 segments need .* has \[1, 3\] checkpoints"):
        run.segments(1)


def test_there_are_no_more_segments_than_checkpoints():
    with pytest.raises(ValueError, match="3 segments need a checkpoint each"):
        long_run([5, 10]).segments(3)


def test_checkpoints_are_read_from_beside_the_record(tmp_path):
    write_tensors(tmp_path / "checkpoints/a.safetensors", {"w": torch.ones(2)})
    kept = CheckpointRecord(step=0, path="checkpoints/a.safetensors", lr_sum=0.0)
    gone = CheckpointRecord(step=2, path="checkpoints/b.safetensors", lr_sum=0.1)
    run = record(checkpoints=[kept, gone])
    with pytest.raises(ValueError, match=r"no folder"):
        run.load_checkpoint(0)
    run.save(tmp_path)
    run = Trajectory.load(tmp_path)
    assert run.load_checkpoint(0)["w"].tolist() == [1, 1]
    with pytest.raises(ArtifactMissing, match=r"b\.safetensors does not exist"):
        run.load_checkpoint(1)
    with pytest.raises(IndexError, match="has 2 checkpoints; asked for 2"):
        run.load_checkpoint(2)
    (tmp_path / "checkpoints/b.safetensors").write_text("no tensors")
    with pytest.raises(ArtifactDamaged, match=r"b\.safetensors cannot be read"):
        run.load_checkpoint(-1)


def test_a_checkpoint_outside_of_the_folder_is_not_read(tmp_path):
    write_tensors(tmp_path / "out.safetensors", {"w": torch.ones(2)})
    run = record(checkpoints=[CheckpointRecord(step=0, path="../out.safetensors", lr_sum=0.0)])
    run.save(tmp_path / "run")
    with pytest.raises(ArtifactDamaged, match="is outside of"):
        run.load_checkpoint(0)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": ["a", "b"]},
        {"lr": [0.1, float("nan")]},
        {"stages": [{"stop": 10**12, "optimizer": "SGD", "weight_decay": 0.0}]},
        {"stages": [{"stop": 2, "optimizer": "SGD", "weight_decay": 0.0, "momentum": 1.0}]},
        {"stages": [{"stop": "x", "optimizer": "SGD", "weight_decay": 0.0}]},
        {"checkpoints": [{"step": 10**15, "path": "x", "lr_sum": 0.0}]},
        {"checkpoints": [{"step": "x", "path": "x", "lr_sum": 0.0}]},
        {"stages": 3},
    ],
)
def test_a_record_that_no_run_made_is_refused(change, tmp_path):
    body = {"optimizer": "SGD", "lr": [0.1, 0.1], "weight_decay": 0.0, "seed": 0}
    body |= {"batches": [["a"], ["b"]], "losses": [1.0, 1.0]}
    write_json(tmp_path / "trajectory.json", body)
    assert Trajectory.load(tmp_path).steps == 2
    write_json(tmp_path / "trajectory.json", body | change)
    with pytest.raises(ArtifactDamaged, match=r"(?s)trajectory\.json is no record.*train again"):
        Trajectory.load(tmp_path)
