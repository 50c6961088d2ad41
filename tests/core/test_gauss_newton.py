"""Products with the exact Gauss–Newton matrix equal those of the dense matrix."""

from copy import deepcopy

import pytest
import torch

from headwater.core.fit import fit
from headwater.core.gauss_newton import (
    GaussNewtonProduct,
    HessianProduct,
    parameters_of,
    template,
)
from headwater.core.gradients import Gradients
from tests.curvature_cases import EVERY, case, dense_gauss_newton, loss_gradients, shared


@pytest.mark.parametrize("name", EVERY)
def test_equals_the_dense_matrix_times_vectors(name):
    found = shared(name)
    fitted = found.fitted("identity")
    x = Gradients({layer.name: torch.randn(5, *layer.block).double() for layer in fitted.followed})
    expected = x.to_matrix() @ dense_gauss_newton(fitted)
    for batch_size, at_once in ((2, 16), (100, 2)):
        again = found.fit("identity", batch_size=batch_size)
        product = GaussNewtonProduct(
            again.capture(), found.train, again.batches(found.train), at_once=at_once
        )
        torch.testing.assert_close(product(x).to_matrix(), expected, rtol=1e-9, atol=1e-11)
        assert list(product(x).blocks) == list(x.blocks)


def test_leaves_the_model_as_it_was():
    found = case("lm")
    found.model.train()
    before = {n: p.clone() for n, p in found.model.named_parameters()}
    fitted = found.fit("identity")
    x = Gradients({layer.name: torch.randn(1, *layer.block).double() for layer in fitted.followed})
    GaussNewtonProduct(fitted.capture(), found.train, fitted.batches(found.train))(x)
    assert found.model.training and found.model.q.training
    for name, p in found.model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


def test_only_the_followed_parameters_take_part():
    found = shared("mlp")
    some = found.fit("identity", layers="2")
    every = found.fitted("identity")
    x = Gradients({"2": torch.randn(2, 3, 6).double()})
    product = GaussNewtonProduct(some.capture(), found.train, some.batches(found.train))
    block = dense_gauss_newton(every)[35:, 35:]  # behind the 5 × 7 of the first layer
    torch.testing.assert_close(product(x).to_matrix(), x.to_matrix() @ block)


def test_gradients_of_layers_become_those_of_parameters():
    found = shared("conv")
    fitted = found.fitted("identity")
    layers = list(fitted.followed)
    rows = loss_gradients(fitted)[:1]
    shape = Gradients({layer.name: torch.zeros(1, *layer.block).double() for layer in layers})
    mapped = parameters_of(shape.from_matrix(rows), layers)
    found.task.loss(found.model, found.train.batch([0])).sum().backward()
    for name, p in found.model.named_parameters():
        torch.testing.assert_close(mapped[name][0], p.grad)


@pytest.mark.parametrize("name", EVERY)
def test_the_hessian_is_the_change_of_the_mean_gradient(name):
    found = case(name)
    fitted = found.fit("identity")
    layers, n = list(fitted.followed), len(found.train)
    shape = template(layers, next(found.model.parameters()))
    torch.manual_seed(1)
    x = torch.randn(2, shape.to_matrix().shape[1]).double()
    product = HessianProduct(fitted.capture(), found.train, fitted.batches(found.train))
    mine = product(shape.from_matrix(x)).to_matrix()
    named, step = dict(found.model.named_parameters()), 1e-5
    for row, direction in zip(mine, x, strict=True):
        change = parameters_of(shape.from_matrix(direction[None]), layers)

        def gradient(scale, change=change):
            with torch.no_grad():
                for name, part in change.items():
                    named[name] += scale * part[0]

            rows = loss_gradients(fitted).sum(0) / n
            with torch.no_grad():
                for name, part in change.items():
                    named[name] -= scale * part[0]
            return rows

        expected = (gradient(step) - gradient(-step)) / (2 * step)
        # central differences: an error of step² times third derivatives, and rounding / step
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
@pytest.mark.parametrize("layers", ["all", "up"])
def test_a_model_in_half_precision_is_multiplied_as_the_same_model_in_float32(kind, layers):
    low, found = case("lm").model.bfloat16(), case("lm")

    def product(model):
        fitted = fit(model, found.train, found.task, curvature="identity", layers=layers)
        generator = torch.Generator().manual_seed(0)
        x = template(list(fitted.followed), torch.zeros(1))
        x = x.from_matrix(torch.randn(x.to_matrix().shape, generator=generator))
        return kind(fitted.capture(), found.train, fitted.batches(found.train))(x).to_matrix()

    expected = product(deepcopy(low).float())
    torch.testing.assert_close(product(low), expected, rtol=1e-5, atol=1e-6)
    assert next(low.parameters()).dtype == torch.bfloat16
