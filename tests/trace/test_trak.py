"""TRAK equals the paper's formula, and on logistic regression it finds what leaving an example out does."""

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.core.examples import TensorExamples
from headwater.core.fit import fits_at
from headwater.core.projection import Joint, TwoSided, project_examples, project_gradients
from headwater.core.target import Measured
from headwater.numerics.ranks import spearman
from headwater.trace import TRAK
from headwater.trace.influence import query_gradients
from headwater.trace.trak import affordable_rank, kernel_scores, residuals, soft_threshold
from tests.curvature_cases import CLASSIFIERS, Case, autograd_rows, shared, side_by_side
from tests.trace.test_tracin import checkpoints


def margins(fitted, examples):
    def value(model, batch):
        return fitted.task.predict(model, batch).margin()

    return side_by_side(autograd_rows(fitted, value, examples))


def probabilities(fitted):
    batch = fitted.train.batch(range(len(fitted.train)))
    logits, labels = fitted.model(batch[0]).detach(), batch[1]
    return logits.softmax(-1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_equals_the_formula_without_projection(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    x, phi = margins(fitted, found.query), margins(fitted, fitted.train)
    gram = phi.mT @ phi
    ridge = 0.3 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    expected = x @ torch.linalg.inv(gram + ridge) @ phi.mT * (1 - probabilities(fitted))
    scores = TRAK(rank=1000, ridge=0.3).attribute(fitted, found.query, measurement="margin")
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-7)
    # a loss falls as its margin rises: by the chain rule, -(1 - p) of the query times as much
    asked = fitted.task.predict(found.model, found.query.batch(range(len(found.query))))
    slope = torch.expm1(-asked.loss()).detach()
    scores = TRAK(rank=1000, ridge=0.3).attribute(fitted, found.query)
    torch.testing.assert_close(
        scores.values.double(), slope[:, None] * expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("options", [{"rank": 2}, {"dim": 9}], ids=str)
def test_factors_of_several_models_are_averaged_apart(options):
    found = shared("mlp")
    fitted = found.fitted(Identity())
    fits = fits_at(fitted, checkpoints(fitted))
    kernel, missed = 0.0, 0.0
    for number, one in enumerate(fits):  # each model has a projection of its own
        make = TwoSided(2, seed=7 + number) if "rank" in options else Joint(9, seed=7 + number)
        gradients = query_gradients(one, found.query, "margin")
        x = torch.cat([*project_gradients(gradients, one.followed, make).values()], dim=1)
        phi = project_examples(
            one.capture(), one.train, make, Measured("margin"), batches=one.batches(one.train)
        )
        phi = torch.cat([*phi.values()], dim=1)
        kernel = kernel + x @ torch.linalg.pinv(phi, rtol=1e-9) / 3
        missed = missed + (1 - probabilities(one)) / 3
    method = TRAK(seed=7, **options)
    scores = method.attribute(fitted, found.query, fits=fits, measurement="margin")
    torch.testing.assert_close(scores.values.double(), kernel * missed, rtol=1e-4, atol=1e-6)
    assert scores.facts["models"] == 3 and scores.unit == ""


def test_finds_what_leaving_an_example_out_of_logistic_regression_does():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(x), torch.tensor(y)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1).double()], dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order, ::3], y[order]
    n, sign = 300, 2.0 * y - 1

    def solve(weight, w):
        """Newton's method on the logistic loss."""
        for _ in range(15):
            p = torch.sigmoid(-(x[:n] @ w) * sign[:n])
            gradient = -(x[:n].mT @ (weight * p * sign[:n])) + 1e-2 * w
            hessian = (x[:n] * (weight * p * (1 - p))[:, None]).mT @ x[:n]
            w = w - torch.linalg.solve(hessian + 1e-2 * torch.eye(len(w)).double(), gradient)
        return w

    whole = solve(torch.ones(n).double(), torch.zeros(x.shape[1]).double())
    queries = x[n : n + 40]
    exact = torch.stack(
        [
            queries @ (whole - solve((torch.arange(n) != i).double(), whole)) * sign[n : n + 40]
            for i in range(n)
        ],
        dim=1,
    )
    model = torch.nn.Linear(x.shape[1], 2, bias=False).double()
    with torch.no_grad():  # two logits whose difference is the logit
        model.weight.copy_(torch.stack([-whole, whole]) / 2)
    found = Case(
        model,
        shared("mlp").task,
        TensorExamples(x[:n], y[:n]),
        TensorExamples(queries, y[n : n + 40]),
    )
    fitted = found.fit(Identity())
    p = probabilities(fitted)
    # the two logits carry every feature twice, so their ridge is twice that of the one logit
    ridge = 2e-2 * 2 * x.shape[1] / float((2 * x[:n].square().sum(1) * p * (1 - p)).sum())
    method = TRAK(rank=1000, reweight=True, ridge=ridge)
    scores = method.attribute(fitted, found.query, measurement="margin").values.double()
    hessian = (x[:n] * (p * (1 - p))[:, None]).mT @ x[:n] + 1e-2 * torch.eye(x.shape[1]).double()
    newton = (queries * sign[n : n + 40, None]) @ torch.linalg.solve(
        hessian, (x[:n] * (sign[:n] * (1 - p))[:, None]).mT
    )
    torch.testing.assert_close(scores, newton, rtol=1e-4, atol=1e-7)
    assert float(spearman(scores, exact).mean()) > 0.95
    # without the weights, as in the paper, the direction is another where most p are near one
    plain = TRAK(rank=1000).attribute(fitted, found.query, measurement="margin").values.double()
    assert 0.3 < float(spearman(plain, exact).mean()) < 0.6


def test_residuals_are_one_minus_the_probability():
    fitted = shared("mlp").fitted(Identity())
    torch.testing.assert_close(residuals(fitted), 1 - probabilities(fitted))
    lm = shared("lm")
    batch = lm.train.batch([0])
    loss = lm.task.token_loss(lm.model, batch)[0, : len(lm.train.sequences[0]) - 1]
    mine = residuals(lm.fitted(Identity()))[0]
    torch.testing.assert_close(mine, (1 - torch.exp(-loss)).mean().detach())


def test_redundant_features_do_no_harm():
    torch.manual_seed(0)
    phi, x = torch.randn(30, 4).double(), torch.randn(2, 4).double()
    torch.testing.assert_close(
        kernel_scores(torch.cat([x, x], 1), torch.cat([phi, phi], 1)), kernel_scores(x, phi)
    )


def test_soft_threshold_keeps_a_share():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    plain = TRAK(rank=2).attribute(fitted, found.query).values
    some = TRAK(rank=2, keep=0.5).attribute(fitted, found.query).values
    assert ((some != 0).sum(1) == 9).all() and bool((some.abs() <= plain.abs()).all())
    lowest = plain.abs().topk(10, dim=1).values[:, -1:]
    torch.testing.assert_close(some, soft_threshold(plain, lowest))


def test_the_default_rank_leaves_four_examples_a_feature():
    layers = shared("mlp").fitted(Identity()).followed.layers
    for n in (20, 100, 1000):
        rank = affordable_rank(layers, n)
        width = sum(TwoSided(rank).width(layer) for layer in layers)
        assert rank == 1 or width <= n / 4
    assert affordable_rank(layers, 10_000) == 32


def test_what_cannot_be_computed_is_refused():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    with pytest.raises(ValueError, match="determine nothing"):
        TRAK(rank=1000).attribute(fitted, found.query)
    regression = shared("regression")
    with pytest.raises(ValueError, match="needs classes"):
        TRAK().attribute(regression.fitted(Identity()), regression.query)
    with pytest.raises(ValueError, match="ridge must be"):
        TRAK(ridge=-1.0)


def test_a_rank_of_zero_is_refused_not_replaced():
    found = shared("mlp")
    with pytest.raises(ValueError, match="1 or more numbers a side; rank is"):
        TRAK(rank=0, ridge=0.1).attribute(found.fitted(Identity()), found.query)
