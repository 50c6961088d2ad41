"""Dynamic programs over ranks, held to the best of all rank vectors."""

import math
from itertools import combinations_with_replacement

import pytest
import torch

from headwater.numerics import rank_budget
from headwater.numerics.rank_budget import greatest_composed, greatest_sum, majorant_at


def instance(seed, *, ties=False):
    """Sorted scores, a batch size and a budget, edges of the budget among them."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 7, (), generator=generator))
    m = int(torch.randint(1, 5, (), generator=generator))
    values = torch.randn(n + 1, generator=generator, dtype=torch.float64)
    values = values.round() if ties else values
    budget = (0, n * m, int(torch.randint(0, n * m + 1, (), generator=generator)))[seed % 3]
    return values.sort().values, m, budget


def allowed(n_ranks, m, costs, budget):
    """Non-decreasing vectors of ranks, from 0, within the budget."""
    return [
        v
        for v in combinations_with_replacement(range(n_ranks), m)
        if sum(costs[k][r] for k, r in enumerate(v)) <= budget
    ]


@pytest.mark.parametrize("ties", [False, True])
def test_the_greatest_sum_is_that_of_brute_force(ties):
    for seed in range(200):
        values, m, budget = instance(seed, ties=ties)
        costs = [list(range(len(values)))] * m
        best = max(sum(values[r].item() for r in v) for v in allowed(len(values), m, costs, budget))
        found, ranks = greatest_sum(values, m, budget)
        assert found == pytest.approx(best, abs=1e-12)
        assert int((ranks - 1).sum()) <= budget
        assert values[ranks - 1].sum().item() == pytest.approx(best, abs=1e-12)


def test_the_majorant_is_above_the_greatest_mean_by_less_than_a_step():
    for seed in range(200):
        values, m, budget = instance(seed)
        exact = greatest_sum(values, m, budget)[0] / m
        bound = majorant_at(values, budget / m)
        span = float(values[-1] - values[0])
        assert exact - 1e-12 <= bound <= exact + span / m + 1e-12


GAMMAS = {
    "sum": (lambda k, so_far, s: so_far + s, 0.0),
    "max": (lambda k, so_far, s: so_far.maximum(s), -math.inf),
    "second half": (lambda k, so_far, s: so_far + s * (k > 1), 0.0),
    "discounted": (lambda k, so_far, s: so_far / (k + 1) + s.exp(), 0.5),
    "worst but one": (lambda k, so_far, s: so_far.maximum(s) if k < 3 else so_far + 0.1 * s, -9.0),
}


@pytest.mark.parametrize("name", GAMMAS)
def test_the_greatest_composed_score_is_that_of_brute_force(name):
    step, start = GAMMAS[name]
    for seed in range(60):
        values, m, budget = instance(seed)
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(0, 3, (m, len(values)), generator=generator)
        costs = steps.cumsum(1) - steps[:, :1] * (seed % 2)
        rows = costs.tolist()

        def score(v, values=values):
            found = torch.tensor(start, dtype=torch.float64)
            for k, r in enumerate(v, start=1):
                found = step(k, found, values[r])
            return found.item()

        best = max(map(score, allowed(len(values), m, rows, budget)), default=-math.inf)
        found, ranks = greatest_composed(step, values, costs, budget, start)
        assert found == pytest.approx(best, abs=1e-12)
        if best > -math.inf:
            places = (ranks - 1).tolist()
            assert places == sorted(places) and score(places) == pytest.approx(best, abs=1e-12)
            assert sum(rows[k][r] for k, r in enumerate(places)) <= budget


def test_a_sum_is_the_same_by_both_programs():
    values = torch.randn(40, dtype=torch.float64).sort().values
    costs = torch.arange(40).expand(8, -1)
    step, start = GAMMAS["sum"]
    assert greatest_composed(step, values, costs, 150, start)[0] == pytest.approx(
        greatest_sum(values, 8, 150)[0], abs=1e-12
    )


def test_a_table_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(rank_budget, "_STATES", 10)
    with pytest.raises(MemoryError, match="give coarser costs"):
        greatest_composed(GAMMAS["sum"][0], torch.arange(5.0), torch.arange(5).expand(3, -1), 6)
