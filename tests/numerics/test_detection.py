"""Areas under curves, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.detection import auroc, average_precision, detection_estimate

CASES = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12)


@given(CASES)
def test_auroc_is_the_share_of_pairs_in_the_right_order(case):
    values = torch.tensor([float(v) for v, _ in case])
    positive = torch.tensor([p for _, p in case])
    pairs = [(a, b) for a, p in case if p for b, q in case if not q]
    found = auroc(values, positive)
    if pairs:
        expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        assert float(found) == pytest.approx(expected)
    else:
        assert found.isnan()


@given(CASES)
def test_average_precision_walks_down_the_ranking_a_group_of_equals_at_a_time(case):
    positives = sum(p for _, p in case)
    area, seen, found = 0.0, 0, 0
    for level in sorted({v for v, _ in case}, reverse=True):
        group = [p for v, p in case if v == level]
        seen, found = seen + len(group), found + sum(group)
        area += sum(group) * found / seen  # the gain in recall times the precision
    values, positive = (torch.tensor([row[k] for row in case]) for k in range(2))
    got = average_precision(values.float(), positive.bool())
    assert float(got) == pytest.approx(area / positives) if positives else got.isnan()


def test_average_precision_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(20, (300,), generator=generator).double()
    positive = torch.rand(300, generator=generator) < 0.2
    expected = metrics.average_precision_score(positive.numpy(), values.numpy())
    assert float(average_precision(values, positive)) == pytest.approx(expected)
    expected = metrics.roc_auc_score(positive.numpy(), values.numpy())
    assert float(auroc(values, positive)) == pytest.approx(expected)


def test_an_interval_holds_the_value_and_narrows_with_more_examples():
    widths = []
    for n in (60, 600):
        positive = torch.arange(n) < n // 5
        values = torch.randn(n, generator=torch.Generator().manual_seed(1)) + positive.float()
        found = detection_estimate(auroc, values, positive, n_samples=200)
        assert found.low < found.value < found.high and found.n == n
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_what_has_no_area_is_refused():
    with pytest.raises(ValueError, match="got 3 positives of 3"):
        detection_estimate(auroc, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 values that are NaN"):
        detection_estimate(auroc, torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
