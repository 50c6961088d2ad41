import json

import pytest

from headwater.core.files import ArtifactDamaged, ArtifactMissing
from headwater.training.trajectory import Trajectory


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
