"""Claims with error control: promises held to repetitions, with both directions of scores."""

import inspect
import math
from itertools import combinations

import pytest
import torch

from headwater.calibrate import claim_curve, claims, draw_sample, select
from headwater.calibrate.claims import _confidence, _most
from headwater.core.provenance import PAPERS, cite
from headwater.numerics.batch_ranks import rank_quantile


def world(seed, total=300, wrong=0.15, gap=2.0, *, decimals=None):
    """Scores, higher for wrong examples by `gap`, and which those are."""
    generator = torch.Generator().manual_seed(10**6 + seed)
    bad = torch.rand(total, generator=generator) < wrong
    scores = torch.randn(total, generator=generator, dtype=torch.float64) + gap * bad
    return (scores if decimals is None else scores.round(decimals=decimals)), bad


def false(selection, bad):
    return int((selection.selected & ~bad).sum())


def test_a_selection_keeps_its_promise_at_the_exact_level_when_nothing_is_wrong():
    total, n, eta, runs = 120, 60, 4, 4000
    scores, bad = torch.arange(total).double(), torch.zeros(total, dtype=torch.bool)
    q, coverage = rank_quantile(n, total - n, total - n - eta, 0.1)
    misses = 0
    for seed in range(runs):
        verified = draw_sample(total, n, seed=seed)
        if seed < 50:  # the rest by its ranks alone, which is the same and faster
            found = select(scores, verified, bad[verified], eta=eta, alpha=0.1)
            assert found.exact_level == pytest.approx(1 - float(coverage), abs=1e-12)
            assert found.threshold == scores[verified].sort().values[q - 1]
        threshold = scores[verified].sort().values[q - 1]
        above = int((scores > threshold).sum() - (scores[verified] > threshold).sum())
        misses += above > eta
    level = 1 - float(coverage)
    assert abs(misses / runs - level) < 3 * math.sqrt(level * (1 - level) / runs)


@pytest.mark.parametrize("decimals", [None, 0], ids=["no ties", "many ties"])
@pytest.mark.parametrize("eta", [0, 3, 20])
def test_false_claims_pass_eta_no_more_often_than_alpha(eta, decimals):
    runs, misses, true = 200, 0, 0
    for seed in range(runs):
        scores, bad = world(seed, decimals=decimals)
        verified = draw_sample(300, 200, seed=seed)
        found = select(scores, verified, bad[verified], eta=eta, alpha=0.2)
        misses += false(found, bad) > eta
        true += int((found.selected & bad).sum())
        assert not found.selected[verified].any()
    assert misses / runs <= 0.2 + 3 * math.sqrt(0.16 / runs)
    assert decimals == 0 or eta < 3 or true / runs > 2  # it does claim something


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("decimals", [None, 0], ids=["no ties", "many ties"])
def test_the_share_of_false_claims_passes_its_limit_no_more_often_than_alpha(share, decimals):
    runs, misses, claimed = 200, 0, 0
    for seed in range(runs):
        scores, bad = world(seed, total=400, wrong=0.3, gap=3.0, decimals=decimals)
        verified = draw_sample(400, 150, seed=seed)
        found = select(scores, verified, bad[verified], share=share, alpha=0.2)
        misses += false(found, bad) > share * len(found)
        claimed += len(found)
        assert found.false_at_most <= share * len(found) and found.exact_level <= 0.2
    assert misses / runs <= 0.2 + 3 * math.sqrt(0.16 / runs)
    assert claimed / runs > 20


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.4])
def test_all_lists_are_bounded_together_over_thousands_of_draws(wrong):
    """The bound of every prefix of the ranking at once, at a level that nothing right can pass."""
    runs, total, n, alpha = 4000, 200, 80, 0.1
    failed = missed = 0
    for seed in range(runs):
        scores, bad = world(seed, total=total, wrong=wrong, gap=1.5)
        verified = draw_sample(total, n, seed=seed)
        curve = claim_curve(scores, verified, bad[verified], alpha=alpha)
        unverified = torch.ones(total, dtype=torch.bool).index_fill(0, verified, False)
        right = scores[unverified & ~bad]
        counts = (right[:, None] > curve.thresholds).sum(0)
        failed += bool((counts > curve.false_at_most).any())
        if seed % 10 == 0:
            found = curve.select(0.3)
            missed += false(found, bad) > 0.3 * len(found)
    error = 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert failed / runs <= alpha + error
    if wrong == 0.0:  # exact where nothing is wrong
        assert abs(failed / runs - curve.level) < error
    assert missed / (runs / 10) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / (runs / 10))


def test_choosing_eta_after_counting_breaks_the_promise_that_selection_keeps():
    """Half are wrong and scores say nothing: every list is half false, and some eta allows a long enough one."""
    runs, total, n, share, alpha = 300, 400, 200, 0.5, 0.1
    ranks = torch.tensor([rank_quantile(n, n, n - eta, alpha)[0] for eta in range(100)])
    etas = torch.arange(100)[ranks <= n]
    searched = kept = 0
    for seed in range(runs):
        scores, bad = world(seed, total=total, wrong=0.5, gap=0.0)
        verified = draw_sample(total, n, seed=seed)
        found = select(scores, verified, bad[verified], share=share, alpha=alpha)
        kept += false(found, bad) > share * len(found)
        right = scores[verified].masked_fill(bad[verified], -math.inf).sort().values
        limits = right[ranks[ranks <= n] - 1]
        others = torch.ones(total, dtype=torch.bool).index_fill(0, verified, False)
        lists = (scores[others][:, None] > limits).sum(0)
        long = etas <= share * lists
        if long.any():
            listed = others & (scores > limits[long].min())
            searched += int((listed & ~bad).sum()) > share * int(listed.sum())
    assert kept / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs) < searched / runs


def test_low_scores_are_suspicious_where_that_is_said():
    scores, bad = world(5)
    verified = draw_sample(300, 150, seed=5)
    for promise in ({"eta": 5}, {"share": 0.4}):
        high = select(scores, verified, bad[verified], **promise)
        low = select(-scores, verified, bad[verified], suspicious="low", **promise)
        assert len(high) > 0 and torch.equal(high.selected, low.selected)
        assert high.threshold == -low.threshold and high.false_at_most == low.false_at_most
        assert (scores[high.selected] > high.threshold).all()
        assert ((-scores)[low.selected] < low.threshold).all()
    curves = [
        claim_curve(scores, verified, bad[verified]),
        claim_curve(-scores, verified, bad[verified], suspicious="low"),
    ]
    assert torch.equal(curves[0].claims, curves[1].claims)
    chosen = scores > 1.0
    assert curves[0].bound(chosen) == curves[1].bound(chosen)


def test_any_list_is_bounded_by_the_best_threshold():
    scores, bad = world(1)
    verified = draw_sample(300, 120, seed=1)
    curve = claim_curve(scores, verified, bad[verified])
    unverified = torch.ones(300, dtype=torch.bool).index_fill(0, verified, False)
    for seed in range(20):
        chosen = torch.rand(300, generator=torch.Generator().manual_seed(seed)) < 0.2 + (scores > 1)
        asked = chosen & unverified
        naive = int(asked.sum())
        for threshold, most in zip(curve.thresholds, curve.false_at_most, strict=True):
            inside = asked & (scores > threshold)
            naive = min(naive, int(most) + int((asked & ~inside).sum()))
        assert curve.bound(chosen) == naive
    # What `select` promises of its list is what the curve says of that list.
    found = curve.select(0.4)
    assert found.false_at_most == curve.bound(found.selected)


def test_the_longest_list_is_taken():
    scores, bad = world(2)
    verified = draw_sample(300, 150, seed=2)
    curve = claim_curve(scores, verified, bad[verified])
    found, share = curve.select(0.3), 0.3
    unverified = torch.ones(300, dtype=torch.bool).index_fill(0, verified, False)
    for threshold in scores[unverified].tolist():
        longer = unverified & (scores > threshold)
        if longer.sum() > len(found):
            assert curve.bound(longer) > share * int(longer.sum())


def test_equal_scores_are_claimed_together():
    scores, bad = world(3, wrong=0.3, gap=4.0, decimals=0)
    verified = draw_sample(300, 150, seed=3)
    for promise in ({"eta": 4}, {"share": 0.3}):
        found = select(scores, verified, bad[verified], **promise)
        others = torch.ones(300, dtype=torch.bool).index_fill(0, verified, False) & ~found.selected
        assert len(found) > 0 and scores[found.selected].min() > scores[others].max()


def test_the_promise_holds_over_every_draw_of_a_small_world():
    """All draws of 5 of 9 examples, with ties and wrong ones: no more than alpha of them break the promise."""
    scores = torch.tensor([0.0, 1, 1, 2, 3, 3, 4, 5, 6]).double()
    bad = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 1]).bool()
    draws = [torch.tensor(d) for d in combinations(range(9), 5)]
    for eta, alpha in ((0, 0.5), (1, 0.3), (2, 0.2)):
        broken = sum(
            false(select(scores, d, bad[d], eta=eta, alpha=alpha), bad) > eta for d in draws
        )
        assert broken <= alpha * len(draws)
    for share, alpha in ((0.3, 0.5), (0.5, 0.4)):
        broken = sum(
            false(found, bad) > share * len(found)
            for d in draws
            for found in [select(scores, d, bad[d], share=share, alpha=alpha)]
        )
        assert broken <= alpha * len(draws)


def test_the_sentence_says_what_is_promised():
    scores, bad = world(0, total=2000, wrong=0.2, gap=5.0)
    verified = draw_sample(2000, 600, seed=0)
    found = select(scores, verified, bad[verified], eta=10)
    assert found.sentence == (
        f"These {len(found)} examples are wrong; with 95 % confidence at most 10 of them are false claims. "
        f"600 of 2,000 examples were verified; {int(bad[verified].sum())} of them are wrong."
    )
    assert found.sentence in repr(found)
    shared = select(scores, verified, bad[verified], share=0.1, alpha=0.1)
    assert len(shared) > 100
    assert (
        f"with 90 % confidence at most 10 % of them are false claims ({shared.false_at_most} at most)"
        in (shared.sentence)
    )
    table = found.table()
    assert sum(table["selected"]) == len(found) and sum(table["verified"]) == 600
    assert table["wrong"].count(None) == 1400
    facts = found.facts
    assert facts["claims"] == len(found) and facts["passes_beyond_the_fit"] == 0
    assert all(paper in PAPERS for paper in facts["papers"]) and cite(found).count("@") == 3


def test_nothing_is_claimed_without_enough_evidence_and_it_says_what_would_be():
    scores, bad = world(0)
    verified = draw_sample(300, 50, seed=0)
    found = select(scores, verified, bad[verified], eta=0)
    assert len(found) == 0 and found.threshold == math.inf
    # n ≥ m (1 - alpha) / alpha with m = 300 - n: 285 of 300.
    assert "takes 285 or more verified examples of 300" in found.sentence
    enough = draw_sample(300, 285, seed=0)
    assert math.isfinite(select(scores, enough, bad[enough], eta=0).threshold)
    fewer = draw_sample(300, 284, seed=0)
    assert select(scores, fewer, bad[fewer], eta=0).threshold == math.inf
    shared = select(scores, verified, bad[verified], share=0.01)
    assert len(shared) == 0 and "allow a larger share" in shared.sentence
    # A finite threshold that nothing is above.
    top = torch.arange(100.0)
    verified = torch.cat([torch.arange(30, 100)])
    with pytest.warns(UserWarning, match="unlike the others'"):
        none = select(top, verified, torch.zeros(70, dtype=torch.bool), eta=3, alpha=0.1)
    assert len(none) == 0 and "no score is beyond" in none.sentence


def test_fewer_claims_than_eta_are_called_no_claims():
    scores, bad = torch.randn(300).double(), torch.zeros(300, dtype=torch.bool)
    told = set()
    for seed in range(20):
        verified = draw_sample(300, 200, seed=seed)
        found = select(scores, verified, bad[verified], eta=6)
        if 0 < len(found) <= 6:
            told.add("no more can be said than that all may be right" in found.sentence)
        else:
            assert "all may be right" not in found.sentence
    assert told == {True}


def test_a_draw_by_score_is_noticed():
    scores, bad = world(0)
    worst = scores.topk(100).indices
    with pytest.warns(UserWarning, match="drawn at random"):
        select(scores, worst, bad[worst], eta=5)
    p_values = torch.tensor(
        [
            claim_curve(scores, d, bad[d], most=5).draw_p_value
            for d in (draw_sample(300, 100, seed=s) for s in range(200))
        ]
    )
    assert 0.01 < (p_values < 0.05).double().mean() < 0.1 and p_values.min() > 1e-4


def test_a_selection_of_thousands_takes_a_dozen_probabilities(monkeypatch):
    from headwater.numerics import batch_ranks

    asked, real = [], batch_ranks.rank_cdf
    monkeypatch.setattr(batch_ranks, "rank_cdf", lambda *a: asked.append(a) or real(*a))
    scores = torch.rand(2100, generator=torch.Generator().manual_seed(0))
    verified = draw_sample(2100, 2000)
    found = select(scores, verified, torch.zeros(2000, dtype=torch.bool), eta=3, alpha=0.1)
    assert math.isfinite(found.threshold) and 0 < len(asked) <= 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": None}, "Give eta"),
        ({"share": 0.1}, "Give eta"),
        ({"eta": -1}, "0 or more and below 6"),
        ({"eta": 6}, "0 or more and below 6"),
        ({"eta": None, "share": 1.0}, "between 0 and 1"),
        ({"eta": None, "share": math.nan}, "between 0 and 1"),
        ({"alpha": 1.0}, "between 0 and 1"),
        ({"verified": [0, 0, 1, 2]}, "verified twice"),
        ({"verified": [0, 1, 2, 10]}, "numbers from 0 to 9; got 0 to 10"),
        ({"verified": []}, "calibration score or more"),
        ({"verified": range(10)}, "test score or more"),
        ({"scores": [math.nan] + [0.0] * 9}, "1 of 10 scores are NaN"),
    ],
)
def test_what_means_nothing_is_refused(change, message):
    given = {"scores": list(range(10)), "verified": [0, 3, 5, 9], "eta": 1, "alpha": 0.1} | change
    scores = torch.tensor(given.pop("scores")).double()
    verified = torch.tensor(list(given.pop("verified"))).long()
    wrong = torch.zeros(len(verified), dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        select(scores, verified, wrong, **given)


def test_as_many_outcomes_as_verified_examples_are_needed():
    unchecked = inspect.unwrap(claims._checked)  # without the shape checks of the tests
    with pytest.raises(ValueError, match="each of 2 verified examples; got 1"):
        unchecked(torch.arange(9.0), torch.tensor([0, 1]), torch.tensor([True]), 0.1, "high")


def test_draws_are_random_and_repeatable():
    assert torch.equal(draw_sample(50, 10, seed=3), draw_sample(50, 10, seed=3))
    assert not torch.equal(draw_sample(50, 10, seed=3), draw_sample(50, 10, seed=4))
    with pytest.raises(ValueError, match="1 to 50 examples"):
        draw_sample(50, 51)


@pytest.mark.parametrize(
    ("alpha", "told"),
    [
        (0.05, "95 %"),
        (0.001, "99.9 %"),
        (0.123456, "87.6544 %"),
        (1e-9, "99.9999999 %"),
        (1e-11, "more than 99.99999999 %"),
        (1e-300, "more than 99.99999999 %"),
        (1 - 1e-12, "more than 0 %"),
    ],
)
def test_a_confidence_is_told_exactly_or_rounded_down(alpha, told):
    assert _confidence(alpha) == told


@pytest.mark.parametrize(
    ("share", "told"), [(0.1, "10 %"), (0.123456, "12.3456 %"), (1e-300, "0.00000001 %")]
)
def test_a_share_that_is_not_passed_is_told_exactly_or_rounded_up(share, told):
    assert _most(share) == told
