import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import headwater
from headwater.core.curvature import EKFAC, Dense, Dual, Identity
from headwater.core.examples import TensorExamples
from headwater.core.fit import fits_at
from headwater.core.task import Classification, Regression
from headwater.trace.source import (
    Source,
    discrete_propagation,
    discrete_response,
    propagation,
    response,
)
from headwater.trace.unrolling import measure_of, unroll
from headwater.training.optimizers import SGD, Adam, AdamW, Stage
from headwater.training.run import Run, train_model
from tests.curvature_cases import dense_gauss_newton, loss_gradients

EYE = torch.eye(3, dtype=torch.float64)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The mathematics


@given(st.floats(0, 20), st.lists(st.floats(1e-4, 0.3), min_size=1, max_size=9))
def test_discrete_forms_equal_the_loop_over_steps(eigenvalue, rates):
    moved, left = 0.0, 1.0
    for rate in rates:  # a unit of constant gradient, and a change that was there before
        moved += rate * (1 - eigenvalue * moved)
        left *= 1 - rate * eigenvalue
    counted = tuple((rate, 1) for rate in rates)
    found = (
        discrete_response(numbers(eigenvalue), counted),
        discrete_propagation(numbers(eigenvalue), counted),
    )
    assert float(found[0]) == pytest.approx(moved, rel=1e-10, abs=1e-12)
    assert float(found[1]) == pytest.approx(left, rel=1e-10, abs=1e-12)


def test_equal_rates_are_a_power():
    s = numbers(0.0, 0.3, 1.0, 10.0, 12.0)
    torch.testing.assert_close(discrete_propagation(s, ((0.1, 7),)), (1 - 0.1 * s) ** 7)


@given(st.floats(0, 50), st.floats(0, 30), st.floats(0, 30))
def test_two_segments_of_one_curvature_are_one(eigenvalue, first, second):
    s = numbers(eigenvalue)
    both = response(s, second) + propagation(s, second) * response(s, first)
    torch.testing.assert_close(both, response(s, first + second), rtol=1e-12, atol=1e-300)
    whole = propagation(s, first) * propagation(s, second)
    torch.testing.assert_close(whole, propagation(s, first + second), rtol=1e-12, atol=1e-300)


def test_the_response_is_finite_and_falls_from_the_horizon():
    h = 7.0
    s = torch.cat([numbers(-1e-3, -1e-300, 0.0), torch.logspace(-300, 3, 400).double()])
    found = response(s, h)
    assert bool(found.isfinite().all()) and bool((found <= h).all())
    assert bool((found[1:] <= found[:-1]).all()) and float(found[2]) == h == float(found[0])
    torch.testing.assert_close(response(numbers(1e-9), h), numbers(h - h * h * 1e-9 / 2))


@given(st.floats(0.01, 1.0), st.integers(1, 400))
def test_the_exponential_is_the_limit_of_small_steps(eigenvalue, steps):
    lr = 1e-4
    fine, coarse = (
        discrete_response(numbers(eigenvalue), ((lr, steps),)),
        response(numbers(eigenvalue), lr * steps),
    )
    # (1 - ηλ)^K = exp(-ηλK (1 + ηλ/2 + ...)): a relative error of the order ηλ.
    torch.testing.assert_close(fine, coarse, rtol=lr * eigenvalue, atol=0)


# Against exact unrolling: at the minimum of a quadratic the gradients and the Hessian stand still


class Quadratic:
    """Ridge regression that begins at its minimum, trained by gradient descent on all data."""

    def __init__(self, folder, rule, *, stages=None, checkpoints=6, decay=0.0, at=None):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(9, generator=generator, dtype=torch.float64)
        self.data, self.task = TensorExamples(x, y), Regression()
        self.queries = TensorExamples(x[:2].flip(1), y[3:5])
        chosen = torch.arange(9) if at is None else at
        X, Y = x[chosen], y[chosen]
        self.hessian = x.T @ x / 9 + decay * EYE
        best = torch.linalg.solve(X.T @ X / len(X) + decay * EYE, X.T @ Y / len(X))
        self.model = nn.Linear(3, 1, bias=False).double()
        with torch.no_grad():
            self.model.weight.copy_(best[None])
        self.record = train_model(
            self.model,
            self.data,
            self.task,
            stages or rule,
            folder=folder,
            checkpoints=checkpoints,
            keep_optimizer=True,
        )
        self.fit = headwater.fit(self.model, self.data, self.task, curvature=Dense(), check=False)

    def exact(self) -> torch.Tensor:
        run = Run(model=self.model, task=self.task, train=self.data, trajectory=self.record)
        return unroll(run, measure_of(run, self.queries)).values

    def source(self, **options) -> torch.Tensor:
        return Source(**options).by_segment(self.fit, self.queries, trajectory=self.record).sum(0)


FULL = {"momentum": 0.0, "batch_size": 9}


@pytest.mark.parametrize(
    ("segments", "schedule", "fast"),
    [(1, "constant", False), (2, "linear", True), (3, "linear", False), (6, "constant", True)],
)
def test_the_discrete_form_is_exact_unrolling_on_a_quadratic(tmp_path, segments, schedule, fast):
    rule = SGD(lr=0.2, weight_decay=0.07, schedule=schedule, epochs=24, **FULL)
    case = Quadratic(tmp_path, rule, decay=0.07)
    found = case.source(segments=segments, form="discrete", fast=fast)
    torch.testing.assert_close(found, case.exact(), rtol=1e-10, atol=1e-12)


def test_the_continuous_form_differs_by_the_power_alone(tmp_path):
    case = Quadratic(tmp_path, SGD(lr=0.01, schedule="constant", epochs=60, **FULL))
    found, exact = case.source(segments=2), case.exact()
    step = 0.01 * float(torch.linalg.eigvalsh(case.hessian)[-1])
    assert float((found - exact).abs().max() / exact.abs().max()) < step


def test_segments_do_not_matter_where_nothing_moves(tmp_path):
    case = Quadratic(tmp_path, SGD(lr=0.2, schedule="linear", epochs=12, **FULL))
    one = case.source(segments=1)
    for segments in (2, 3, 6):
        torch.testing.assert_close(case.source(segments=segments), one, rtol=1e-11, atol=1e-13)


def test_long_training_gives_undamped_influence(tmp_path):
    case = Quadratic(tmp_path, SGD(lr=0.6, schedule="constant", epochs=400, **FULL), checkpoints=1)
    g, q = loss_gradients(case.fit), loss_gradients(case.fit, case.queries)
    expected = -q @ torch.linalg.solve(case.hessian, g.T) / 9
    torch.testing.assert_close(case.source(segments=1), expected, rtol=1e-9, atol=1e-12)


def test_short_training_gives_the_inner_product_of_gradients(tmp_path):
    case = Quadratic(tmp_path, SGD(lr=1e-7, schedule="constant", epochs=4, **FULL))
    g, q = loss_gradients(case.fit), loss_gradients(case.fit, case.queries)
    torch.testing.assert_close(case.source(segments=2), -q @ g.T * 4e-7 / 9, rtol=1e-6, atol=0)


def test_momentum_lengthens_the_horizon(tmp_path):
    rule = SGD(lr=0.02, momentum=0.7, schedule="constant", batch_size=9, epochs=120)
    case = Quadratic(tmp_path, rule)
    found, exact = case.source(segments=1), case.exact()
    assert float((found - exact).abs().max() / exact.abs().max()) < 0.05
    assert not torch.allclose(
        found, Quadratic(tmp_path / "plain", replace(rule, momentum=0.0)).source()
    )


def test_a_later_stage_lets_the_examples_of_the_first_fade(tmp_path):
    first, second = torch.arange(4), torch.arange(4, 9)
    rule = SGD(lr=0.1, schedule="constant", momentum=0.0, batch_size=9, epochs=10)
    stages = [
        Stage(optimizer=rule, examples=first, name="first"),
        Stage(optimizer=replace(rule, lr=0.05), examples=second, name="second"),
    ]
    case = Quadratic(tmp_path, None, stages=stages, checkpoints=4, at=first)
    method = Source(segments=2, form="discrete")
    parts = method.by_segment(case.fit, case.queries, trajectory=case.record)
    assert not parts[0][:, second].any() and not parts[1][:, first].any()
    # In the first stage nothing moves, in the second the Hessian does not: exact for the first's examples.
    exact = case.exact()
    torch.testing.assert_close(parts.sum(0)[:, first], exact[:, first], rtol=1e-10, atol=1e-12)
    # Without the second stage they would weigh more, by its matrix exactly.
    alone = Quadratic(tmp_path / "alone", None, stages=stages[:1], checkpoints=2, at=first)
    x = case.data.tensors[0][second]
    decayed = torch.linalg.matrix_power(EYE - 0.05 * x.T @ x / 5, 10)
    g = loss_gradients(alone.fit)[first]
    before = discrete_response_matrix(case.data.tensors[0][first], 0.1, 10)
    q = loss_gradients(case.fit, case.queries)
    expected = -q @ decayed @ before @ g.T / 4
    torch.testing.assert_close(parts[0][:, first], expected, rtol=1e-10, atol=1e-12)
    assert float(parts[0].norm()) < float((q @ before @ g.T / 4).norm())


def discrete_response_matrix(x, lr, steps):
    H, total = x.T @ x / len(x), torch.zeros_like(EYE)
    for _ in range(steps):
        total = lr * EYE + (EYE - lr * H) @ total
    return total


# Networks: the same algebra with dense matrices


def trained(folder, rule, *, n=12, checkpoints=4, epochs_model=0):
    torch.manual_seed(epochs_model)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = TensorExamples(torch.randn(n, 4).double(), torch.arange(n) % 3)
    queries = TensorExamples(torch.randn(3, 4).double(), torch.arange(3))
    task = Classification()
    record = train_model(
        model, data, task, rule, folder=folder, checkpoints=checkpoints, keep_optimizer=True
    )
    return model, data, queries, task, record


def naive(model, data, queries, task, record, segments, *, preconditioned=False):
    """The paper's walk with whole matrices and matrix exponentials, checkpoint by checkpoint."""
    fit = headwater.fit(model, data, task, curvature=Dense())
    v, total = loss_gradients(fit, queries), 0.0
    eye = torch.eye(v.shape[1], dtype=torch.float64)
    for segment in reversed(record.segments(segments)):
        stage = record.stages[segment.stage]
        at = fits_at(fit, [record.load_checkpoint(i) for i in segment.checkpoints])
        H = sum(dense_gauss_newton(each) for each in at) / len(at)
        g = sum(loss_gradients(each) for each in at) / len(at)
        P = torch.ones(len(eye), dtype=torch.float64)
        if preconditioned:
            squares = [
                {
                    n: s / (1 - stage.betas[1] ** (record.checkpoints[i].step - stage.start))
                    for n, s in record.load_optimizer(i)["square"].items()
                }
                for i in segment.checkpoints
            ]
            flat = [
                torch.cat(
                    [
                        x.from_parameters({n: s[n][None] for n in x.parameters}).flatten()
                        for x in fit.followed
                    ]
                )
                for s in squares
            ]
            P = 1 / (torch.stack(flat).mean(0).sqrt() + stage.eps)
        M = P[:, None] * H + stage.weight_decay * eye
        S = torch.linalg.matrix_exp(-segment.horizon * M)
        r = torch.linalg.solve(M, (eye - S) @ (P[:, None] * g.T)) / len(data)
        total = total - v @ r
        v = v @ S
    return total


SMALL = {"batch_size": 6, "epochs": 6, "weight_decay": 0.05}


@pytest.mark.parametrize("curvature", ["dense", "dual"])
@pytest.mark.parametrize(
    "rule",
    [SGD(lr=0.3, momentum=0.5, **SMALL), AdamW(lr=0.01, eps=1e-3, **SMALL)],
    ids=["momentum", "adamw"],
)
def test_equals_the_walk_with_whole_matrices(tmp_path, curvature, rule):
    model, data, queries, task, record = trained(tmp_path, rule)
    adaptive = isinstance(rule, AdamW)
    fit = headwater.fit(model, data, task, curvature=Dual(cut=0.0))
    found = Source(segments=2, curvature="fit" if curvature == "dual" else curvature).by_segment(
        fit, queries, trajectory=record
    )
    expected = naive(model, data, queries, task, record, 2, preconditioned=adaptive)
    torch.testing.assert_close(found.sum(0), expected, rtol=1e-8, atol=1e-11)


def test_a_fast_segment_stands_at_the_mean_of_its_checkpoints(tmp_path):
    model, data, queries, task, record = trained(tmp_path, SGD(lr=0.3, momentum=0.0, **SMALL))
    fit = headwater.fit(model, data, task, curvature=Dense())
    states = [record.load_checkpoint(i) for i in range(1, 5)]
    mean = {n: sum(s[n] for s in states) / 4 for n in states[0]}
    at = fits_at(fit, [mean])[0]
    H = dense_gauss_newton(at) + 0.05 * torch.eye(43, dtype=torch.float64)
    S = torch.linalg.matrix_exp(-record.horizon * H)
    r = torch.linalg.solve(H, (torch.eye(43).double() - S) @ loss_gradients(at).T) / 12
    expected = -loss_gradients(fit, queries) @ r
    found = Source(segments=1, fast=True).attribute(fit, queries, trajectory=record)
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-8)  # float32


def test_ekfac_for_adam_ranks_like_whole_matrices(tmp_path):
    rule = AdamW(lr=0.01, eps=1e-3, **SMALL)
    model, data, queries, task, record = trained(tmp_path, rule, n=30)
    fit = headwater.fit(model, data, task, curvature=EKFAC(fisher="exact"))
    found = Source(segments=2).by_segment(fit, queries, trajectory=record).sum(0)
    expected = naive(model, data, queries, task, record, 2, preconditioned=True)
    ignored = naive(model, data, queries, task, record, 2)
    near, far = (
        torch.corrcoef(torch.stack([x.flatten(), expected.flatten()]))[0, 1]
        for x in (found, ignored)
    )
    assert float(near) > 0.9 and float(near) > float(far)
    # and the size is about right, which no correlation shows
    assert 0.5 < float((found * expected).sum() / expected.square().sum()) < 2


def test_a_loss_over_tokens_weighs_as_the_steps_did(tmp_path):
    model, data, queries, task, record = trained(tmp_path, SGD(lr=0.3, momentum=0.0, **SMALL))
    fit = headwater.fit(model, data, task, curvature=Dense())
    # Steps that divide by five times as much and go five times as far are the same steps, but for the decay.
    plain = replace(record, stages=[replace(record.stages[0], weight_decay=0.0)])
    other = replace(
        plain,
        normalizers=[5 * n for n in record.normalizers],
        lr=[5 * rate for rate in record.lr],
    )
    object.__setattr__(plain, "folder", record.folder)
    object.__setattr__(other, "folder", record.folder)
    one, two = (Source(segments=2).by_segment(fit, queries, trajectory=r) for r in (plain, other))
    torch.testing.assert_close(one, two)


def test_attribute_adds_up_its_segments_and_tells_of_them(tmp_path):
    model, data, queries, task, record = trained(tmp_path, SGD(lr=0.3, momentum=0.5, **SMALL))
    fit = headwater.fit(model, data, task, curvature=EKFAC(), weight_decay=0.05)
    method = Source(segments=2)
    scores = method.attribute(fit, queries, trajectory=tmp_path)
    parts = method.by_segment(fit, queries, trajectory=record)
    torch.testing.assert_close(scores.values, parts.sum(0).float())
    told = scores.facts["segments"]
    assert [s["checkpoints"] for s in told] == [[3, 6], [9, 12]] and scores.unit == "nats"
    assert math.isclose(sum(s["horizon"] for s in told), record.horizon)
    groups = method.attribute(
        fit, queries, trajectory=record, weights=torch.tensor([[1.0, -1.0, 0.0]]), names=["why"]
    )
    torch.testing.assert_close(groups.values[0], scores.values[0] - scores.values[1])


# What is refused, and what is told


def test_says_what_it_cannot_do(tmp_path):
    model, data, queries, task, record = trained(tmp_path, SGD(lr=0.3, momentum=0.5, **SMALL))
    fit = headwater.fit(model, data, task, curvature=Dense())

    def ask(method, fit=fit, record=record):
        return method.attribute(fit, queries, trajectory=record)

    with pytest.raises(ValueError, match=r"momentum; the run's is 0\.5"):
        ask(Source(segments=1, form="discrete"))
    with pytest.raises(ValueError, match="5 segments need a checkpoint each"):
        ask(Source(segments=5))
    with pytest.raises(ValueError, match="has 'identity'; pass curvature='ekfac'"):
        ask(Source(), headwater.fit(model, data, task, curvature=Identity()))
    backwards = replace(record, checkpoints=record.checkpoints[::-1])
    object.__setattr__(backwards, "folder", record.folder)
    with pytest.raises(ValueError, match="in the order of their steps"):
        ask(Source(), record=backwards)
    fewer = headwater.fit(model, data.subset(range(5)), task, curvature=Dense())
    with pytest.raises(ValueError, match="saw 7 examples that the fit does not have"):
        ask(Source(), fewer)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match="away from the fit's model"):
        ask(Source(), headwater.fit(other, data, task, curvature=Dense()))


def test_adam_needs_its_state(tmp_path):
    model, data, queries, task, _ = trained(tmp_path / "a", AdamW(lr=0.01, **SMALL))
    record = train_model(model, data, task, AdamW(lr=0.01, **SMALL), folder=tmp_path / "b")
    fit = headwater.fit(model, data, task, curvature=Dense())
    with pytest.raises(ValueError, match="keep_optimizer=True"):
        Source().attribute(fit, queries, trajectory=record)


def test_warns_of_coupled_decay_and_of_steps_that_are_too_long(tmp_path):
    model, data, queries, task, record = trained(tmp_path, Adam(lr=0.01, eps=1e-3, **SMALL))
    fit = headwater.fit(model, data, task, curvature=Dense())
    with pytest.warns(UserWarning, match="adds its weight decay to the gradient"):
        Source(segments=1).attribute(fit, queries, trajectory=record)
    rule = SGD(lr=0.3, momentum=0.0, **SMALL)
    model, data, queries, task, record = trained(tmp_path / "sum", rule)
    fit = headwater.fit(model, data, task, curvature=Dense())
    summed = replace(record, normalizers=[0.001] * record.steps)  # as of a sum over many tokens
    object.__setattr__(summed, "folder", record.folder)
    with pytest.warns(UserWarning, match="where descent is unstable"):
        Source(segments=1).attribute(fit, queries, trajectory=summed)
