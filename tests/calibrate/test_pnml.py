"""pNML by refitting, in closed form for ridge regression, and of a last layer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import headwater
from headwater.calibrate.pnml import (
    LastLayerPNML,
    genie_probabilities,
    last_layer_genies,
    regret,
    ridge_normalizer,
)
from headwater.core.task import Classification
from headwater.training.optimizers import SGD
from tests.cases import mlp, mlp_data

RIDGE = 0.7


def regression(n=9, d=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]).double()


def test_the_normalizer_of_ridge_regression_is_the_integral_over_refitted_models():
    x, y = regression()
    query = torch.tensor([[0.4, 1.5, -0.3]]).double()

    def density(label):
        """Of a label under the model that was fitted with it."""
        xs, ys = torch.cat([x, query]), torch.cat([y, label[None]])
        theta = torch.linalg.solve(xs.T @ xs + RIDGE * torch.eye(3).double(), xs.T @ ys)
        return torch.exp(-((label - query[0] @ theta) ** 2) / 2) / math.sqrt(2 * math.pi)

    grid = torch.linspace(-60, 60, 6001, dtype=torch.float64)
    integral = torch.trapezoid(torch.stack([density(label) for label in grid]), grid)
    torch.testing.assert_close(ridge_normalizer(x, query, RIDGE)[0], integral, rtol=1e-8, atol=0)


@given(scale=st.floats(1e-4, 1e-2))
def test_expected_self_influence_is_the_regret_to_first_order(scale):
    x, _ = regression()
    query = scale * torch.tensor([[0.4, 1.5, -0.3]]).double()
    # For unit noise E_y[g_y gᵀ_y] = x xᵀ, and the Hessian of the mean loss is (XᵀX + λ) / N.
    hessian = (x.T @ x + RIDGE * torch.eye(3).double()) / len(x)
    influence = float((query @ torch.linalg.solve(hessian, query.T)) / len(x))
    found = float(ridge_normalizer(x, query, RIDGE).log())
    assert found == pytest.approx(influence, rel=influence)  # log(1 + h) = h - h²/2 + …
    assert found == pytest.approx(math.log1p(influence), rel=1e-9)


def test_genies_are_models_trained_on_with_the_point_added():
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    x, y = torch.randn(8, 3).double(), torch.randint(3, (8,))
    queries = torch.randn(2, 3).double()
    rule = SGD(lr=0.3, momentum=0.0, weight_decay=0.01, batch_size=9, epochs=4, schedule="constant")
    found = genie_probabilities(model, x, y, queries, 3, rule, at_once=4)
    for i in range(2):
        for label in range(3):
            theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
            xs, ys = torch.cat([x, queries[i : i + 1]]), torch.cat([y, torch.tensor([label])])
            for _ in range(4):
                loss = nn.functional.cross_entropy(xs @ theta[0].T + theta[1], ys)
                loss = loss + 0.005 * sum(p.square().sum() for p in theta)
                grads = torch.autograd.grad(loss, theta)
                theta = [
                    (p - 0.3 * g).detach().requires_grad_()
                    for p, g in zip(theta, grads, strict=True)
                ]
            p = (queries[i] @ theta[0].T + theta[1]).softmax(0)[label]
            torch.testing.assert_close(found[i, label], p.detach(), rtol=1e-9, atol=0)
    assert bool((regret(found) > 0).all())


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=6),
    low=st.floats(0, 1e3),
    more=st.floats(1e-3, 1e3),
)
def test_the_last_layers_regret_rises_with_leverage_from_zero_to_at_most_log_c(logits, low, more):
    p = torch.tensor([logits], dtype=torch.float64).softmax(1)
    found = [
        float(regret(last_layer_genies(p, torch.tensor([h], dtype=torch.float64))))
        for h in (0.0, low, low + more)
    ]
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert found[1] <= found[2] + 1e-12 <= math.log(len(logits)) + 2e-12


def test_the_last_layer_reads_the_features_of_the_fit():
    torch.manual_seed(0)
    train, queries = mlp_data(40), mlp_data(6)
    fit = headwater.fit(mlp(), train, Classification(), curvature="identity")
    predictor = LastLayerPNML(ridge=1e-3).calibrate(fit)

    def features(x):
        h = fit.model[:2](x).detach()
        return h / h.norm(dim=1, keepdim=True)

    X, q = features(train.tensors[0]), features(queries.tensors[0])
    moment = X.T @ X
    moment = moment + 1e-3 * moment.diagonal().mean() * torch.eye(6).double()
    leverage = (q * torch.linalg.solve(moment, q.T).T).sum(1)
    p = fit.model(queries.tensors[0]).detach().softmax(1)
    s = (leverage / (1 + leverage))[:, None]
    expected = p / (p + p**s * (1 - p))
    torch.testing.assert_close(predictor.genies(queries), expected)
    found = predictor.predict(queries).probabilities
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))
