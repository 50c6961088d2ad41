"""The contract of every method: it documents itself, repeats itself, saves, loads and cites."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

import headwater
from headwater import trace
from headwater.core.curvature import EKFAC
from headwater.core.provenance import PAPERS, papers
from headwater.core.scores import Scores
from headwater.trace.base import Attributor
from headwater.training.optimizers import SGD
from headwater.training.run import train_model
from tests.curvature_cases import case
from tests.method_cases import run

ATTRIBUTORS = sorted(
    (
        c
        for c in vars(trace).values()
        if inspect.isclass(c)
        and issubclass(c, Attributor)
        and c not in (Attributor, trace.Cascade, trace.Indexed)  # an index comes first
    ),
    key=lambda c: c.__name__,
)
every = pytest.mark.parametrize("method", ATTRIBUTORS, ids=lambda c: c.__name__)
_FITS: dict[str, object] = {}


def fitted(name: str):
    """One fit of a case's model after a short recorded run, with queries and record, for all tests."""
    if name not in _FITS:
        found, folder = case(name), Path(mkdtemp())
        model, rule = copy.deepcopy(found.model), SGD(lr=0.02, batch_size=4, epochs=2)
        record = train_model(
            model, found.train, found.task, rule, folder=folder, keep_optimizer=True
        )
        fit = headwater.fit(model, found.train, found.task, curvature=EKFAC(), weight_decay=0.01)
        _FITS[name] = (fit, found.query, record)
    return _FITS[name]


def attribute(method, name: str):
    """A method's scores of a case; methods that read the training run get its record."""
    fit, queries, record = fitted(name)
    reads = "trajectory" in inspect.signature(method.attribute).parameters
    return run(method(), fit, queries, **({"trajectory": record} if reads else {}))


def test_every_method_is_listed():
    assert {"Influence", "GradientDot", "GradientCosine"} <= {c.__name__ for c in ATTRIBUTORS}
    for method in ATTRIBUTORS:
        assert method.__name__ in trace.__all__


@every
def test_documents_itself(method):
    text, module = inspect.getdoc(method), inspect.getmodule(method)
    assert text and text.splitlines()[0].endswith(".")
    for field in dataclasses.fields(method):
        assert f"{field.name}:" in text, f"{method.__name__} has no word on {field.name}"
    assert module is not None and method.paper in (module.__doc__ or "")
    assert inspect.getdoc(method.attribute)


@every
def test_is_its_own_configuration(method):
    instance = method()
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert instance == method() and hash(instance) == hash(method())
    assert eval(repr(instance), dict(vars(trace))) == instance
    assert json.loads(json.dumps(dataclasses.asdict(instance))) == dataclasses.asdict(instance)
    with pytest.raises(TypeError):
        method(1)  # keywords only


@every
@pytest.mark.parametrize("name", ["mlp", "lm"])
def test_gives_scores_and_repeats_itself(method, name):
    if method is trace.BM25 and name == "mlp":
        pytest.skip("no text")
    fit, queries, _ = fitted(name)
    scores, again = (attribute(method, name) for _ in range(2))
    assert isinstance(scores, Scores) and scores.values.dtype == torch.float32
    assert scores.values.shape == (len(queries), len(fit.train)) and bool(
        scores.values.isfinite().all()
    )
    assert torch.equal(scores.values, again.values)
    assert scores.train_ids == fit.train.ids and scores.query_ids == queries.ids
    assert not any(p.grad is not None for p in fit.model.parameters())


@every
def test_saves_and_loads(method, tmp_path):
    fit, scores = fitted("lm")[0], attribute(method, "lm")
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert torch.equal(again.values, scores.values) and again.metadata == scores.metadata
    assert json.loads(json.dumps(again.facts)) == json.loads(json.dumps(scores.facts))
    assert again.facts["made_from"] == fit.made_from


@every
def test_cites(method):
    scores = attribute(method, "lm")
    assert set(papers(scores.facts)) <= set(PAPERS)
    if method.paper:
        assert method.paper in papers(scores.facts)
        assert PAPERS[method.paper] in headwater.cite(scores)


def test_influence_cites_its_curvature_and_damping():
    found = case("mlp")
    scores = trace.Influence().attribute(found.fit(EKFAC()), found.query)
    named = papers(scores.facts)
    assert {"arXiv:1806.03884", "arXiv:1703.04730", "doi:10.1162/neco.1992.4.3.415"} <= set(named)
