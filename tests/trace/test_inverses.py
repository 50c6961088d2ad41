"""DataInf, LiSSA, Arnoldi and the explicit inverse against dense matrices from whole Jacobians."""

import warnings

import pytest
import torch
from torch.func import functional_call

from headwater.core.curvature import Dense, Identity
from headwater.trace import Arnoldi, DataInf, Explicit, Influence, LiSSA
from headwater.trace.arnoldi import subspace_influence
from tests.curvature_cases import (
    EVERY,
    autograd_rows,
    case,
    dense_gauss_newton,
    loss_gradients,
    shared,
)

RHO = 0.05


def influence(fitted, queries, inverse):
    return (
        -loss_gradients(fitted, queries) @ inverse @ loss_gradients(fitted).mT / len(fitted.train)
    )


def damped_inverse(matrix, rho=RHO):
    return torch.linalg.inv(matrix + rho * torch.eye(len(matrix)).double())


def dense_hessian(fitted):
    named = {n: p.detach() for n, p in fitted.model.named_parameters()}
    layers, batch = list(fitted.followed), fitted.train.batch(range(len(fitted.train)))

    def loss(flat):
        values, start = {}, 0
        for layer in layers:
            part = flat[start : start + layer.numel].reshape(1, *layer.block)
            values |= {n: v[0] for n, v in layer.to_parameters(part).items()}
            start += layer.numel
        logits = functional_call(fitted.model, values, (batch[0],))
        return torch.nn.functional.cross_entropy(logits, batch[1])

    start = {n: p[None] for n, p in named.items()}
    flat = torch.cat([layer.from_parameters(start).flatten() for layer in layers])
    return torch.autograd.functional.hessian(loss, flat)  # reverse over reverse


@pytest.mark.parametrize("name", EVERY)
def test_explicit_equals_the_dense_gauss_newton_matrix(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    expected = influence(fitted, found.query, damped_inverse(dense_gauss_newton(fitted)))
    scores = Explicit(damping=RHO).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    dense = Influence(damping=RHO, n_intervals=0).attribute(found.fitted(Dense()), found.query)
    torch.testing.assert_close(scores.values, dense.values, rtol=1e-3, atol=1e-5)  # labels cut
    assert scores.unit == "nats"


@pytest.mark.parametrize("name", ["mlp", "norm", "conv"])
def test_explicit_with_the_hessian(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    H = dense_hessian(fitted)
    torch.testing.assert_close(Explicit(matrix="hessian").form(fitted), H)
    rho = 0.1 - float(torch.linalg.eigvalsh(H)[0])
    expected = influence(fitted, found.query, damped_inverse(H, rho))
    scores = Explicit(matrix="hessian", damping=rho).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="not at a minimum"):
        Explicit(matrix="hessian", damping=1e-4).attribute(fitted, found.query)


def test_explicit_refuses_large_models():
    found = shared("mlp")
    with pytest.raises(ValueError, match=r"at most 10 followed parameters; this one has 53"):
        Explicit(max_parameters=10).attribute(found.fitted(Identity()), found.query)


@pytest.mark.parametrize("name", EVERY)
def test_datainf_equals_its_definition(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    n, expected = len(found.train), 0.0
    queries = autograd_rows(fitted, fitted.task.loss, found.query)
    train = autograd_rows(fitted, fitted.task.loss, found.train)
    for layer in fitted.followed:
        v, g = queries[layer.name], train[layer.name]
        rho = 0.1 * g.square().mean()
        solved = torch.zeros_like(v)
        for one in g:  # the inverse of each example's own matrix, by brute force
            solved += v @ damped_inverse(torch.outer(one, one), float(rho)) / n
        expected = expected - solved @ g.mT / n
    scores = DataInf().attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)


def test_datainf_of_one_example_is_the_exact_damped_inverse():
    found = case("mlp")
    fitted = found.fit(Identity(), layers="2")
    one = type(found)(found.model, found.task, found.train.subset([3]), found.query).fit(
        Identity(), layers="2"
    )
    g = loss_gradients(one)
    rho = float(0.1 * g.square().mean())
    expected = -loss_gradients(fitted, found.query) @ damped_inverse(g.mT @ g, rho) @ g.mT
    scores = DataInf().attribute(one, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_lissa_over_all_data_converges_to_the_damped_inverse(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    expected = influence(fitted, found.query, damped_inverse(dense_gauss_newton(fitted), 0.3))
    method = LiSSA(damping=0.3, steps=150, n_samples=None, tolerance=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = method.attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-3, atol=1e-5)
    assert scores.facts["residual"] < 1e-4


def test_lissa_over_samples_comes_near_and_nearer_with_repeats():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    exact = influence(fitted, found.query, damped_inverse(dense_gauss_newton(fitted), 0.3))
    errors = []
    for repeats in (1, 8):
        method = LiSSA(damping=0.3, steps=25, n_samples=6, repeats=repeats, tolerance=9.0)
        values = method.attribute(fitted, found.query).values.double()
        errors.append(float((values - exact).norm() / exact.norm()))
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.15


def test_lissa_refuses_to_diverge_and_warns_of_a_series_cut_short():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    with pytest.raises(FloatingPointError, match=r"diverges under scale=0.1"):
        LiSSA(damping=RHO, scale=0.1, n_samples=None).attribute(fitted, found.query)
    with pytest.warns(UserWarning, match="stopped after 3 terms"):
        LiSSA(damping=RHO, steps=3).attribute(fitted, found.query)


def test_lissa_raises_its_own_scale_where_single_examples_are_stiffer():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    method = LiSSA(damping=RHO, steps=200, n_samples=1, tolerance=1e9)
    assert bool(method.attribute(fitted, found.query).values.isfinite().all())


@pytest.mark.parametrize("name", EVERY)
def test_arnoldi_of_full_rank_is_the_pseudoinverse(name):
    found = shared(name)
    fitted = found.fitted(Identity())
    C = dense_gauss_newton(fitted)
    expected = influence(fitted, found.query, torch.linalg.pinv(C, rtol=1e-4, hermitian=True))
    scores = Arnoldi(rank=1000, steps=1000, least=1e-4).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
def test_arnoldi_keeps_the_leading_eigenvectors(matrix):
    found = shared("mlp")
    fitted = found.fitted(Identity())
    C = dense_gauss_newton(fitted) if matrix == "gauss_newton" else dense_hessian(fitted)
    values, vectors = torch.linalg.eigh(C)
    leading = values.abs().argsort(descending=True)[:5]
    values, basis = values[leading], vectors[:, leading]
    x, y = loss_gradients(fitted, found.query), loss_gradients(fitted)
    expected = subspace_influence(x @ basis, basis.mT @ y.mT, values)
    scores = Arnoldi(rank=5, steps=60, matrix=matrix).attribute(fitted, found.query)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-4, atol=1e-5)
    assert scores.facts["kept"] == 5


def test_arnoldi_over_some_examples_and_settings_that_make_no_sense():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    some = Arnoldi(rank=4, steps=40, n_examples=9, seed=2)
    values, vectors = some.eigenpairs(fitted)
    drawn = torch.randperm(18, generator=torch.Generator().manual_seed(2))[:9]
    part = type(found)(found.model, found.task, found.train.subset(drawn.tolist()), found.query)
    C = dense_gauss_newton(part.fit(Identity()))
    torch.testing.assert_close(vectors @ C, values[:, None] * vectors, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="rank from 1"):
        Arnoldi(rank=10, steps=5)
