"""The explicit inverse equals the dense matrix from whole Jacobians, and the Hessian by double backward."""

import pytest
import torch

from headwater.core.curvature import Dense, Identity
from headwater.trace import Explicit, Influence
from tests.curvature_cases import EVERY, dense_gauss_newton, shared
from tests.method_cases import damped_inverse, dense_hessian, influence

RHO = 0.05


@pytest.mark.parametrize("name", EVERY)
def test_explicit_equals_the_dense_gauss_newton_matrix(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    expected = influence(fitted, found.query, damped_inverse(dense_gauss_newton(fitted), RHO))
    scores = Explicit(damping=RHO).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    dense = Influence(damping=RHO, n_intervals=0).attribute(found.fitted(Dense()), found.query)
    torch.testing.assert_close(scores.values, dense.values, rtol=1e-3, atol=1e-5)  # labels cut
    assert scores.unit == "nats"


@pytest.mark.parametrize("name", ["mlp", "norm", "conv"])
def test_explicit_with_the_hessian(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    H = dense_hessian(fitted)
    torch.testing.assert_close(Explicit(matrix="hessian").form(fitted), H)
    rho = 0.1 - float(torch.linalg.eigvalsh(H)[0])
    expected = influence(fitted, found.query, damped_inverse(H, rho))
    scores = Explicit(matrix="hessian", damping=rho).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="not at a minimum"):
        Explicit(matrix="hessian", damping=1e-4).attribute(fitted, found.query)


def test_explicit_refuses_large_models():
    found = shared("mlp")
    with pytest.raises(ValueError, match=r"at most 10 followed parameters; this one has 53"):
        Explicit(max_parameters=10).attribute(found.fitted(Identity()), found.query)
