"""The dense matrix equals JᵀHJ from whole Jacobians."""

import pytest
import torch

from headwater.core.curvature import Dense, DenseCurvature
from headwater.core.gradients import Gradients
from tests.curvature_cases import EVERY, blocks_of, case, dense_gauss_newton, shared


@pytest.mark.parametrize("name", EVERY)
def test_equals_the_gauss_newton_matrix_from_jacobians(name):
    fitted = shared(name).fitted(Dense())
    torch.testing.assert_close(
        fitted.curvature.matrix, dense_gauss_newton(fitted), rtol=1e-9, atol=1e-11
    )


def test_block_diagonal_keeps_the_blocks_of_the_layers():
    fitted = shared("mlp").fitted(Dense(block_diagonal=True))
    expected = torch.block_diag(*blocks_of(dense_gauss_newton(fitted), fitted).values())
    torch.testing.assert_close(fitted.curvature.matrix, expected, rtol=1e-9, atol=1e-11)


def test_functions_are_matrix_functions_and_quadratics_their_forms():
    fitted = shared("mlp").fitted(Dense())
    x = Gradients({layer.name: torch.randn(2, *layer.block).double() for layer in fitted.followed})
    expected = x.to_matrix() @ torch.matrix_exp(-fitted.curvature.matrix)
    applied = fitted.curvature.apply(x, lambda e, mean: (-e).exp())
    torch.testing.assert_close(applied.to_matrix(), expected, rtol=1e-9, atol=1e-11)
    own = fitted.curvature.quadratic(x, lambda e, mean: (-e).exp())
    torch.testing.assert_close(own, (x.to_matrix() * expected).sum(1), rtol=1e-9, atol=1e-11)


def test_comes_back_from_its_tensors():
    curvature = shared("mlp").fitted(Dense()).curvature
    again = DenseCurvature.from_tensors(curvature.tensors(), {})
    assert torch.equal(again.matrix, curvature.matrix) and again.n_examples == 18
    assert curvature.replicates() == () and curvature.n_replicates == 0


def test_large_models_are_refused_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"at most 50 followed parameters.*53.*EKFAC\(\) or Dual\(\)"
    ):
        case("mlp").fit(Dense(max_parameters=50))
