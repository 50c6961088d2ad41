import pytest

from headwater.core.capture import BatchPlan
from headwater.core.plan.clock import Clock
from headwater.core.task import Classification
from tests.plan_cases import followed, images, mlp


def test_work_that_grows_with_positions_is_extrapolated_by_them():
    data = images(64)
    capture = followed(mlp(20, 4), data, Classification())
    batches = [BatchPlan(tuple(range(i, i + 16)), 0) for i in range(0, 64, 16)]
    clock = Clock(capture, data, batches)
    # 10 ms a batch and 1 ms an example: 4 * 10 + 64 ms in all.
    told = clock.all_data(lambda some: sum(0.010 + 0.001 * len(b.indices) for b in some))
    assert told == pytest.approx(0.104)
    clock.limit = 0.02  # too little for a whole batch, so parts of one tell
    told = clock.all_data(lambda some: sum(0.010 + 0.001 * len(b.indices) for b in some))
    assert told == pytest.approx(0.104)
