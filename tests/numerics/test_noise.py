import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headwater.numerics import noise

FROZEN_KEYS = [8493733112532773764, 8011640889333105901, -8218377507933086173]
FROZEN_UNIFORM = [
    ["0x1.9d0edef6f480dp-1", "0x1.9ab18e90be3c6p-2"],
    ["0x1.48d0a1cb5634dp-1", "0x1.3639cfdd676f6p-2"],
    ["0x1.3346de7266aa1p-1", "0x1.b569a80a9ac76p-2"],
]


def uniforms(key, counter, seed):
    key, counter = torch.broadcast_tensors(torch.as_tensor(key), torch.as_tensor(counter))
    return noise.uniform(key, counter, seed)


def test_draws_are_the_same_on_every_machine():
    keys = noise.keys(["0", "train/17", "ünïcode"])
    assert keys.tolist() == FROZEN_KEYS
    drawn = uniforms(keys[:, None], [0, 1], seed=3)
    # Integer arithmetic and one exact scaling: equal bits, not merely close.
    assert [[x.hex() for x in row] for row in drawn.tolist()] == FROZEN_UNIFORM


@pytest.mark.parametrize("axis", ["keys", "counters", "seeds", "named keys"])
def test_draws_are_uniform_along_every_axis(axis):
    n = 20_000
    index = torch.arange(n)
    drawn = {
        "keys": lambda: uniforms(index, 0, 0),
        "counters": lambda: uniforms(7, index, 0),
        "seeds": lambda: torch.cat([uniforms([7], 0, s) for s in range(2000)]),
        "named keys": lambda: uniforms(noise.keys(map(str, range(n))), 3, 1),
    }[axis]()
    # A true generator falls below this one time in ten thousand, and the draws are fixed.
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    "other",
    [lambda i: (i, 1, 0), lambda i: (i, 0, 1), lambda i: (i + 1, 0, 0), lambda i: (-i, 0, 0)],
)
def test_draws_of_other_counters_seeds_and_keys_are_independent(other):
    index = torch.arange(1, 20_001)
    x, y = uniforms(index, 0, 0), uniforms(*other(index))
    # The correlation of independent draws has a standard deviation of 1 / √20000 = 0.007.
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.03
    counts = torch.histogramdd(torch.stack([x, y], 1), [8, 8], range=[0.0, 1, 0, 1]).hist
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-4


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**31))
def test_a_draw_lies_strictly_between_zero_and_one(key, counter, seed):
    assert 0 < float(uniforms([key], [counter], seed)) < 1


def test_the_largest_hash_does_not_round_up_to_one(monkeypatch):
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, -1))
    assert float(uniforms([1], [1], 0)) < 1
    monkeypatch.setattr(noise, "_mix", torch.zeros_like)
    assert float(uniforms([1], [1], 0)) > 0


def test_normal_draws_are_standard_normal_and_independent():
    index = torch.arange(20_000)
    x, y = (
        noise.normal(index, torch.zeros_like(index), 0),
        noise.normal(index, torch.ones_like(index), 0),
    )
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-4
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.03  # as above


def test_keys_of_different_names_differ():
    keys = noise.keys(f"example {i}" for i in range(100_000))
    assert keys.unique().numel() == 100_000
