"""The distribution of ranks, held to enumeration and to published numbers."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate, combinations, combinations_with_replacement
from math import ceil, comb

import pytest
import torch

from headwater.numerics import batch_ranks
from headwater.numerics.batch_ranks import (
    box_probability,
    cost_quantile,
    decimal,
    rank_cdf,
    rank_quantile,
    rank_sum_counts,
    rank_sum_quantile,
    sample_ranks,
)

SMALL = [(n, m) for total in range(2, 10) for m in range(1, total) for n in [total - m]]


def vectors(n, m):
    """All non-decreasing vectors of m ranks from 1 to n + 1."""
    return list(combinations_with_replacement(range(1, n + 2), m))


def orders_of_scores(n, m):
    """Rank vectors of all ways in which m test scores can lie among n calibration scores."""
    return [
        tuple(place - before for before, place in enumerate(places))
        for places in combinations(range(1, n + m + 1), m)
    ]


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_every_rank_vector_belongs_to_one_order_of_the_scores(n, m):
    assert sorted(orders_of_scores(n, m)) == vectors(n, m)


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_ranks_are_distributed_as_counted_and_as_in_the_paper(n, m):
    whole, total = vectors(n, m), comb(n + m, m)
    for k in range(1, m + 1):
        counts = Counter(v[k - 1] for v in whole)
        for r in range(1, n + 2):
            step = rank_cdf(n, m, k, r) - rank_cdf(n, m, k, r - 1)
            assert step * total == counts[r]
            assert counts[r] == comb(r + k - 2, k - 1) * comb(n + m - r - k + 1, m - k)


@pytest.mark.parametrize(("n", "m"), [s for s in SMALL if s[1] > 1])
def test_pairs_of_ranks_are_distributed_as_counted_and_as_in_the_paper(n, m):
    whole, total = vectors(n, m), comb(n + m, m)
    for j, k in combinations(range(1, m + 1), 2):
        counts = Counter((v[j - 1], v[k - 1]) for v in whole)
        for a, b in combinations_with_replacement(range(1, n + 2), 2):
            between = comb(b - a + k - j - 1, k - j - 1)
            formula = comb(a + j - 2, j - 1) * between * comb(n + m - b - k + 1, m - k)
            assert box_probability(n, m, {j: (a, a), k: (b, b)}) * total == counts[a, b] == formula


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_sums_of_ranks_are_counted(n, m):
    counts = Counter(sum(v) - m for v in vectors(n, m))
    expected = [counts[u] for u in range(n * m + 1)]
    assert rank_sum_counts(n, m).tolist() == expected
    shares = rank_sum_counts(n, m, exact=False)
    # Sums of at most 126 shares of order one, in float64.
    assert shares == pytest.approx([c / comb(n + m, m) for c in expected], abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(4, 3), (3, 4), (6, 2)])
def test_costs_of_ranks_are_counted(n, m):
    costs = torch.arange(n + 1) // 2 + torch.arange(m)[:, None] * (torch.arange(n + 1) > 1)
    sums = sorted(sum(int(costs[k, r - 1]) for k, r in enumerate(v)) for v in vectors(n, m))
    for alpha in (0.5, 0.2, 0.05):
        q = sums[ceil((1 - decimal(alpha)) * len(sums)) - 1]
        coverage = Fraction(sum(s <= q for s in sums), len(sums))
        assert cost_quantile(n, m, costs, alpha) == (q, coverage)


def test_costs_that_are_ranks_give_the_quantile_of_their_sum():
    costs = torch.arange(13).expand(5, -1)
    q, coverage = cost_quantile(12, 5, costs, 0.1)
    assert (q + 5, coverage) == rank_sum_quantile(12, 5, 0.1)


def test_published_ranks_are_reproduced():
    found = [rank_quantile(200, 100, 90, a) for a in (0.1, 0.05, 0.01)]
    assert [q for q, _ in found] == [188, 190, 194]
    assert [round(float(p), 4) for _, p in found] == [0.9020, 0.9507, 0.9935]
    levels = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    assert [rank_quantile(500, 100, 90, a)[0] for a in levels] == [472, 467, 464, 461, 459, 456]
    selection = [rank_quantile(1000, 100, 100 - eta, 0.1)[0] for eta in (0, 2, 4, 6, 8, 10)]
    assert selection == [1000, 991, 978, 963, 948, 932]
    assert [rank_quantile(2000, 100, 100, a)[0] for a in (0.05, 0.1, 0.2, 0.3)] == [
        2000,
        1999,
        1997,
        1994,
    ]
    sums = {(40, 10): [245, 263, 278], (100, 5): [312, 341, 365], (20, 20): [251, 268, 281]}
    for (n, m), quantiles in sums.items():
        assert [rank_sum_quantile(n, m, a)[0] for a in (0.2, 0.1, 0.05)] == quantiles


def test_a_bound_on_the_largest_needs_enough_calibration_scores():
    for m, alpha in ((100, 0.1), (7, 0.3), (50, 0.05)):  # n ≥ m (1 - alpha) / alpha
        n = ceil(m * (1 - decimal(alpha)) / decimal(alpha))
        assert rank_quantile(n, m, m, alpha)[0] == n
        assert rank_quantile(n - 1, m, m, alpha)[0] == n


def test_large_sizes_agree_with_exact_ones(monkeypatch):
    exact = rank_quantile(3000, 1000, 900, 0.05)
    boxes = {20: (200, 500), 90: (800, 1000)}
    box, sums = box_probability(1000, 100, boxes), rank_sum_quantile(150, 40, 0.05)
    costs = torch.arange(21).expand(6, -1)
    cost = cost_quantile(20, 6, costs, 0.1)
    for limit in ("_EXACT_RANKS", "_EXACT_CELLS", "_EXACT_WORK"):
        monkeypatch.setattr(batch_ranks, limit, 0)
    rounded = rank_quantile(3000, 1000, 900, 0.05)
    assert rounded[0] == exact[0] and rounded[1] == pytest.approx(float(exact[1]), abs=1e-9)
    assert box_probability(1000, 100, boxes) == pytest.approx(float(box), abs=1e-12)
    for found, expected in (
        (rank_sum_quantile(150, 40, 0.05), sums),
        (cost_quantile(20, 6, costs, 0.1), cost),
    ):
        assert found[0] == expected[0] and found[1] == pytest.approx(float(expected[1]), abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 10), (100, 5), (60, 60), (300, 30), (15, 200)])
@pytest.mark.parametrize("alpha", [0.2, 0.1, 0.05, 0.01])
def test_the_normal_quantile_of_sums_is_a_little_above_the_exact_one(n, m, alpha, monkeypatch):
    exact = rank_sum_quantile(n, m, alpha)[0]
    monkeypatch.setattr(batch_ranks, "_FLOAT_WORK", 0)
    near, coverage = rank_sum_quantile(n, m, alpha)
    assert exact <= near <= exact + 3 and coverage is None


def test_ten_million_calibration_scores_take_two_dozen_probabilities(monkeypatch):
    asked: list[int] = []

    def counted(n, m, k, r):
        asked.append(r)
        return rank_cdf(n, m, k, r)

    monkeypatch.setattr(batch_ranks, "rank_cdf", counted)
    q, coverage = rank_quantile(10_000_000, 100, 90, 0.05)
    assert 0.95 <= coverage < 0.9501 and q / 10_000_000 == pytest.approx(0.937, abs=1e-3)
    assert len(asked) <= 25


def test_sampled_ranks_are_uniform():
    n, m, size = 4, 3, 35_000
    counts = Counter(map(tuple, sample_ranks(n, m, size).tolist()))
    assert set(counts) == set(vectors(n, m))
    expected = size / len(vectors(n, m))  # 1,000 each, give or take 5 standard deviations
    assert all(abs(c - expected) < 5 * expected**0.5 for c in counts.values())


@pytest.mark.parametrize(("n", "m", "published"), [(40, 10, 0.9345), (20, 20, 0.8895)])
def test_sorted_draws_with_replacement_would_not_be(n, m, published):
    """They understate the spread of the sum, and a quantile from them at 95 % covers too little."""
    ways = [1]  # of m ranks from 0 to n, each drawn by itself, by their sum
    for _ in range(m):
        ways = [sum(ways[max(0, u - n) : u + 1]) for u in range(len(ways) + n)]
    sums, total = list(accumulate(ways)), (n + 1) ** m
    quantile = next(u for u, below in enumerate(sums) if below >= Fraction(19, 20) * total)
    mean = Fraction(sum(u * w for u, w in enumerate(ways)), total)
    variance = Fraction(sum(u * u * w for u, w in enumerate(ways)), total) - mean**2
    assert variance == Fraction(m * ((n + 1) ** 2 - 1), 12)  # not n m (n + m + 1) / 12
    level = Fraction(int(sum(rank_sum_counts(n, m)[: quantile + 1])), comb(n + m, m))
    assert round(float(level), 4) == published


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_quantile(10, 5, 3, 1.0), "between 0 and 1"),
        (lambda: rank_quantile(10, 5, 6, 0.1), "no 6-th smallest"),
        (lambda: rank_quantile(0, 5, 3, 0.1), "calibration score or more"),
        (lambda: rank_quantile(10, 0, 1, 0.1), "test score or more"),
        (lambda: box_probability(5, 2, {3: (1, 2)}), "order statistics 1 to 2"),
        (lambda: cost_quantile(3, 2, torch.ones(2, 3).long(), 0.1), "2 test scores at 4 ranks"),
        (lambda: cost_quantile(1, 1, torch.tensor([[1, 0]]), 0.1), "must not fall"),
    ],
)
def test_what_means_nothing_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
