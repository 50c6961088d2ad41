"""Hypergradients against closed forms, and the implicit bias of cold and warm starts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.curate.base import InnerProblem, descend, gradient_step
from headwater.curate.bilevel import (
    Implicit,
    Unrolled,
    cg_solver,
    direct_solver,
    implicit_gradient,
    neumann_solver,
)
from headwater.numerics.implicit_bias import (
    closest_solution,
    neumann_filter,
    project_onto_example,
)

pytestmark = pytest.mark.thorough

N, DIM = 30, 6


def data(n: int = N, dim: int = DIM, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, dim, generator=generator).double()
    w = torch.randn(dim, generator=generator).double()
    return X, X @ w + 0.5 * torch.randn(n, generator=generator).double()


def ridge(horizon: int = 500) -> InnerProblem:
    """u is the logarithm of the penalty; the outer loss is that of held-out data."""
    (X, y), (X_val, y_val) = data(seed=0), data(seed=1)

    def inner(w, u, batch, t):
        penalty = u["log_penalty"].exp() * w["w"].square().sum()
        return ((X @ w["w"] - y).square().mean() + penalty) / 2

    return InnerProblem(
        init=lambda seed: {"w": torch.zeros(DIM).double()},
        step=gradient_step(inner, 0.2),
        outer=lambda w, u, b, t: (X_val @ w["w"] - y_val).square().mean() / 2,
        horizon=horizon,
        inner=inner,
    )


def analytic_ridge_gradient(u: torch.Tensor) -> torch.Tensor:
    """w* = (X'X/n + λ)⁻¹ X'y/n, so that dF/du = -F_w' (X'X/n + λ)⁻¹ λ w*."""
    (X, y), (X_val, y_val) = data(seed=0), data(seed=1)
    H = X.T @ X / N + u.exp() * torch.eye(DIM).double()
    w = torch.linalg.solve(H, X.T @ y / N)
    F_w = X_val.T @ (X_val @ w - y_val) / N
    return -F_w @ torch.linalg.solve(H, u.exp() * w)


@pytest.mark.parametrize(
    "method",
    [
        Implicit(solver="cg", tolerance=1e-10),
        Implicit(solver="direct"),
        Implicit(solver="neumann", terms=400),
        Unrolled(),
        Unrolled(truncation=400),
        Unrolled(mode="forward"),
    ],
    ids=["cg", "direct", "neumann", "unrolled", "truncated", "forward"],
)
def test_every_hypergradient_of_the_ridge_penalty_is_the_analytic_one(method):
    problem = ridge()
    for log_penalty in (-3.0, 0.0):
        u = {"log_penalty": torch.tensor(log_penalty).double()}
        found = method.estimate(problem, u)
        expected = analytic_ridge_gradient(u["log_penalty"])
        torch.testing.assert_close(found.gradient["log_penalty"], expected, rtol=1e-6, atol=1e-9)


def test_a_preconditioned_solve_agrees_in_fewer_steps():
    """The inverse of a layer's input covariance and damping, which for least squares is K-FAC's."""
    problem, u = ridge(), {"log_penalty": torch.tensor(-3.0).double()}
    w, _ = problem.retrain(u)
    X, _ = data(seed=0)
    values, Q = torch.linalg.eigh(X.T @ X / N)

    def precondition(v):
        return ((v @ Q) / (values + u["log_penalty"].exp())) @ Q.T

    def gradient(solver):
        return implicit_gradient(
            lambda w, u: problem.inner(w, u, None, 0),
            lambda w, u: problem.outer(w, u, None, 0),
            w,
            u,
            solver,
        )

    plain = gradient(cg_solver(tolerance=1e-9))
    helped = gradient(cg_solver(tolerance=1e-9, precondition=precondition))
    expected = analytic_ridge_gradient(u["log_penalty"])
    for found in (plain, helped):
        torch.testing.assert_close(found.gradient["log_penalty"], expected, rtol=1e-6, atol=1e-9)
    assert helped.steps == 1 < plain.steps


def test_the_hypergradient_is_the_slope_of_the_cold_start_solver():
    problem = ridge(40)  # far from converged: only unrolling is exact
    u, h = torch.tensor(-1.0).double(), 1e-5
    high, low = (problem.retrain({"log_penalty": u + s * h})[1] for s in (1, -1))
    found = Unrolled().estimate(problem, {"log_penalty": u}).gradient["log_penalty"]
    assert float(found) == pytest.approx((high - low) / (2 * h), rel=1e-7)
    implicit = Implicit().estimate(problem, {"log_penalty": u})
    assert implicit.facts["stationarity"] > 1e-6
    assert Implicit().estimate(ridge(), {"log_penalty": u}).facts["stationarity"] < 1e-12


def quadratic(
    eigenvalues: torch.Tensor, lr: float, steps: int, *, start: float = 0.0
) -> tuple[InnerProblem, torch.Tensor]:
    """f = ½ w'Hw - u'w, F = c'w: the response of w to u is a function of H alone."""
    dim = len(eigenvalues)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(dim, dim, generator=generator).double())[0]
    H = (Q * eigenvalues) @ Q.T
    c = torch.randn(dim, generator=generator).double()

    def inner(w, u, batch, t):
        return w["w"] @ H @ w["w"] / 2 - u["u"] @ w["w"]

    problem = InnerProblem(
        init=lambda seed: {"w": torch.full((dim,), start).double()},
        step=gradient_step(inner, lr),
        outer=lambda w, u, b, t: c @ w["w"],
        horizon=steps,
        inner=inner,
    )
    return problem, Q.T @ c


@given(terms=st.integers(0, 30), flat=st.booleans())
def test_neumann_terms_and_truncated_unrolling_filter_the_spectrum_alike(terms, flat):
    s = torch.tensor([0.0 if flat else 0.03, 0.1, 0.7, 1.9]).double()
    problem, c = quadratic(s, lr=0.8, steps=31)
    u = {"u": torch.zeros(4).double()}
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    expected = Q @ (neumann_filter(s, lr=0.8, terms=terms) * c)
    for method in (
        Implicit(solver="neumann", lr=0.8, terms=terms),
        Unrolled(truncation=terms + 1),
    ):
        found = method.estimate(problem, u).gradient["u"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_along_a_path_unrolling_is_a_neumann_sum_of_the_cross_derivatives_there():
    """T steps: Σ_j (I - αH)^j α f_wu at step T-1-j, here with f_wu that depends on w."""
    (X, _), steps, lr = data(), 7, 0.2
    problem, u = ridge(steps), {"log_penalty": torch.tensor(0.3).double()}
    path, w = [], problem.init(0)
    for t in range(steps):
        path.append(w["w"])
        w = problem.step(w, u, None, t)
    H = X.T @ X / N + u["log_penalty"].exp() * torch.eye(DIM).double()
    X_val, y_val = data(seed=1)
    F_w = X_val.T @ (X_val @ w["w"] - y_val) / N
    shrink, total = torch.eye(DIM).double() - lr * H, torch.zeros(()).double()
    for j in range(steps):
        cross = u["log_penalty"].exp() * path[steps - 1 - j]
        total -= F_w @ torch.linalg.matrix_power(shrink, j) @ cross * lr
    found = Unrolled().estimate(problem, u).gradient["log_penalty"]
    torch.testing.assert_close(found, total, rtol=0, atol=1e-12)


def test_long_unrolling_tends_to_the_response_of_least_norm_and_leaves_flat_directions_alone():
    """In directions of zero curvature u moves w for ever; without a part there the limit is H⁺."""
    s = torch.tensor([0.0, 0.0, 0.5, 1.0]).double()
    problem, c = quadratic(s, lr=0.5, steps=200, start=2.0)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    u = {"u": Q @ torch.tensor([0.0, 0.0, 1.0, 1.0]).double()}
    w, _ = problem.retrain(u)
    expected = Q.T @ w["w"]
    torch.testing.assert_close(expected[2:], torch.tensor([2.0, 1.0]).double())
    torch.testing.assert_close(expected[:2], (Q.T @ torch.full((4,), 2.0).double())[:2])
    inside = {k: v @ Q[:, 2:] for k, v in Unrolled().estimate(problem, u).gradient.items()}
    direct = {
        k: v @ Q[:, 2:] for k, v in Implicit(solver="direct").estimate(problem, u).gradient.items()
    }
    torch.testing.assert_close(inside, direct)
    torch.testing.assert_close(direct["u"], c[2:] / s[2:])


@given(seed=st.integers(0, 20))
def test_cold_descent_finds_the_solution_nearest_to_its_start(seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3, 8, generator=generator).double() / 4
    y, w0 = (torch.randn(n, generator=generator).double() for n in (3, 8))
    w = w0
    for _ in range(20_000):
        w = w - 0.5 * X.T @ (X @ w - y)
        if (X @ w - y).norm() < 1e-12:
            break
    torch.testing.assert_close(w, closest_solution(X, y, w0), rtol=0, atol=1e-8)
    near = closest_solution(X, y, w0, damping=1e-9)
    torch.testing.assert_close(near, closest_solution(X, y, w0), rtol=0, atol=1e-5)
    proximal = closest_solution(X, y, w0, damping=0.3)
    slope = X.T @ (X @ proximal - y) + 0.3 * (proximal - w0)
    assert float(slope.norm()) < 1e-12
    others = closest_solution(X, y, torch.zeros(8).double())
    assert float(others.norm()) <= float(w.norm()) + 1e-12  # least norm among solutions


def test_a_converged_warm_start_projects_onto_each_point_in_turn():
    """w visits the hyperplanes of all points that u has been: the method of Kaczmarz."""

    def inner(w, u, batch, t):
        return (u["x"] @ w["w"] - u["y"]).square() / 2

    problem = InnerProblem(
        init=lambda seed: {"w": torch.zeros(25).double()},
        step=gradient_step(inner, 0.3),
        outer=lambda w, u, b, t: w["w"].sum(),
        horizon=100,
        inner=inner,
    )
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(6, 25, generator=generator).double() / 5
    ys = torch.randn(6, generator=generator).double()
    method, expected = Unrolled(start="warm", truncation=1), torch.zeros(25).double()
    state = method.init(problem, {"x": xs[0], "y": ys[0]})
    for x, y in zip(xs, ys, strict=True):
        state, _ = method.step(problem, state, {"x": x, "y": y})
        expected = project_onto_example(expected, x, y)
    torch.testing.assert_close(state.state["w"], expected, rtol=0, atol=1e-6)  # 100 steps a point
    # It stays in the span of the points that were seen.
    outside = torch.linalg.svd(xs)[2][6:]
    torch.testing.assert_close(outside @ state.state["w"], torch.zeros(19).double())


def test_a_point_that_walks_teaches_warm_weights_what_no_single_point_can():
    """20 points in 25 dimensions, one at a time: warm weights fit them all, fresh ones the last."""
    X, y = data(20, 25, seed=3)
    problem = InnerProblem(
        init=lambda seed: {"w": torch.zeros(25).double()},
        step=lambda w, u, b, t: {"w": project_onto_example(w["w"], u["x"], u["y"])},
        outer=lambda w, u, b, t: (X @ w["w"] - y).square().mean() / 2,
        horizon=1,
    )
    method, u = Unrolled(start="warm"), {"x": X[0], "y": y[0]}
    before = problem.outer(problem.init(0), u, None, 0).item()
    state, info = method.init(problem, u), None
    for t in range(2000):
        u = {"x": X[t % 20], "y": y[t % 20]}
        state, info = method.step(problem, state, u)
    assert info.loss < 1e-3 * before
    assert problem.retrain(u)[1] > 0.5 * before
    # The limit is the least-norm fit of everything that was seen.
    distance = (state.state["w"] - closest_solution(X, y, torch.zeros(25).double())).norm()
    assert distance < 0.1 * state.state["w"].norm()


def one_point_regression(n_frequencies: int = 6) -> InnerProblem:
    """A curve in Fourier features, taught by one point (x, y) to convergence, judged by 20 points.

    The inner minimum nearest to the weights at hand is a projection, taken in one step.
    """
    k = torch.arange(1, n_frequencies + 1).double()

    def features(x):
        angle = x[..., None] * k
        return torch.cat([angle.sin(), angle.cos()], -1) / n_frequencies**0.5

    grid = torch.linspace(-3, 3, 20).double()
    curve = grid.sin() + 0.5 * (3 * grid).cos()

    def step(w, u, batch, t):
        return {"w": project_onto_example(w["w"], features(u["x"]), u["y"])}

    return InnerProblem(
        init=lambda seed: {"w": torch.zeros(2 * n_frequencies).double()},
        step=step,
        outer=lambda w, u, b, t: (features(grid) @ w["w"] - curve).square().mean() / 2,
        horizon=1,
    )


@pytest.mark.slow
def test_one_point_teaches_warm_weights_everything_and_fresh_weights_next_to_nothing():
    problem = one_point_regression()
    u = {"x": torch.tensor(1.0).double(), "y": torch.tensor(0.0).double()}
    before = problem.outer(problem.init(0), u, None, 0).item()
    warm = descend(problem, u, Unrolled(start="warm"), steps=1500, lr=1.0)
    cold = descend(problem, u, Unrolled(start="cold"), steps=200, lr=0.1)
    assert warm.coadapted < 0.15 * before
    assert warm.retrained[0] > 0.7 * before
    assert cold.coadapted == pytest.approx(cold.retrained[0], rel=0.01)
    grid = torch.linspace(-4, 4, 41).double()  # no single point teaches the curve
    best = min(problem.retrain({"x": x, "y": y})[1] for x in grid for y in grid[::4])
    assert best > 0.5 * before and cold.retrained[0] > 0.99 * best


@pytest.mark.slow
def test_a_point_that_is_learned_online_teaches_warm_weights_nearly_all_and_fresh_ones_little():
    """20 points in 25 dimensions; one inner step for each outer one, so that a residual is left."""
    generator = torch.Generator().manual_seed(100)
    X = torch.randn(20, 25, generator=generator).double() / 5
    y = X @ torch.randn(25, generator=generator).double()
    x = torch.randn(25, generator=generator).double()
    u = {"x": x / x.norm(), "y": torch.tensor(0.0).double()}
    problem = InnerProblem(
        init=lambda seed: {"w": torch.zeros(25).double()},
        step=gradient_step(lambda w, u, b, t: (u["x"] @ w["w"] - u["y"]).square() / 2, 0.1),
        outer=lambda w, u, b, t: (X @ w["w"] - y).square().mean() / 2,
        horizon=200,
    )
    before = problem.outer(problem.init(0), u, None, 0).item()
    method = Unrolled(start="warm", inner_steps=1)
    settings = {"steps": 1500, "lr": 100.0, "clip": 3e-3, "optimizer": torch.optim.SGD}
    found = descend(problem, u, method, **settings)
    assert found.coadapted < 0.05 * before
    assert found.retrained[0] > 0.2 * before
    # Training to convergence on each point leaves little residual, and overwrites what was learned.
    exact = replace(
        problem,
        step=lambda w, u, b, t: {"w": project_onto_example(w["w"], u["x"], u["y"])},
        horizon=1,
    )
    stuck = descend(exact, u, Unrolled(start="warm"), **{**settings, "steps": 300})
    assert stuck.losses[-1] > 0.2 * before


def test_implicit_warm_and_cold_agree_where_the_inner_minimum_is_unique():
    problem, u = ridge(100), {"log_penalty": torch.tensor(1.0).double()}
    learned = [
        descend(problem, u, Implicit(start=start), steps=10, lr=0.1) for start in ("cold", "warm")
    ]
    torch.testing.assert_close(learned[0].meta, learned[1].meta, rtol=0, atol=1e-5)
    for found in learned:
        assert found.coadapted == pytest.approx(found.retrained[0], rel=1e-3)


def test_more_terms_lead_to_outer_solutions_of_smaller_norm():
    """Antidistillation: more labels than the outer loss fixes, so that the answer is a choice.

    From zero, labels stay in the span of the approximate hypergradients, X P_k S' for a Neumann
    filter P_k and an outer loss that sees S w. The exact hypergradient gives the least norm.
    """
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(6, 6, generator=generator).double())[0] for _ in range(2))
    s = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.3, 0.2]).double()
    X, S = (U * s) @ V.T, torch.eye(6)[:2].double()
    target = torch.tensor([1.0, -2.0]).double()
    response = torch.linalg.inv(X)

    def inner(w, u, batch, t):
        return (X @ w["w"] - u["y"]).square().sum() / 2

    problem = InnerProblem(
        init=lambda seed: {"w": torch.zeros(6).double()},
        step=lambda w, u, b, t: {"w": response @ u["y"]},  # training to convergence
        outer=lambda w, u, b, t: (S @ w["w"] - target).square().sum() / 2,
        horizon=1,
        inner=inner,
    )
    norms = []
    for terms in (1, 4, 16, None):
        method = (
            Implicit(solver="direct")
            if terms is None
            else Implicit(solver="neumann", lr=1.0, terms=terms)
        )
        filtered = 1 / s**2 if terms is None else neumann_filter(s**2, lr=1.0, terms=terms)
        span = X @ (V * filtered) @ V.T @ S.T
        seen = S @ response @ span
        rate = 1.0 / float(torch.linalg.eigvals(seen).abs().max())
        found = descend(
            problem,
            {"y": torch.zeros(6).double()},
            method,
            steps=100,
            lr=rate,
            optimizer=torch.optim.SGD,
        )
        expected = span @ torch.linalg.solve(seen, target)
        torch.testing.assert_close(found.meta["y"], expected, rtol=0, atol=1e-6)
        assert found.retrained[0] < 1e-12
        norms.append(float(expected.norm()))
    assert norms[0] > norms[1] > norms[2] > norms[3] - 1e-9
    least = torch.linalg.pinv(S @ response) @ target
    assert norms[3] == pytest.approx(float(least.norm()))


def test_cold_starts_can_sample_their_initial_weights():
    problem = replace(
        ridge(1), init=lambda seed: {"w": torch.full((DIM,), float(seed % 10)).double()}
    )
    u = {"log_penalty": torch.tensor(0.0).double()}
    for sample, distinct in ((False, 1), (True, 3)):
        method = Unrolled(sample_init=sample)
        state, losses = method.init(problem, u), set()
        for _ in range(3):
            state, info = method.step(problem, state, u)
            losses.add(info.loss)
        assert len(losses) == distinct


def test_online_starts_begin_anew_after_the_horizon_and_warm_ones_go_on():
    problem, u = ridge(4), {"log_penalty": torch.tensor(0.0).double()}
    seen = {}
    for start in ("cold", "warm", "online"):
        method = Unrolled(start=start, inner_steps=2)
        state, seen[start] = method.init(problem, u), []
        for _ in range(4):
            state, info = method.step(problem, state, u)
            seen[start].append(info.loss)
    assert len(set(seen["cold"])) == 1
    assert len(set(seen["warm"])) == 4
    assert seen["online"][:2] == seen["warm"][:2] and seen["online"][2:] == seen["online"][:2]


def test_what_cannot_work_is_refused_with_advice():
    problem, u = ridge(100), {"log_penalty": torch.tensor(0.0).double()}
    with pytest.raises(ValueError, match="inner_steps must be 1"):
        Unrolled(inner_steps=0)
    with pytest.raises(ValueError, match="truncation must be 1"):
        Unrolled(truncation=0)
    with pytest.raises(ValueError, match="no inner loss"):
        Implicit().estimate(replace(problem, inner=None), u)
    with pytest.raises(ValueError, match="objective=mean"):
        Implicit().estimate(replace(problem, objective="mean"), u)
    with pytest.raises(ValueError, match="diverges"):
        Implicit(solver="neumann", lr=5.0, terms=200).estimate(problem, u)
    apart = replace(problem, inner=lambda w, u, b, t: w["w"].square().sum())
    with pytest.raises(ValueError, match="reach neither the inner gradient nor the outer loss"):
        Implicit().estimate(apart, u)
    saddle, _ = quadratic(torch.tensor([-0.5, 0.1, 1.0]).double(), lr=0.1, steps=1)
    with pytest.raises(ValueError, match="negative curvature"):
        Implicit().estimate(saddle, {"u": torch.zeros(3).double()})
    Implicit(damping=0.6).estimate(saddle, {"u": torch.zeros(3).double()})


def test_damping_is_added_to_the_eigenvalues_by_every_solver():
    s = torch.tensor([0.0, 0.3, 1.0]).double()
    problem, c = quadratic(s, lr=0.5, steps=5)
    weights, u = problem.init(0), {"u": torch.zeros(3).double()}
    solvers = (
        cg_solver(damping=0.2, tolerance=1e-12),
        neumann_solver(damping=0.2, terms=2000),
        direct_solver(damping=0.2),
    )
    for solver in solvers:
        found = implicit_gradient(
            lambda w, u: problem.inner(w, u, None, 0),
            lambda w, u: problem.outer(w, u, None, 0),
            weights,
            u,
            solver,
        )
        expected = (c.square() / (s + 0.2).square()).sum().sqrt()
        torch.testing.assert_close(found.gradient["u"].norm(), expected, rtol=1e-8, atol=0)
