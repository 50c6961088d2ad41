"""K-FAC where it is exact, EK-FAC nearer than K-FAC, and what a curvature offers."""

import pytest
import torch
from torch import nn

from headwater.core.capture import BatchInfo
from headwater.core.curvature import EKFAC, KFAC, Diagonal, Identity, Layerwise
from headwater.core.damping import Damping, Inverse
from headwater.core.examples import TensorExamples
from headwater.core.gradients import Gradients
from headwater.core.target import Loss
from headwater.core.task import Regression
from tests.curvature_cases import (
    Case,
    Pooled,
    block_matrices,
    blocks_of,
    case,
    dense_gauss_newton,
    loss_gradients,
    position_regression,
    shared,
)

EXACT = {"fisher": "exact", "cut": 0.0}


def assert_equals_exact_blocks(fitted):
    exact = blocks_of(dense_gauss_newton(fitted), fitted)
    for name, block in block_matrices(fitted).items():
        # sums of some hundred products in float64, and an eigendecomposition taken back
        torch.testing.assert_close(block, exact[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [KFAC(**EXACT), EKFAC(**EXACT)])
def test_is_the_exact_block_of_a_deep_linear_network_with_squared_loss(method):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    x, y = torch.randn(15, 4).double(), torch.randn(15, 2).double()
    train = TensorExamples(x, y)
    assert_equals_exact_blocks(Case(model, Regression(), train, train).fit(method))


def test_expand_is_exact_where_each_position_has_its_own_loss():
    # the setting of Eschenhagen et al. (2023), section 3.2: deep linear, weights shared over positions
    model = Pooled((4, 5, 2), linear=True, pool=False).double()
    x, y = torch.randn(9, 3, 4).double(), torch.randn(9, 3, 2).double()
    train = TensorExamples(x, y)
    found = Case(model, position_regression(2), train, train)
    assert_equals_exact_blocks(found.fit(KFAC(approximation="expand", **EXACT)))


def test_reduce_is_exact_where_positions_are_pooled():
    model = Pooled((4, 5, 2), linear=True).double()
    x, y = torch.randn(9, 3, 4).double(), torch.randn(9, 2).double()
    train = TensorExamples(x, y)
    found = Case(model, Regression(), train, train)
    assert_equals_exact_blocks(found.fit(KFAC(approximation="reduce", **EXACT)))
    exact = blocks_of(dense_gauss_newton(found.fit("identity")), found.fit("identity"))
    expanded = block_matrices(found.fit(KFAC(approximation="expand", **EXACT)))
    assert (expanded["layers.0"] - exact["layers.0"]).norm() > 0.1 * exact["layers.0"].norm()


def test_gains_and_biases_of_a_norm_are_exact_blocks():
    fitted = shared("norm").fitted(KFAC(**EXACT))
    exact = blocks_of(dense_gauss_newton(fitted), fitted)
    torch.testing.assert_close(block_matrices(fitted)["1"], exact["1"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "positions", "conv", "lm"])
def test_ekfac_is_nearer_the_exact_block_than_kfac(name):
    found = shared(name)
    kfac, ekfac = found.fitted(KFAC(**EXACT)), found.fitted(EKFAC(**EXACT))
    exact = blocks_of(dense_gauss_newton(ekfac), ekfac)
    ours, theirs = block_matrices(ekfac), block_matrices(kfac)
    for name, block in exact.items():
        # equal where the block is one factor (gains of a norm), up to rounding
        assert (ours[name] - block).norm() <= (theirs[name] - block).norm() + 1e-12


@pytest.mark.parametrize("name", ["mlp", "positions", "conv", "lm", "regression"])
def test_ekfac_eigenvalues_are_the_diagonal_of_the_exact_block_in_the_eigenbasis(name):
    fitted = shared(name).fitted(EKFAC(**EXACT))
    exact = blocks_of(dense_gauss_newton(fitted), fitted)
    for layer in fitted.followed:
        Q_A, Q_G = fitted.curvature.bases[layer.name]
        eigenvalues = fitted.curvature.eigenvalues[layer.name]
        if layer.shape[0] == 1:
            Q_A, Q_G, eigenvalues = Q_A[None], Q_G[None], eigenvalues[None]
        Q = torch.block_diag(*[torch.kron(g, a) for g, a in zip(Q_G, Q_A, strict=True)])
        diagonal = (Q.mT @ exact[layer.name] @ Q).diagonal()
        torch.testing.assert_close(eigenvalues.flatten(), diagonal, rtol=1e-9, atol=1e-12)


def test_diagonal_is_the_diagonal():
    fitted = shared("conv").fitted(Diagonal(**EXACT))
    exact = blocks_of(dense_gauss_newton(fitted), fitted)
    for name, eigenvalues in fitted.curvature.eigenvalues.items():
        torch.testing.assert_close(
            eigenvalues.flatten(), exact[name].diagonal(), rtol=1e-9, atol=1e-12
        )


def test_empirical_labels_give_the_second_moment_of_the_given_gradients():
    fitted = shared("mlp").fitted(Diagonal(fisher="empirical"))
    expected = loss_gradients(fitted).square().mean(0)
    eigenvalues = fitted.curvature.eigenvalues
    found = torch.cat([eigenvalues[layer.name].flatten() for layer in fitted.followed])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_drawn_labels_approach_the_exact_fisher():
    found = case("mlp")
    exact = found.fit(Diagonal(**EXACT)).curvature.eigenvalues
    drawn = found.fit(Diagonal(fisher="mc", draws=100, folds=1)).curvature.eigenvalues
    for name, e in exact.items():
        # 100 draws of 18 examples: a relative error of a few times 1 / sqrt(1800) = 2.4 %
        assert (drawn[name] - e).norm() < 0.1 * e.norm()


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_any_function_is_the_dense_matrix_function(name):
    fitted = shared(name).fitted(EKFAC(**EXACT))
    matrices = block_matrices(fitted)
    x = Gradients({layer.name: torch.randn(2, *layer.block).double() for layer in fitted.followed})
    applied = fitted.curvature.apply(x, lambda e, mean: (-3 * e).exp() + mean)
    for layer in fitted.followed:
        mean = fitted.curvature.eigenvalues[layer.name].mean()
        matrix = (
            torch.matrix_exp(-3 * matrices[layer.name]) + mean * torch.eye(layer.numel).double()
        )
        expected = x.blocks[layer.name].flatten(1) @ matrix
        torch.testing.assert_close(
            applied.blocks[layer.name].flatten(1), expected, rtol=1e-8, atol=1e-10
        )


def test_quadratic_forms_are_those_of_apply():
    fitted = shared("conv").fitted(EKFAC(**EXACT))
    x = Gradients({layer.name: torch.randn(3, *layer.block).double() for layer in fitted.followed})
    function = Inverse(Damping(0.1, "relative"))
    expected = (x.to_matrix() * fitted.curvature.apply(x, function).to_matrix()).sum(1)
    torch.testing.assert_close(fitted.curvature.quadratic(x, function), expected)


def test_a_long_side_keeps_its_diagonal():
    found = shared("mlp")
    fitted = found.fitted(EKFAC(max_factor=5, **EXACT))  # the first layer reads 6 numbers and a one
    assert fitted.curvature.bases["0"][0] is None
    whole = found.fitted(Diagonal(**EXACT)).curvature.eigenvalues["0"]
    rotated = fitted.curvature.eigenvalues["0"]
    torch.testing.assert_close(rotated.sum(0), whole.sum(0))  # the other side is only rotated
    kfac = found.fitted(KFAC(max_factor=2, **EXACT)).curvature
    assert kfac.bases["0"] == (None, None)
    assert kfac.facts["moments_examples"] == 18


def test_shared_inputs_give_what_separate_inputs_give(monkeypatch):
    found = case("lm")
    together = found.fit(EKFAC(**EXACT))
    names = {layer.name: layer.input_group for layer in together.followed}
    assert names["q"] == names["k"] == names["v"]
    from headwater.core import follow

    def ungrouped(layers, calls):
        return [type(x)(**{**vars(x), "input_group": x.name}) for x in layers]

    monkeypatch.setattr(follow, "_with_input_groups", ungrouped)
    apart = found.fit(EKFAC(**EXACT))
    assert len({layer.input_group for layer in apart.followed}) == len(apart.followed)
    ours, theirs = block_matrices(together), block_matrices(apart)
    for name, block in theirs.items():
        torch.testing.assert_close(ours[name], block, rtol=1e-9, atol=1e-12)


def test_replicates_leave_out_one_fold_each():
    found = shared("mlp")
    curvature = found.fitted(EKFAC(folds=3, own_bases=False, **EXACT)).curvature
    replicates = curvature.replicates()
    assert len(replicates) == curvature.n_replicates == 3
    for name, e in curvature.eigenvalues.items():
        n = torch.tensor([r.n_examples for r in replicates])
        means = sum(w * r.eigenvalues[name] for w, r in zip(n, replicates, strict=True))
        torch.testing.assert_close(means / n.sum(), e)  # each fold is missing once
    assert found.fitted(EKFAC(folds=1, **EXACT)).curvature.replicates() == []
    assert found.fitted(KFAC(**EXACT)).curvature.n_replicates == 0


@pytest.mark.parametrize("method", [Identity(), Diagonal(), KFAC(), EKFAC(max_factor=5)])
def test_comes_back_from_its_tensors(method):
    curvature = case("conv").fit(method).curvature
    again = Layerwise.from_tensors(curvature.tensors(), curvature.facts)
    assert again.n_examples == curvature.n_examples
    for name, e in curvature.eigenvalues.items():
        assert torch.equal(again.eigenvalues[name], e)
        for mine, theirs in zip(again.bases[name], curvature.bases[name], strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_a_tolerance_stops_early_and_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    train = TensorExamples(torch.randn(1200, 4).double(), torch.randint(3, (1200,)))
    found = Case(model, case("mlp").task, train, train)
    facts = found.fit(EKFAC(tolerance=0.1), batch_size=20).curvature.facts
    assert facts["moments_examples"] < 1000 and facts["eigenvalues_examples"] < 1200
    assert facts["moments_relative_error"] < 0.1 and facts["eigenvalues_relative_error"] < 0.1
    whole = found.fit(KFAC(), batch_size=20).curvature.facts
    assert whole["moments_examples"] == 1200
    assert whole["moments_relative_error"] < facts["moments_relative_error"]


@pytest.mark.parametrize(
    "options", [{"tolerance": 0.0}, {"tolerance": -1.0}, {"draws": 0}, {"folds": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        EKFAC(**options)


def test_a_tolerance_without_folds_is_refused():
    with pytest.raises(ValueError, match="folds=5"):
        shared("mlp").fitted(EKFAC(tolerance=0.1, folds=1))


@pytest.mark.parametrize("method", [KFAC(fisher="empirical"), EKFAC(fisher="empirical", folds=2)])
def test_the_factors_behind_the_bases_are_kept_and_saved(method):
    found = shared("mlp")
    fitted = found.fitted(method)
    rows = [fitted.curvature, Layerwise.from_tensors(fitted.curvature.tensors(), {})]
    capture, layers = fitted.capture(), [layer.name for layer in fitted.followed]
    seen: dict[str, list] = {name: [] for name in layers}
    with capture.hooks():
        data = fitted.train.batch(range(len(fitted.train)))
        info = BatchInfo(torch.arange(len(fitted.train)))
        emit = lambda rows: seen[rows.layer.name].extend([rows.a[:, 0], rows.g[:, 0]])  # noqa: E731
        capture.backward(data, Loss(), info, fitted.train.keys, emit)
    for curvature in rows:
        for name in layers:
            for factor, x in zip(curvature.factors(name), seen[name], strict=True):
                # products of some twenty rows in float64, and an eigendecomposition taken back
                torch.testing.assert_close(factor, x.mT @ x / len(x), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="holds no factors of '0'"):
        found.fitted(Identity()).curvature.factors("0")
