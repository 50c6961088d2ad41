"""Classifiers at a temperature: gradients of order one, the Fisher information they have, labels of one's choice."""

import pytest
import torch
from torch.func import functional_call, jacrev

import headwater
from headwater.core.capture import plan_batches
from headwater.core.curvature import EKFAC, Dense
from headwater.core.damping import Damping, Inverse
from headwater.core.examples import take
from headwater.core.task import Classification, Regression
from headwater.core.tempering import (
    AtTemperature,
    EveryLabel,
    GivenLabels,
    Tempered,
    fit_at_temperature,
    label_norms,
    passes_of,
)
from tests.cases import CLASSES, mlp, mlp_data
from tests.curvature_cases import block_matrices, shared

TAUS = (1.0, 7.0, 1000.0)


def fitted(n=12, seed=0):
    torch.manual_seed(seed)
    return headwater.fit(mlp(), mlp_data(n), Classification(), curvature="identity")


def jacobians(fit):
    """Jacobian of the logits in all parameters, layers side by side (n, class, parameter)."""
    named = {k: v.detach() for k, v in fit.model.named_parameters()}
    x = fit.train.tensors[0]
    rows = jacrev(lambda theta: functional_call(fit.model, theta, (x,)))(named)
    parts = []
    for layer in fit.followed:
        flat = {k: rows[k].flatten(0, 1) for k in layer.parameters}
        parts.append(layer.from_parameters(flat).flatten(1))
    return torch.cat(parts, 1).unflatten(0, (len(x), CLASSES))


@pytest.mark.parametrize("tau", TAUS)
def test_the_fisher_at_a_temperature_is_that_of_its_jacobians(tau):
    fit = fitted()
    soft = fit_at_temperature(fit, tau, curvature=Dense())
    J, p = jacobians(fit), (fit.model(fit.train.tensors[0]).detach() / tau).softmax(1)
    expected = sum(
        j.mT @ (torch.diag(q) - q[:, None] * q) @ j for j, q in zip(J, p, strict=True)
    ) / len(J)
    torch.testing.assert_close(soft.curvature.matrix, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_norms_of_every_label_are_those_of_dense_gradients(tau):
    fit = fitted()
    soft = fit_at_temperature(fit, tau, curvature=Dense())
    damping = Damping(1e-3, "relative")
    labels = torch.arange(CLASSES).expand(len(fit.train), -1)
    found = label_norms(soft, fit.train, labels, Inverse(damping))
    J, p = jacobians(fit), (fit.model(fit.train.tensors[0]).detach() / tau).softmax(1)
    F = soft.curvature.matrix
    F = F + 1e-3 * F.diagonal().mean() * torch.eye(len(F)).double()
    g = torch.einsum("nyc,ncp->nyp", p[:, None] - torch.eye(CLASSES).double(), J)
    expected = (g * torch.linalg.solve(F, g.flatten(0, 1).mT).mT.view_as(g)).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "norm", "conv"])
def test_ekfac_norms_are_those_of_the_matrix_it_stands_for(name):
    case = shared(name)
    soft = fit_at_temperature(case.fitted(EKFAC()), 3.0, curvature=EKFAC(folds=1))
    labels = torch.arange(3).expand(len(case.query), -1)
    found = label_norms(soft, case.query, labels, Inverse(Damping(0.1)))
    matrices = block_matrices(soft)
    total = torch.zeros_like(found)
    named = dict(soft.model.named_parameters())
    for i in range(len(case.query)):
        for y in range(3):
            batch = (*case.query.batch([i])[:-1], torch.tensor([y]))
            loss = soft.task.loss(soft.model, batch).sum()
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            each = {
                k: (torch.zeros_like(p) if g is None else g)[None]
                for (k, p), g in zip(named.items(), grads, strict=True)
            }
            for layer in soft.followed:
                g = layer.from_parameters({k: each[k] for k in layer.parameters}).flatten()
                M = matrices[layer.name]
                M = M + 0.1 * torch.eye(len(M)).double()
                total[i, y] += g @ torch.linalg.solve(M, g)
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-9)


def test_gradients_stay_of_order_one_in_half_the_digits():
    torch.manual_seed(0)
    single = mlp().float()
    x, y = mlp_data(12).tensors
    norms = {}
    for dtype in (torch.float32, torch.float64):
        model = mlp().to(dtype)
        model.load_state_dict(single.state_dict())
        data = (x.to(dtype), y)
        fit = headwater.fit(model, data, Classification(), curvature="identity")
        soft = fit_at_temperature(fit, 1000.0, curvature=EKFAC(fisher="exact", folds=1))
        labels = torch.arange(CLASSES).expand(12, -1)
        norms[dtype] = label_norms(soft, fit.train, labels, Inverse(Damping(1e-3, "relative")))
    # 1e-3 of the mean eigenvalue magnifies rounding of 1e-7 in the eigenvalues about a thousandfold
    torch.testing.assert_close(norms[torch.float32], norms[torch.float64], rtol=5e-3, atol=1e-3)


def test_labels_are_drawn_from_the_softened_distribution():
    logits = torch.tensor([[[4.0, 0.0]]]).double().expand(20_000, 1, 2)
    labels = torch.zeros(20_000, 1, dtype=torch.int64)
    keys = torch.arange(20_000) * 7919
    drawn = Tempered(logits, labels, 4.0).sample(keys, 0)
    assert isinstance(drawn, Tempered)
    assert drawn.temperature == 4.0
    expected = float(torch.tensor([1.0, 0.0]).softmax(0)[1])
    assert float(drawn.labels.double().mean()) == pytest.approx(expected, abs=0.012)  # 4 sigma


def test_a_saved_fit_remembers_its_temperature(tmp_path):
    fit = fitted()
    soft = fit_at_temperature(fit, 3.0, folder=tmp_path / "soft")
    again = fit_at_temperature(fit, 3.0, folder=tmp_path / "soft")
    assert again.made_from["task"] == "Classification at temperature 3"
    for name, values in soft.curvature.eigenvalues.items():
        torch.testing.assert_close(again.curvature.eigenvalues[name], values)
    with pytest.raises(ValueError, match="task"):
        fit_at_temperature(fit, 5.0, folder=tmp_path / "soft")


def test_a_temperature_of_a_temperature_is_the_last_one():
    twice = fit_at_temperature(fit_at_temperature(fitted(), 3.0), 5.0)
    assert twice.task == AtTemperature(base=Classification(), temperature=5.0)


def test_passes_are_counted():
    assert passes_of(fit_at_temperature(fitted(), 3.0), CLASSES) == 2
    exact = fit_at_temperature(fitted(), 3.0, curvature=EKFAC(fisher="exact", folds=1))
    assert passes_of(exact, CLASSES) == 2 * CLASSES


def test_every_label_comes_with_its_example():
    base = mlp_data(3)
    rows = EveryLabel(base, torch.tensor([[0, 1], [2, 0], [1, 2]]))
    assert len(rows) == 6
    assert rows.ids[3] == "1 as 0"
    (x, _), labels = rows.batch([0, 3, 5])
    torch.testing.assert_close(x, base.tensors[0][[0, 1, 2]])
    assert labels.tolist() == [0, 0, 2]
    half = take(rows.batch([0, 3, 5]), torch.tensor([2]))
    assert GivenLabels(base=Classification()).predict(mlp(), half).labels.tolist() == [[2]]
    assert sum(len(plan.indices) for plan in plan_batches(rows, batch_size=4)) == 6
    other = EveryLabel(base, torch.tensor([[0, 1], [2, 0], [1, 0]]))
    assert rows.fingerprint() != other.fingerprint()


def test_real_numbers_and_given_labels_have_no_temperature():
    fit = fitted()
    with pytest.raises(ValueError, match="given labels"):
        fit_at_temperature(fit, 3.0, curvature=EKFAC(fisher="empirical"))
    with pytest.raises(ValueError, match="positive"):
        fit_at_temperature(fit, 0.0)
    x, _ = fit.train.tensors
    plain = headwater.fit(mlp(), (x, torch.randn(12, 3).double()), Regression())
    with pytest.raises(ValueError, match="Only a distribution over classes"):
        fit_at_temperature(plain, 3.0)
    with pytest.raises(ValueError, match="labels of 12 examples"):
        EveryLabel(fit.train, torch.zeros(3, 2, dtype=torch.int64))
