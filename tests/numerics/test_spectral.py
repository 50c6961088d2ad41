import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics import spectral


def covariance(*shape, rank=None):
    x = torch.randn(*shape[:-1], rank or shape[-1], shape[-1], dtype=torch.float64)
    return x.mT @ x


def assert_decomposes(matrix, values, vectors):
    dim = matrix.shape[-1]
    torch.testing.assert_close(vectors * values[..., None, :] @ vectors.mT, matrix.double())
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(dim).double().expand_as(vectors))
    assert bool((values[..., 1:] >= values[..., :-1]).all()) and bool((values >= 0).all())


@given(dim=st.integers(1, 8), rank=st.integers(1, 8), lead=st.sampled_from([(), (3,)]))
def test_the_parts_make_the_matrix_again(dim, rank, lead):
    torch.manual_seed(0)
    matrix = covariance(*lead, dim, rank=min(rank, dim))
    assert_decomposes(matrix, *spectral.eigh(matrix))


def test_float32_is_decomposed_in_float64():
    matrix = covariance(6).float()
    values, vectors = spectral.eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float64
    assert_decomposes(matrix, values, vectors)


def test_a_matrix_that_is_symmetric_but_for_rounding_is_taken_as_symmetric():
    matrix = covariance(6)
    crooked = matrix + 1e-3 * (skew := torch.randn(6, 6).double().triu(1)) - 1e-3 * skew.mT
    torch.testing.assert_close(spectral.eigh(crooked)[0], spectral.eigh(matrix)[0])


def failing(times, monkeypatch):
    eigh, calls = torch.linalg.eigh, []

    def fails(matrix):
        calls.append(matrix)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    return calls


def test_a_first_failure_is_met_with_a_small_diagonal(monkeypatch):
    matrix = covariance(2, 5)
    calls = failing(1, monkeypatch)
    values, vectors = spectral.eigh(matrix)
    assert len(calls) == 2
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = (calls[1] - calls[0]).diagonal(dim1=-2, dim2=-1)
    # The sum with entries near 10 keeps 1e-15 of the 1e-10 that is added.
    torch.testing.assert_close(added, (1e-10 * mean)[:, None].expand(2, 5), rtol=1e-3, atol=0)
    assert_decomposes(matrix, values, vectors)


def test_a_second_failure_is_met_with_singular_vectors_and_a_warning(monkeypatch):
    matrix = covariance(2, 5, rank=3)
    failing(2, monkeypatch)
    with pytest.warns(UserWarning, match="did not converge"):
        values, vectors = spectral.eigh(matrix)
    assert_decomposes(matrix, values, vectors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        spectral.eigh(matrix)
