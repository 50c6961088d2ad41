"""Closed forms of implicit bias against the iterations they replace."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.implicit_bias import (
    closest_solution,
    neumann_filter,
    project_onto_example,
)


@given(s=st.floats(0, 1.9), terms=st.integers(0, 40))
def test_the_filter_is_the_sum_of_the_terms(s, terms):
    summed = sum((1 - s) ** j for j in range(terms + 1))
    found = neumann_filter(torch.tensor([s], dtype=torch.float64), lr=1.0, terms=terms).item()
    assert abs(found - summed) <= 1e-13 * max(1, summed)  # rounding of up to 41 terms


def test_the_filter_tends_to_the_inverse_and_is_the_horizon_in_flat_directions():
    s = torch.tensor([0.0, 1e-4, 0.5, 1.5]).double()
    found = neumann_filter(s, lr=1.0, terms=99)
    torch.testing.assert_close(found[2:], 1 / s[2:])
    assert found[0] == 100.0 and 99 < found[1] < 100  # damped far below 10,000


@given(seed=st.integers(0, 30), n=st.integers(1, 5))
def test_the_closest_solution_fits_and_no_other_solution_is_closer(seed, n):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 8, generator=generator).double()
    y, start, other = (torch.randn(k, generator=generator).double() for k in (n, 8, 8))
    w = closest_solution(X, y, start)
    torch.testing.assert_close(X @ w, y, rtol=1e-8, atol=1e-8)
    another = closest_solution(X, y, other)
    assert (w - start).norm() <= (another - start).norm() + 1e-9
    if n == 1:
        torch.testing.assert_close(w, project_onto_example(start, X[0], y[0]))
