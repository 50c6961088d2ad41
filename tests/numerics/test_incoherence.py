"""Random orthogonal matrices without forming them, and the way there and back."""

import pytest
import torch

from headwater.numerics.incoherence import (
    KroneckerOrthogonal,
    balance,
    factor_pair,
    haar,
    mu_hessian,
    mu_weight,
    turn,
)

DOUBLE = torch.float64


def test_sides_split_as_in_the_published_code():
    assert factor_pair(576) == (24, 24) and factor_pair(1536) == (32, 48)
    assert factor_pair(192) == (24, 8) and set(factor_pair(49152)) == {128, 384}
    assert factor_pair(13) == (13, 1) and factor_pair(1) == (1, 1)


def dense(U: KroneckerOrthogonal) -> torch.Tensor:
    """P_out (O_1 ⊗ O_2) P_in, written out."""
    eye = torch.eye(len(U.order_in), dtype=DOUBLE)
    return eye[U.order_out] @ torch.kron(U.left, U.right) @ eye[U.order_in]


@pytest.mark.parametrize("n", [1, 12, 13, 48])
def test_products_are_those_of_the_dense_matrix(n):
    U, x = KroneckerOrthogonal.random(n, seed=5), torch.randn(3, 4, n, dtype=DOUBLE)
    whole = dense(U)
    torch.testing.assert_close(U(x), x @ whole.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(U.back(x), x @ whole, rtol=1e-10, atol=1e-10)
    H = torch.randn(n, n, dtype=DOUBLE)
    torch.testing.assert_close(U.both_sides(H), whole @ H @ whole.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [24, 576])
def test_it_is_orthogonal_and_repeats_itself(n):
    U = KroneckerOrthogonal.random(n, seed=1)
    eye = torch.eye(n, dtype=DOUBLE)
    torch.testing.assert_close(U.back(U(eye)), eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(U(eye) @ U(eye).mT, eye, rtol=0, atol=1e-10)
    again, other = KroneckerOrthogonal.random(n, seed=1), KroneckerOrthogonal.random(n, seed=2)
    assert torch.equal(again(eye), U(eye)) and not torch.equal(other(eye), U(eye))
    assert not torch.equal(U.left, U.right)


def test_random_orthogonal_matrices_have_no_preferred_direction():
    """Entries of a Haar matrix have mean 0 and variance 1/n; means of 400 matrices are 20 times closer."""
    Q = torch.stack([haar(6, seed) for seed in range(400)])
    assert float(Q.mean(0).abs().max()) < 5 * (1 / 6 / 400) ** 0.5
    assert float((Q.square().mean(0) - 1 / 6).abs().max()) < 0.06


def test_a_large_prime_side_is_warned_of():
    with pytest.warns(UserWarning, match="67 is prime"):
        KroneckerOrthogonal.random(67, seed=0)


def test_there_and_back_is_where_it_began():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 24, generator=generator)
    x = torch.randn(100, 24, generator=generator)
    turned = turn(W, (x.mT @ x).double(), (1, 2))
    back = turned.back(turned.W)
    assert float((back - W).norm() / W.norm()) < 1e-5  # float32


def test_turning_keeps_the_outputs():
    """W x is Uᵀ of the turned weight times V D⁻¹ x."""
    W, x = torch.randn(6, 8, dtype=DOUBLE), torch.randn(30, 8, dtype=DOUBLE)
    turned = turn(W, x.mT @ x / 30, (3, 4))
    outputs = turned.U.back(turned.V(x / turned.rescale) @ turned.W.mT)
    torch.testing.assert_close(outputs, x @ W.mT, rtol=1e-9, atol=1e-9)
    inputs = turned.V(x / turned.rescale)
    moment = inputs.mT @ inputs
    moment = moment * (8 / moment.trace()) + 0.01 * torch.eye(8, dtype=DOUBLE)
    torch.testing.assert_close(turned.H, moment, rtol=1e-9, atol=1e-9)


def test_the_balance_is_the_best_diagonal():
    W, x = torch.randn(5, 6, dtype=DOUBLE), torch.randn(30, 6, dtype=DOUBLE) * torch.arange(1, 7)
    H = x.mT @ x
    scaled_W, scaled_H, _ = balance(W, H)
    least = float(scaled_H.trace() * scaled_W.square().sum())
    torch.testing.assert_close(scaled_W.square().sum(0), scaled_H.diagonal(), rtol=1e-9, atol=0)
    for seed in range(5):
        factor = torch.exp(0.2 * torch.randn(6, generator=torch.Generator().manual_seed(seed)))
        other = (scaled_H / factor / factor[:, None]).trace() * (scaled_W * factor).square().sum()
        assert float(other) >= least


def test_turning_makes_what_stands_out_disappear():
    n = 96
    W = torch.zeros(n, n, dtype=DOUBLE)
    W[3, 5] = W[10, 20] = 1.0
    W += 1e-3 * torch.randn(n, n, dtype=DOUBLE)
    H = torch.diag(torch.linspace(1, 2, n, dtype=DOUBLE))  # eigenvectors are the coordinates
    assert mu_weight(W) > 30 and mu_hessian(H) == pytest.approx(n**0.5)
    turned = turn(W, H, (1, 2))
    assert mu_weight(turned.W) < 10
    assert mu_hessian(turned.H) < n**0.5 * 0.8


def test_mu_of_known_matrices():
    assert mu_weight(torch.eye(9)) == pytest.approx(3.0)
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    H = hadamard @ torch.diag(torch.tensor([1.0, 3.0])) @ hadamard.mT / 2
    assert mu_hessian(H) == pytest.approx(1.0, abs=1e-5)
