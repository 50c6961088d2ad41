"""Damping chosen by retraining where the right one is known: ridge regression, whose penalty is the damping."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import EKFAC, Dense
from headwater.core.damping import evidence, log_evidence
from headwater.core.task import Regression
from headwater.numerics.resampling import Estimate
from headwater.trace import Influence
from headwater.trace.damping_choice import (
    DampingChoice,
    _curve,
    choose_by_bank,
    choose_by_evidence,
    choose_by_reweighting,
    dampings_for,
    response_smoothness,
)
from headwater.training.bank import RetrainingBank, random_masks

N, P, Q, RHO = 40, 6, 12, 0.03


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SCALES = torch.logspace(0, -2, P, dtype=torch.float64)  # a spectrum over four decades
X, Y, XQ = normal(N, P) * SCALES, normal(N, 1, seed=1), normal(Q, P, seed=2) * SCALES
TRUE = XQ @ normal(P, 1, seed=3)


def solve(weights):
    """The minimum of Σ w (y - xθ)² / 2N + ρ‖θ‖²/2."""
    weighted = weights.double()[:, None] * X / N
    return torch.linalg.solve(X.T @ weighted + RHO * torch.eye(P).double(), weighted.T @ Y)


def prediction(p):
    return p.mean[:, 0, 0]


def retrain(weights, seed):
    return (XQ @ solve(weights))[:, 0]


@pytest.fixture(scope="module")
def fit():
    model = nn.Linear(P, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(solve(torch.ones(N)).T)
    task = Regression(measurement_of=prediction)
    return headwater.fit(model, (X, Y), task, curvature=Dense())


GRID = [RHO * 10 ** (k / 2) for k in range(-3, 4)]


def small_bank(fraction=0.9):
    masks = random_masks(N, 30, fraction=fraction)
    runs = torch.stack([retrain(mask.double(), 0) for mask in masks])[:, None]
    return RetrainingBank(
        masks=masks, measurements={"prediction": runs.float()}, meta={"same_run": True}
    )


def test_a_small_bank_finds_the_penalty_of_a_ridge_regression(fit):
    found = choose_by_bank(fit, (XQ, TRUE), small_bank(), dampings=GRID, n_samples=20)
    assert found.chosen.value == pytest.approx(RHO)
    assert max(found.values) > 0.97 and found.values[0] < max(found.values) > found.values[-1]
    assert found.facts["retrainings"] == 30 and found.facts["protocol"] == "fixed run"
    assert all(a <= b for a, b in zip(found.low, found.high, strict=True))
    assert "best LDS of 7 values" in found.chosen.source


def test_a_few_reweightings_find_it_too_and_tell_that_the_response_is_straight(fit):
    found = choose_by_reweighting(fit, (XQ, TRUE), retrain, h=0.02, dampings=GRID, n_samples=20)
    assert found.chosen.value == pytest.approx(RHO)
    assert found.facts == {
        "metasmoothness": pytest.approx(1),
        "retrainings": 7,
        "h": 0.02,
    }
    # The rest is what is not linear in weights that move by 2 h = 4 %.
    assert max(found.values) > 0.999


def test_a_crooked_response_is_warned_of(fit):
    calls = []

    def noisy(weights, seed):
        calls.append(seed)
        return retrain(weights, seed) + normal(Q, seed=len(calls))

    with pytest.warns(UserWarning, match="response to reweighting is crooked"):
        choose_by_reweighting(fit, (XQ, TRUE), noisy, dampings=GRID, n_samples=5)


def test_smoothness_of_straight_and_of_turning_responses():
    zero, step = normal(5), normal(3, 5, seed=1)
    assert response_smoothness(zero, zero + step, zero + 2 * step) == pytest.approx(1)
    assert response_smoothness(zero, zero + step, zero + 0.5 * step) == pytest.approx(-1)


def test_the_evidence_is_highest_where_its_fixed_point_is(fit):
    spectra, distance = list(fit.curvature.spectra().values()), 2.0
    best = evidence(spectra, n=N, distance=distance)
    around = [
        log_evidence(spectra, n=N, distance=distance, damping=best * f) for f in (0.99, 1, 1.01)
    ]
    assert around[1] > around[0] and around[1] > around[2]


def test_the_evidence_is_the_exact_integral_of_a_quadratic():
    """One parameter: ∫ exp(-Nλ(t - m)²/2) N(t; 0, 1/(Nρ)) dt, less the loss where training ends."""
    lam, m, n = 0.7, 1.3, 20

    def exact(rho):
        t = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
        prior = (n * rho / (2 * torch.pi)) ** 0.5 * torch.exp(-n * rho * t**2 / 2)
        integral = torch.trapezoid(torch.exp(-n * lam * (t - m) ** 2 / 2) * prior, t).log()
        end = lam * m / (lam + rho)
        return float(integral) + n * lam * (end - m) ** 2 / 2, end**2

    for rho in (0.01, 0.3, 4.0):
        value, distance = exact(rho)
        eigenvalues = [torch.tensor([lam])]
        found = log_evidence(eigenvalues, n=n, distance=distance, damping=rho)
        assert found == pytest.approx(value, abs=1e-6)  # λ is a float32


def test_the_evidence_needs_no_retraining_and_shows_its_curve(fit):
    found = choose_by_evidence(fit)
    assert found.chosen == fit.damping("evidence")
    assert found.values[found.dampings.index(found.chosen.value)] == max(found.values)
    assert len(found.dampings) == len(dampings_for(fit)) + 1 and found.low == []


def test_the_choice_is_what_auto_means_afterwards_and_scores_say_why(fit, tmp_path):
    found = choose_by_bank(fit, (XQ, TRUE), small_bank(), dampings=GRID, n_samples=5)
    tuned = found.of(fit)
    scores = Influence(n_intervals=0).attribute(tuned, (XQ, TRUE))
    assert scores.facts["damping"]["value"] == found.chosen.value
    assert scores.facts["damping"]["source"].startswith("best LDS of 7 values")
    tuned.save(tmp_path / "fit")
    again = headwater.load(tmp_path / "fit", fit.model, (X, Y), fit.task)
    assert again.damping() == found.chosen
    assert again.facts["damping_curve"]["values"] == pytest.approx(found.values)
    assert again.damping(0.5).value == 0.5  # what is asked for by number is what is taken
    assert fit.damping() != found.chosen


def test_a_curve_is_continued_where_its_best_is_at_an_end():
    def peak(damping):
        value = -abs(torch.tensor(damping).log10().item())
        return Estimate(value, value, value, 1)

    assert max(_curve(peak, [1e-2, 10**-1.5]).items(), key=lambda i: i[1].value)[
        0
    ] == pytest.approx(1)
    with pytest.raises(ValueError, match="positive dampings"):
        _curve(peak, [0.0, 1.0])


def test_a_best_that_stays_at_the_end_is_warned_of(fit):
    with pytest.warns(UserWarning, match="is at the end of those tried"):
        choose_by_bank(fit, (XQ, TRUE), small_bank(), dampings=[RHO * 1e5, RHO * 3e5], n_samples=2)


def test_the_curve_is_drawn_with_the_choice():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    choice = DampingChoice(
        chosen=headwater.core.damping.Damping(0.1),
        criterion="LDS",
        dampings=[0.01, 0.1, 1.0],
        values=[0.2, 0.5, 0.3],
        low=[0.1, 0.4, 0.2],
        high=[0.3, 0.6, 0.4],
        facts={},
    )
    axes = choice.plot().axes[0]
    assert axes.get_xscale() == "log" and list(axes.lines[0].get_ydata()) == [0.2, 0.5, 0.3]
    assert "0.1: 0.500" in repr(choice) and replace(choice, low=[], high=[]).plot()


def test_who_inverts_the_exact_matrix_gets_its_damping_whatever_the_fit_holds():
    model = nn.Linear(P, 1, bias=False).double()
    task = Regression(measurement_of=prediction)
    record = {"weight_decay": 0.01, "horizon": 100.0}
    layerwise = headwater.fit(model, (X, Y), task, curvature=EKFAC(), **record)
    assert layerwise.damping().value == 0.01
    assert layerwise.damping(exact=True).value == pytest.approx(0.02)
    assert layerwise.damping(0.5, exact=True).value == 0.5
    plain = Influence(n_intervals=0).attribute(layerwise, (XQ, TRUE))
    refined = Influence(n_intervals=0, cg_steps=P).attribute(layerwise, (XQ, TRUE))
    assert plain.facts["damping"]["value"] == 0.01
    assert refined.facts["damping"]["value"] == pytest.approx(0.02)
