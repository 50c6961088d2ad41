"""Conjugate gradients equal dense solves, system by system."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.linear_operator import conjugate_gradients, lanczos, neumann_series


def positive(dim: int, condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(dim, dim, generator=generator).double())[0]
    return (Q * torch.logspace(0, torch.tensor(condition).log10(), dim).double()) @ Q.mT


@given(dim=st.integers(1, 12), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_solves_several_systems_at_once(dim, n, seed):
    A = positive(dim, 100.0, seed)
    b = torch.randn(n, dim).double() * torch.logspace(-3, 3, n).double()[:, None]
    found = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b.mT).mT, rtol=1e-7, atol=1e-12)
    assert bool((found.residual <= 1e-10).all())
    actual = (b - found.x @ A).norm(dim=1) / b.norm(dim=1)
    assert bool((actual < 1e-8).all())  # the recurrence of the residual drifts by rounding only


def test_each_system_stops_by_itself_and_zero_stays_zero():
    A = positive(8, 50.0)
    b = torch.stack(
        [torch.zeros(8).double(), torch.linalg.eigh(A)[1][:, 0], torch.randn(8).double()]
    )
    found = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-12)
    assert not bool(found.x[0].any()) and bool(found.x.isfinite().all())
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b.mT).mT)


def test_a_good_preconditioner_saves_steps_and_an_exact_one_needs_a_single_step():
    A = positive(40, 1e4)
    b = torch.randn(2, 40).double()
    plain = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-8)
    inverse = torch.linalg.inv(A)
    near = inverse + 1e-6 * torch.eye(40).double()
    helped = conjugate_gradients(
        lambda v: v @ A, b, precondition=lambda v: v @ near, tolerance=1e-8
    )
    exact = conjugate_gradients(
        lambda v: v @ A, b, precondition=lambda v: v @ inverse, tolerance=1e-8
    )
    assert exact.steps <= 2 and helped.steps < plain.steps
    torch.testing.assert_close(helped.x, b @ inverse, rtol=1e-5, atol=1e-8)


def test_goes_on_from_a_first_guess_and_reports_progress():
    A, b, seen = positive(10, 20.0), torch.randn(1, 10).double(), []
    first = conjugate_gradients(lambda v: v @ A, b, steps=3)
    rest = conjugate_gradients(
        lambda v: v @ A, b, start=first.x, tolerance=1e-9, progress=lambda *step: seen.append(step)
    )
    torch.testing.assert_close(rest.x, torch.linalg.solve(A, b.mT).mT)
    assert [s for s, _ in seen] == list(range(1, rest.steps + 1)) and seen[-1][1] <= 1e-9
    assert first.steps == 3 and float(first.residual) > 1e-9


def test_an_indefinite_matrix_ends_without_overflow():
    A = torch.diag(torch.tensor([1.0, -1.0, 0.0]).double())
    found = conjugate_gradients(lambda v: v @ A, torch.ones(2, 3).double())
    assert bool(found.x.isfinite().all()) and float(found.residual.min()) > 1e-3


def test_steps_bound_the_products():
    calls = []
    A = positive(30, 1e6)
    found = conjugate_gradients(
        lambda v: calls.append(1) or v @ A, torch.randn(1, 30).double(), steps=5, tolerance=1e-15
    )
    assert found.steps == len(calls) == 5


def test_the_residual_is_relative_to_the_right_hand_side():
    A, b = torch.eye(2).double() * 2, torch.tensor([[3.0, 4.0]]).double()
    found = conjugate_gradients(lambda v: v @ A, b, steps=0)
    assert float(found.residual) == pytest.approx(1.0)


def symmetric(dim, seed=0):
    x = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)).double()
    return (x + x.mT) / 2


def test_lanczos_finds_all_eigenpairs_of_a_small_matrix():
    A = symmetric(12)
    start = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).double()
    values, vectors = lanczos(lambda v: v @ A, start)
    expected = torch.linalg.eigvalsh(A)
    expected = expected[expected.abs().argsort(descending=True)]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(vectors @ A, values[:, None] * vectors)
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(12).double())


def test_lanczos_finds_the_largest_eigenpairs_first():
    Q = torch.linalg.qr(symmetric(60)).Q
    spectrum = torch.cat([torch.tensor([9.0, -7.0, 5.0]), torch.linspace(-1, 1, 57)]).double()
    A = Q @ torch.diag(spectrum) @ Q.mT
    start = torch.randn(1, 60, generator=torch.Generator().manual_seed(1)).double()
    values, vectors = lanczos(lambda v: v @ A, start, steps=25)
    assert len(values) == 25
    torch.testing.assert_close(values[:3], spectrum[:3], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        vectors[:3] @ A, values[:3, None] * vectors[:3], atol=1e-5, rtol=1e-5
    )


def test_lanczos_stops_where_the_matrix_has_lower_rank():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).double()
    A, n_products = x.mT @ x, []
    start = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)).double()
    values, _ = lanczos(lambda v: (n_products.append(1), v @ A)[1], start)
    assert len(n_products) <= 6  # the range, and the part of the start outside it
    torch.testing.assert_close(values[:4], torch.linalg.eigvalsh(A)[-4:].flip(0))


def test_the_neumann_series_solves_and_notices_when_it_cannot():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    A = x @ x.mT + torch.eye(8).double()
    b = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
    top = float(torch.linalg.eigvalsh(A)[-1])
    found = neumann_series([lambda v: v @ A] * 2000, b, scale=top)
    assert not found.diverged and found.steps == 2000
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b.mT).mT)
    diverging = neumann_series([lambda v: v @ A] * 2000, b, scale=top / 2.5)
    assert diverging.diverged and diverging.steps < 200
