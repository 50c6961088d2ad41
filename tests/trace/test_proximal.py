"""Responses to one more example: exact where the objective is quadratic, and near influence for small steps."""

import pytest
import torch
from torch import nn

import headwater
from headwater.core.examples import TensorExamples
from headwater.core.function_space import StoredDistance, function_space_distance
from headwater.core.task import Classification, Regression
from headwater.numerics.ranks import spearman
from headwater.trace import Influence, Proximal
from headwater.trace.proximal import mislabel_scores
from tests.curvature_cases import loss_gradients


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear_regression():
    x = torch.randn(20, 3, dtype=torch.float64)
    train = (x, x @ torch.randn(3, 2).double() + 0.1 * torch.randn(20, 2).double())
    return headwater.fit(nn.Linear(3, 2).double(), train, Regression(), curvature="dual")


def network(n: int = 40):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(n, 4).double()
    data = TensorExamples(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        Classification().loss(net, data.tensors).mean().backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    return headwater.fit(net, data, Classification(), curvature="dual")


def test_for_a_linear_model_it_solves_the_system_with_the_example_in_it():
    fit, rho = linear_regression(), 0.1
    n, G = len(fit.train), loss_gradients(fit)
    x = torch.cat([fit.train.tensors[0], torch.ones(20, 1).double()], dim=1)
    eye = torch.eye(2).double()
    blocks = [torch.kron(eye, torch.outer(row, row)) for row in x]  # parameters output by output
    C = sum(blocks) / n
    theta, residual = Proximal(damping=rho, tolerance=1e-9).response(fit, 3)
    moved = torch.cat(
        [
            theta["weight"] - fit.model.weight.detach(),
            (theta["bias"] - fit.model.bias.detach())[:, None],
        ],
        dim=1,
    )
    expected = -torch.linalg.solve(C + rho * torch.eye(8) + blocks[3] / n, G[3]) / n
    torch.testing.assert_close(moved.flatten(), expected, rtol=1e-6, atol=1e-9)
    assert residual <= 1e-9


def test_scores_are_changes_of_the_measurement_in_the_response():
    fit = network()
    queries = fit.train.subset([1, 5, 7])
    scores = Proximal(damping=0.05, tolerance=1e-8).attribute(fit, queries, among=[4, 9])
    theta, _ = Proximal(damping=0.05, tolerance=1e-8).response(fit, 9)
    after = torch.func.functional_call(fit.model, theta, (fit.train.tensors[0][[1, 5, 7]],))
    loss = torch.nn.functional.cross_entropy(
        after, fit.train.tensors[1][[1, 5, 7]], reduction="none"
    )
    before = fit.task.loss(fit.model, queries.batch([0, 1, 2])).detach()
    torch.testing.assert_close(scores.values[:, 1].double(), loss - before, rtol=1e-5, atol=1e-7)
    assert scores.train_ids == ["4", "9"] and scores.kept == [4, 9] and scores.n_train == 40


@pytest.mark.parametrize("free", [False, True])
def test_strongly_held_it_is_the_influence_under_the_distance_s_curvature(free):
    """The larger the damping the shorter the step, and the nearer the response is to its derivative."""
    fit = network()
    queries, damping = fit.train.subset(range(6)), 100.0
    distance, derivative = None, fit
    if free:
        distance = function_space_distance(fit, n_samples=50)
        derivative = distance.in_place_of_data(fit)
    scores = Proximal(damping=damping, tolerance=1e-9).attribute(
        fit, queries, among=range(0, 40, 5), distance=distance
    )
    linear = Influence(damping=damping, n_intervals=0).attribute(derivative, queries)
    torch.testing.assert_close(
        scores.values, linear.values[:, ::5], rtol=0.02, atol=0.02 * float(linear.values.std())
    )
    assert ("arXiv:2302.03519" in scores.facts["papers"]) == free


def test_without_the_data_responses_rank_as_with_them():
    fit = network()
    queries, some = fit.train.subset(range(10)), list(range(0, 40, 4))
    distance = function_space_distance(fit, by=fit.train.tensors[1].tolist())
    exact, free = (
        Proximal(damping=0.05).attribute(fit, queries, among=some, distance=d).values.double()
        for d in (None, distance)
    )
    assert float(spearman(exact, free).mean()) > 0.5


def test_self_influence_is_the_fall_of_the_example_s_own_loss():
    fit = network()
    own = Proximal(damping=0.05).self_influence(fit, among=[2, 3])
    scores = Proximal(damping=0.05).attribute(
        fit, fit.train.subset([2, 3]), among=[2, 3], measurement="loss"
    )
    torch.testing.assert_close(own, -scores.values.diagonal(), rtol=1e-4, atol=1e-7)
    assert bool((own >= 0).all())


def test_mislabel_scores_are_self_influences_under_the_distance_s_curvature():
    fit, rho = network(), 0.05
    distance = function_space_distance(fit, n_samples=50)
    found = mislabel_scores(fit, distance, damping=rho)
    C = distance.curvature(fit).rows.to_matrix()
    C = C.mT @ C / 50
    G = loss_gradients(fit)
    inverse = torch.linalg.inv(C + rho * torch.eye(len(C)))
    expected = torch.einsum("ni,ij,nj->n", G, inverse, G) / len(G)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


def test_a_wrong_label_stands_out():
    fit = network()
    labels = fit.train.tensors[1].clone()
    labels[7] = (labels[7] + 1) % 3
    noisy = headwater.fit(fit.model, (fit.train.tensors[0], labels), fit.task, curvature="dual")
    scores = mislabel_scores(noisy, function_space_distance(noisy), damping=0.05)
    assert int(scores.argmax()) == 7


def test_a_distance_from_elsewhere_and_bad_numbers_are_refused():
    fit, other = network(), network()
    with pytest.raises(ValueError, match="another model than the distance's anchor"):
        mislabel_scores(fit, function_space_distance(other))
    with pytest.raises(ValueError, match="there is no example 40 among 40"):
        Proximal().attribute(fit, fit.train.subset([0]), among=[40])
    with pytest.raises(ValueError, match="one step or more"):
        Proximal(steps=0)
    softmax = function_space_distance(fit, rho="softmax")
    with pytest.raises(ValueError, match="rho='kl' or 'squared'"):
        softmax.curvature(fit)


def test_the_model_is_left_as_it_was():
    fit = network()
    before = {k: p.detach().clone() for k, p in fit.model.named_parameters()}
    distance = StoredDistance(fit.model, fit.task, fit.train)
    Proximal(damping=0.05).attribute(fit, fit.train.subset([0]), among=[1], distance=distance)
    for name, p in fit.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
