"""Arnoldi influence equals the inverse on leading eigenvectors of dense matrices."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.trace import Arnoldi
from headwater.trace.arnoldi import subspace_influence
from tests.curvature_cases import EVERY, dense_gauss_newton, loss_gradients, shared
from tests.method_cases import dense_hessian, influence


@pytest.mark.parametrize("name", EVERY)
def test_arnoldi_of_full_rank_is_the_pseudoinverse(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    C = dense_gauss_newton(fitted)
    expected = influence(fitted, found.query, torch.linalg.pinv(C, rtol=1e-4, hermitian=True))
    scores = Arnoldi(rank=1000, steps=1000, least=1e-4).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
def test_arnoldi_keeps_the_leading_eigenvectors(matrix):
    found = shared("mlp")
    fitted = found.fitted(Identity())
    C = dense_gauss_newton(fitted) if matrix == "gauss_newton" else dense_hessian(fitted)
    values, vectors = torch.linalg.eigh(C)
    leading = values.abs().argsort(descending=True)[:5]
    values, basis = values[leading], vectors[:, leading]
    x, y = loss_gradients(fitted, found.query), loss_gradients(fitted)
    expected = subspace_influence(x @ basis, basis.mT @ y.mT, values)
    scores = Arnoldi(rank=5, steps=60, matrix=matrix).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-4, atol=1e-5)
    assert scores.facts["kept"] == 5


def test_arnoldi_over_some_examples_and_settings_that_make_no_sense():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    some = Arnoldi(rank=4, steps=40, n_examples=9, seed=2)
    values, vectors = some.eigenpairs(fitted)
    drawn = torch.randperm(18, generator=torch.Generator().manual_seed(2))[:9]
    part = type(found)(found.model, found.task, found.train.subset(drawn.tolist()), found.query)
    C = dense_gauss_newton(part.fit(Identity()))
    torch.testing.assert_close(vectors @ C, values[:, None] * vectors, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="rank from 1"):
        Arnoldi(rank=10, steps=5)
