"""What every estimator shares: the interface, the outer loop, and the contract of methods."""

import dataclasses
import inspect
import json

import pytest
import torch
from torch import nn

import headwater
from headwater import curate
from headwater.core.provenance import PAPERS, papers
from headwater.curate.base import (
    HyperGradient,
    Info,
    InnerProblem,
    descend,
    functional_model,
    gradient_step,
    minibatch,
    pack,
    unpack,
)
from headwater.curate.bilevel import Implicit, Unrolled
from headwater.curate.evolution import PES, ESSingle, FullES, TruncatedES

ESTIMATORS = [ESSingle, FullES, Implicit, PES, TruncatedES, Unrolled]
METHODS = [*ESTIMATORS, curate.DataWeights, curate.Distillation, curate.LearningRate]
every = pytest.mark.parametrize("method", METHODS, ids=lambda c: c.__name__)


def quadratic(horizon: int = 20) -> InnerProblem:
    """Descent on ½‖w - u‖², judged by ½‖w - 1‖²: the best u is a little above 1."""

    def inner(w, u, batch, t):
        return (w["w"] - u["u"]).square().sum() / 2

    return InnerProblem(
        init=lambda seed: {"w": torch.zeros(2).double()},
        step=gradient_step(inner, 0.2),
        outer=lambda w, u, b, t: (w["w"] - 1).square().sum() / 2,
        horizon=horizon,
        inner=inner,
    )


def test_all_estimators_are_listed():
    listed = {
        c
        for c in vars(curate).values()
        if inspect.isclass(c) and issubclass(c, HyperGradient) and c is not HyperGradient
    }
    assert listed == set(ESTIMATORS)
    assert all(hasattr(curate, name) for name in curate.__all__)


@every
def test_documents_itself(method):
    text, module = inspect.getdoc(method), inspect.getmodule(method)
    assert text and text.splitlines()[0].endswith(".")
    for field in dataclasses.fields(method):
        assert f"{field.name}:" in text, f"{method.__name__} has no word on {field.name}"
    assert module is not None and "arXiv:" in (module.__doc__ or "")
    assert method.paper in PAPERS


@every
def test_is_its_own_configuration(method):
    instance = method()
    assert instance == method() and hash(instance) == hash(method())
    assert eval(repr(instance), {c.__name__: c for c in METHODS}) == instance
    assert json.loads(json.dumps(dataclasses.asdict(instance))) == dataclasses.asdict(instance)
    with pytest.raises(TypeError):
        method(1)  # keywords only


@pytest.mark.parametrize("method", ESTIMATORS, ids=lambda c: c.__name__)
def test_every_estimator_learns_and_repeats_itself_and_cites(method):
    problem, u = quadratic(), {"u": torch.zeros(2).double()}
    first, again = (descend(problem, u, method(), steps=60, lr=0.1) for _ in range(2))
    assert torch.equal(first.meta["u"], again.meta["u"])
    assert first.retrained[0] < 0.1 * problem.retrain(u)[1]
    assert method.paper in papers(first.facts)
    assert PAPERS[method.paper] in headwater.cite(first)
    assert not u["u"].any()  # what was passed in stays as it was
    assert len(first.losses) == len(first.gradient_norms) == len(first.inner_steps) == 60


def test_the_result_always_tells_what_retraining_gives():
    problem, u = quadratic(), {"u": torch.zeros(2).double()}
    found = descend(problem, u, Unrolled(), steps=5, lr=0.1, fresh_seeds=(0, 1, 2))
    assert found.retrained == [problem.retrain(found.meta, seed=s)[1] for s in (0, 1, 2)]
    assert "after retraining from scratch" in repr(found)


def test_long_gradients_are_clipped():
    problem, u = quadratic(), {"u": torch.full((2,), 100.0).double()}
    found = descend(problem, u, Unrolled(), steps=1, lr=1.0, clip=0.5, optimizer=torch.optim.SGD)
    assert float((found.meta["u"] - u["u"]).norm()) == pytest.approx(0.5)
    assert found.gradient_norms[0] > 10


def test_a_diverged_inner_problem_stops_the_descent():
    problem = dataclasses.replace(quadratic(), step=lambda w, u, b, t: {"w": u["u"] * torch.inf})
    with pytest.raises(FloatingPointError, match="outer step 0 is NaN"):
        descend(problem, {"u": torch.ones(2).double()}, Unrolled(), steps=3, lr=0.1)
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        descend(quadratic(), {"u": torch.ones(2).double()}, Unrolled(), steps=0, lr=0.1)


def test_variance_counts_the_pairs_that_are_left():
    pairs = torch.tensor([[1.0, 0.0], [3.0, 0.0], [torch.nan, 0.0]])
    info = Info(gradient={}, loss=0.0, inner_steps=0, pairs=pairs)
    assert info.variance == pytest.approx(2.0 / 2)
    assert Info(gradient={}, loss=0.0, inner_steps=0).variance == 0.0


def test_vectors_hold_all_tensors_in_their_order():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(9.0)}
    vector = pack(tensors)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 9]
    again = unpack(vector, tensors)
    assert list(again) == ["b", "a"] and all(torch.equal(again[k], tensors[k]) for k in tensors)


def test_epochs_cover_the_data_in_orders_of_their_own():
    epochs = [torch.cat([minibatch(10, 3, 5, t) for t in range(3 * e, 3 * e + 3)]) for e in (0, 1)]
    for epoch in epochs:
        assert len(epoch.unique()) == 9
    assert not torch.equal(*epochs)
    assert torch.equal(minibatch(10, 3, 5, 4), minibatch(10, 3, 5, 4))
    assert not torch.equal(minibatch(10, 3, 5, 4), minibatch(10, 3, 6, 4))


def test_a_functional_model_is_the_model_and_refuses_running_statistics():
    def make(seed):
        torch.manual_seed(seed)
        return nn.Linear(3, 2)

    init, outputs = functional_model(make)
    x = torch.randn(5, 3)
    torch.testing.assert_close(outputs(init(4), x), make(4)(x))
    with pytest.raises(ValueError, match="has buffers"):
        functional_model(lambda seed: nn.BatchNorm1d(3))
