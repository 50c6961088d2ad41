import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics import kronecker

LEADS = st.sampled_from([(), (3,)])


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def basis(*shape):
    return torch.linalg.qr(rows(*shape, shape[-1]))[0]


@pytest.mark.parametrize("dim", [1, 5, 255, 256, 513, 767, 1153])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_the_upper_triangle_make_the_whole_product(dim, weighted):
    x = rows(4, dim)
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    moment = kronecker.second_moment(x, weight)
    expected = x.T @ (x if weight is None else weight[:, None] * x)
    torch.testing.assert_close(moment, expected, rtol=0, atol=1e-12)


def test_groups_have_second_moments_of_their_own():
    x, weight = rows(2, 6, 800), torch.rand(6, dtype=torch.float64)
    moment = kronecker.second_moment(x, weight)
    for i in range(2):
        torch.testing.assert_close(moment[i], kronecker.second_moment(x[i], weight))


@given(lead=LEADS, batch=st.integers(1, 5), pos=st.integers(1, 4))
def test_gradients_are_sums_of_outer_products(lead, batch, pos):
    torch.manual_seed(0)
    a, g = rows(*lead, batch, pos, 3), rows(*lead, batch, pos, 2)
    expected = torch.einsum("...bto,...bti->...boi", g, a)
    torch.testing.assert_close(kronecker.gradient(a, g), expected)


@given(
    lead=LEADS,
    batch=st.integers(1, 5),
    # many positions and small sides rotate after the sum, few positions and large sides before
    sizes=st.sampled_from([(1, 3, 2), (2, 5, 7), (9, 2, 3), (4, 1, 1)]),
    bases=st.sampled_from(["both", "in", "out", "none"]),
    weighted=st.booleans(),
    limit=st.sampled_from([1, 40, 1 << 24]),
)
def test_squared_sums_are_those_of_a_loop(lead, batch, sizes, bases, weighted, limit):
    torch.manual_seed(0)
    pos, d_in, d_out = sizes
    a, g = rows(*lead, batch, pos, d_in), rows(*lead, batch, pos, d_out)
    Q_A = basis(*lead, d_in) if bases in ("both", "in") else None
    Q_G = basis(*lead, d_out) if bases in ("both", "out") else None
    weight = torch.rand(batch, dtype=torch.float64) if weighted else None
    saved = a.clone(), g.clone()

    expected = torch.zeros(*lead, d_out, d_in, dtype=torch.float64)
    for b in range(batch):
        for group in range(len(expected)) if lead else [...]:
            each = sum(
                torch.outer(
                    g[group, b, t] if lead else g[b, t], a[group, b, t] if lead else a[b, t]
                )
                for t in range(pos)
            )
            if Q_A is not None:
                each = each @ Q_A[group]
            if Q_G is not None:
                each = Q_G[group].T @ each
            expected[group] += (1 if weight is None else weight[b]) * each.square()
    actual = kronecker.squared_sum(a, g, Q_A, Q_G, weight, limit)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(a, saved[0]) and torch.equal(g, saved[1])  # others read the same rows


@pytest.mark.parametrize("tokens_first", [True, False])
def test_no_more_gradients_than_the_limit_are_held_at_a_time(monkeypatch, tokens_first):
    pos = 2 if tokens_first else 50
    a, g, held = rows(10, pos, 6), rows(10, pos, 4), []
    gradient = kronecker.gradient

    def watched(a, g):
        found = gradient(a, g)
        held.append(found.numel())
        return found

    monkeypatch.setattr(kronecker, "gradient", watched)
    kronecker.squared_sum(a, g, basis(6), basis(4), limit=3 * 24)
    assert held == [72, 72, 72, 24]


@given(lead=LEADS, dim=st.integers(1, 5))
def test_a_rotation_gives_coordinates_in_the_columns_of_the_basis(lead, dim):
    torch.manual_seed(0)
    x, Q = rows(*lead, 4, 3, dim), basis(*lead, dim)
    rotated = kronecker.rotate(x, Q)
    torch.testing.assert_close(rotated, torch.einsum("...bti,...ij->...btj", x, Q))
    assert kronecker.rotate(x, None) is x


@given(lead=LEADS, use=st.sampled_from(["both", "in", "out", "none"]))
def test_coordinates_change_and_change_back(lead, use):
    torch.manual_seed(0)
    x = rows(5, *lead, 4, 3)
    Q_A = basis(*lead, 3) if use in ("both", "in") else None
    Q_G = basis(*lead, 4) if use in ("both", "out") else None
    y = kronecker.change_basis(x, Q_A, Q_G)
    torch.testing.assert_close(kronecker.change_back(y, Q_A, Q_G), x)
    A, G = rows(5, *lead, 1, 3), rows(5, *lead, 1, 4)  # of an outer product: rotate its sides
    outer = kronecker.change_basis(G.mT @ A, Q_A, Q_G)
    A = A if Q_A is None else A @ Q_A
    G = G if Q_G is None else G @ Q_G
    torch.testing.assert_close(outer, G.mT @ A)
