"""LiSSA converges to the damped inverse where it should, and says so where it does not."""

import warnings

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.trace import LiSSA
from tests.curvature_cases import dense_gauss_newton, shared
from tests.method_cases import damped_inverse, influence

RHO = 0.05


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_lissa_over_all_data_converges_to_the_damped_inverse(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    expected = influence(fitted, found.query, damped_inverse(dense_gauss_newton(fitted), 0.3))
    method = LiSSA(damping=0.3, steps=150, n_samples=None, tolerance=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scores = method.attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-3, atol=1e-5)
    assert scores.facts["residual"] < 1e-4


def test_lissa_over_samples_comes_near_and_nearer_with_repeats():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    exact = influence(fitted, found.query, damped_inverse(dense_gauss_newton(fitted), 0.3))
    errors = []
    for repeats in (1, 8):
        method = LiSSA(damping=0.3, steps=25, n_samples=6, repeats=repeats, tolerance=9.0)
        values = method.attribute(fitted, found.query).values.double()
        errors.append(float((values - exact).norm() / exact.norm()))
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.15


def test_lissa_refuses_to_diverge_and_warns_of_a_series_cut_short():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    with pytest.raises(FloatingPointError, match=r"diverges under scale=0.1"):
        LiSSA(damping=RHO, scale=0.1, n_samples=None).attribute(fitted, found.query)
    with pytest.warns(UserWarning, match="stopped after 3 terms"):
        LiSSA(damping=RHO, steps=3).attribute(fitted, found.query)


def test_lissa_raises_its_own_scale_where_single_examples_are_stiffer():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    method = LiSSA(damping=RHO, steps=40, n_samples=1, tolerance=1e9)
    assert bool(method.attribute(fitted, found.query).values.isfinite().all())


@pytest.mark.parametrize("options", [{"steps": 0}, {"repeats": 0}])
def test_lissa_needs_a_term_and_a_series(options):
    with pytest.raises(ValueError, match="must be 1 or more"):
        LiSSA(**options)
