"""Ranks, soft ranks and components."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.degeneracy import (
    agreement,
    connected_components,
    effective_dimension,
    participation_ratio,
    rank,
    rank_tolerance,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 20])
def test_rounding_is_not_taken_for_rank(dtype, r):
    g = torch.Generator().manual_seed(r)
    W = torch.randn(r, 40, generator=g, dtype=torch.float64)
    x = (torch.randn(500, r, generator=g, dtype=torch.float64).to(dtype) @ W.to(dtype)).double()
    values = torch.linalg.eigvalsh(x.mT @ x / 500)
    assert int(rank(values, rank_tolerance(40, dtype))) == r


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_soft_ranks_lie_between_nothing_and_the_rank(values, tau):
    d = torch.tensor(values, dtype=torch.float64)
    n = int((d > 0).sum())
    assert 0 <= float(effective_dimension(d, tau)) <= n
    assert float(participation_ratio(d)) <= n + 1e-9
    assert float(effective_dimension(d, tau)) >= float(effective_dimension(d, 2 * tau))


def test_groups_are_counted_one_by_one():
    values = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert rank(values).tolist() == [2, 0] and participation_ratio(values)[1] == 0


def test_agreement_counts_both_on_and_both_off():
    fires = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1.0]]).double()
    found = agreement(fires.mT @ fires, 4)
    same = (fires[:, :, None] == fires[:, None, :]).double().mean(0)
    torch.testing.assert_close(found, same)


def test_chains_are_one_component():
    linked = torch.eye(5).bool()
    for i, j in ((0, 3), (3, 4)):
        linked[i, j] = linked[j, i] = True
    assert connected_components(linked).tolist() == [0, 1, 2, 0, 0]
