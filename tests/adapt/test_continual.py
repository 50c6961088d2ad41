"""Continual learning: the penalty, the loop, and that what was learnt is held."""

import copy

import pytest
import torch
from torch import nn

from headwater.adapt import Continual, Episode, OneHead, Regularizer, accuracy_of
from headwater.core.examples import TensorExamples
from headwater.core.function_space import function_space_distance
from headwater.core.task import Classification
from headwater.training.optimizers import SGD, Adam


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def episode(way: int, n: int = 120) -> Episode:
    """Points on two sides of a plane, which the second task calls the other way round in its part of the space."""
    x = torch.randn(2 * n, 6)
    x[:, 4:] = 0
    x[:, 4 + way] = 2.0
    y = ((x[:, 0] > 0) == (way == 0)).long()
    parts = [TensorExamples(x[i::2], y[i::2]) for i in range(2)]
    return Episode(name=f"way {way}", train=parts[0], test=parts[1], task=Classification())


RULE = Adam(lr=0.01, batch_size=20, epochs=20, schedule="constant")


def test_a_head_is_a_slice_of_the_outputs_with_labels_of_its_own():
    model, x, y = net(), torch.randn(5, 6), torch.tensor([1, 0, 0, 1, 1])
    loss = OneHead(outputs=(2, 3)).loss(model, (x, y))
    expected = torch.nn.functional.cross_entropy(model(x)[:, 2:], y, reduction="none")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="row 2 of the batch is 3, but the model has 2 outputs"):
        OneHead(outputs=(2, 3)).loss(model, (x, torch.tensor([0, 1, 3, 1, 0])))


def test_the_penalty_is_the_weighted_mean_or_sum_and_carries_gradients():
    model, data = net(), (torch.randn(30, 6), torch.randint(4, (30,)))
    distances = [function_space_distance(model, data, Classification(), seed=k) for k in (0, 1)]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight += 0.3
    parts = [float(d(other).detach()) for d in distances]
    mean, total = (
        Regularizer(tuple(distances), weight=0.5, reduction=r)(other) for r in ("mean", "sum")
    )
    assert float(mean.detach()) == pytest.approx(sum(parts) / 4)
    assert float(total.detach()) == pytest.approx(sum(parts) / 2)
    mean.backward()
    assert other[0].weight.grad is not None and float(other[0].weight.grad.norm()) > 0
    assert float(Regularizer()(other)) == 0
    with pytest.raises(ValueError, match="a weight of 0 or more"):
        Regularizer(weight=-1.0)


def test_without_memory_the_loop_is_plain_training():
    task = episode(0)
    rule = SGD(lr=0.1, momentum=0.9, batch_size=30, epochs=3, schedule="constant")
    model = net()
    found = Continual(memory="none", optimizer=rule, seed=5).adapt(model, [task]).model
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for index in torch.randperm(120, generator=generator).split(30):
            optimizer.zero_grad()
            task.task.loss(plain, task.train.batch(index.tolist())).mean().backward()
            optimizer.step()
    for p, q in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("memory", ["function-space", "ewc", "k-fac", "stored", "replay"])
def test_what_was_learnt_is_held(memory):
    tasks, model = [episode(0), episode(1)], net()
    weight = {"ewc": 100.0, "k-fac": 10.0}.get(memory, 3.0)
    without, run = (
        Continual(memory=name, weight=weight, optimizer=RULE, n_stored=60).adapt(model, tasks)
        for name in ("none", memory)
    )
    assert without.forgetting > 0.2 and run.forgetting < without.forgetting / 2
    assert run.accuracy.shape == (2, 2) and bool(run.accuracy[0, 1].isnan())
    assert float(run.accuracy[0, 0]) == float(without.accuracy[0, 0])  # no task came before
    assert run.n_numbers > 0 and without.n_numbers == 0
    assert len(run.table()["task"]) == 2 and "2 tasks" in repr(run)
    last = accuracy_of(run.model, tasks[1].task, tasks[1].test)
    assert last == pytest.approx(float(run.accuracy[1, 1]))


def test_a_run_repeats_itself_and_leaves_the_model_alone():
    tasks, model = [episode(0), episode(1)], net()
    before = copy.deepcopy(model.state_dict())
    rule = Continual(optimizer=Adam(lr=0.01, batch_size=40, epochs=2))
    one, other = (rule.adapt(model, tasks).model.state_dict() for _ in range(2))
    for name, value in model.state_dict().items():
        assert torch.equal(one[name], other[name]) and torch.equal(value, before[name])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="n_samples and n_stored must be 1 or more"):
        Continual(n_stored=0)
    with pytest.raises(ValueError, match="one task or more"):
        Continual().adapt(net(), [])
    with pytest.raises(FloatingPointError, match="diverged at step"):
        rule = SGD(lr=1e30, batch_size=40, epochs=3)
        Continual(memory="none", optimizer=rule).adapt(net(), [episode(0)])
