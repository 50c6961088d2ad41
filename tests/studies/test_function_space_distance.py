"""The study's parts at small size: what it measures is what it says."""

import pytest
import torch

from headwater.core.function_space import StoredDistance
from studies.function_space_distance import (
    FIRST,
    Kept,
    OneHead,
    Plan,
    continual_run,
    figures_table,
    mlp,
    random_directions,
    split,
    trajectory,
)

pytest.importorskip("sklearn")


@pytest.fixture
def plan(tmp_path):
    return Plan(folder=tmp_path, part="distance", hidden=8, epochs=1, batch_size=200)


def test_splits_are_disjoint_and_count_labels_from_zero():
    train, test = split((5, 6, 7, 8, 9), 0)
    assert set(train.tensors[1].tolist()) == set(range(5)) == set(test.tensors[1].tolist())
    together = torch.cat([train.tensors[0], test.tensors[0]])
    assert len(together.unique(dim=0)) == len(together)  # no picture twice, in the data or in both
    assert not torch.equal(split((5, 6), 1)[0].tensors[0], split((5, 6), 0)[0].tensors[0])


def test_points_move_away_from_the_anchor(plan):
    model, (train, _) = mlp([64, 8, 8, 10], seed=0), split(FIRST, 0)
    truth = StoredDistance(model, OneHead(outputs=FIRST), train)
    points = random_directions(model, 0)
    with torch.no_grad():
        sizes = torch.tensor([float(truth(p)) for p in points]).view(5, 8)
        tuned = [float(truth(p)) for p in trajectory(plan, model, 0)]
    assert bool((sizes[:, -1] > 10 * sizes[:, 0]).all()) and len(tuned) == 1 and tuned[0] > 0


def test_a_run_tells_accuracy_forgetting_and_what_it_kept(plan):
    average, forgetting, numbers = continual_run(plan, "function-space, by class", 1.0, 0)
    assert 0 <= average <= 1 and -1 <= forgetting <= 1
    # two earlier tasks of three classes: a count, means, a triangle of covariances, two layers of gates
    assert numbers == 2 * 3 * (1 + 64 + 64 * 65 // 2 + 8 + 8)


def test_tables_have_means_with_intervals_and_runs_are_made_once(plan):
    runs = [{"a": {"auroc": 0.8}, "b": {"auroc": 0.5}}, {"a": {"auroc": 0.9}, "b": {"auroc": 0.6}}]
    assert "| a | 0.850 [" in figures_table(runs, ["auroc"])
    made, kept = [], Kept(plan.folder)
    for _ in range(2):
        assert kept("one", lambda value: made.append(value) or [value], 3) == [3]
    assert made == [3]
