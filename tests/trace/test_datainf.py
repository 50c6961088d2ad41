"""DataInf equals its definition by brute force."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.trace import DataInf
from tests.curvature_cases import EVERY, autograd_rows, case, loss_gradients, shared
from tests.method_cases import damped_inverse


@pytest.mark.parametrize("name", EVERY)
def test_datainf_equals_its_definition(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    n, expected = len(found.train), 0.0
    queries = autograd_rows(fitted, fitted.task.loss, found.query)
    train = autograd_rows(fitted, fitted.task.loss, found.train)
    for layer in fitted.followed:
        v, g = queries[layer.name], train[layer.name]
        rho = 0.1 * g.square().mean()
        solved = torch.zeros_like(v)
        for one in g:  # the inverse of each example's own matrix, by brute force
            solved += v @ damped_inverse(torch.outer(one, one), float(rho)) / n
        expected = expected - solved @ g.mT / n
    scores = DataInf().attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)


def test_datainf_of_one_example_is_the_exact_damped_inverse():
    found = case("mlp")
    fitted = found.fit(Identity(), layers="2")
    one = type(found)(found.model, found.task, found.train.subset([3]), found.query).fit(
        Identity(), layers="2"
    )
    g = loss_gradients(one)
    rho = float(0.1 * g.square().mean())
    expected = -loss_gradients(fitted, found.query) @ damped_inverse(g.mT @ g, rho) @ g.mT
    scores = DataInf().attribute(one, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
