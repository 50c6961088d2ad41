"""Calibration measures equal sums written out, and stay within their bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.calibration import (
    brier_scores,
    expected_calibration_error,
    log_losses,
    reliability,
)


def drawn(seed, n=101, classes=4):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(n, classes, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    return p, torch.randint(classes, (n,), generator=generator)


def test_the_error_of_equal_mass_is_the_sum_written_out():
    p, y = drawn(0)
    confidence, predicted = p.max(1)
    rows = sorted(zip(confidence.tolist(), (predicted == y).tolist(), strict=True))
    total, start = 0.0, 0
    for size in [6] + [5] * 19:  # 101 examples in 20 bins: the first holds one more
        part = rows[start : start + size]
        start += size
        mean = sum(c for c, _ in part) / size
        total += size / 101 * abs(sum(r for _, r in part) / size - mean)
    assert expected_calibration_error(p, y, n_bins=20) == pytest.approx(total, abs=1e-12)


def test_the_error_of_equal_width_is_the_sum_written_out():
    p, y = drawn(1)
    confidence, predicted = p.max(1)
    total = 0.0
    for b in range(10):
        inside = (confidence >= b / 10) & (confidence < (b + 1) / 10)
        if inside.any():
            gap = (predicted == y)[inside].double().mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    found = expected_calibration_error(p, y, n_bins=10, bins="width")
    assert found == pytest.approx(total, abs=1e-12)


@given(seed=st.integers(0, 50), n=st.integers(1, 60), n_bins=st.integers(1, 30))
def test_bins_hold_every_example_once_and_the_error_is_bounded(seed, n, n_bins):
    p, y = drawn(seed, n)
    confidence, predicted = p.max(1)
    for bins in ("mass", "width"):
        found = reliability(confidence, predicted == y, n_bins=n_bins, bins=bins)
        assert int(found.count.sum()) == n
        assert bool((found.count > 0).all())
        assert abs(found.overconfidence) <= found.error + 1e-12 <= found.greatest + 2e-12
        assert found.greatest <= 1


def test_probabilities_that_are_true_have_little_error():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200_000, 3, generator=generator, dtype=torch.float64).softmax(1)
    y = torch.multinomial(p, 1, generator=generator)[:, 0]
    # Each of 20 bins of 10,000 has a standard error below 0.005.
    assert expected_calibration_error(p, y) < 0.008
    assert expected_calibration_error((p.log() * 4).softmax(1), y) > 0.2


def test_losses_and_brier_scores_are_those_of_their_formulas():
    p, y = drawn(2)
    hot = torch.nn.functional.one_hot(y, 4).double()
    torch.testing.assert_close(brier_scores(p, y), (p - hot).square().sum(1))
    torch.testing.assert_close(log_losses(p, y), -(p.log() * hot).sum(1))


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="not logits"):
        reliability(torch.tensor([3.0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="0 examples"):
        reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
