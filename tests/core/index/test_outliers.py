"""Outliers: the stated rate on clean rows, planted ones found, each told once."""

import warnings

import pytest
import torch
from torch import nn

from headwater.core.fit import fit
from headwater.core.index import LiveIndex, LoGra, Outliers
from headwater.core.index.outliers import SelfInfluence, Watch, far_out
from headwater.core.task import Classification
from headwater.data.images import digits
from headwater.models.vision import mlp


def rate_of(draw, rate, n=40_000):
    watch = Watch(Outliers(rate=rate, most=0))
    for start in range(0, n, 100):
        watch.update([f"{start + i}" for i in range(100)], start, "loss", draw(100).exp())
    return watch.flagged / watch.judged


def test_normal_logarithms_are_flagged_at_the_stated_rate():
    # two tests at half the rate each, of which most that one flags the other does too
    assert 0.005 < rate_of(torch.randn, 0.01) < 0.0125


@pytest.mark.parametrize("shape", [lambda x: -x.abs(), lambda x: x.abs().sqrt(), torch.sigmoid])
def test_other_light_tails_are_flagged_at_the_stated_rate_at_most(shape):
    assert 0.003 < rate_of(lambda n: shape(torch.randn(n)), 0.01) < 0.0125


def test_a_tight_bulk_shows_all_outliers_however_many():
    window = torch.cat([torch.randn(900) / 10, torch.full((100,), 3.0)])
    assert far_out(torch.full((5,), 3.0), window, 0.01).all()
    assert not far_out(torch.randn(50) / 10, window, 1e-6).any()


def test_rows_all_alike_are_no_outliers():
    assert not far_out(torch.ones(5), torch.ones(300), 0.001).any()


def test_each_example_is_told_once_and_warnings_end():
    watch = Watch(Outliers(least=200, most=2))
    watch.update([f"c{i}" for i in range(300)], 0, "loss", torch.randn(300).exp())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in (1, 2):
            watch.update(["a", "b", "c"], step, "loss", torch.full((3,), 1e9))
    assert [o.id for o in watch.found] == ["a", "b", "c"] and {o.step for o in watch.found} == {1}
    assert len(told) == 2
    assert "'a' stands out at step 1: its loss is" in str(told[0].message)
    assert "No more of these warnings" in str(told[1].message)


def test_self_influence_is_that_of_the_damped_second_moment():
    rows = torch.randn(500, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    measure = SelfInfluence({"a": 4, "b": 3}, window=500)
    measure(rows)
    expected = 0.0
    for part in rows.split([4, 3], 1):
        F = part.mT @ part / 500
        damped = F + 0.1 * F.trace() / len(F) * torch.eye(len(F))
        expected = expected + (part @ damped.inverse() * part).sum(1)
    torch.testing.assert_close(measure(rows), expected)


def watched(share, *, told, rate=0.01, epochs=4):
    """A run on real digits of which a share is labelled wrongly, and the ids of those."""
    x, y = digits().tensors
    wrong = torch.randperm(len(y))[: round(share * len(y))]
    y = y.index_put((wrong,), (y[wrong] + torch.randint(1, 10, (len(wrong),))) % 10)
    model = mlp([64, 64, 10])
    fitted = fit(model, (x, y), Classification(), curvature="identity")
    return model, fitted, (x, y), {str(i) for i in wrong.tolist()}, rate, told, epochs


def run(folder, share, **options):
    model, fitted, (x, y), wrong, rate, told, epochs = watched(share, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    kind, outliers = LoGra(rank=8), Outliers(rate=rate, most=0)
    with LiveIndex(fitted, folder, kind=kind, optimizer=optimizer, outliers=outliers) as live:
        for _ in range(epochs):
            for some in torch.randperm(len(y)).split(32):
                optimizer.zero_grad()
                with live.step(some) as step:
                    losses = nn.functional.cross_entropy(model(x[some]), y[some], reduction="none")
                    if told:
                        step.follow(losses)
                    losses.mean().backward()
                optimizer.step()
    return live, wrong


@pytest.mark.parametrize("told", [True, False])
def test_mislabelled_digits_are_among_those_warned_of(tmp_path, told):
    live, wrong = run(tmp_path, 0.03, told=told)
    warned = {outlier.id for outlier in live.outliers}
    precision, recall = len(warned & wrong) / len(warned), len(warned & wrong) / len(wrong)
    print(f"told={told}: precision {precision:.2f}, recall {recall:.2f}, {len(warned)} warned of")
    assert precision > 0.6 and recall > 0.3


@pytest.mark.parametrize("told", [True, False])
def test_clean_digits_are_warned_of_at_about_the_stated_rate(tmp_path, told):
    live, _ = run(tmp_path, 0.0, told=told)
    print(f"told={told}: flagged {live.flagged:.4f}")
    assert 0.002 < live.flagged < 0.02
