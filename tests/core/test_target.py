import pytest
import torch

from headwater.core.target import (
    Drawn,
    DrawnSeveral,
    Enumerated,
    Loss,
    Measured,
    fisher_target,
)
from headwater.core.task import CausalLM, Classification
from tests.cases import mlp, numbers
from tests.core.test_task import language_batch, language_net

TASK, KEYS = Classification(), torch.arange(4)


def test_losses_and_measurements_are_those_of_the_task():
    model, batch = mlp(), numbers(5)
    assert torch.equal(Loss()(model, TASK, batch, KEYS)[0], TASK.loss(model, batch))
    margin = TASK.predict(model, batch).margin()
    assert torch.equal(Measured("margin")(model, TASK, batch, KEYS)[0], margin)
    asked = Classification(measurement_of="margin")
    assert torch.equal(Measured()(model, asked, batch, KEYS)[0], margin)


def test_drawn_labels_can_be_given_again():
    model, batch = mlp(), numbers(5)
    values, labels = Drawn(3)(model, TASK, batch, KEYS)
    assert torch.equal(values, TASK.predict(model, batch).with_target(labels).loss())
    again, _ = Drawn(4)(model, TASK, batch, KEYS, labels)
    assert torch.equal(again, values)


@pytest.mark.parametrize("draws", [1, 3])
def test_several_draws_share_an_example(draws):
    model, batch = mlp(), numbers(5)
    parts = list(DrawnSeveral(draws, seed=2).parts(model, TASK, batch, KEYS))
    assert len(parts) == draws
    labels = {tuple(p.target(model, TASK, batch, KEYS)[1].flatten().tolist()) for p in parts}
    assert len(labels) == draws
    if draws > 1:
        total = sum(part.share for part in parts)
        torch.testing.assert_close(total, torch.ones(4).double(), rtol=0, atol=1e-15)
        assert all(torch.equal(part.weights, part.share) for part in parts)
    again = list(DrawnSeveral(draws, seed=3).parts(model, TASK, batch, KEYS))
    others = {tuple(p.target(model, TASK, batch, KEYS)[1].flatten().tolist()) for p in again}
    assert not others & labels


@pytest.mark.parametrize("cut", [0.0, 0.2])
def test_enumerated_rows_count_each_example_once(cut):
    model, batch, keys = language_net(), language_batch(), torch.arange(3)
    batch["labels"][2] = -100  # nothing is scored in this example
    target = Enumerated(cut)
    share, weight, n_rows = torch.zeros(3).double(), torch.zeros(3).double(), 0
    prediction = CausalLM().predict(model, batch)
    for part in target.parts(model, CausalLM(), batch, keys):
        assert len(part.index) == len(part.weights) == len(part.share) <= 3
        share.index_add_(0, part.index, part.share)
        weight.index_add_(0, part.index, part.weights)
        n_rows += len(part.index)
    torch.testing.assert_close(share, torch.ones(3).double())
    kept = prediction.logits.softmax(-1) * (prediction.logits.softmax(-1) >= cut)
    torch.testing.assert_close(weight, (kept.sum(-1) * prediction.mask).sum(1).detach())
    assert weight[2] == 0
    expected = int(((kept > 0) & prediction.mask[..., None]).sum())
    assert n_rows == expected + 1
    assert target.lost == [(prediction.rows(cut).lost, prediction.rows(cut).trace)]


def test_a_row_is_the_loss_of_one_label_at_one_position():
    model, batch, keys = language_net(), language_batch(), torch.arange(3)
    prediction = CausalLM().predict(model, batch)
    log_probabilities = prediction.logits.log_softmax(-1)
    for part in Enumerated(0.0).parts(model, CausalLM(), batch, keys):
        some = {k: v[part.index] for k, v in batch.items()}
        values, where = part.target(model, CausalLM(), some, keys[part.index])
        expected = -log_probabilities[part.index, where[:, 0], where[:, 1]]
        torch.testing.assert_close(values, expected)
        one = {k: v[:1] for k, v in some.items()}
        first, _ = part.target(model, CausalLM(), one, keys[:1], where[:1])
        torch.testing.assert_close(first, expected[:1])


def test_fisher_targets_are_chosen_by_name():
    assert fisher_target("mc", draws=3, seed=2) == DrawnSeveral(3, 2)
    assert fisher_target("exact", cut=0.1) == Enumerated(0.1)
    assert fisher_target("empirical") == Loss()
