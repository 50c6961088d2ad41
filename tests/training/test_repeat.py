"""Repeating a recorded run with other labels is the run on those labels."""

import copy

import pytest
import torch

from headwater.core.task import Classification
from headwater.training.optimizers import SGD
from headwater.training.repeat import Relabelled, RepeatedRun
from headwater.training.run import Run, train_model
from tests.cases import mlp, mlp_data
from tests.curvature_cases import Tokens

RULE = SGD(lr=0.1, batch_size=5, epochs=2)


@pytest.fixture
def parts(tmp_path):
    torch.manual_seed(0)
    model, data = mlp(), mlp_data(15)
    start = copy.deepcopy(model)
    record = train_model(model, data, Classification(), RULE, folder=tmp_path / "run", seed=3)
    run = Run(model=model, task=Classification(), train=data, trajectory=record)
    return start, model, data, RepeatedRun(run=run, measure=lambda m: m(data.tensors[0][:2])[:, 0])


def test_without_changes_it_ends_where_the_run_ended(parts):
    _, model, data, repeat = parts
    found = repeat(torch.ones(15), 3)
    torch.testing.assert_close(found, model(data.tensors[0][:2])[:, 0])


def test_new_labels_and_weights_are_those_of_a_run_made_with_them(parts):
    start, model, data, repeat = parts
    y = data.tensors[1].clone()
    y[4] = (y[4] + 1) % 3
    weights = torch.ones(15)
    weights[7] = 0.0
    other = copy.deepcopy(start)
    train_model(other, (data.tensors[0], y), Classification(), RULE, weights=weights, seed=3)
    found = repeat.with_labels({4: int(y[4])})(weights, 3)
    torch.testing.assert_close(found, other(data.tensors[0][:2])[:, 0])
    torch.testing.assert_close(repeat(torch.ones(15), 3), model(data.tensors[0][:2])[:, 0])


def test_another_seed_is_refused(parts):
    with pytest.raises(
        ValueError, match="has seed 3 and can only be repeated as it was; got seed 4"
    ):
        parts[-1](torch.ones(15), 4)


def test_relabelled_examples_keep_all_but_the_named_labels():
    data = mlp_data(6)
    given = data.tensors[1]
    new = Relabelled(data, {2: 9})
    x, y = new.batch([1, 2, 5])
    assert y.tolist() == [int(given[1]), 9, int(given[5])] and torch.equal(
        x, data.tensors[0][[1, 2, 5]]
    )
    assert int(given[2]) != 9 and new.ids == data.ids
    assert new.fingerprint() != data.fingerprint() != Relabelled(data, {2: 8}).fingerprint()
    with pytest.raises(ValueError, match="Only examples of one class each can be relabelled"):
        Relabelled(Tokens([[1, 2, 3]]), {0: 1}).batch([0])
