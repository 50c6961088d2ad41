import pytest
import torch
from torch.nn.functional import cross_entropy

from studies.logistic_loo import hessian, influence, leave_one_out, with_ones


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=generator)
    return x, y, x[:9] + 0.3, y[:9].roll(1)


def minimum_by_descent(x, y, divisor, l2):
    """Query-independent reference: L-BFGS from zero on the objective as written."""
    theta = torch.zeros(3, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=1000,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(x @ theta.T, y, reduction="sum") / divisor
        loss = loss + l2 / 2 * theta.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach()


def test_leaving_out_equals_training_anew_without_the_example(problem):
    x, y, x_query, y_query = problem
    removed = torch.tensor([0, 7, 19, 59])
    loo = leave_one_out(*problem, removed, l2=0.01, n_classes=3, n_parallel=3)
    inputs, queries = with_ones(x), with_ones(x_query)

    def losses(index, divisor):
        theta = minimum_by_descent(inputs[index], y[index], divisor, 0.01)
        return cross_entropy(queries @ theta.T, y_query, reduction="none")

    full = losses(torch.arange(60), 60)
    for row, i in enumerate(removed.tolist()):
        rest = torch.arange(60)[torch.arange(60) != i]
        # The reference stops at a loss difference of float64 rounding: √1e-16 in its solution.
        torch.testing.assert_close(loo.delta[row], losses(rest, 60) - full, rtol=0, atol=1e-6)
        torch.testing.assert_close(loo.delta_mean[row], losses(rest, 59) - full, rtol=0, atol=1e-6)
    assert loo.gradient_norm <= 1e-12


def test_the_hessian_is_that_of_the_objective(problem):
    x, y = with_ones(problem[0]), problem[1]
    theta = torch.randn(3, 8, dtype=torch.float64)

    def objective(t):
        return cross_entropy(x @ t.T, y) + 0.3 / 2 * t.square().sum()

    expected = torch.autograd.functional.hessian(objective, theta).reshape(24, 24)
    torch.testing.assert_close(hessian(theta, x, 0.3), expected)


def test_influence_is_the_derivative_in_the_example_s_weight(problem):
    """With ever larger penalties the change becomes first order, and influence exact."""
    errors = []
    for l2 in (0.1, 1.0, 10.0):
        loo = leave_one_out(*problem, torch.arange(20), l2=l2, n_classes=3)
        predicted = influence(loo, *problem)
        errors.append(((predicted - loo.delta).norm() / loo.delta.norm()).item())
    # The second order is a share of about |x|² / (N l2) of the first.
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 8 / (60 * 10.0)


@pytest.mark.slow
def test_influence_predicts_leaving_out_real_digits():
    from headwater.data.images import digits

    x, y = digits().tensors
    removed = torch.arange(0, 1000, 20)
    loo = leave_one_out(x[:1000], y[:1000], x[1000:1050], y[1000:1050], removed, l2=1e-3)
    predicted = influence(loo, x[:1000], y[:1000], x[1000:1050], y[1000:1050])
    pairs = torch.stack([predicted.flatten(), loo.delta.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.98
