import math

import pytest
import torch

from headwater.models.vision import mlp
from headwater.training.loop import batches, train
from headwater.training.optimizers import (
    SGD,
    Adam,
    AdamW,
    Stage,
    adam_step,
    as_stages,
    learning_rate,
    plan_steps,
)

BETAS = (0.8, 0.95)
PAIRS = {
    "sgd": (SGD(momentum=0.0), lambda p: torch.optim.SGD(p, lr=1.0)),
    "momentum and decay": (
        SGD(momentum=0.7, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.7, weight_decay=0.1),
    ),
    "adam": (Adam(betas=BETAS), lambda p: torch.optim.Adam(p, lr=1.0, betas=BETAS)),
    "adam and decay": (
        Adam(weight_decay=0.1, eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=1.0, weight_decay=0.1, eps=1e-3),
    ),
    "adamw": (
        AdamW(weight_decay=0.1, betas=BETAS),
        lambda p: torch.optim.AdamW(p, lr=1.0, betas=BETAS, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_torch(name):
    rule, make = PAIRS[name]
    theta = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    other = {k: v.clone().requires_grad_(True) for k, v in theta.items()}
    theirs, state = make(other.values()), rule.init(theta)
    for step in range(30):
        gradients = {k: torch.randn_like(v) * (step % 7) for k, v in theta.items()}
        theirs.param_groups[0]["lr"] = lr = 0.1 / (1 + step)
        for k, p in other.items():
            p.grad = gradients[k].clone()
        theirs.step()
        theta, state = rule.step(theta, state, gradients, lr)
    assert state.count == 30
    for k, p in other.items():
        # The same operations on float64 in another order: a few units in the last place a step.
        torch.testing.assert_close(theta[k], p.detach(), rtol=1e-14, atol=1e-15)


def test_a_step_changes_nothing_that_it_is_given():
    rule = AdamW()
    theta, gradients = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    state = rule.init(theta)
    rule.step(theta, state, gradients, 0.1)
    assert theta["w"].tolist() == gradients["w"].tolist() == [1, 1]
    assert state.count == 0
    assert state.moments["mean"]["w"].tolist() == [0, 0]


@pytest.mark.parametrize("rule", [SGD(), Adam(), AdamW()])
def test_a_step_can_be_differentiated_in_its_learning_rate(rule):
    theta, gradients = {"w": torch.tensor([1.0, -2.0]).double()}, {"w": torch.ones(2).double()}

    def after(lr):
        return rule.step(theta, rule.init(theta), gradients, lr)[0]["w"].sum()

    slope = torch.func.grad(after)(torch.tensor(0.1).double())
    assert slope.item() == pytest.approx((after(0.1 + 1e-6) - after(0.1 - 1e-6)).item() / 2e-6)


def test_adam_has_a_finite_slope_where_no_gradient_ever_came():
    zero = torch.zeros(1, dtype=torch.float64)

    def after(g):
        return adam_step(zero, zero, zero, g, count=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)[0]

    slope = torch.func.jacrev(after)(zero).item()
    # m̂ = g and √ŝ = |g| after one step, so that the step is -lr g / (|g| + eps).
    assert slope == pytest.approx(-1e-3 / 1e-8, rel=1e-12)
    tiny = torch.full((1,), 1e-14).double()
    assert (after(tiny) / tiny).item() == pytest.approx(slope, rel=1e-5)


def test_eps_root_stands_under_the_root():
    theta = {"w": torch.zeros(1, dtype=torch.float64)}
    rule = Adam(eps=0.0, eps_root=0.09)
    moved, _ = rule.step(theta, rule.init(theta), {"w": torch.full((1,), 0.4).double()}, 1.0)
    assert moved["w"].item() == pytest.approx(-0.4 / 0.5)  # √(0.16 + 0.09)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
        ("linear", 1, [0.5, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules(schedule, warmup, expected):
    actual = [learning_rate(k, 4, lr=1.0, schedule=schedule, warmup=warmup) for k in range(4)]
    assert actual == pytest.approx(expected)
    assert Adam(lr=1.0, schedule=schedule, warmup=warmup).lr_at(2, 4) == actual[2]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="constant, linear, cosine; got 'step'"):
        learning_rate(0, 1, lr=1.0, schedule="step")


def test_stages_see_their_own_examples_with_their_own_optimizer():
    first, second = torch.arange(6), torch.arange(4, 10)
    stages = [
        Stage(optimizer=SGD(lr=0.1, batch_size=4, epochs=2, schedule="constant"), examples=first),
        Stage(optimizer=Adam(lr=0.2, batch_size=3, epochs=1), examples=second),
    ]
    plan = list(plan_steps(torch.arange(10)[None], seeds=[0], stages=stages))
    assert [p.stage for p in plan] == [0, 0, 0, 0, 1, 1]
    assert [p.step for p in plan] == [0, 1, 2, 3, 0, 1]
    assert [p.lr for p in plan] == [0.1, 0.1, 0.1, 0.1, 0.2, 0.1]
    seen = torch.cat([p.examples[0] for p in plan[4:]])
    assert sorted(seen.tolist()) == second.tolist()


def test_a_stage_must_leave_every_model_as_many_examples():
    stages = [Stage(optimizer=SGD(), examples=torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"equally many examples, and some; got \[0, 1\]"):
        list(batches(torch.tensor([[0, 2], [2, 3]]), seeds=[0, 1], optimizer=stages))


def test_training_needs_a_stage_with_steps():
    with pytest.raises(ValueError, match="one stage or more; got none"):
        as_stages([])
    with pytest.raises(ValueError, match="must be positive; got 0 and 100"):
        as_stages(SGD(epochs=0))


@pytest.mark.parametrize("rule", [SGD(lr=0.1), Adam(lr=0.01), AdamW(lr=0.01, schedule="cosine")])
def test_models_side_by_side_equal_models_one_by_one(rule):
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    stages = [
        Stage(optimizer=type(rule)(lr=rule.lr, batch_size=4, epochs=2), examples=torch.arange(15)),
        Stage(optimizer=rule, examples=torch.arange(10, 30)),
    ]
    models = [mlp([6, 5, 3], seed=seed).double() for seed in range(3)]
    subsets = torch.stack([torch.tensor([s, 14, 11, 20 + s, 29]) for s in range(3)])
    together = train(models, x, y, subsets=subsets, seeds=[3, 4, 5], optimizer=stages)
    for i, model in enumerate(models):
        alone = train([model], x, y, subsets=subsets[i : i + 1], seeds=[3 + i], optimizer=stages)
        for name, value in alone.items():
            # Float64 products in another order; Adam divides small gradients by their own size.
            torch.testing.assert_close(together[name][i], value[0], rtol=1e-9, atol=1e-11)
