"""Evolution strategies against closed forms: bias, variance, resets, and the system that punishes truncation."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from headwater.curate.base import InnerProblem, descend, mean_info
from headwater.curate.bilevel import Unrolled
from headwater.curate.evolution import PES, ESSingle, FullES, TruncatedES
from headwater.numerics.evolution import persistent_variance, single_noise_variance

pytestmark = pytest.mark.thorough

DIM, META, T = 4, 3, 12


def linear_quadratic(objective: str = "mean", horizon: int = T) -> InnerProblem:
    """s' = A s + B u, judged by a quadratic: the outer loss is quadratic in u."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(DIM, DIM, generator=generator).double() / 4
    B = torch.randn(DIM, META, generator=generator).double()
    C = torch.randn(DIM, generator=generator).double()
    return InnerProblem(
        init=lambda seed: {"s": torch.full((DIM,), float(seed % 7)).double()},
        step=lambda state, u, batch, t: {"s": A @ state["s"] + B @ u["u"]},
        outer=lambda state, u, batch, t: (state["s"] - C).square().sum() / 2,
        horizon=horizon,
        objective=objective,
    )


@pytest.fixture
def u():
    return {"u": torch.tensor([0.3, -0.2, 0.5]).double()}


ALL = [
    FullES(n_particles=40_000),
    ESSingle(n_particles=40_000, truncation=3),
    PES(n_particles=40_000, truncation=3),
    PES(n_particles=40_000, truncation=3, perturbation=6),
]


@pytest.mark.parametrize("objective", ["mean", "final"])
@pytest.mark.parametrize("method", ALL, ids=["FullES", "ESSingle", "PES", "hybrid"])
def test_the_mean_of_many_estimates_is_the_gradient_of_a_quadratic(method, objective, u):
    problem = linear_quadratic(objective)
    truth = Unrolled().estimate(problem, u)
    found = method.estimate(problem, u)
    error = found.gradient["u"] - truth.gradient["u"]
    spread = (found.pairs.var(0) / len(found.pairs)).sqrt()
    assert bool((error.abs() < 3.5 * spread).all())  # 3.5 σ over 24 numbers: one in 100 seeds fails
    assert found.variance == pytest.approx(float(spread.square().sum()))


def test_truncated_es_converges_to_the_truncated_gradient_and_not_to_the_gradient(u):
    problem = linear_quadratic()
    found = TruncatedES(n_particles=40_000, truncation=3).estimate(problem, u)
    spread = (found.pairs.var(0) / len(found.pairs)).sqrt()
    truncated = Unrolled(start="online", inner_steps=3).estimate(problem, u).gradient["u"]
    whole = Unrolled().estimate(problem, u).gradient["u"]
    assert bool(((found.gradient["u"] - truncated).abs() < 3.5 * spread).all())
    assert bool(((found.gradient["u"] - whole).abs() > 10 * spread).any())


@pytest.mark.parametrize("objective", ["mean", "final"])
@pytest.mark.parametrize("truncation", [1, 2, 4, 6])
def test_at_fixed_parameters_es_single_is_full_es_in_instalments(truncation, objective, u):
    """On any loss, here one that is not even continuous in u."""
    problem = linear_quadratic(objective)
    rough = replace(
        problem, step=lambda s, u, b, t: problem.step(s, {"u": (4 * u["u"]).round() / 4}, b, t)
    )
    for case in (problem, rough):
        full = FullES(n_particles=8, sigma=0.5).estimate(case, u, seed=3)
        parts = ESSingle(n_particles=8, sigma=0.5, truncation=truncation).estimate(case, u, seed=3)
        torch.testing.assert_close(parts.gradient, full.gradient, rtol=0, atol=1e-10)
        torch.testing.assert_close(parts.pairs, full.pairs, rtol=0, atol=1e-10)


def test_hybrids_have_pes_and_es_single_at_their_ends(u):
    problem = linear_quadratic()
    for perturbation, end in ((3, PES(truncation=3)), (T, ESSingle(truncation=3))):
        hybrid = PES(truncation=3, perturbation=perturbation)
        found, expected = (m.estimate(problem, u).gradient["u"] for m in (hybrid, end))
        assert torch.equal(found, expected)


def linear_in_each_truncation(response: torch.Tensor, span: int) -> InnerProblem:
    """Truncation t loses Σ_τ G[t, τ]·u_τ, where u_τ was in force in truncation τ (mean objective)."""
    n, _, dim = response.shape

    def step(state, u, batch, t):
        mask = (torch.arange(n) == t // span).double()[:, None]
        return {"seen": state["seen"] * (1 - mask) + mask * u["u"]}

    return InnerProblem(
        init=lambda seed: {"seen": torch.zeros(n, dim).double()},
        step=step,
        outer=lambda s, u, b, t: n * (response[t // span] * s["seen"]).sum(),
        horizon=n * span,
        objective="mean",
    )


def responses(n: int, dim: int, kind: str) -> torch.Tensor:
    """Losses at the end only, from equal or orthogonal parts of a gradient of unit norm."""
    G = torch.zeros(n, n, dim).double()
    if kind == "equal":
        G[-1] = torch.ones(dim).double() / dim**0.5 / n
    elif kind == "orthogonal":
        G[-1, torch.arange(n), torch.arange(n)] = n**-0.5
    else:
        G = torch.randn(n, n, dim, generator=torch.Generator().manual_seed(n)).double().tril()
        G = G * torch.ones(n, n).double().tril()[..., None]
    return G


@pytest.mark.parametrize("kind", ["equal", "orthogonal", "random"])
@pytest.mark.parametrize("n", [2, 6])
def test_variances_on_linear_losses_are_the_closed_forms(n, kind):
    G = responses(n, 8, kind)
    problem, u = linear_in_each_truncation(G, 2), {"u": torch.zeros(8).double()}
    gradient = sum(G[t, : t + 1].sum(0) for t in range(n))
    for method, expected in (
        (PES(n_particles=20_000, truncation=2), persistent_variance(G)),
        (ESSingle(n_particles=20_000, truncation=2), single_noise_variance(gradient)),
        (FullES(n_particles=20_000), single_noise_variance(gradient)),
    ):
        found = method.estimate(problem, u)
        torch.testing.assert_close(
            found.gradient["u"], gradient, rtol=0, atol=5 * float(expected / 10_000) ** 0.5
        )
        # Fourth moments of normal products: the relative error of a variance is about 3 / √n.
        assert found.variance * 10_000 == pytest.approx(float(expected), rel=0.12)


def test_the_variance_of_pes_grows_with_truncations_where_that_of_es_single_is_flat():
    dim = 32
    pes, single = [], []
    for n in (1, 2, 8, 32):
        G = responses(n, dim, "orthogonal")
        pes.append(float(persistent_variance(G)))
        single.append(float(single_noise_variance(G[-1].sum(0))))
    assert single == pytest.approx([dim + 1] * 4)  # a gradient of unit norm however it is cut
    assert pes == pytest.approx([dim + 1 + (n - 1) * dim for n in (1, 2, 8, 32)])
    equal = [float(persistent_variance(responses(n, dim, "equal"))) for n in (1, 2, 8, 32)]
    assert equal == pytest.approx([dim + 1] * 4)  # where truncations agree, PES loses nothing


def test_a_small_recurrent_network_shows_the_same_slopes():
    """Total variance of one pair against the number of truncations, on random sequences."""
    hidden, length = 8, 32
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(hidden, hidden, generator=generator).double() / hidden**0.5
    x = torch.randn(length, hidden, generator=generator).double()
    y = torch.randint(hidden, (length,), generator=generator)
    problem = InnerProblem(
        init=lambda seed: {"h": torch.zeros(hidden).double()},
        step=lambda s, u, b, t: {"h": torch.tanh((W + u["W"]) @ s["h"] + x[t])},
        outer=lambda s, u, b, t: cross_entropy(s["h"][None], y[t : t + 1]),
        horizon=length,
        objective="final",
    )
    u = {"W": torch.zeros(hidden, hidden).double()}
    found = {
        (m, n): m(n_particles=2000, sigma=0.01, truncation=length // n)
        .estimate(problem, u)
        .variance
        for m in (PES, ESSingle)
        for n in (1, 4, 16)
    }
    assert found[ESSingle, 16] == pytest.approx(found[ESSingle, 1], rel=1e-9)
    assert found[PES, 1] == pytest.approx(found[ESSingle, 1], rel=1e-9)
    assert found[PES, 16] > 2 * found[PES, 4] > 2 * found[PES, 1]


@pytest.mark.parametrize("method", [PES, ESSingle, TruncatedES])
def test_a_problem_that_ends_inside_a_truncation_is_begun_anew_there(method, u):
    """Horizon 5, truncation 3: the second truncation is 2 old steps and 1 new one."""
    problem = linear_quadratic(horizon=5)
    estimator = method(n_particles=2, truncation=3)
    state = estimator.init(problem, u)
    state, _ = estimator.step(problem, state, u)
    before = state.populations[0]
    state, info = estimator.step(problem, state, u)
    after = state.populations[0]
    assert (after.t, after.problems) == (1, 2)
    fresh, _ = problem.unroll(problem.init(1), {"u": u["u"] + after.noise[0]}, [None], start=0)
    torch.testing.assert_close(after.states["s"][0], fresh["s"])
    assert torch.equal(after.total, after.noise) and not torch.equal(after.noise, before.noise)
    if method is ESSingle:  # written out: old losses with the old noise, new ones with the new
        expected = torch.zeros(3).double()
        for sign, row in ((1, 0), (-1, 1)):
            s = {"s": before.states["s"][row]}
            lost = problem.unroll(s, {"u": u["u"] + sign * before.noise[0]}, [None] * 2, start=3)
            new = problem.unroll(
                problem.init(1), {"u": u["u"] + sign * after.noise[0]}, [None], start=0
            )
            expected += sign * (before.noise[0] * lost[1] + after.noise[0] * new[1]) / 3 / 0.02
        torch.testing.assert_close(info.gradient["u"], expected)


@pytest.mark.parametrize("method", [PES, ESSingle])
def test_with_resets_inside_truncations_the_long_run_mean_is_still_the_gradient(method, u):
    problem = replace(linear_quadratic(horizon=5), init=lambda seed: {"s": torch.ones(4).double()})
    estimator = method(n_particles=20_000, truncation=3)
    state, infos = estimator.init(problem, u), []
    for _ in range(5):  # three whole problems
        state, info = estimator.step(problem, state, u)
        infos.append(info)
    found, truth = mean_info(infos), Unrolled().estimate(problem, u)
    spread = (found.pairs.var(0) / len(found.pairs)).sqrt()
    assert bool(((found.gradient["u"] - truth.gradient["u"]).abs() < 3.5 * spread).all())


def test_differences_of_final_losses_telescope(u):
    problem = linear_quadratic("final")
    estimator = ESSingle(n_particles=2, truncation=4)
    state, total = estimator.init(problem, u), torch.zeros(3).double()
    for _ in range(T // 4):
        state, info = estimator.step(problem, state, u)
        total += info.gradient["u"] * 4 / T
    noise = state.populations[0].noise[0]
    plus, minus = (problem.retrain({"u": u["u"] + e})[1] for e in (noise, -noise))
    torch.testing.assert_close(total, noise * (plus - minus) / (2 * 0.1**2))


def influence_balancing(horizon: int = 300, n: int = 23, positive: int = 10) -> InnerProblem:
    """Tallec and Ollivier's linear system, whose short-term gradient points the wrong way."""
    A = torch.diag(torch.full((n,), 0.5)) + torch.diag(torch.full((n - 1,), 0.5), 1)
    sign = torch.cat([torch.ones(positive), -torch.ones(n - positive)])
    A, sign = A.double(), sign.double()
    return InnerProblem(
        init=lambda seed: {"s": torch.ones(n).double()},
        step=lambda s, u, b, t: {"s": A @ s["s"] + u["theta"] * sign},
        outer=lambda s, u, b, t: (s["s"][0] - 1).square() / 2,
        horizon=horizon,
        objective="mean",
    )


def test_es_single_balances_influences_with_four_particles_and_truncation_goes_wrong():
    problem, start = influence_balancing(), {"theta": torch.tensor(0.5).double()}
    low, middle, high = (
        problem.retrain({"theta": torch.tensor(v).double()})[1] for v in (-1.0, 0.0, 1.0)
    )
    best = (low - high) / 2 / (low + high - 2 * middle)  # the loss is a parabola in θ
    least = problem.retrain({"theta": torch.tensor(best).double()})[1]
    single = descend(
        problem, start, ESSingle(n_particles=4, truncation=10), steps=700, lr=2e-3, clip=10.0
    )
    assert abs(float(single.meta["theta"]) - best) < 0.08  # it came from 0.5
    assert single.retrained[0] < 1.3 * least
    before = problem.retrain(start)[1]
    for k, method in (
        (10, Unrolled(start="online", inner_steps=10)),
        (1, TruncatedES(n_particles=4, truncation=1)),
    ):
        truncated = descend(problem, start, method, steps=150, lr=2e-3)
        assert float(truncated.meta["theta"]) > 0.5, k
        assert truncated.retrained[0] > before


def test_staggered_pairs_begin_at_different_times_and_agree_in_the_mean(u):
    problem = linear_quadratic()
    estimator = ESSingle(n_particles=8, truncation=3, stagger=4)
    state = estimator.init(problem, u)
    seen = []
    for _ in range(4):
        state, info = estimator.step(problem, state, u)
        seen.append([p.t for p in state.populations])
        assert len(info.pairs) == len(seen)  # those that have not begun say nothing
    assert seen == [[3, 0, 0, 0], [6, 3, 0, 0], [9, 6, 3, 0], [0, 9, 6, 3]]
    noises = torch.cat([p.noise for p in state.populations])
    assert len(noises.unique(dim=0)) == 4


def test_a_diverged_pair_is_left_out_and_counted(u):
    def explode(state, meta, batch, t):
        return {"s": torch.where(meta["u"][0] > 0.41, torch.inf, 1.0) * meta["u"]}

    problem = replace(linear_quadratic(), step=explode, outer=lambda s, u, b, t: s["s"].sum())
    info = ESSingle(n_particles=40, truncation=T).estimate(problem, u)
    dropped = info.facts["dropped_pairs"]
    noise = info.pairs.isfinite().all(1)
    assert 0 < dropped < 20 and dropped == float((~noise).sum())
    torch.testing.assert_close(info.gradient["u"], info.pairs[noise].mean(0))
    with pytest.raises(FloatingPointError, match="All 20 pairs"):
        ESSingle(n_particles=40).step(
            problem, ESSingle(n_particles=40).init(problem, u), {"u": u["u"] + 100}
        )


def test_particles_in_turn_equal_particles_side_by_side(u):
    problem = linear_quadratic()
    for method in (PES(truncation=4), ESSingle(truncation=4), TruncatedES(truncation=4)):
        side, turn = (method.estimate(replace(problem, vectorized=v), u) for v in (True, False))
        torch.testing.assert_close(side.gradient, turn.gradient)
        assert side.inner_steps == turn.inner_steps == T * (4 + isinstance(method, TruncatedES))


def test_wrong_settings_are_refused_by_name(u):
    problem = linear_quadratic()
    with pytest.raises(ValueError, match="even"):
        ESSingle(n_particles=3)
    with pytest.raises(ValueError, match="sigma must be positive"):
        PES(sigma=0.0)
    with pytest.raises(ValueError, match="equal groups"):
        ESSingle(n_particles=8, stagger=3)
    with pytest.raises(ValueError, match="perturbation must be the 10 steps"):
        PES(truncation=10, perturbation=5)
    with pytest.raises(ValueError, match="longer than the inner problem"):
        ESSingle(truncation=13).estimate(problem, u)
    with pytest.raises(ValueError, match="divisor of the horizon"):
        ESSingle(truncation=5).estimate(problem, u)
    with pytest.raises(TypeError, match=r"floating point; got torch\.int64"):
        ESSingle().init(problem, {"u": torch.tensor([1, 2, 3])})
    with pytest.raises(ValueError, match="horizon must be 1"):
        replace(problem, horizon=0)


def test_dead_meta_parameters_are_reported(u):
    problem = replace(linear_quadratic(), step=lambda s, u, b, t: s)
    estimator = ESSingle(truncation=T)
    with pytest.warns(UserWarning, match="Every meta-gradient was zero"):
        estimator.estimate(problem, u)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.estimate(linear_quadratic(), u)
