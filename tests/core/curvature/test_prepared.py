"""Queries kept in the eigenbasis score as preconditioned ones, and a separable form is the best of its size."""

import pytest
import torch

from headwater.core.curvature import EKFAC, Diagonal
from headwater.core.curvature.prepared import InEigenbasis, separable
from headwater.core.damping import Damping, Inverse
from headwater.core.gradients import Factored, Gradients, dense
from tests.curvature_cases import shared

FUNCTION = Inverse(Damping(0.01))


def gradients(fitted, n: int, pos: int | None) -> Gradients:
    """Random gradients, factored over `pos` positions or dense."""
    blocks = {}
    for layer in fitted.followed:
        lead = layer.block[:-2]
        a, g = (
            torch.randn(*lead, n, pos or 1, layer.shape[2]),
            torch.randn(*lead, n, pos or 1, layer.shape[1]),
        )
        block = Factored(a.double(), g.double())
        blocks[layer.name] = block if pos else dense(block)
    return Gradients(blocks)


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
@pytest.mark.parametrize("pos", [None, 1, 3])
@pytest.mark.parametrize("method", [EKFAC(), EKFAC(max_factor=4), Diagonal()])
def test_both_forms_score_alike(name, pos, method):
    fitted = shared(name).fitted(method)
    queries, data = gradients(fitted, 3, pos), gradients(fitted, 5, 2)
    expected = fitted.curvature.apply(queries, FUNCTION).inner(data)
    kinds = set()
    for n_rows in (1, 10**9):  # few rows are rotated, for many the queries are rotated back
        prepared = fitted.curvature.prepare(queries, FUNCTION, n_rows)
        kinds.add(type(prepared).__name__)
        scores = sum(prepared.layer(n, b) for n, b in data.blocks.items())
        assert prepared.finish_batch() is None and prepared.n == 3
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prepared.dense().inner(data), expected, rtol=1e-9, atol=1e-9)
    assert "InEigenbasis" in kinds and (len(kinds) == 2 or isinstance(method, Diagonal))


def test_inputs_that_layers_share_are_rotated_once_a_batch():
    fitted = shared("lm").fitted(EKFAC())
    prepared = fitted.curvature.prepare(gradients(fitted, 2, None), FUNCTION, 1)
    assert isinstance(prepared, InEigenbasis)
    a = torch.randn(3, 4, 5).double()
    for name in ("q", "k", "v"):
        prepared.layer(name, Factored(a, torch.randn(3, 4, 4).double()))
        assert prepared._shared._a is a
        rotated = prepared._shared._rotated
    prepared.layer("v", Factored(a, torch.randn(3, 4, 4).double()))
    assert prepared._shared._rotated is rotated
    prepared.finish_batch()
    assert prepared._shared._a is None


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_as_many_terms_as_the_shorter_side_are_exact(name):
    fitted = shared(name).fitted(EKFAC())
    queries, data = gradients(fitted, 3, 1), gradients(fitted, 5, 1)
    expected = fitted.curvature.apply(queries, FUNCTION).inner(data)
    errors = []
    for terms in (1, 2, 9):
        prepared = fitted.curvature.prepare(queries, FUNCTION, 100, terms=terms)
        scores = sum(prepared.layer(n, b) for n, b in data.blocks.items())
        errors.append(float((scores - expected).norm() / expected.norm()))
        torch.testing.assert_close(prepared.dense().inner(data), scores)
    assert errors[2] < 1e-9 < errors[1]
    several = gradients(fitted, 5, 2)  # data with more positions take the same form, multiplied out
    scores = sum(prepared.layer(n, b) for n, b in several.blocks.items())
    expected = fitted.curvature.apply(queries, FUNCTION).inner(several)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_separable_form_is_the_best_in_the_norm_weighted_by_marginals(lead):
    torch.manual_seed(0)
    weight = torch.rand(*lead, 5, 4).double().exp()
    factor = 1 / (torch.rand(*lead, 5, 4).double() + 0.01)
    u, v = separable(factor, weight, 2)
    found = torch.einsum("r...i,r...j->...ij", u, v)
    both = (weight.sum(-1, keepdim=True) * weight.sum(-2, keepdim=True)).sqrt()
    left = torch.linalg.matrix_norm((found - factor) * both).square()
    s = torch.linalg.svdvals(factor * both)
    torch.testing.assert_close(left, s[..., 2:].square().sum(-1))  # Eckart and Young


def test_a_few_terms_of_a_large_layer_are_nearly_the_best():
    generator = torch.Generator().manual_seed(0)
    row, column = (10 ** -(5 * torch.rand(n, generator=generator).double()) for n in (60, 40))
    weight = row[:, None] * column  # spectra of factors fall over many orders
    factor = 1 / (weight + 1e-4)
    u, v = separable(factor, weight, 4)
    left = torch.linalg.matrix_norm((u.mT @ v - factor) * weight.sqrt())
    s = torch.linalg.svdvals(factor * weight.sqrt())
    # Twelve vectors iterated four times: what they miss falls with the eighth power of s[12] / s[4].
    torch.testing.assert_close(left, s[4:].norm(), rtol=1e-6, atol=0)
