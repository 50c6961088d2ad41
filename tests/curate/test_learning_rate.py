"""The schedule is the formula, and a bad one is mended."""

import math

import pytest
import torch

from headwater.curate import ESSingle, LearningRate, Unrolled, inverse_time_rate, schedule_problem
from tests.curate.test_data_weights import blobs, make


@pytest.mark.parametrize("t", [0, 7, 200])
def test_the_rate_is_the_formula(t):
    meta = {"log_lr": torch.tensor(-1.0).double(), "log_decay": torch.tensor(0.4).double()}
    expected = math.exp(-1) / (1 + t / 50) ** math.exp(0.4)
    assert inverse_time_rate(meta, t, decay_steps=50.0).item() == pytest.approx(expected)


def test_training_without_validation_data_is_judged_by_the_next_batch():
    x, y = blobs(40, 0)
    problem = schedule_problem(make, (x, y), steps=4, batch_size=10)
    now, following = (problem.batch(3, t) for t in (0, 1))
    assert torch.equal(now[1][0], following[0][0]) and not torch.equal(now[0][0], now[1][0])
    judged = schedule_problem(make, (x, y), validation=blobs(9, 1), steps=4)
    assert torch.equal(judged.batch(3, 0)[1][0], blobs(9, 1)[0])


@pytest.mark.parametrize(
    "estimator", [Unrolled(), ESSingle(n_particles=8, truncation=5)], ids=["unrolled", "ES-Single"]
)
def test_a_rate_far_too_small_is_raised(estimator):
    train, validation = blobs(200, 0), blobs(100, 1)
    n = 40 if isinstance(estimator, Unrolled) else 100
    method = LearningRate(
        estimator=estimator, lr=0.002, decay=1.0, steps=20, outer_steps=n, outer_lr=0.1
    )
    learned = method.learn(make, train, validation=validation)
    problem = schedule_problem(make, train, validation=validation, steps=20)
    before = problem.retrain({"log_lr": torch.tensor(0.002).log(), "log_decay": torch.tensor(0.0)})[
        1
    ]
    assert learned.retrained[0] < 0.6 * before
    assert learned.meta["log_lr"] > math.log(0.02)
