"""The greatest products of two spectra: the threshold search equals a heap, and a full sort."""

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.numerics.staircase import staircase_by_count, staircase_by_mass, staircase_mask


def by_heap(lam, mu, share):
    """The k-way merge: the best pair that is not taken yet of each row waits in a heap."""
    target, mass = share * float(lam.sum() * mu.sum()), 0.0
    heap = [(-float(lam[i] * mu[0]), i, 0) for i in range(len(lam))]
    heapq.heapify(heap)
    counts = torch.zeros(len(lam), dtype=torch.int64)
    while heap and mass < target:
        product, i, j = heapq.heappop(heap)
        mass, counts[i] = mass - product, j + 1
        if j + 1 < len(mu):
            heapq.heappush(heap, (-float(lam[i] * mu[j + 1]), i, j + 1))
    return counts


def by_sort(lam, mu, share):
    flat = (lam[:, None] * mu).flatten()
    order = flat.argsort(descending=True, stable=True)
    cumulative = flat[order].cumsum(0)
    n = int((cumulative < share * float(lam.sum() * mu.sum())).sum()) + 1
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.view(len(lam), len(mu))


def spectrum(n, seed, decay=3.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, generator=generator, dtype=torch.float64).pow(decay)
    return values.sort(descending=True).values


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 12),
    in_=st.integers(1, 12),
    share=st.floats(0.01, 0.999),
    seed=st.integers(0, 10_000),
)
def test_heap_sort_and_threshold_search_choose_the_same_pairs(out, in_, share, seed):
    lam, mu = spectrum(out, seed), spectrum(in_, seed + 1)
    counts = staircase_by_mass(lam, mu, share)
    mask = staircase_mask(counts, in_)
    assert torch.equal(counts, by_heap(lam, mu, share))
    assert torch.equal(mask, by_sort(lam, mu, share))


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 9),
    share=st.floats(0.01, 0.999),
    seed=st.integers(0, 10_000),
)
def test_the_mass_is_reached_with_the_fewest_pairs(out, in_, share, seed):
    lam, mu = spectrum(out, seed), spectrum(in_, seed + 1)
    products = lam[:, None] * mu
    kept = products[staircase_mask(staircase_by_mass(lam, mu, share), in_)]
    total = float(products.sum())
    # sums of at most 81 products in float64
    assert float(kept.sum()) >= share * total * (1 - 1e-13)
    assert float(kept.sum() - kept.min()) < share * total * (1 + 1e-13)


def test_equal_products_are_taken_by_their_index():
    # integers, so that every sum is exact: products 4 2 2 / 2 1 1 / 2 1 1, of 16 in all
    lam = mu = torch.tensor([2.0, 1.0, 1.0])
    assert staircase_by_mass(lam, mu, 6 / 16).tolist() == [2, 0, 0]
    assert staircase_by_mass(lam, mu, 8 / 16).tolist() == [3, 0, 0]
    assert staircase_by_mass(lam, mu, 9 / 16).tolist() == [3, 1, 0]
    assert staircase_by_mass(lam, mu, 13 / 16).tolist() == [3, 2, 1]
    flat = torch.ones(3)
    assert staircase_by_mass(flat, flat, 5 / 9).tolist() == [3, 2, 0]


def test_all_of_the_mass_is_every_pair_even_those_of_no_mass():
    lam, mu = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])
    assert staircase_by_mass(lam, mu, 1.0).tolist() == [3, 3]
    assert staircase_by_mass(lam, mu, 0.999).tolist() == [1, 0]


@settings(deadline=None, max_examples=30)
@given(out=st.integers(1, 7), in_=st.integers(1, 7), seed=st.integers(0, 1000))
def test_a_number_of_pairs_is_the_beginning_of_the_sorted_products(out, in_, seed):
    lam, mu = spectrum(out, seed), spectrum(in_, seed + 1)
    lam[out // 2 :] = 0  # products of zero as well, taken by their index
    products = (lam[:, None] * mu).flatten()
    order = products.argsort(descending=True, stable=True)
    for n in range(out * in_ + 1):
        mask = staircase_mask(staircase_by_count(lam, mu, n), in_).flatten()
        assert int(mask.sum()) == n
        assert products[mask].sum() == pytest.approx(float(products[order[:n]].sum()), abs=1e-14)


def test_large_spectra_need_no_table_of_products():
    lam, mu = spectrum(4000, 0), spectrum(5000, 1)
    counts = staircase_by_mass(lam, mu, 0.6)
    prefix = torch.cat([torch.zeros(1).double(), mu.cumsum(0)])
    mass, total = float((lam * prefix[counts]).sum()), float(lam.sum() * mu.sum())
    assert 0.6 <= mass / total < 0.6 + 1e-6
    assert bool((counts[1:] <= counts[:-1]).all())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_outside_zero_to_one_are_refused(share):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        staircase_by_mass(torch.ones(2), torch.ones(2), share)


def test_broken_spectra_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        staircase_by_mass(torch.tensor([1.0, float("nan")]), torch.ones(2), 0.5)
    with pytest.raises(ValueError, match="descending"):
        staircase_by_mass(torch.tensor([1.0, 2.0]), torch.ones(2), 0.5)
    with pytest.raises(ValueError, match="all zero"):
        staircase_by_mass(torch.zeros(2), torch.ones(2), 0.5)
