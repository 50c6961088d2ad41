"""The limit on what lies outside holds as often as it says, and the top k is counted as by brute force."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.recall import Stratum, missed, most_marked, places, pushed_out


def test_the_limit_is_that_of_all_ways_to_draw():
    population, drawn, level = 9, 4, 0.9
    ways = list(combinations(range(population), drawn))
    for found in range(drawn + 1):
        most = most_marked(found, drawn, population, confidence_level=level)
        for marked in range(found, population - drawn + found + 1):
            likely = sum(sum(i < marked for i in way) <= found for way in ways) / len(ways)
            assert (likely > 1 - level) == (marked <= most)


@given(marked=st.integers(0, 60), drawn=st.integers(1, 60))
def test_the_limit_is_large_enough_as_often_as_it_says(marked, drawn):
    n = 60

    def probability(x):
        ways = math.comb(marked, x) * math.comb(n - marked, drawn - x)
        return ways / math.comb(n, drawn)

    held = sum(
        probability(x)
        for x in range(max(0, drawn - n + marked), min(drawn, marked) + 1)
        if most_marked(x, drawn, n, confidence_level=0.95) >= marked
    )
    assert held >= 0.95 - 1e-12


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="found <= drawn <= population; got 3, 2 and 9"):
        most_marked(3, 2, 9)


@given(
    inside=st.lists(st.integers(-50, 50), min_size=1, max_size=12, unique=True),
    outside=st.lists(st.integers(51, 150), max_size=12, unique=True),
    shift=st.integers(0, 120),
    k=st.integers(1, 8),
)
def test_outsiders_in_the_top_are_counted_as_by_sorting(inside, outside, shift, k):
    inside, outside = [2 * x for x in inside], [2 * (x - shift) + 1 for x in outside]  # no ties
    best = sorted(inside + outside)[-k:]
    at = places(torch.tensor([inside]).double(), k)
    counts = (torch.tensor(outside).double()[:, None] > at).sum(0).double()
    assert int(pushed_out(counts)) == sum(x in outside for x in best)


def stratum(scores, guesses, others, drawn, sizes=None):
    """A stratum of some scores, of which some are drawn, with guesses of all; both sides of one query."""
    sizes = torch.ones(len(scores)).double() if sizes is None else sizes
    rest = torch.tensor([i for i in others.tolist() if i not in set(drawn.tolist())], dtype=int)

    def both(x):
        return torch.stack([x, -x])

    return Stratum(
        size=len(others),
        drawn=both(scores[drawn]),
        guess=both(guesses[drawn]),
        scale=sizes[drawn],
        others=lambda: [(both(guesses[part]), sizes[part]) for part in rest.split(17)],
    )


def test_what_was_scored_wholly_leaves_nothing_behind():
    scores = torch.tensor([9.0, 1.0, 5.0, 6.0, 0.0]).double()
    all_of_it = stratum(scores, scores, torch.tensor([3, 4]), torch.tensor([3, 4]))
    inside = torch.stack([scores[:3], -scores[:3]])
    found = missed(inside, [all_of_it], k=2)
    assert (found.estimate, found.high, found.at_most, found.found) == (0, 0, 0, 2)
    nothing = missed(inside, [], k=2)
    assert nothing.estimate == nothing.at_most == 0 and nothing.outside == 0


def test_few_draws_of_many_promise_nothing():
    scores = torch.zeros(10_010).double()
    scores[:10] = torch.tensor([1.0, -1.0] * 5)
    some = stratum(scores, scores, torch.arange(10, 10_010), torch.arange(10, 30))
    found = missed(torch.stack([scores[:10], -scores[:10]]), [some], k=5)
    assert found.estimate == found.high == 0 and found.at_most == 1


def test_without_errors_the_guesses_tell_what_is_missing():
    scores = torch.randn(60, generator=torch.Generator().manual_seed(2)).double()
    some = stratum(scores, scores / 3, torch.arange(20, 60), torch.arange(20, 30))
    found = missed(torch.stack([scores[:20], -scores[:20]]), [some], k=10)
    ends = torch.stack([scores, -scores]).topk(10).indices
    truth = float((ends >= 30).sum()) / 20
    assert truth > 0 and found.estimate == pytest.approx(truth) and found.at_most >= truth
    looked = torch.stack([scores, -scores])[:, :30].topk(10).indices
    assert found.found == int((looked >= 20).sum())


def trials(n, level, *, tails):
    """What is missing and what is told of it, over many sets of guessed scores whose errors grow with a known scale."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(n):
        sizes = torch.rand(600, generator=generator).double() + 0.5
        guesses = sizes * torch.randn(600, generator=generator).double()
        noise = torch.randn(600, generator=generator).double()
        scores = guesses + 0.7 * sizes * noise * (noise.abs() if tails else 1)
        order = guesses.abs().argsort(descending=True)
        inside, near, far = order[:80], order[80:200], order[200:]
        strata, drawn = [], []
        for others in (near, far):
            some = others[torch.randperm(len(others), generator=generator)[:40]]
            strata.append(stratum(scores, guesses, others, some, sizes))
            drawn += some.tolist()
        both = torch.stack([scores, -scores])
        found = missed(both[:, inside], strata, k=10, confidence_level=level, seed=seed)
        known = {*inside.tolist(), *drawn}
        yield sum(i not in known for i in both.topk(10).indices.flatten().tolist()) / 20, found


@pytest.mark.parametrize(("tails", "short"), [(False, 0.0), (True, 0.15)])
def test_the_limits_cover_what_is_missing_as_often_as_they_say(tails, short):
    told = list(trials(200, 0.8, tails=tails))
    pairs = ((t, f.estimate) for t, f in told)
    truth, estimate = (torch.tensor(x) for x in zip(*pairs, strict=True))
    assert float(truth.mean()) > 0.05

    def rate(limit):
        return sum(getattr(f, limit) >= t - 1e-9 for t, f in told) / len(told)

    noise = 3 * (0.8 * 0.2 / len(told)) ** 0.5
    assert rate("at_most") >= 0.8  # sure, so that few draws make it far too large
    assert rate("high") >= 0.8 - noise - short  # 40 draws see too little of a heavy tail
    assert abs(float((estimate - truth).mean())) < 0.15 * float(truth.mean())
