"""Newton's step equals retraining where the model is linear and the loss quadratic, and whole matrices elsewhere."""

import dataclasses

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import Dual, DualCurvature
from headwater.core.examples import TensorExamples
from headwater.core.task import Regression
from headwater.trace import Influence, Newton
from headwater.trace.newton import random_subsets
from tests.curvature_cases import dense_gauss_newton, loss_gradients, shared

RHO = 0.1


def output(prediction):
    return prediction.mean.sum((1, 2))


def ridge(x, y, members, n):
    """Weights after training on some examples, the loss divided by n."""
    x = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)[members]
    return torch.linalg.solve(
        x.T @ x / n + RHO * torch.eye(x.shape[1]).double(), x.T @ y[members] / n
    )


def trained(seed=0, n=13):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    query = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    weights = ridge(x, y, torch.ones(n, dtype=torch.bool), n)
    with torch.no_grad():
        model.weight.copy_(weights[:-1].T)
        model.bias.copy_(weights[-1])
    task = Regression(measurement_of=output)
    fit = headwater.fit(model, TensorExamples(x, y), task, curvature=Dual(cut=0.0))
    return fit, TensorExamples(query, torch.zeros(3, 2).double()), (x, y, query)


def presence(x, y, query, chosen):
    """What each example's presence beside the others of a subset does, by training with and without it."""
    rows, asked = [], torch.cat([query, torch.ones(len(query), 1).double()], dim=1)
    for i in range(len(x)):
        with_it, without = chosen.clone(), chosen.clone()
        with_it[i], without[i] = True, False
        n = int(chosen.sum())
        rows.append((asked @ (ridge(x, y, with_it, n) - ridge(x, y, without, n))).sum(1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("share", "subsets"), [(1.0, 1), (0.5, 5), (0.7, 3)])
def test_equals_retraining_of_a_linear_model(share, subsets):
    fit, queries, known = trained()
    found = Newton(share=share, subsets=subsets, damping=RHO, seed=3).attribute(fit, queries)
    each = [presence(*known, chosen) for chosen in random_subsets(13, share, subsets, 3)]
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(
        found.values.double(), expected, rtol=1e-6, atol=1e-9
    )  # kept as float32
    assert found.unit == "nats"
    first_order = Influence(damping=RHO, n_intervals=0).attribute(fit, queries).values.double()
    assert (first_order - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["mlp", "norm", "conv", "positions", "lm"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_equals_whole_matrices(name, share):
    found = shared(name)
    fit = found.fitted(Dual(cut=0.0))
    each, n_train = loss_gradients(fit), len(fit.train)
    asked = loss_gradients(fit, found.query)
    whole = [
        dense_gauss_newton(dataclasses.replace(fit, train=fit.train.subset([i])))
        for i in range(n_train)
    ]
    total = torch.zeros(len(asked), n_train).double()
    subsets = 1 if share == 1 else 2
    for chosen in random_subsets(n_train, share, subsets, 0):
        n = int(chosen.sum())
        some = [i for i in range(n_train) if chosen[i]]
        damped = RHO * torch.eye(each.shape[1]).double()
        H = sum(whole[i] for i in some) / n + damped
        moved = torch.linalg.solve(H, each.mean(0) - each[chosen].mean(0))
        for i in range(n_train):
            there = each[i] + whole[i] @ moved
            beside = H + (-1 if chosen[i] else 1) * whole[i] / n
            total[:, i] -= asked @ torch.linalg.solve(beside, there) / n
    scores = Newton(share=share, subsets=2, damping=RHO).attribute(fit, found.query)
    torch.testing.assert_close(
        scores.values.double(), total / subsets, rtol=1e-4, atol=1e-6 * float(total.abs().max())
    )


def test_examples_that_nothing_was_learned_from_keep_their_influence():
    fit, queries, _ = trained(n=400)
    exact = Newton(share=1.0, damping=RHO).attribute(fit, queries).values
    first = Influence(damping=RHO, n_intervals=0).attribute(fit, queries).values
    torch.testing.assert_close(exact, first, rtol=0.2, atol=1e-4)


def test_halves_come_in_pairs_and_none_is_like_another():
    masks = list(random_subsets(10, 0.5, 6, 0))
    assert all(int(m.sum()) == 5 for m in masks)
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert not bool((first & second).any())
    assert not torch.equal(masks[0], masks[2])
    assert all(int(m.sum()) == 3 for m in random_subsets(10, 0.3, 4, 0))
    again = list(random_subsets(10, 0.5, 6, 0))
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_tells_whether_more_subsets_would_help():
    fit, queries, _ = trained()
    facts = [
        Newton(subsets=n, damping=RHO).attribute(fit, queries).facts["agreement_of_halves"]
        for n in (4, 64)
    ]
    assert facts[0] < facts[1] and facts[1] > 0.9


def test_weighted_queries_are_sums():
    fit, queries, _ = trained()
    each = Newton(subsets=2, damping=RHO).attribute(fit, queries).values
    weights = torch.tensor([[1.0, 0.0, -1.0]])
    found = Newton(subsets=2, damping=RHO).attribute(fit, queries, weights=weights, names=["a-c"])
    torch.testing.assert_close(found.values[0], each[0] - each[2], rtol=1e-4, atol=1e-6)
    assert found.query_ids == ["a-c"]


def test_a_stored_fit_gives_the_same(tmp_path):
    found = shared("mlp")
    fit = found.fitted(Dual())
    curvature = fit.curvature
    again = DualCurvature.from_tensors(curvature.tensors(), curvature.facts)
    read = dataclasses.replace(fit, curvature=again)
    a, b = (Newton(subsets=2).attribute(f, found.query).values for f in (fit, read))
    assert torch.equal(a, b)


def test_refusals():
    found = shared("mlp")
    with pytest.raises(ValueError, match=r"share must lie above 0 and not above 1; got 0"):
        Newton(share=0.0)
    with pytest.raises(ValueError, match=r"subsets must be 1 or more; got 0"):
        Newton(subsets=0)
    with pytest.raises(ValueError, match=r"curvature is 'ekfac'. Fit with curvature='dual'"):
        Newton().attribute(found.fitted("ekfac"), found.query)
    fit = found.fitted(Dual())
    with pytest.raises(ValueError, match=r"leaves some in and some out"):
        Newton(share=1e-3).attribute(fit, found.query)
    tensors = {k: v for k, v in fit.curvature.tensors().items() if k != "owners"}
    old = dataclasses.replace(fit, curvature=DualCurvature.from_tensors(tensors, {}))
    with pytest.raises(ValueError, match=r"does not tell which example each of its rows is of"):
        Newton().attribute(old, found.query)
