"""Projected gradients equal projections of whole ones, by autograd."""

import pytest
import torch

from headwater.core.capture import plan_batches, sweep
from headwater.core.curvature import Identity
from headwater.core.projection import (
    TOGETHER,
    Joint,
    ProjectGradients,
    TwoSided,
    project_gradients,
)
from headwater.core.target import Loss
from headwater.numerics import noise
from headwater.numerics.projection import random_matrix
from headwater.trace.influence import query_gradients
from tests.curvature_cases import EVERY, autograd_rows, shared


def rows_of(fitted, projection, *, examples=None, batch_size=5, **options):
    examples = fitted.train if examples is None else examples
    found = ProjectGradients(fitted.followed, projection, len(examples), **options)
    sweep(
        fitted.capture(),
        examples,
        [found],
        Loss(),
        batches=plan_batches(examples, batch_size=batch_size, batch_tokens=20),
    )
    return found


@pytest.mark.parametrize("name", EVERY)
def test_a_large_rank_keeps_whole_gradients(name):
    fitted = shared(name).fitted(Identity())
    expected = autograd_rows(fitted, fitted.task.loss, fitted.train)
    found = rows_of(fitted, TwoSided(1000)).finish()
    assert list(found) == list(expected)  # the backward pass comes in another order
    for layer, rows in expected.items():
        torch.testing.assert_close(found[layer], rows)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_two_sided_rows_equal_projected_whole_gradients(name, kind):
    fitted = shared(name).fitted(Identity())
    whole = autograd_rows(fitted, fitted.task.loss, fitted.train)
    projection = TwoSided(2, seed=4, kind=kind)
    found = rows_of(fitted, projection).finish()
    for layer in fitted.followed:
        G = whole[layer.name].unflatten(1, layer.block)
        P_out, P_in = (None if p is None else p.double() for p in projection.sides(layer))
        G = G if P_out is None else P_out @ G
        G = G if P_in is None else G @ P_in.mT
        torch.testing.assert_close(found[layer.name], G.flatten(1))
        assert found[layer.name].shape[1] == projection.width(layer)


@pytest.mark.parametrize("name", EVERY)
def test_joint_rows_equal_one_matrix_over_all_parameters(name):
    fitted = shared(name).fitted(Identity())
    whole = autograd_rows(fitted, fitted.task.loss, fitted.train)
    expected = 0.0
    for layer in fitted.followed:
        key = int(noise.keys([layer.name])[0])
        P = random_matrix(9, range(layer.numel), seed=2, key=key).double()
        expected = expected + whole[layer.name] @ P.mT / 3
    found = rows_of(fitted, Joint(9, seed=2)).finish()
    assert list(found) == [TOGETHER]
    torch.testing.assert_close(found[TOGETHER], expected)


@pytest.mark.parametrize("projection", [TwoSided(2), Joint(7)], ids=["two-sided", "joint"])
@pytest.mark.parametrize("name", ["conv", "lm"])
def test_gradients_at_hand_and_swept_ones_agree(name, projection):
    fitted = shared(name).fitted(Identity())
    swept = rows_of(fitted, projection, examples=fitted.train).finish()
    gradients = query_gradients(fitted, fitted.train)
    for each in (gradients, gradients.dense()):
        at_hand = project_gradients(each, fitted.followed, projection)
        assert at_hand.keys() == swept.keys()
        for layer, rows in swept.items():
            torch.testing.assert_close(at_hand[layer], rows)


def test_any_split_of_the_data_merges_to_the_whole_and_resumes():
    fitted = shared("lm").fitted(Identity())
    projection, n = TwoSided(2), len(fitted.train)
    whole = rows_of(fitted, projection).finish()
    plans, halves = plan_batches(fitted.train, batch_size=1), []
    for part in (plans[:2], plans[2:]):
        half = ProjectGradients(fitted.followed, projection, n)
        sweep(fitted.capture(), fitted.train, [half], Loss(), batches=part)
        halves.append(half)
    again = ProjectGradients(fitted.followed, projection, n)
    again.load(halves[0].tensors())
    again.merge(halves[1])
    for name, rows in whole.items():
        torch.testing.assert_close(again.finish()[name], rows)


def test_given_sides_and_ranks_of_single_layers():
    fitted = shared("mlp").fitted(Identity())
    first, second = fitted.followed.layers
    basis = torch.linalg.qr(torch.randn(first.shape[2], 3).double()).Q.mT
    projection = TwoSided(2, ranks={second.name: (1, 4)}, sides={first.name: (None, basis)})
    found = rows_of(fitted, projection).finish()
    whole = autograd_rows(fitted, fitted.task.loss, fitted.train)[first.name]
    torch.testing.assert_close(
        found[first.name], (whole.unflatten(1, first.block) @ basis.mT).flatten(1)
    )
    assert found[second.name].shape[1] == projection.width(second) == 4


def test_a_transformation_comes_before_the_projection():
    fitted = shared("mlp").fitted(Identity())
    plain = rows_of(fitted, TwoSided(2)).finish()
    double = rows_of(fitted, TwoSided(2), transform=lambda layer, block: 2 * block.dense())
    for name, rows in double.finish().items():
        torch.testing.assert_close(rows, 2 * plain[name])


def test_inner_products_are_kept_on_average_over_seeds():
    fitted = shared("positions").fitted(Identity())
    whole = torch.cat(list(autograd_rows(fitted, fitted.task.loss, fitted.train).values()), dim=1)
    exact = whole @ whole.mT
    for make in (lambda s: TwoSided(3, seed=s), lambda s: Joint(16, seed=s)):
        grams = []
        for seed in range(60):
            rows = torch.cat(list(rows_of(fitted, make(seed)).finish().values()), dim=1)
            grams.append(rows @ rows.mT)
        grams = torch.stack(grams)
        error, spread = grams.mean(0) - exact, grams.std(0) / 60**0.5
        assert float(error.norm()) < 2.5 * float(spread.norm())  # entries are correlated
        assert float(error.norm()) < 0.2 * float(exact.norm())


def test_empty_projections_are_refused():
    for make in (lambda: TwoSided(0), lambda: Joint(0), lambda: TwoSided(2, ranks={"a": (0, 1)})):
        with pytest.raises(ValueError, match="1 or more"):
            make()
