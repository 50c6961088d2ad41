"""The dual form equals the dense matrix, function by function."""

import math

import pytest
import torch
from torch import nn

from headwater.core.curvature import Dense, Dual, DualCurvature, dual
from headwater.core.curvature.dual import gram_eigen, gram_matrix, gram_middle
from headwater.core.damping import Damping, Inverse
from headwater.core.examples import TensorExamples
from headwater.core.gradients import Factored, Gradients
from headwater.core.task import Classification
from tests.curvature_cases import EVERY, Case, autograd_rows, case, shared

RHO = 3e-3


def source(eigenvalues: torch.Tensor, mean: float) -> torch.Tensor:
    """One segment of approximate unrolling, with weight decay 1e-2 and horizon 20."""
    return (1 - torch.exp(-20 * (eigenvalues + 1e-2))) / (eigenvalues + 1e-2)


def random_gradients(fitted, n: int = 3) -> Gradients:
    generator = torch.Generator().manual_seed(5)
    return Gradients(
        {
            layer.name: torch.randn(n, *layer.block, generator=generator).double()
            for layer in fitted.followed
        }
    )


@pytest.mark.parametrize("name", EVERY)
def test_damped_inverse_and_any_function_equal_the_dense_matrix(name):
    found = shared(name)
    dense, dual = found.fitted(Dense()), found.fitted(Dual(cut=0.0))
    x = random_gradients(dual)
    for function in (Inverse(Damping(RHO)), Inverse(Damping(0.1, "relative")), source):
        expected = dense.curvature.apply(x, function).to_matrix()
        # a solve in float64 whose condition is at most some 1e4
        torch.testing.assert_close(
            dual.curvature.apply(x, function).to_matrix(), expected, rtol=1e-8, atol=1e-8
        )
        quadratic = dual.curvature.quadratic(x, function)
        torch.testing.assert_close(
            quadratic, (x.to_matrix() * expected).sum(1), rtol=1e-8, atol=1e-8
        )
    assert dual.curvature.mean_eigenvalue == pytest.approx(
        dense.curvature.mean_eigenvalue, rel=1e-9
    )
    mine, theirs = (f.curvature.spectra()["all layers"] for f in (dual, dense))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "short positions"])
def test_queries_left_as_combinations_score_as_preconditioned_ones(name):
    found = shared(name)
    curvature = found.fitted(Dual(cut=0.0)).curvature
    x, data = (
        random_gradients(found.fitted("identity"), 6),
        random_gradients(found.fitted("identity"), 9),
    )
    function = Inverse(Damping(RHO))
    expected = curvature.apply(x, function).inner(data)
    kinds = set()
    for n_rows in (1, 10**9):  # few rows are scored with whole matrices, many with the root's rows
        prepared = curvature.prepare(x, function, n_rows)
        kinds.add(type(prepared).__name__)
        scores = sum(prepared.layer(n, data.blocks[n]).double() for n in data.blocks)
        rest = prepared.finish_batch()
        scores = scores if rest is None else scores + rest
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prepared.dense().inner(data), expected, rtol=1e-9, atol=1e-9)
    assert kinds == {"Preconditioned", "_Combined"}


def test_rows_with_several_positions_stay_factored_where_that_is_smaller():
    rows = shared("short positions").fitted(Dual()).curvature.rows
    assert isinstance(rows.blocks["layers.0"], Factored) and rows.blocks["layers.0"].pos == 2
    dense = shared("conv").fitted(Dual()).curvature.rows
    assert not isinstance(dense.blocks["second"], Factored)


def test_no_cut_is_the_limit_of_small_cuts():
    found = case("mlp")
    for p in found.model.parameters():
        p.data.mul_(6)  # some classes become improbable
    whole = found.fit(Dual(cut=0.0)).curvature
    x = random_gradients(found.fit("identity"))
    function = Inverse(Damping(RHO))
    expected = whole.apply(x, function).to_matrix()
    errors, rows = [], []
    for cut in (0.3, 1e-2, 1e-4, 1e-12):
        some = found.fit(Dual(cut=cut)).curvature
        errors.append(float((some.apply(x, function).to_matrix() - expected).norm()))
        rows.append(len(some.rows))
    assert errors[0] > errors[2] and errors[3] < 1e-6 * errors[0]
    assert rows[0] < rows[3] == len(whole.rows) == 3 * len(found.train)


def test_lost_trace_is_what_the_dropped_labels_carry():
    found = case("mlp")
    for p in found.model.parameters():
        p.data.mul_(4)
    cut = 0.2
    with torch.no_grad():
        p = found.model(found.train.tensors[0]).softmax(1)
    each = p * (p[:, None] - torch.eye(3)).square().sum(2)  # p_y |∇_z ℓ_y|² = p_y |p - e_y|²
    lost = float(each[p < cut].sum() / each.sum())
    assert 0.01 < lost < 0.5
    for batch_size in (256, 5):
        facts = found.fit(Dual(cut=cut), batch_size=batch_size).curvature.facts
        assert facts["lost_trace"] == pytest.approx(lost, rel=1e-9)
        assert facts["rows"] == int((p >= cut).sum())
    assert found.fit(Dual(cut=0.0)).curvature.facts["lost_trace"] == 0


def test_empirical_and_drawn_rows():
    found = shared("mlp")
    given = found.fitted(Dual(fisher="empirical"))
    loss = autograd_rows(given, found.task.loss, found.train)
    V = torch.cat(list(loss.values()), dim=1)
    torch.testing.assert_close(given.curvature.gram, V @ V.mT)
    drawn = found.fitted(Dual(fisher="mc", draws=3)).curvature
    assert len(drawn.rows) == 3 * 18 and "lost_trace" not in drawn.facts


def test_replicates_are_the_fit_without_a_fold():
    found = case("mlp")
    curvature = found.fit(Dual(cut=0.0, folds=3)).curvature
    x = random_gradients(found.fit("identity"))
    fold_of = found.train.keys % 3
    for k, replicate in enumerate(curvature.replicates()):
        rest = (fold_of != k).nonzero().squeeze(1).tolist()
        alone = Case(found.model, found.task, found.train.subset(rest), found.query).fit(Dense())
        assert replicate.n_examples == len(rest)
        for function in (Inverse(Damping(RHO)), Inverse(Damping(0.1, "relative"))):
            torch.testing.assert_close(
                replicate.apply(x, function).to_matrix(),
                alone.curvature.apply(x, function).to_matrix(),
                rtol=1e-8,
                atol=1e-8,
            )
    assert found.fit(Dual(folds=1)).curvature.n_replicates == 0


@pytest.mark.parametrize("name", ["mlp", "conv", "short positions"])
def test_batches_change_nothing(name):
    found = case(name)
    a, b = (found.fit(Dual(cut=0.0), batch_size=n).curvature for n in (4, 100))
    torch.testing.assert_close(a.gram, b.gram, rtol=1e-12, atol=1e-14)
    assert torch.equal(a.folds, b.folds) and torch.equal(a.n_folds, b.n_folds)


def test_functions_do_not_stand_in_for_each_other():
    found = case("mlp")
    curvature, x = found.fit(Dual()).curvature, random_gradients(found.fit("identity"))
    scaled = [
        curvature.apply(x, lambda e, mean, c=c: c / (1 + e)).to_matrix() for c in (1.0, 2.0, 3.0)
    ]  # each function is gone when the next one comes, and may have its address
    torch.testing.assert_close(scaled[1], 2 * scaled[0])
    torch.testing.assert_close(scaled[2], 3 * scaled[0])


def test_more_rows_than_parameters():
    torch.manual_seed(0)
    x, y = torch.randn(60, 2).double(), torch.randint(3, (60,))
    train = TensorExamples(x, y)
    found = Case(nn.Linear(2, 3).double(), Classification(), train, train)
    dense, dual = found.fit(Dense()).curvature, found.fit(Dual(cut=0.0)).curvature
    mine, theirs = dual.spectra()["all layers"], dense.spectra()["all layers"]
    assert len(mine) == 9 and len(dual.rows) == 180
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    g = random_gradients(found.fit("identity"))
    for function in (Inverse(Damping(RHO)), source):
        torch.testing.assert_close(
            dual.apply(g, function).to_matrix(),
            dense.apply(g, function).to_matrix(),
            rtol=1e-8,
            atol=1e-8,
        )


def test_the_middle_drops_the_null_space():
    V = torch.randn(2, 5).double()
    V = torch.cat([V, V[:1]])  # a row twice
    M, f0 = gram_middle(gram_eigen(V @ V.mT, 4.0), 4.0, source, 0.0)
    e, U = torch.linalg.eigh(V.mT @ V / 4)
    expected = (U * source(e, 0.0)) @ U.mT
    torch.testing.assert_close(f0 * torch.eye(5).double() + V.mT @ M @ V, expected)


def test_gram_matrix_adds_up_over_layers(monkeypatch):
    from headwater.core import gradients

    monkeypatch.setattr(gradients, "_CHUNK", 50)  # many small steps
    rows = Gradients(
        {
            "a": Factored(torch.randn(11, 1, 4).double(), torch.randn(11, 1, 3).double()),
            "b": Factored(torch.randn(2, 11, 3, 2).double(), torch.randn(2, 11, 3, 2).double()),
            "c": torch.randn(11, 2, 3).double(),
        }
    )
    V = rows.to_matrix()
    torch.testing.assert_close(gram_matrix(rows), V @ V.mT)


def test_single_precision_says_when_it_fails():
    torch.manual_seed(0)
    a, g = torch.randn(30, 1, 3), torch.randn(30, 1, 2)  # rank 6 at most
    rows = Gradients({"a": Factored(a, g)})
    curvature = DualCurvature(rows, torch.zeros(30, dtype=torch.int64), torch.tensor([30.0]))
    x = Gradients({"a": torch.randn(1, 2, 3)})
    with pytest.warns(UserWarning, match="Raise the damping"):
        applied = curvature.apply(x, Inverse(Damping(1e-12)))
    assert math.isfinite(float(applied.to_matrix().norm()))
    curvature.apply(x, Inverse(Damping(1.0)))
    assert 1 < curvature.facts["condition"] < 1e4


def test_too_many_rows_are_refused_with_remedies():
    with pytest.raises(ValueError, match=r"max_rows=20 rows.*Raise `cut`.*fisher='mc'.*EKFAC"):
        shared("mlp").fitted(Dual(cut=0.0, max_rows=20))


def test_rows_whose_gram_matrix_does_not_fit_are_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(dual, "available_memory_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=r"rows so far.*0\.0 GB are free\. Raise `cut`.*EKFAC"):
        shared("mlp").fitted(Dual(cut=0.0, max_rows=12_345))


def test_comes_back_from_its_tensors():
    found = shared("conv")
    curvature = found.fitted(Dual()).curvature
    again = DualCurvature.from_tensors(curvature.tensors(), curvature.facts)
    x = random_gradients(found.fitted("identity"))
    function = Inverse(Damping(RHO))
    assert torch.equal(
        again.apply(x, function).to_matrix(), curvature.apply(x, function).to_matrix()
    )
    assert again.n_replicates == curvature.n_replicates == 5
