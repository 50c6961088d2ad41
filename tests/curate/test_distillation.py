"""Distilled examples teach more than real ones, and more to fresh networks when learned from cold starts."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from headwater.curate import Distillation, Unrolled, distillation_problem
from headwater.curate.distillation import representatives, soft_cross_entropy, targets_of
from tests.curate.test_data_weights import blobs, make


def test_soft_labels_of_single_classes_are_the_cross_entropy():
    logits, y = torch.randn(6, 3), torch.arange(6) % 3
    hard = torch.nn.functional.one_hot(y, 3).float()
    torch.testing.assert_close(soft_cross_entropy(logits, hard), cross_entropy(logits, y))


def test_representatives_come_class_by_class_and_are_refused_where_there_are_too_few():
    y = torch.tensor([2, 0, 1, 1, 2, 0, 0])
    assert y[representatives(y, 2, seed=4)].tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="fewer than the 3"):
        representatives(y, 3)


def test_labels_are_of_the_classes_in_turn_unless_they_are_learned():
    fixed = targets_of({"images": torch.zeros(4, 5)}, 2)
    assert fixed.argmax(1).tolist() == [0, 0, 1, 1]
    learned = targets_of({"images": torch.zeros(4, 5), "labels": torch.zeros(4, 2)}, 2)
    assert torch.equal(learned, torch.full((4, 2), 0.5))


@pytest.mark.parametrize("learn_labels", [False, True])
def test_distilled_examples_teach_more_than_those_they_began_as(learn_labels):
    real = blobs(300, 0)
    method = Distillation(
        per_class=1, learn_labels=learn_labels, outer_steps=40, outer_lr=0.1, steps=10
    )
    learned = method.learn(make, real)
    problem = distillation_problem(make, real, n_classes=3, steps=10)
    start = {"images": real[0][representatives(real[1], 1)]}
    before = [problem.retrain(start, seed=10_000 + i)[1] for i in range(3)]
    assert sum(learned.retrained) < 0.8 * sum(before)
    assert set(learned.meta) == ({"images", "labels"} if learn_labels else {"images"})


@pytest.mark.slow
def test_ten_digits_teach_fresh_networks_only_when_learned_from_cold_starts():
    pytest.importorskip("sklearn")
    from studies.bilevel_bias import _taught as taught
    from studies.bilevel_bias import accuracy, network, split

    real, test = split(0, 1200)
    cold = Distillation(outer_steps=150, lr=0.3).learn(network, real)
    warm = Distillation(
        estimator=Unrolled(start="warm", inner_steps=3), outer_steps=1000, lr=0.3
    ).learn(network, real)
    random = {"images": real[0][representatives(real[1], 1)]}
    fresh = {
        name: taught(meta, real, test, 0)
        for name, meta in {"cold": cold.meta, "warm": warm.meta, "random": random}.items()
    }
    assert fresh["cold"] > fresh["warm"] + 0.1 and fresh["cold"] > fresh["random"] + 0.1
    assert accuracy(network, warm.state.state, test) > fresh["warm"] + 0.1
