import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from headwater.models.vision import mlp
from headwater.training.loop import (
    SGD,
    batches,
    correct_class_margin,
    example_losses,
    outputs,
    stack,
    train,
    unstack,
)

SIZES = (6, 5, 3)
RECIPE = SGD(lr=0.1, momentum=0.9, weight_decay=1e-2, batch_size=4, epochs=3)


def data(n=30):
    return torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3


def model(seed):
    return mlp(SIZES, seed=seed).double()


def train_with_torch(net, x, y, subset, seed, sgd, weights=None):
    """The same training in PyTorch's own words, one model at a time."""
    optimizer = torch.optim.SGD(
        net.parameters(), lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay
    )
    linear = sgd.schedule == "linear"
    steps, done = sgd.epochs * -(-len(subset) // sgd.batch_size), 0
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
    for _ in range(sgd.epochs):
        for index in subset[torch.randperm(len(subset), generator=generator)].split(sgd.batch_size):
            optimizer.param_groups[0]["lr"] = sgd.lr * (1 - done / steps if linear else 1)
            optimizer.zero_grad()
            losses = cross_entropy(net(x[index]), y[index], reduction="none")
            (losses * weights[index]).mean().backward()
            optimizer.step()
            done += 1
    return net


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("n", [12, 10])  # batches that fill up, and a smaller last one
def test_models_side_by_side_equal_models_one_by_one(schedule, n):
    x, y = data()
    sgd = SGD(lr=0.1, weight_decay=1e-2, batch_size=4, epochs=3, schedule=schedule)
    subsets = torch.stack([torch.randperm(30)[:n] for _ in range(4)])
    seeds = [3, 4, 5, 6]
    together = train([model(s) for s in seeds], x, y, subsets=subsets, seeds=seeds, optimizer=sgd)
    for i, seed in enumerate(seeds):
        alone = train_with_torch(model(seed), x, y, subsets[i], seed, sgd)
        for name, value in alone.named_parameters():
            # Float64 products in another order, over nine steps.
            torch.testing.assert_close(together[name][i], value.detach(), rtol=0, atol=1e-12)


def test_weights_multiply_losses_and_leave_the_order_alone():
    x, y = data()
    weights = torch.ones(2, 30, dtype=torch.float64)
    weights[0, ::3] = 0
    weights[1, 1] = 2.5
    everything = torch.arange(30).repeat(2, 1)
    together = train(
        [model(1), model(1)],
        x,
        y,
        subsets=everything,
        seeds=[1, 1],
        optimizer=RECIPE,
        weights=weights,
    )
    for i in range(2):
        alone = train_with_torch(model(1), x, y, everything[i], 1, RECIPE, weights[i])
        for name, value in alone.named_parameters():
            torch.testing.assert_close(together[name][i], value.detach(), rtol=0, atol=1e-12)


def test_training_finds_the_minimum_of_the_stated_objective():
    x, y = data()
    sgd = SGD(
        lr=0.5, momentum=0.8, weight_decay=0.05, batch_size=30, epochs=300, schedule="constant"
    )
    net = mlp([6, 3]).double()
    trained = train([net], x, y, subsets=torch.arange(30)[None], seeds=[0], optimizer=sgd)
    net.load_state_dict(unstack(trained, 0))
    penalty = sum(p.square().sum() for p in net.parameters()) * 0.05 / 2
    (cross_entropy(net(x), y) + penalty).backward()
    # Heavy ball on a strongly convex objective: the error shrinks by √0.8 a step, to 1e-14.
    assert max(p.grad.abs().max() for p in net.parameters()) < 1e-9


def test_initial_models_are_left_as_they_were():
    x, y = data()
    first = model(0)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    train([first], x, y, subsets=torch.arange(30)[None], seeds=[0], optimizer=RECIPE)
    assert all(torch.equal(before[k], v) for k, v in first.state_dict().items())


def test_every_epoch_visits_every_example_of_the_subset_once_in_a_new_order():
    subset = torch.tensor([[2, 3, 5, 7, 11]])
    rows = list(batches(subset, seeds=[0], optimizer=SGD(batch_size=2, epochs=2)))
    assert [len(row[0]) for row in rows] == [2, 2, 1, 2, 2, 1]
    epochs = [torch.cat(rows[:3], 1), torch.cat(rows[3:], 1)]
    assert all(sorted(e[0].tolist()) == [2, 3, 5, 7, 11] for e in epochs)
    assert not torch.equal(*epochs)


def test_the_learning_rate_falls_linearly_to_zero():
    sgd = SGD(lr=0.05, momentum=0.9, batch_size=100, epochs=20)
    steps = sgd.steps(4000)
    assert steps == 800
    assert [sgd.lr_at(s, steps) for s in (0, 400)] == [0.05, 0.025]
    assert sgd.lr_at(steps, steps) == 0
    # Sum of an arithmetic series: lr (steps + 1) / 2, over 1 - momentum.
    assert sgd.horizon(4000) == pytest.approx(0.05 * 801 / 2 / 0.1)


def test_the_hook_sees_every_step():
    x, y = data()
    seen = []
    trained = train(
        [model(0)],
        x,
        y,
        subsets=torch.arange(30)[None],
        seeds=[0],
        optimizer=RECIPE,
        after_step=lambda step, theta: seen.append((step, theta["0.bias"].clone())),
    )
    assert [step for step, _ in seen] == list(range(1, 3 * 8 + 1))
    assert torch.equal(seen[-1][1], trained["0.bias"])


def test_outputs_are_those_of_each_model():
    x, _ = data()
    models = [model(0), model(1)]
    actual = outputs(models[0], stack(models), x)
    for i in range(2):
        torch.testing.assert_close(actual[i], models[i](x).detach())


def test_the_margin_is_the_log_odds_of_the_correct_class():
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    margin = correct_class_margin(logits, labels)
    p = (-example_losses(logits, labels)).exp()
    torch.testing.assert_close(margin, (p / (1 - p)).log(), rtol=1e-4, atol=1e-5)  # float32 1 - p


def test_a_model_with_running_statistics_is_refused_by_name():
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\) has buffers"):
        stack([nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_training_that_diverges_is_an_error_that_names_the_model():
    x, y = data()
    weights = torch.ones(2, 30, dtype=torch.float64)
    weights[1] = 1e300
    with pytest.raises(FloatingPointError, match=r"models \[1\] of 2 diverged; lower lr"):
        train(
            [model(0), model(1)],
            x,
            y,
            subsets=torch.arange(30).repeat(2, 1),
            seeds=[0, 1],
            optimizer=RECIPE,
            weights=weights,
        )


def test_seeds_and_subsets_must_match_the_models():
    x, y = data()
    with pytest.raises(ValueError, match="2 models, 1 subsets and 2 seeds"):
        train([model(0)] * 2, x, y, subsets=torch.arange(30)[None], seeds=[0, 1], optimizer=RECIPE)
