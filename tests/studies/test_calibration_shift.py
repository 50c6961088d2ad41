"""The study's shifts are what they are called, and its claims hold for one seed."""

import pytest
import torch

from studies import calibration_shift
from studies.calibration_shift import METHODS, SHIFTS, area, blurred, mean_of, shift, split, truth


def test_blur_keeps_even_images_inside_and_spreads_a_point():
    even = blurred(torch.ones(1, 64), 0.6).view(8, 8)
    torch.testing.assert_close(even[3:5, 3:5], torch.ones(2, 2), rtol=0, atol=1e-4)
    point = torch.zeros(1, 64)
    point[0, 27] = 1.0
    spread = blurred(point, 1.0).view(8, 8)
    assert float(spread.sum()) == pytest.approx(1, abs=5e-3)
    torch.testing.assert_close(spread, spread.T)
    assert spread.argmax() == 27


def test_parts_are_disjoint_and_hold_all_digits():
    parts = split(3)
    assert [len(x) for x, _ in parts] == [1000, 300, 497]
    labels = torch.cat([y for _, y in parts])
    assert len(labels) == 1797


def test_areas_and_means_are_those_of_their_names():
    assert area(torch.tensor([2.0, 3.0]), torch.tensor([1.0])) == 1.0
    row = {"none 1 ece": 9.0, "noise 1 ece": 1.0, "noise 2 ece": 3.0, "noise 1 nll": 7.0}
    assert mean_of(("noise",), "ece")(row) == 2.0


@pytest.mark.slow
def test_complexity_ranks_like_the_regret_of_refitted_models():
    found = truth(0, "early")
    best = found["IF-COMP at τ = 3"]["spearman"]
    assert best >= 0.5
    assert best > found["IF-COMP at τ = 1"]["spearman"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["early", "late"])
def test_hedging_is_better_calibrated_under_shift(recipe, monkeypatch):
    some = {k: METHODS[k] for k in ("softmax", "temperature scaling", "IF-COMP")}
    monkeypatch.setattr(calibration_shift, "METHODS", some)
    found = shift(0, recipe)
    plain, scaled, hedged = (mean_of(SHIFTS, "ece")(row) for row in found.values())
    assert hedged <= plain
    assert hedged <= scaled + 0.005
