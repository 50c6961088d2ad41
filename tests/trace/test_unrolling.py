import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification, FunctionTask, Regression
from headwater.models.gpt import GPT
from headwater.trace.unrolling import (
    Unrolling,
    measure_of,
    metasmoothness,
    responses,
    unroll,
)
from headwater.training.optimizers import SGD, Adam, AdamW, Stage
from headwater.training.record import record
from headwater.training.run import Run, train_model
from tests.curvature_cases import TinyLM, Tokens

TASK = Classification(measurement_of="margin")
SIZE = {
    "batch_size": 4,
    "epochs": 13,
}  # of 15 examples: 52 steps, the last batch of an epoch smaller
RULES = {
    "sgd": SGD(lr=0.2, momentum=0.0, schedule="constant", **SIZE),
    "momentum and decay": SGD(lr=0.1, momentum=0.8, weight_decay=0.05, warmup=5, **SIZE),
    "adam": Adam(lr=0.01, weight_decay=0.01, schedule="cosine", eps_root=1e-8, **SIZE),
    "adamw": AdamW(lr=0.01, weight_decay=0.1, eps_root=1e-8, **SIZE),
    "adamw as in torch": AdamW(lr=0.01, schedule="constant", **SIZE),
}
every = pytest.mark.parametrize("name", RULES)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def examples(n=15):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return TensorExamples(x, torch.arange(n) % 3, ids=[f"e{i}" for i in range(n)])


def queries():
    generator = torch.Generator().manual_seed(3)
    return TensorExamples(
        torch.randn(3, 5, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2])
    )


def trained(folder, rule, *, model=None, data=None, task=TASK, **options) -> Run:
    model, data = model or net(), data or examples()
    trajectory = train_model(model, data, task, rule, folder=folder, checkpoints=1, **options)
    return Run(model=model, task=task, train=data, trajectory=trajectory)


def difference(run: Run, measure, direction: torch.Tensor, h: float = 1e-4) -> torch.Tensor:
    """Central difference of the measurements along a change of the weights, to order h⁴."""

    def at(scale: float) -> torch.Tensor:
        return measure(run.repeat(1 + scale * h * direction).parameters)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Against the truth


@every
def test_reverse_equals_forward_equals_finite_differences(name, tmp_path):
    run = trained(tmp_path, RULES[name])
    measure = measure_of(run, queries())
    found = unroll(run, measure)
    assert run.steps == 52
    response, last = responses(run, range(15))
    gradients = torch.func.jacrev(measure)(last.parameters)
    forwards = sum(gradients[n].flatten(1) @ r.flatten(1).T for n, r in response.items())
    assert relative(found.values, forwards) < 1e-12
    direction = torch.randn(15, dtype=torch.float64)
    # Rounding 1e-16 over h = 1e-4, and what is left of order h⁴.
    assert relative(found.values @ direction, difference(run, measure, direction)) < 1e-6


def test_gradient_descent_on_a_quadratic_has_a_closed_form(tmp_path):
    n, d, steps, lr, decay = 8, 3, 12, 0.3, 0.1
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double()
    rule = SGD(
        lr=lr, momentum=0.0, weight_decay=decay, schedule="constant", batch_size=n, epochs=steps
    )
    theta = model.weight.detach()[0].clone()
    eye = torch.eye(d, dtype=torch.float64)
    hessian = x.T @ x / n + decay * eye
    expected = torch.zeros(n, d, dtype=torch.float64)
    for k in range(steps):
        g = (x @ theta - y)[:, None] * x
        power = torch.linalg.matrix_power(eye - lr * hessian, steps - 1 - k)
        expected -= lr / n * g @ power
        theta = theta - lr * (g.mean(0) + decay * theta)
    run = trained(tmp_path, rule, model=model, data=TensorExamples(x, y), task=Regression())
    found = unroll(run, lambda p: p["weight"][0])  # the parameters themselves are measured
    torch.testing.assert_close(found.final["weight"][0], theta, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.values, expected.T, rtol=1e-10, atol=1e-12)
    response, _ = responses(run, range(n))
    torch.testing.assert_close(response["weight"][:, 0], expected, rtol=1e-10, atol=1e-12)


def test_heavy_ball_on_a_quadratic_has_a_closed_form(tmp_path):
    """One parameter with curvature 1: state (θ, v) moves by a fixed matrix and a kick a step."""
    lr, mu, steps, target = 0.2, 0.7, 9, torch.tensor([1.0, -3.0], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    start = model.weight.item()
    data = TensorExamples(torch.ones(2, 1, dtype=torch.float64), target)
    rule = SGD(lr=lr, momentum=mu, schedule="constant", batch_size=2, epochs=steps)
    run = trained(tmp_path, rule, model=model, data=data, task=Regression())
    move = torch.tensor([[1 - lr, -lr * mu], [1.0, mu]], dtype=torch.float64)
    kick = torch.tensor([-lr, 1.0], dtype=torch.float64)  # of a unit of gradient on (θ, v)
    state = torch.tensor([start, 0.0], dtype=torch.float64)
    response = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(steps):
        g = state[0] - target
        response = response @ move.T + (g / 2)[:, None] * kick
        state = move @ state + kick * (-target.mean())
    values = unroll(run, lambda p: p["weight"][0]).values[0]
    torch.testing.assert_close(values, response[:, 0], rtol=1e-12, atol=1e-14)


def test_stages_are_crossed(tmp_path):
    stages = [
        Stage(optimizer=replace(RULES["adamw"], epochs=2), examples=torch.arange(9)),
        Stage(
            optimizer=replace(RULES["momentum and decay"], epochs=3), examples=torch.arange(6, 13)
        ),
        Stage(optimizer=replace(RULES["adam"], epochs=2), examples=torch.arange(3, 7)),
    ]
    run = trained(tmp_path, stages)
    measure = measure_of(run, queries())
    found = unroll(run, measure, keep="sqrt")
    response, last = responses(run, range(15))
    gradients = torch.func.jacrev(measure)(last.parameters)
    forwards = sum(gradients[n].flatten(1) @ r.flatten(1).T for n, r in response.items())
    assert relative(found.values, forwards) < 1e-12
    direction = torch.randn(15, dtype=torch.float64)
    assert relative(found.values @ direction, difference(run, measure, direction)) < 1e-6
    assert (found.values[:, 13:] == 0).all()  # seen in no stage
    assert (found.values[:, :13] != 0).all()


def test_weights_summed_over_examples_are_a_uniform_reweighting(tmp_path):
    run = trained(tmp_path, replace(RULES["adamw"], epochs=3))
    measure = measure_of(run, queries())
    along = difference(run, measure, torch.ones(15, dtype=torch.float64))
    assert relative(unroll(run, measure).values.sum(1), along) < 1e-6


def test_an_example_that_stands_twice_in_a_batch_counts_twice(tmp_path):
    data, model = examples(4), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    index = [2, 2, 0]
    with record(model, optimizer, tmp_path, ids=data.ids) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            x, y = data.batch(index)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            recorder.step(index)
    run = Run(model=model, task=TASK, train=data, trajectory=recorder.trajectory)
    measure = measure_of(run, queries())
    direction = torch.tensor([0.0, 0, 1, 0], dtype=torch.float64)
    values = unroll(run, measure).values
    assert relative(values[:, 2], difference(run, measure, direction)) < 1e-6
    assert (values[:, [1, 3]] == 0).all()
    response, _ = responses(run, [2])
    theirs = torch.func.jacrev(measure)(run.repeat().parameters)
    forwards = sum(theirs[n].flatten(1) @ r.flatten(1).T for n, r in response.items())
    assert relative(values[:, [2]], forwards) < 1e-12


@pytest.mark.parametrize("model", ["tiny", "gpt"])
def test_tokens_have_derivatives_of_their_own(model, tmp_path):
    data = Tokens([[1, 2, 3, 4, 1], [2, 3], [5, 1, 2], [4, 4, 0, 6]])
    start = TinyLM() if model == "tiny" else GPT(7, context=8, n_layers=1, dim=4, n_heads=2)
    rule = AdamW(lr=0.02, batch_size=2, epochs=3, eps_root=1e-8)
    run = trained(
        tmp_path, rule, model=start.double(), data=data, task=CausalLM(), normalize="tokens"
    )
    asked = Tokens([[3, 1, 2], [1, 5, 5, 2]])
    measure = measure_of(run, asked)
    by_example = unroll(run, measure).values
    by_token = Run(**(vars_of(run) | {"per_token": True}))
    found = unroll(by_token, measure)
    assert found.values.shape == (2, 4, 4)
    torch.testing.assert_close(found.values.sum(2), by_example, rtol=1e-9, atol=1e-15)
    assert (found.values[:, 1, 1:] == 0).all()  # two tokens, of which the second is predicted
    direction = torch.zeros(4, 4, dtype=torch.float64)
    direction[0, 2] = 1
    assert relative(found.values[:, 0, 2], difference(by_token, measure, direction)) < 1e-5


def vars_of(run: Run) -> dict:
    return {name: getattr(run, name) for name in ("model", "task", "train", "trajectory")}


# Policies


@pytest.mark.parametrize("name", ["momentum and decay", "adamw"])
def test_policies_of_keeping_states_agree_bit_by_bit(name, tmp_path):
    run = trained(tmp_path, replace(RULES[name], epochs=6))
    measure, n = measure_of(run, queries()), 24
    whole = unroll(run, measure, keep="all")
    assert (whole.peak_states, whole.steps_made) == (n, n)
    root = unroll(run, measure, keep="sqrt")
    tree = unroll(run, measure, keep="tree", branching=2)
    assert torch.equal(root.values, whole.values) and torch.equal(tree.values, whole.values)
    assert root.peak_states <= 2 * math.ceil(math.sqrt(n)) and root.steps_made <= 2 * n
    assert tree.peak_states <= math.ceil(math.log2(n)) + 1
    assert tree.steps_made <= n * math.ceil(math.log2(n))
    assert tree.peak_states < root.peak_states < whole.peak_states


def test_queries_can_be_taken_a_few_at_a_time(tmp_path):
    run = trained(tmp_path, RULES["sgd"])
    measure = measure_of(run, queries())
    few, all_at_once = unroll(run, measure, at_once=1), unroll(run, measure)
    torch.testing.assert_close(few.values, all_at_once.values, rtol=1e-12, atol=1e-15)


# The method


def fitted(run: Run):
    return headwater.fit(run.model, run.train, run.task)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_scores_predict_the_run_with_an_example_left_out(mode, tmp_path):
    run = trained(tmp_path, SGD(lr=0.02, momentum=0.5, batch_size=15, epochs=10))
    scores = Unrolling(mode=mode, at_once=4).attribute(fitted(run), queries(), trajectory=tmp_path)
    measure = measure_of(run, queries())
    before = measure(run.repeat().parameters)
    for i in (1, 8):
        weights = torch.ones(15, dtype=torch.float64)
        weights[i] = 0
        change = measure(run.repeat(weights).parameters) - before
        # The second-order term of leaving out one of 15 in a short run.
        torch.testing.assert_close(-scores.values[:, i].double(), change, rtol=0.1, atol=1e-3)
    assert scores.measurement == "margin"
    assert scores.train_ids == run.train.ids
    assert scores.facts["replay_gap"] < 1e-12


def test_a_run_that_ends_elsewhere_than_the_model_is_refused(tmp_path):
    run = trained(tmp_path, RULES["sgd"])
    with torch.no_grad():
        run.model[0].weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="of its way from the fit's model"):
        Unrolling().attribute(fitted(run), queries(), trajectory=run.trajectory)


def test_a_step_that_draws_at_random_is_refused(tmp_path):
    def noisy(model, batch):
        return nn.functional.cross_entropy(
            model(batch[0] + torch.randn_like(batch[0])), batch[1], reduction="none"
        )

    run = trained(tmp_path, RULES["sgd"], task=FunctionTask(loss_with=noisy))
    with pytest.raises(ValueError, match="made twice gave two results"):
        unroll(run, lambda p: p["0.bias"])


def test_an_adjoint_that_is_not_finite_names_the_step(tmp_path):
    data = TensorExamples(torch.ones(2, 1).double(), torch.zeros(2).double())
    model = nn.Linear(1, 1, bias=False).double()
    rule = SGD(lr=1e30, momentum=0.0, schedule="constant", batch_size=2, epochs=4)
    run = trained(tmp_path, rule, model=model, data=data, task=Regression())

    def steep(p):
        return 1e100 * p["weight"][0]

    with pytest.raises(FloatingPointError, match=r"not finite before step 3 of 4: the run is too"):
        unroll(run, steep)


def test_a_measurement_must_be_one_number_a_query(tmp_path):
    run = trained(tmp_path, RULES["sgd"])
    with pytest.raises(
        ValueError, match=r"one number a query from the measurement; got shape \(6, 5\)"
    ):
        unroll(run, lambda p: p["0.weight"])


# How far it can be trusted


def test_metasmoothness_is_one_on_a_short_smooth_run_and_low_on_a_rough_one(tmp_path):
    smooth = trained(tmp_path / "a", SGD(lr=0.02, momentum=0.0, batch_size=15, epochs=5))
    rough = trained(tmp_path / "b", SGD(lr=4.0, momentum=0.9, batch_size=4, epochs=15))
    assert metasmoothness(smooth, h=0.01) > 0.99
    assert metasmoothness(rough, h=0.1) < 0.5
