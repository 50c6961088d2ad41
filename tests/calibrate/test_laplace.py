"""The last layer's Gauss–Newton matrix is the exact one, and the predictive integrates what it says."""

import pytest
import torch
from torch import nn

import headwater
from headwater.calibrate.laplace import (
    LastLayerLaplace,
    last_layer_ggn,
    logit_covariance,
    mean_softmax,
    probit,
)
from headwater.core.curvature import Dense
from headwater.core.forward import last_layer
from headwater.core.task import Classification
from tests.cases import Net, mlp, mlp_data


def fitted(n=30):
    torch.manual_seed(0)
    return headwater.fit(mlp(), mlp_data(n), Classification(), curvature="identity")


def features_of(fit, examples):
    h = fit.model[:2](examples.tensors[0]).detach()
    return torch.cat([h, torch.ones(len(h), 1).double()], 1)


def test_the_matrix_is_the_fits_dense_one_of_that_layer():
    fit = fitted()
    x, _ = fit.train.tensors
    found = last_layer_ggn(features_of(fit, fit.train), fit.model(x).detach().softmax(1))
    dense = headwater.fit(fit.model, fit.train, Classification(), curvature=Dense(), layers=["2.*"])
    torch.testing.assert_close(found / len(fit.train), dense.curvature.matrix)


def test_the_matrix_is_the_hessian_of_the_loss():
    fit = fitted()
    x, y = fit.train.tensors
    phi = features_of(fit, fit.train)
    weights = last_layer(fit.model, fit.task, fit.train).weights(fit.model)

    def loss(w):
        return nn.functional.cross_entropy(phi @ w.T, y, reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, weights).reshape(2 * (weights.numel(),))
    torch.testing.assert_close(
        last_layer_ggn(phi, fit.model(x).detach().softmax(1)), hessian, rtol=1e-8, atol=1e-10
    )


def test_the_covariance_of_logits_is_that_of_their_jacobian():
    torch.manual_seed(0)
    phi, root = torch.randn(5, 4).double(), torch.randn(12, 12).double()
    sigma = root @ root.T
    found = logit_covariance(phi, sigma)
    for i in range(5):
        J = torch.kron(torch.eye(3).double(), phi[i : i + 1])
        torch.testing.assert_close(found[i], J @ sigma @ J.T)


def test_the_averages_are_those_of_gaussian_logits():
    logits = torch.tensor([[2.0, 0.0, -1.0]]).double()
    root = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 0.5]]).double()
    covariance = (root @ root.T)[None]
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(400_000, 3, generator=generator, dtype=torch.float64) @ root.T + logits
    exact = draws.softmax(1).mean(0, keepdim=True)
    # 4,000 draws: standard error below 0.2 / √4000 = 0.003
    sampled = mean_softmax(logits, covariance, n_samples=4000)
    torch.testing.assert_close(sampled, exact, rtol=0, atol=0.012)
    # the probit form looks at variances alone, and is known to be near, not equal
    torch.testing.assert_close(probit(logits, covariance), exact, rtol=0, atol=0.05)
    plain = logits.softmax(1)
    for p in (sampled, probit(logits, covariance)):
        assert float(p.max()) < float(plain.max())
    torch.testing.assert_close(probit(logits, 0 * covariance), plain)


@pytest.mark.parametrize("predictive", ["probit", "mc"])
def test_a_precise_prior_leaves_the_model_as_it_is_and_a_vague_one_hedges(predictive):
    fit, queries = fitted(), mlp_data(7)
    plain = fit.model(queries.tensors[0]).detach().softmax(1)
    far = LastLayerLaplace(prior_precision=1e12, predictive=predictive).calibrate(fit, queries)
    torch.testing.assert_close(far.predict(queries).probabilities, plain, rtol=1e-4, atol=1e-5)
    near = LastLayerLaplace(prior_precision=1e-3, predictive=predictive).calibrate(fit, queries)
    found = near.predict(queries).probabilities
    torch.testing.assert_close(found.sum(1), torch.ones(7).double())
    assert float(found.amax(1).mean()) < float(plain.amax(1).mean())


def test_the_prior_is_chosen_by_validation_loss_or_by_the_evidence():
    fit, validation = fitted(), mlp_data(40)
    chosen = LastLayerLaplace().calibrate(fit, validation)
    best = chosen.predict(validation).measures()["nll"]
    for precision in (1e-4, 1.0, 1e4):
        other = LastLayerLaplace(prior_precision=precision).calibrate(fit, validation)
        assert best <= other.predict(validation).measures()["nll"] + 1e-12
    found = LastLayerLaplace(prior_precision="evidence").calibrate(fit, validation)
    values = torch.linalg.eigvalsh(
        last_layer_ggn(
            features_of(fit, fit.train), fit.model(fit.train.tensors[0]).detach().softmax(1)
        )
    )
    determined = float((values / (values + found.prior_precision)).sum())
    weights = found.layer.weights(fit.model)
    assert found.prior_precision == pytest.approx(
        determined / float(weights.square().sum()), rel=1e-6
    )  # MacKay's fixed point


def test_models_without_a_last_linear_layer_are_refused():
    torch.manual_seed(0)
    model = Net(lambda self, x: self.head(x).tanh() * 2, head=nn.Linear(5, 3)).double()
    fit = headwater.fit(model, mlp_data(9), Classification(), curvature="identity")
    with pytest.raises(ValueError, match="logits are what a linear layer returns"):
        LastLayerLaplace().calibrate(fit, mlp_data(4))
    with pytest.raises(ValueError, match="max_parameters"):
        LastLayerLaplace(max_parameters=5).calibrate(fitted(), mlp_data(4))
    with pytest.raises(ValueError, match="positive"):
        LastLayerLaplace(prior_precision=0.0)
