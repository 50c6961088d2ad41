import pytest
import torch
from torch import nn

from headwater.core.capture import sweep
from headwater.core.curvature import Dense, Diagonal, Dual, FitContext, Identity
from headwater.core.examples import TensorExamples
from headwater.core.fit import fit
from headwater.core.gradients import CollectGradients
from headwater.core.scaling import (
    Scale,
    ScaledCapture,
    exact_scale,
    scaled,
    separable_scale,
)
from headwater.core.target import Loss
from headwater.core.task import Classification
from tests.curvature_cases import case, dense_gauss_newton, loss_gradients


def grouped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)).double()
    data = TensorExamples(torch.randn(5, 2, 3, 3).double(), torch.arange(5) % 3)
    return fit(model, data, Classification(), curvature=Identity())


def a_fit(name: str):
    return grouped() if name == "grouped" else case(name).fit(Identity())


def side_by_side(fitted, scales) -> torch.Tensor:
    return torch.cat([scales[x.name].matrix.flatten() for x in fitted.followed])


def term(block: tuple[int, ...]) -> Scale:
    u, v = torch.rand(*block[:-1]).double() + 0.1, torch.rand(*block[:-2], block[-1]).double() + 0.1
    return Scale(u[None], v[None])


@pytest.mark.parametrize("name", ["mlp", "grouped", "positions", "norm", "lm"])
@pytest.mark.parametrize("exact", [True, False])
def test_rows_are_those_of_scaled_gradients(name, exact):
    fitted = a_fit(name)
    scales = {
        x.name: exact_scale(torch.rand(x.block).double() + 0.1) if exact else term(x.block)
        for x in fitted.followed
    }
    capture = ScaledCapture(fitted.capture(), scales).at("auto", fitted.train)
    collect = CollectGradients(capture.layers.values())
    sweep(capture, fitted.train, [collect], Loss(), batches=fitted.batches(fitted.train))
    gradients = loss_gradients(fitted)
    found = collect.finish()[0]
    expected = gradients * side_by_side(fitted, scales)
    torch.testing.assert_close(found.to_matrix(), expected)
    back = scaled(found, scales, inverse=True).to_matrix()
    torch.testing.assert_close(back, gradients)
    assert scaled(found, {}) is found


@pytest.mark.parametrize("method", [Dense(), Dual(cut=0.0), Diagonal(fisher="exact", cut=0.0)])
def test_curvature_is_that_of_scaled_coordinates(method):
    fitted = grouped()
    scales = {x.name: exact_scale(torch.rand(x.block).double() + 0.1) for x in fitted.followed}
    capture = ScaledCapture(fitted.capture(), scales)
    curvature = method.fit(FitContext(capture, fitted.train, fitted.batches(fitted.train)))
    S = side_by_side(fitted, scales)
    expected = S[:, None] * dense_gauss_newton(fitted) * S
    spectra = curvature.spectra()
    if isinstance(method, Diagonal):
        diagonal = torch.cat([spectra[x.name].flatten() for x in fitted.followed])
        torch.testing.assert_close(diagonal, expected.diagonal())
    else:
        found, values = spectra["all layers"], torch.linalg.eigvalsh(expected)
        torch.testing.assert_close(found.sort().values, values, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_separable_second_moment_is_scaled_exactly(lead):
    u, v = torch.rand(*lead, 3).double() + 0.1, torch.rand(*lead, 4).double() + 0.1
    moment = u[..., :, None] * v[..., None, :]
    torch.testing.assert_close(separable_scale(moment, 0.0).matrix, moment**-0.25)


def test_parameters_without_gradients_stay_finite():
    moment = torch.zeros(3, 4).double()
    assert bool(separable_scale(moment, 1e-8).matrix.isfinite().all())
    moment[1, 2] = 4.0
    assert float(separable_scale(moment, 1e-8).matrix[1, 2]) == pytest.approx(4.0**-0.25)
