"""Caps on false claims: joint probabilities held to all orders of the scores."""

from itertools import combinations
from math import comb, log

import pytest
import torch

from headwater.numerics import false_claims
from headwater.numerics.batch_ranks import rank_cdf
from headwater.numerics.false_claims import crossing_probability, log_paths, simultaneous_caps

SMALL = [(n, total - n) for total in range(2, 10) for n in range(1, total)]


def above(n, m):
    """For each order of n verified and m unverified scores, how many unverified ones are above each verified one."""
    rows = []
    for places in combinations(range(n + m), n):  # of verified scores, from the top
        rows.append([place - before for before, place in enumerate(places)])
    return torch.tensor(rows)


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_the_probability_of_passing_a_cap_is_that_of_all_orders(n, m):
    orders = above(n, m)
    generator = torch.Generator().manual_seed(n * 10 + m)
    for length in range(1, n + 1):
        for _ in range(4):
            caps = torch.randint(0, m + 2, (length,), generator=generator).sort().values
            passed = (orders[:, :length] > caps).any(1).double().mean().item()
            # Exponentials of differences of logarithms of factorials below 10!, summed with signs.
            assert crossing_probability(n, m, caps) == pytest.approx(passed, abs=1e-12)


def test_blocks_of_thresholds_agree_with_one_block(monkeypatch):
    caps = (torch.arange(60) * 1.4 + 9).long()
    whole = crossing_probability(80, 90, caps)
    monkeypatch.setattr(false_claims, "_BLOCK", 7)
    assert crossing_probability(80, 90, caps) == pytest.approx(whole, abs=1e-12)
    assert 0.01 < whole < 0.99


def test_one_cap_is_passed_as_often_as_its_rank_says():
    for b, cap in ((0, 5), (3, 12), (10, 25)):
        caps = torch.full((b + 1,), cap)
        # More than `cap` above the (b + 1)-th largest: the (cap + 1)-th from the top has rank b + 1 or less.
        expected = float(rank_cdf(50, 60, cap + 1, b + 1))
        assert crossing_probability(50, 60, caps) == pytest.approx(expected, abs=1e-12)


def test_single_caps_are_the_smallest_that_keep_their_level():
    n, m = 30, 70
    for b in (0, 1, 7, 29):
        levels = torch.tensor([0.3, 0.05, 0.001], dtype=torch.float64)
        caps = false_claims._single_caps(n, m, b, levels)
        for level, cap in zip(levels.tolist(), caps.tolist(), strict=True):
            exceeded = rank_cdf(n, m, cap + 1, b + 1) if cap < m else 0
            assert exceeded <= level
            assert cap == 0 or rank_cdf(n, m, cap, b + 1) > level


@pytest.mark.parametrize("alpha", [0.3, 0.1, 0.05, 0.01])
@pytest.mark.parametrize(("n", "m"), [(3, 5), (60, 40), (200, 800), (500, 500)])
def test_caps_keep_their_joint_level_and_use_it_up(n, m, alpha):
    found = simultaneous_caps(n, m, alpha, most=m // 2)
    assert (found.caps.diff() >= 0).all()
    assert found.level == pytest.approx(crossing_probability(n, m, found.caps), abs=1e-12)
    assert found.level <= alpha
    if n > 50:  # one level less for all caps is at most 1/47 of log(1 + log n) of it
        assert found.level > 0.75 * alpha
        assert found.first_level >= alpha / (1.01 + log(n)) - 1e-12


def test_caps_are_kept_in_random_orders():
    n, m, alpha, runs = 40, 120, 0.1, 4000
    found = simultaneous_caps(n, m, alpha)
    keys = torch.rand(runs, n + m, generator=torch.Generator().manual_seed(0))
    places = keys.topk(n, dim=1).indices.sort(1).values
    passed = ((places - torch.arange(n))[:, : len(found.caps)] > found.caps).any(1)
    error = (found.level * (1 - found.level) / runs) ** 0.5
    assert abs(passed.double().mean().item() - found.level) < 3 * error  # exact, not only below


def test_caps_that_no_one_asks_for_are_left_out():
    few, all_caps = simultaneous_caps(100, 400, 0.05, most=30), simultaneous_caps(100, 400, 0.05)
    assert len(few.caps) < len(all_caps.caps) == 100
    assert few.caps[0] <= all_caps.caps[0] and few.caps[0] <= 30
    assert len(simultaneous_caps(5, 1000, 0.05, most=3).caps) == 0


def test_a_million_examples_take_seconds():
    found = simultaneous_caps(300, 1_000_000, 0.05, most=20_000)
    assert 0.04 < found.level <= 0.05


def test_paths_are_counted():
    assert log_paths(torch.tensor(3), torch.tensor(4)).exp().item() == pytest.approx(comb(7, 3))
    assert log_paths(torch.tensor(-1), torch.tensor(4)).item() == -torch.inf


@pytest.mark.parametrize("caps", [[2, 1], [-1], [0] * 6])
def test_caps_that_are_none_are_refused(caps):
    with pytest.raises(ValueError, match="do not fall"):
        crossing_probability(5, 5, torch.tensor(caps))
