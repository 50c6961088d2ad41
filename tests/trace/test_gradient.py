"""Gradient similarity equals naive loops."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.core.task import Classification
from headwater.trace import GradientCosine, GradientDot
from headwater.trace.gradient import cosine
from tests.curvature_cases import (
    EVERY,
    Case,
    autograd_rows,
    case,
    loss_gradients,
    shared,
    side_by_side,
)


@pytest.mark.parametrize("name", EVERY)
def test_dot_and_cosine_equal_loops(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    queries, train = loss_gradients(fitted, found.query), loss_gradients(fitted)
    dot, cos = torch.zeros(len(queries), len(train)), torch.zeros(len(queries), len(train))
    for q, x in enumerate(queries):
        for n, y in enumerate(train):
            dot[q, n] = -(x @ y)
            cos[q, n] = -(x @ y) / (x.norm() * y.norm())
    for method, expected in ((GradientDot(), dot), (GradientCosine(), cos)):
        scores = method.attribute(fitted, found.query)
        torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-6)  # kept in float32
        assert scores.train_ids == found.train.ids and scores.metadata == found.train.metadata


def test_groups_and_other_measurements():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    weights = torch.tensor([[1.0, -1.0, 0.0, 2.0]])
    gradients = side_by_side(
        autograd_rows(fitted, lambda m, b: found.task.predict(m, b).margin(), found.query)
    )
    group = weights.double() @ gradients
    scores = GradientCosine().attribute(
        fitted, found.query, measurement="margin", weights=weights, names=["contrast"]
    )
    train = loss_gradients(fitted)
    expected = -(group @ train.mT) / (group.norm() * train.norm(dim=1))
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    assert scores.query_ids == ["contrast"] and scores.measurement == "margin"


def test_a_gradient_of_zero_has_cosine_zero():
    x, y = torch.tensor([0.0, 2.0]).double(), torch.tensor([3.0, 0.0]).double()
    dot = torch.tensor([[0.0, 0.0], [6.0, 0.0]]).double()
    assert cosine(dot, x, y).tolist() == [[0, 0], [1, 0]]


def test_measurements_without_a_name_will_do():
    from functools import partial

    found = case("mlp")
    task = Classification(measurement_of=partial(lambda scale, p: scale * p.loss(), 2.0))
    twice = Case(found.model, task, found.train, found.query).fit(Identity())
    scores = GradientDot().attribute(twice, found.query)
    torch.testing.assert_close(
        scores.values, 2 * GradientDot().attribute(found.fit(Identity()), found.query).values
    )
    assert scores.measurement == "custom"
