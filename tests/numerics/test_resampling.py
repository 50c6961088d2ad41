import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.ranks import lds
from headwater.numerics.resampling import (
    Estimate,
    bootstrap,
    bootstrap_lds,
    bootstrap_lds_difference,
    jackknife_interval,
    jackknife_variance,
    noise_ceiling,
    seed_reliability,
    spearman_brown,
    student_quantile,
)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def half_masks(n_subsets, n_train, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(n_train, generator=generator) < n_train // 2 for _ in range(n_subsets)]
    )


def test_an_estimate_prints_its_interval_and_count():
    assert str(Estimate(0.5, 0.25, 0.75, 12)) == "0.500 [0.250, 0.750] (n = 12)"


def test_bootstrap_of_a_mean_has_the_textbook_width():
    x = normal(400)
    estimate = bootstrap(lambda i: x[i].mean().item(), (400,), n=400, n_samples=2000)
    assert estimate.value == x.mean().item()
    # With 2,000 draws an end of the interval is known to about 1/20 of its distance.
    width = 2 * 1.96 * x.std(correction=0).item() / 20
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)


def test_bootstrap_draws_the_same_under_the_same_seed():
    x = normal(50)

    def estimate(seed):
        return bootstrap(lambda i: x[i].mean().item(), (50,), n=50, n_samples=20, seed=seed)

    assert estimate(3) == estimate(3) != estimate(4)


def test_two_way_bootstrap_counts_the_variation_of_both_axes():
    rows, columns = normal(200, seed=1), normal(30, seed=2)
    table = rows[:, None] + columns
    both = bootstrap(lambda i, j: table[i][:, j].mean().item(), (200, 30), n=200, n_samples=2000)
    sd = math.sqrt(rows.var(correction=0) / 200 + columns.var(correction=0) / 30)
    assert both.high - both.low == pytest.approx(2 * 1.96 * sd, rel=0.1)  # as above


def test_a_perfect_score_is_one_with_an_interval_of_no_width():
    scores, masks = normal(6, 30), half_masks(40, 30)
    estimate = bootstrap_lds(scores, masks, masks.double() @ scores.T, n_samples=20)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))


def test_queries_without_a_score_are_left_out_and_counted():
    scores, masks = normal(6, 30), half_masks(40, 30)
    outcomes = masks.double() @ scores.T + normal(40, 6, seed=5)
    scores[1], outcomes[:, 4] = 0.3, 7.0
    estimate = bootstrap_lds(scores, masks, outcomes, n_samples=50)
    assert estimate.n == 4
    assert estimate.value == pytest.approx(lds(scores, masks, outcomes).nanmean().item())
    assert estimate.low < estimate.value < estimate.high


def test_no_query_with_a_score_is_an_error():
    with pytest.raises(ValueError, match="None of 3 queries"):
        bootstrap_lds(torch.zeros(3, 30), half_masks(10, 30), normal(10, 3))


def test_few_subsets_make_a_wider_interval_than_few_queries_remove():
    scores, masks = normal(50, 60), half_masks(80, 60)
    shared = normal(80, 1, seed=9)  # the same noise in every query: more queries do not help
    outcomes = masks.double() @ scores.T + 4 * shared
    few = bootstrap_lds(scores, masks[:20], outcomes[:20], n_samples=200)
    many = bootstrap_lds(scores, masks, outcomes, n_samples=200)
    assert few.high - few.low > 1.4 * (many.high - many.low)  # 2 expected from sqrt(80 / 20)


def test_spearman_brown_gives_the_correlation_of_means_of_repeats():
    # Signal of variance 1, noise of variance 2: one repeat has reliability 1/3.
    signal = normal(200_000, 1, seed=1)
    first, second = (
        (signal + math.sqrt(2) * normal(200_000, 4, seed=seed)).mean(1) for seed in (2, 3)
    )
    actual = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    # A correlation from 200,000 pairs has standard error (1 - r²) / 447 = 0.001.
    assert spearman_brown(1 / 3, 4) == pytest.approx(actual, abs=0.005)


def test_the_noise_ceiling_is_what_a_perfect_prediction_reaches():
    masks, tau = half_masks(300, 100), normal(40, 100, seed=1)
    expected = masks.double() @ tau.T
    noise = expected.std() * 1.5 * normal(300, 3, 40, seed=2)
    outcomes = expected[:, None] + noise
    reached = lds(tau, masks, outcomes.mean(1)).nanmean().item()
    ceiling = noise_ceiling(outcomes)
    # Ranks of normal variables correlate a little less (6/π asin(r/2) at correlation r), which
    # enters both sides in slightly different ways: up to 0.02; sampling adds 0.01.
    assert ceiling.value == pytest.approx(reached, abs=0.03)
    assert ceiling.low < ceiling.value < ceiling.high
    # One half of the repeats against another is no ceiling.
    assert seed_reliability(outcomes).mean() < reached - 0.2


def test_equal_repeats_have_a_ceiling_of_one_and_unrelated_ones_near_zero():
    once = normal(50, 1, 5)
    assert noise_ceiling(once.expand(50, 3, 5), n_samples=20).value == pytest.approx(1)
    unrelated = noise_ceiling(normal(400, 2, 50), n_samples=20)
    # Mean of 50 correlations with standard error 0.05 each: ρ < 0.03, so √(2ρ) < 0.25.
    assert unrelated.value < 0.25


def test_constant_queries_are_not_counted_in_the_ceiling():
    outcomes = normal(30, 3, 5)
    outcomes[:, :, 2] = 1.0
    assert noise_ceiling(outcomes, n_samples=5).n == 4


def test_a_ceiling_needs_repeats_that_are_complete():
    with pytest.raises(ValueError, match="two or more retrainings"):
        noise_ceiling(normal(10, 1, 3))
    outcomes = normal(10, 2, 3)
    outcomes[4, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 retrainings have no outcome"):
        noise_ceiling(outcomes)


def test_jackknife_of_a_mean_is_the_squared_standard_error():
    x = normal(12, 4)
    replicates = torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean(0) for i in range(12)])
    # The identity is exact; float64 sums of twelve numbers round at 1e-15.
    torch.testing.assert_close(jackknife_variance(replicates), x.var(0) / 12, rtol=1e-10, atol=0)


def test_jackknife_interval_of_a_mean_is_the_t_interval():
    x = normal(12, 1)
    replicates = torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean(0) for i in range(12)])
    low, high = jackknife_interval(x.mean(0), replicates, confidence_level=0.9)
    expected = scipy.stats.t.interval(0.9, 11, loc=x.mean().item(), scale=scipy.stats.sem(x[:, 0]))
    assert (low.item(), high.item()) == pytest.approx(expected, rel=1e-5)  # as student_quantile


def test_jackknife_interval_covers_as_often_as_it_says():
    data = normal(20_000, 8, 5) ** 2  # skewed on purpose: eight folds of five numbers, mean 1
    total = data.sum(dim=(1, 2))
    replicates = ((total[:, None] - data.sum(2)) / 35).T
    low, high = jackknife_interval(total / 40, replicates)
    covered = ((low < 1) & (high > 1)).double().mean().item()
    # Skewness costs about 0.02 of 0.95 at 40 numbers; 20,000 trials know it to 0.002.
    assert 0.92 < covered < 0.96


@given(st.floats(0.001, 0.999), st.integers(1, 10_000))
def test_student_quantile_equals_scipy(level, dof):
    expected = scipy.stats.t.ppf(level, dof)
    assert student_quantile(level, dof=dof) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_student_quantile_refuses_what_is_no_level():
    with pytest.raises(ValueError, match="level in"):
        student_quantile(1.0, dof=3)


def test_a_jackknife_needs_two_folds():
    with pytest.raises(ValueError, match="two or more folds; got 1"):
        jackknife_variance(torch.zeros(1, 3))


def test_a_paired_difference_is_that_of_the_scores_with_a_narrower_interval():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 40, generator=generator, dtype=torch.float64)
    masks = torch.rand(50, 40, generator=generator) < 0.5
    outcomes = masks.double() @ truth.T
    near, far = (
        truth + scale * torch.randn(20, 40, generator=generator, dtype=torch.float64)
        for scale in (0.9, 1.1)
    )
    options = {"n_samples": 200}
    first, second = (bootstrap_lds(x, masks, outcomes, **options) for x in (near, far))
    found = bootstrap_lds_difference(near, far, masks, outcomes, **options)
    assert found.value == pytest.approx(first.value - second.value)
    same = bootstrap_lds_difference(near, near, masks, outcomes, **options)
    assert same.value == same.low == same.high == 0
    assert found.low < found.value < found.high
