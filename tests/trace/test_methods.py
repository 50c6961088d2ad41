"""What holds for every attribution method, whatever it computes."""

import inspect
from functools import cache

import pytest
import torch

from headwater import trace
from headwater.core.curvature import EKFAC
from headwater.trace.base import Attributor
from tests.curvature_cases import Case, Tokens, case
from tests.method_cases import run

METHODS = sorted(
    (
        c
        for c in vars(trace).values()
        if inspect.isclass(c)
        and issubclass(c, Attributor)
        and c not in (Attributor, trace.Cascade, trace.Indexed)  # an index comes first
        and "trajectory" not in inspect.signature(c.attribute).parameters  # reads a recorded run
    ),
    key=lambda c: c.__name__,
)
ON_CLASSES = [m for m in METHODS if m is not trace.BM25]
PAIRS = [(m, name) for name in ("mlp", "lm") for m in (ON_CLASSES if name == "mlp" else METHODS)]
every = pytest.mark.parametrize(
    ("method", "name"), PAIRS, ids=[f"{m.__name__}-{name}" for m, name in PAIRS]
)
OPTIONS = {"weight_decay": 0.1}


@cache
def fitted(name: str, batch_size: int = 100, extra: int = 0):
    """A fit whose queries are its own first two training examples."""
    found = case(name)
    train = Tokens(found.train.sequences, extra=extra) if name == "lm" else found.train
    found = Case(found.model, found.task, train, train.subset([0, 1]))
    return found.fit(EKFAC(), batch_size=batch_size, **OPTIONS), found.query


@every
@pytest.mark.parametrize("measurement", ["loss", "log_prob", "margin"])
def test_an_example_supports_a_query_that_is_its_duplicate(method, name, measurement):
    if method is trace.Random:
        pytest.skip("knows nothing")
    fit, queries = fitted(name)
    scores = run(method(), fit, queries, measurement=measurement)
    own = scores.values.diagonal()
    assert scores.measurement == measurement
    assert bool((own < 0 if measurement == "loss" else own > 0).all())


@every
def test_batches_and_padding_change_nothing(method, name):
    (fit, queries), (other, same) = fitted(name), fitted(name, batch_size=1, extra=3)
    assert len(other.batches(other.train)) > len(fit.batches(fit.train))
    object.__setattr__(other, "curvature", fit.curvature)
    scores, again = run(method(), fit, queries).values, run(method(), other, same).values
    torch.testing.assert_close(again, scores, rtol=1e-4, atol=1e-5 * float(scores.abs().max()))


@every
def test_groups_of_queries_have_a_row_each(method, name):
    fit, queries = fitted(name)
    weights = torch.tensor([[1.0, -1.0], [0.5, 0.5], [0.0, 1.0]])
    scores = run(method(), fit, queries, weights=weights, names=["a", "b", "c"])
    assert scores.values.shape == (3, len(fit.train)) and scores.query_ids == ["a", "b", "c"]
    alone = run(method(), fit, queries).values[1]
    torch.testing.assert_close(scores.values[2], alone, rtol=1e-4, atol=1e-6)


@every
def test_says_its_unit_and_leaves_the_model_as_it_was(method, name):
    fit, queries = fitted(name)
    before = {k: v.clone() for k, v in fit.model.state_dict().items()}
    fit.model.train()
    scores = run(method(), fit, queries)
    assert fit.model.training and all(p.requires_grad for p in fit.model.parameters())
    for key, value in fit.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert scores.unit in ("nats", "") and scores.facts["made_from"] == fit.made_from
    in_nats = ("Influence", "Newton", "Explicit", "LiSSA", "Arnoldi", "DataInf", "Proximal")
    assert (scores.unit == "nats") == (method.__name__ in in_nats)
