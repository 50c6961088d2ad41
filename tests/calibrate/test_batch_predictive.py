"""Bounds on batches: edges, mirror images, and coverage at the exact level."""

import math

import pytest
import torch

from headwater.calibrate import (
    accept_shifted,
    composed_bound,
    coverage_bound,
    mean_bound,
    order_at,
    quantile_bound,
    quantiles_bound,
    split_conformal_coverage,
)
from headwater.numerics.batch_ranks import rank_quantile

RUNS = 4000


def drawn(name, runs, n, seed=0):
    """Scores of `runs` repetitions, n of each."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(runs, n, generator=generator, dtype=torch.float64)
    if name == "uniform":
        return uniform
    if name == "arcsine":  # Beta(1/2, 1/2)
        return (uniform * math.pi / 2).sin().square()
    return (math.pi * (uniform - 0.5)).tan()  # Cauchy: no mean, no variance


def near(hits, level):
    """Within three standard errors of an exact level."""
    error = math.sqrt(level * (1 - level) / len(hits))
    return abs(hits.double().mean().item() - level) < 3 * error


DISTRIBUTIONS = pytest.mark.parametrize("name", ["uniform", "arcsine", "cauchy"])


@DISTRIBUTIONS
@pytest.mark.parametrize("side", ["upper", "lower", "both"])
def test_a_quantile_is_bounded_at_the_exact_level(name, side):
    n, m, order = 200, 40, 20
    scores = drawn(name, RUNS, n + m)
    bound = quantile_bound(scores[0, :n], m, order, alpha=0.1, side=side)
    assert 0.9 <= bound.exact_coverage < 0.92
    # Ranks do not depend on scores: the same ones serve all repetitions.
    ends = scores[:, :n].sort(1).values
    target = scores[:, n:].sort(1).values[:, order - 1]
    hits = torch.ones(RUNS, dtype=torch.bool)
    if side in ("upper", "both"):
        hits &= target <= ends[:, bound.ranks[-1] - 1]
    if side in ("lower", "both"):
        hits &= target > ends[:, bound.ranks[0] - 1]
    assert near(hits, bound.exact_coverage)
    values = scores[0, :n].sort().values
    if side != "lower":
        assert bound.upper == values[bound.ranks[-1] - 1]
    if side != "upper":
        assert bound.lower == values[bound.ranks[0] - 1]


@DISTRIBUTIONS
@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_a_share_of_the_batch_is_covered_at_the_exact_level(name, delta):
    n, m = 300, 20
    scores = drawn(name, RUNS, n + m)
    bound = coverage_bound(scores[0, :n], m, delta=delta, alpha=0.1)
    q = bound.rank_quantile
    limits = scores[:, :n].sort(1).values[:, q - 1]
    covered = (scores[:, n:] <= limits[:, None]).double().mean(1) >= 1 - delta - 1e-9
    assert near(covered, bound.exact_coverage)
    assert bound.upper == scores[0, :n].sort().values[q - 1]


@DISTRIBUTIONS
def test_split_conformal_intervals_cover_a_share_as_often_as_computed(name):
    n, m, delta = 200, 100, 0.1
    exact = split_conformal_coverage(n, m, delta)
    assert round(exact, 3) == 0.588  # far below 0.9
    scores = drawn(name, RUNS, n + m)
    limits = scores[:, :n].sort(1).values[:, 180]  # rank ⌈0.9 · 201⌉ = 181
    covered = (scores[:, n:] <= limits[:, None]).sum(1) >= 90
    assert near(covered, exact)


@DISTRIBUTIONS
@pytest.mark.parametrize("side", ["both", "outer", "upper", "lower"])
def test_several_quantiles_are_bounded_together_at_the_exact_level(name, side):
    n, m, orders = 200, 40, [10, 30]
    scores = drawn(name, RUNS, n + m)
    bound = quantiles_bound(scores[0, :n], m, orders, alpha=0.1, side=side)
    assert 0.9 <= bound.exact_coverage < 0.93
    padded = torch.nn.functional.pad(scores[:, :n].sort(1).values, (1, 0), value=-math.inf)
    padded = torch.nn.functional.pad(padded, (0, 1), value=math.inf)
    hits = torch.ones(RUNS, dtype=torch.bool)
    for k, (low, high) in zip(orders, bound.rank_quantile, strict=True):
        target = scores[:, n:].sort(1).values[:, k - 1]
        hits &= (target > padded[:, low - 1]) & (target <= padded[:, high])
    assert near(hits, bound.exact_coverage)
    finite = [math.isfinite(b) for b in (*bound.lower, *bound.upper)]
    expected = {
        "both": [True] * 4,
        "outer": [True, False, False, True],
        "upper": [False, False, True, True],
        "lower": [True, True, False, False],
    }
    assert finite == expected[side]


@pytest.mark.parametrize("name", ["uniform", "arcsine"])
@pytest.mark.parametrize("side", ["upper", "lower", "both"])
def test_the_mean_is_within_its_bounds(name, side):
    n, m, runs = 40, 10, 100
    scores = drawn(name, runs, n + m)
    hits = []
    for row in scores:
        bound = mean_bound(row[:n], m, alpha=0.1, side=side, lowest=0.0, highest=1.0)
        hits.append(bound.lower <= row[n:].mean().item() <= bound.upper)
    error = math.sqrt(0.1 * 0.9 / runs)
    assert sum(hits) / runs >= 0.9 - 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "arcsine"])
def test_the_mean_is_within_its_bound_over_thousands_of_batches(name):
    n, m = 40, 10
    scores = drawn(name, RUNS, n + m, seed=1)
    bounds = [mean_bound(row[:n], m, alpha=0.1, highest=1.0).upper for row in scores]
    hits = scores[:, n:].mean(1) <= torch.tensor(bounds, dtype=torch.float64)
    assert hits.double().mean().item() >= 0.9 - 3 * math.sqrt(0.09 / RUNS)


def test_bounds_on_both_sides_are_mirror_images():
    scores = drawn("arcsine", 1, 60)[0]
    for above, below in (
        (
            quantile_bound(scores, 20, 6, alpha=0.1, highest=1.0),
            quantile_bound(-scores, 20, 15, alpha=0.1, side="lower", lowest=-1.0),
        ),
        (
            mean_bound(scores, 5, alpha=0.1, highest=1.0),
            mean_bound(-scores, 5, alpha=0.1, side="lower", lowest=-1.0),
        ),
    ):
        assert above.upper == pytest.approx(-below.lower, abs=1e-12)
        assert above.exact_coverage == below.exact_coverage
    both = mean_bound(scores, 5, alpha=0.2, side="both", lowest=0.0, highest=1.0)
    assert both.upper == mean_bound(scores, 5, alpha=0.1, highest=1.0).upper
    assert both.exact_coverage == pytest.approx(
        2 * mean_bound(scores, 5, alpha=0.1, highest=1.0).exact_coverage - 1, abs=1e-12
    )


def test_the_ranks_of_a_mean_bound_reach_it():
    scores = drawn("uniform", 1, 50)[0]
    bound = mean_bound(scores, 8, alpha=0.1, side="both", lowest=0.0, highest=1.0)
    padded = torch.cat([torch.zeros(1), scores.sort().values, torch.ones(1)]).double()
    low, high = torch.tensor(bound.ranks[:8]), torch.tensor(bound.ranks[8:])
    assert padded[low].mean().item() == pytest.approx(bound.lower, abs=1e-12)
    assert padded[high].mean().item() == pytest.approx(bound.upper, abs=1e-12)


def test_a_mean_over_many_scores_is_bounded_by_the_majorant():
    scores = drawn("arcsine", 1, 5000)[0]
    bound = mean_bound(scores, 100, alpha=0.05, highest=1.0)
    assert "concave majorant" in bound.reason
    deviation = math.sqrt(1 / 8 / 100)  # of the mean of 100 scores of variance 1/8
    assert 0.5 + deviation < bound.upper < 0.5 + 5 * deviation


def test_a_mean_of_fifty_by_two_hundred_is_bounded_exactly():
    scores = drawn("uniform", 1, 200)[0]
    bound = mean_bound(scores, 50, alpha=0.05, highest=1.0)
    assert bound.reason == "" and bound.upper < 0.8 and len(bound.ranks) == 50
    padded = torch.cat([scores.sort().values, torch.ones(1).double()])
    at = torch.tensor(bound.ranks) - 1
    assert padded[at].mean().item() == pytest.approx(bound.upper, abs=1e-12)
    assert sum(bound.ranks) <= bound.rank_quantile


def test_means_of_unbounded_scores_are_unbounded_and_say_why():
    scores = drawn("cauchy", 1, 100)[0]
    bound = mean_bound(scores, 5, alpha=0.1, side="both")
    assert (bound.lower, bound.upper) == (-math.inf, math.inf)
    assert "pass highest" in bound.reason and "pass lowest" in bound.reason
    composed = composed_bound(scores, 5, lambda k, so_far, s: so_far + s, alpha=0.1)
    assert composed.upper == math.inf and "pass highest" in composed.reason


def test_a_budget_that_reaches_no_last_rank_needs_no_greatest_score():
    # P(the sum of both ranks is at most q) ≥ 1/4 for a q below n + m.
    bound = mean_bound(torch.arange(10.0), 2, alpha=0.75)
    assert math.isfinite(bound.upper) and bound.reason == ""


def test_composed_sums_equal_means():
    scores = drawn("uniform", 1, 25)[0]
    composed = composed_bound(scores, 6, lambda k, so_far, s: so_far + s, alpha=0.1, highest=1.0)
    mean = mean_bound(scores, 6, alpha=0.1, highest=1.0)
    assert composed.upper / 6 == pytest.approx(mean.upper, abs=1e-12)
    assert composed.exact_coverage == pytest.approx(mean.exact_coverage, abs=1e-12)


def test_a_composed_score_that_is_not_symmetric_is_within_its_bound():
    """The mean of the upper half: an expected shortfall."""
    n, m, runs = 20, 5, 60
    scores = drawn("uniform", runs, n + m)
    costs = torch.arange(n + 1) * (torch.arange(m) >= 3)[:, None]

    def step(k, so_far, s):
        return so_far + s / 2 if k > 3 else so_far

    hits = []
    for row in scores:
        bound = composed_bound(row[:n], m, step, alpha=0.1, costs=costs, highest=1.0)
        hits.append(row[n:].sort().values[3:].mean().item() <= bound.upper)
    assert sum(hits) / runs >= 0.9 - 3 * math.sqrt(0.09 / runs)


def test_the_largest_as_a_composed_score_equals_its_quantile_bound():
    scores = drawn("uniform", 1, 30)[0]
    n, m = 30, 4
    last = torch.arange(n + 1) * (torch.arange(m) == m - 1)[:, None]

    def step(k, so_far, s):
        return so_far.maximum(s)

    composed = composed_bound(scores, m, step, alpha=0.2, start=-math.inf, costs=last, highest=1.0)
    direct = quantile_bound(scores, m, m, alpha=0.2, highest=1.0)
    assert composed.upper == direct.upper
    assert composed.exact_coverage == pytest.approx(direct.exact_coverage, abs=1e-12)


def test_ties_leave_upper_bounds_valid():
    n, m = 60, 20
    scores = (drawn("uniform", RUNS, n + m) * 5).floor()
    bound = quantile_bound(scores[0, :n], m, 15, alpha=0.1)
    assert bound.ties == 60
    limits = scores[:, :n].sort(1).values[:, bound.rank_quantile - 1]
    hits = scores[:, n:].sort(1).values[:, 14] <= limits
    assert hits.double().mean().item() >= bound.exact_coverage - 3 * math.sqrt(0.09 / RUNS)


def test_intervals_go_around_predictions():
    scores, predictions = drawn("uniform", 1, 100)[0], torch.linspace(0, 9, 10).double()
    bound = coverage_bound(scores, 10, delta=0.2, alpha=0.1)
    low, high = bound.around(predictions)
    torch.testing.assert_close(high - low, torch.full_like(low, 2 * bound.upper))
    mean = mean_bound(scores - 0.5, 10, alpha=0.1, side="both", lowest=-0.5, highest=0.5)
    low, high = mean.around(predictions)
    assert low < 4.5 < high
    with pytest.raises(ValueError, match="of the 10 examples; got 3"):
        bound.around(predictions[:3])
    with pytest.raises(ValueError, match="no interval around predictions"):
        quantile_bound(scores, 10, 5, alpha=0.1).around(predictions)


def test_too_few_calibration_scores_give_the_range_and_say_so():
    bound = quantile_bound(torch.arange(5.0), 20, 20, alpha=0.05)
    assert bound.upper == math.inf and "too few" in bound.reason and "too few" in repr(bound)
    known = quantile_bound(torch.arange(5.0), 20, 20, alpha=0.05, highest=9.0)
    assert known.upper == 9.0


def test_shifted_batches_are_covered_with_accepted_scores_and_not_without():
    """Calibration x is uniform, the batch's has density 2x, and scores grow with x."""
    m, runs = 30, 300
    generator = torch.Generator().manual_seed(3)
    plain, accepted = [], []
    for run in range(runs):
        x = torch.rand(300, generator=generator, dtype=torch.float64)
        noise = torch.rand(300 + m, generator=generator, dtype=torch.float64)
        there = torch.rand(m, generator=generator, dtype=torch.float64).sqrt()
        here, target = x + 0.1 * noise[:300], (there + 0.1 * noise[300:]).sort().values[14]
        keep = accept_shifted(2 * x, bound=2.0, seed=run)
        plain.append(target <= quantile_bound(here, m, 15, alpha=0.1).upper)
        accepted.append(target <= quantile_bound(here[keep], m, 15, alpha=0.1).upper)
    error = math.sqrt(0.09 / runs)
    assert sum(accepted) / runs >= 0.9 - 3 * error
    assert sum(plain) / runs < 0.5


def test_ratios_above_their_bound_are_clipped_aloud():
    with pytest.warns(UserWarning, match="1 of 3 density ratios are above the bound of 2"):
        kept = accept_shifted(torch.tensor([0.0, 1.0, 5.0]), bound=2.0)
    assert kept.tolist()[0] is False and kept.tolist()[2] is True


def test_a_rank_does_not_depend_on_the_scores():
    for name in ("uniform", "cauchy"):
        bound = quantile_bound(drawn(name, 1, 200)[0], 100, 90, alpha=0.05)
        assert bound.rank_quantile == 190 == rank_quantile(200, 100, 90, 0.05)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: quantile_bound(s, 5, 6, alpha=0.1), "no 6-th smallest"),
        (lambda s: quantile_bound(s, 5, 3, alpha=0.0), "between 0 and 1"),
        (lambda s: quantile_bound(s[:0], 5, 3, alpha=0.1), "calibration score or more; got 0"),
        (lambda s: quantile_bound(s, 0, 1, alpha=0.1), "test score or more; got 0"),
        (lambda s: quantile_bound(s.index_fill(0, s[:1].long(), math.nan), 5, 3, alpha=0.1), "NaN"),
        (lambda s: mean_bound(s, 5, alpha=0.1, highest=3.0), "outside the given range"),
        (lambda s: mean_bound(s / 0, 5, alpha=0.1), "NaN|finite scores"),
        (lambda s: quantiles_bound(s, 5, [3, 2], alpha=0.1), "rising numbers"),
        (lambda s: coverage_bound(s, 5, delta=1.0, alpha=0.1), "below 1"),
        (lambda s: order_at(5, 0.0), "above 0"),
        (lambda s: accept_shifted(-s, bound=1.0), "0 or more"),
    ],
)
def test_what_means_nothing_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(1.0, 11.0))
