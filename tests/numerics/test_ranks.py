import inspect

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.ranks import (
    average_ranks,
    kept_ranking,
    lds,
    pearson,
    redrawn_spearman,
    spearman,
    subset_predictions,
)

numbers = st.lists(st.integers(-3, 3), min_size=2, max_size=30)


def bank(n_subsets=60, n_train=40, n_query=7):
    """Half-subsets and an outcome that is a linear function of them."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(n_query, n_train, generator=generator, dtype=torch.float64)
    masks = torch.stack(
        [torch.randperm(n_train, generator=generator) < n_train // 2 for _ in range(n_subsets)]
    )
    return scores, masks, 3.0 + 2.0 * masks.double() @ scores.T


@given(numbers)
def test_tied_values_share_their_mean_rank(values):
    actual = average_ranks(torch.tensor(values).double())
    assert actual.tolist() == scipy.stats.rankdata(values).tolist()


@given(st.data(), numbers)
def test_correlations_equal_scipy_with_ties(data, a):
    b = data.draw(st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
    rows = torch.tensor([a, b]).double()
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert spearman(*rows).isnan() and pearson(*rows).isnan()
        return
    # Both sum products of about 30 numbers of order one: a few roundings of float64.
    assert spearman(*rows).item() == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
    assert pearson(*rows).item() == pytest.approx(scipy.stats.pearsonr(a, b)[0], abs=1e-12)


def test_rows_are_correlated_one_by_one():
    a, b = torch.randn(2, 4, 3, 20, dtype=torch.float64)
    together = spearman(a, b)
    for i in range(4):
        for j in range(3):
            assert together[i, j] == spearman(a[i, j], b[i, j])


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_tiny_and_huge_numbers_correlate_as_any_others(scale):
    a, b = torch.randn(2, 20, dtype=torch.float64)
    # Scaling by a number that is not a power of two rounds each value once.
    torch.testing.assert_close(pearson(a * scale, b), pearson(a, b), rtol=1e-12, atol=0)


@given(st.data(), numbers)
def test_counted_elements_correlate_as_if_they_were_repeated(data, a):
    b = data.draw(st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(a), max_size=len(a)))
    counts[0] += 1
    rows, counts = torch.tensor([a, b]).double(), torch.tensor(counts)
    repeated = spearman(*rows.repeat_interleave(counts, dim=1))
    # Sums of at most 120 ranks below 120, in float64.
    torch.testing.assert_close(
        redrawn_spearman(*average_ranks(rows), counts),
        repeated,
        rtol=0,
        atol=1e-10,
        equal_nan=True,
    )


def test_a_row_with_nan_has_no_correlation():
    a = torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0]])
    assert spearman(a, torch.arange(3.0).expand(2, 3)).isnan().tolist() == [True, False]


def test_an_additive_oracle_scores_one_and_its_negative_minus_one():
    scores, masks, outcomes = bank()
    # Ranks are exact, so only the division by two square roots rounds.
    one = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(lds(scores, masks, outcomes), one, atol=1e-12, rtol=0)
    torch.testing.assert_close(lds(-scores, masks, outcomes), -one, atol=1e-12, rtol=0)


def test_random_scores_are_within_three_standard_errors_of_zero():
    _, masks, outcomes = bank(n_subsets=100, n_train=2000)
    random = torch.randn(7, 2000, dtype=torch.float64)
    # 1/√K from the subsets; two random vectors of N scores correlate by 1/√N besides.
    assert lds(random, masks, outcomes).abs().max() < 3 * (1 / 100 + 1 / 2000) ** 0.5


@given(st.floats(-1e6, 1e6))
def test_a_query_with_constant_scores_has_no_value(constant):
    scores, masks, outcomes = bank()
    scores[2] = constant  # sums over different subsets of one size differ by rounding at most
    assert lds(scores, masks, outcomes).isnan().nonzero().flatten().tolist() == [2]


def test_a_query_with_constant_outcomes_has_no_value():
    scores, masks, outcomes = bank()
    outcomes[:, 5] = 0.1
    values = lds(scores, masks, outcomes)
    assert values.isnan().nonzero().flatten().tolist() == [5]
    assert values.nanmean().item() == pytest.approx(1)


def test_scores_of_float32_are_summed_in_float64():
    scores, masks, _ = bank()
    exact = masks.double() @ scores.float().double().T
    torch.testing.assert_close(subset_predictions(scores.float(), masks), exact.T)


def test_scores_of_other_examples_are_refused():
    scores, masks, _ = bank()
    unchecked = inspect.unwrap(subset_predictions)  # without the shape checks of the tests
    with pytest.raises(ValueError, match="39 columns of scores and masks of 40 examples"):
        unchecked(scores[:, 1:], masks)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_kept_rankings_are_those_of_scikit_learn(k):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    scores, reference = torch.randn(2, 20, 15, generator=generator).double()
    relevance = torch.zeros(20, 15).double()
    order = reference.argsort(dim=1, descending=True)[:, :k]
    relevance.scatter_(1, order, torch.arange(k, 0, -1).double().expand(20, -1))
    expected = [
        metrics.ndcg_score(r[None].numpy(), s[None].numpy(), k=k)
        for r, s in zip(relevance, scores, strict=True)
    ]
    found = kept_ranking(scores, reference, k)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert kept_ranking(reference.exp(), reference, k).tolist() == pytest.approx([1.0] * 20)


def test_a_ranking_of_fewer_items_is_kept_whole_and_of_none_is_refused():
    assert kept_ranking(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), 10).item() == 1
    with pytest.raises(ValueError, match="k must be 1 or more; got 0"):
        kept_ranking(torch.ones(3), torch.ones(3), 0)
