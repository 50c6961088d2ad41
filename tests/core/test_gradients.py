"""Inner products, norms and combinations of gradients equal those of the whole matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core import gradients
from headwater.core.capture import BatchInfo, Rows
from headwater.core.gradients import (
    CollectGradients,
    Factored,
    Gradients,
    combined,
    dense,
    inner,
    squared_norms,
)
from tests.curvature_cases import layer_of, random_rows


def factored(n: int, pos: int, d_in: int, d_out: int, groups: int = 1) -> Factored:
    lead = (groups,) if groups > 1 else ()
    return Factored(
        torch.randn(*lead, n, pos, d_in).double(), torch.randn(*lead, n, pos, d_out).double()
    )


def matrices(block) -> torch.Tensor:
    """Each gradient by a loop, (n, numel)."""
    if isinstance(block, torch.Tensor):
        return block.flatten(1)
    rows = []
    for n in range(len(block)):
        a, g = block.a[..., n, :, :], block.g[..., n, :, :]
        rows.append(
            sum(g[..., t, :, None] * a[..., t, None, :] for t in range(block.pos)).flatten()
        )
    return torch.stack(rows)


sides = st.integers(1, 6)


@settings(max_examples=60)
@given(
    n=st.integers(1, 5),
    m=st.integers(1, 9),
    d_in=sides,
    d_out=sides,
    pos=st.tuples(st.sampled_from([1, 2, 7]), st.sampled_from([1, 3])),
    groups=st.sampled_from([1, 2]),
    wholes=st.tuples(st.booleans(), st.booleans()),
    chunk=st.sampled_from([7, 1 << 25]),
)
def test_inner_products_equal_those_of_the_matrices(n, m, d_in, d_out, pos, groups, wholes, chunk):
    x, y = (factored(k, p, d_in, d_out, groups) for k, p in zip((n, m), pos, strict=True))
    expected = matrices(x) @ matrices(y).mT
    x, y = (dense(b) if whole else b for b, whole in zip((x, y), wholes, strict=True))
    before, gradients._CHUNK = gradients._CHUNK, chunk
    try:
        torch.testing.assert_close(inner(x, y), expected, rtol=1e-10, atol=1e-10)
    finally:
        gradients._CHUNK = before


@pytest.mark.parametrize(
    ("n", "pos", "d_in", "d_out"), [(3, 1, 90, 20), (3, 1, 20, 90), (1, 6, 30, 9)]
)
def test_few_queries_contract_the_longer_side_first(n, pos, d_in, d_out, monkeypatch):
    x, y = torch.randn(n, d_out, d_in).double(), factored(8, pos, d_in, d_out)
    expected = x.flatten(1) @ matrices(y).mT
    monkeypatch.setattr(Factored, "dense", None)  # no gradient of the data is formed
    torch.testing.assert_close(inner(x, y), expected, rtol=1e-10, atol=1e-10)


def test_the_wider_precision_is_used():
    x, y = factored(2, 1, 3, 4), factored(3, 1, 3, 4)
    low = Factored(y.a.bfloat16(), y.g.bfloat16())
    expected = matrices(x) @ matrices(low.to(torch.float64)).mT
    torch.testing.assert_close(inner(x, low), expected)
    assert low.dtype == torch.bfloat16 and low.to(torch.bfloat16) is low


@pytest.mark.parametrize("pos", [1, 3, 60])
@pytest.mark.parametrize("whole", [True, False])
def test_bfloat16_products_have_float32_sums(pos, whole):
    n = 4000  # a sum of so many terms in bfloat16 would be far off
    x, y = factored(2, pos, n, 3).to(torch.float32), factored(3, pos, n, 3).to(torch.bfloat16)
    x = Factored(x.a.abs(), x.g.abs())
    y = Factored(y.a.abs(), y.g.abs())
    expected = matrices(x.to(torch.float64)) @ matrices(y.to(torch.float64)).mT
    found = inner(x.dense() if whole else x, y)
    assert found.dtype == torch.float32
    # 2^-9 for each rounding, of the factors and of a product of theirs
    torch.testing.assert_close(found.double(), expected, rtol=4 * 2**-9, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pos", [1, 2, 30])
def test_norms_and_combinations(pos, groups, monkeypatch):
    block = factored(5, pos, 4, 3, groups)
    expected = matrices(block)
    weights = torch.randn(2, 5).double()
    monkeypatch.setattr(gradients, "_CHUNK", 30)
    for form in (block, dense(block)):
        torch.testing.assert_close(squared_norms(form), expected.square().sum(1))
        torch.testing.assert_close(combined(form, weights).flatten(1), weights @ expected)


def several() -> Gradients:
    return Gradients(
        {
            "a": factored(5, 1, 4, 3),
            "b": factored(5, 2, 3, 2, 2),
            "c": torch.randn(5, 2, 3).double(),
        }
    )


def test_several_layers_behave_as_one_long_vector():
    x, y = several(), several()
    X, Y = (torch.cat([matrices(b) for b in g.blocks.values()], dim=1) for g in (x, y))
    torch.testing.assert_close(x.to_matrix(), X)
    torch.testing.assert_close(x.inner(y), X @ Y.mT)
    torch.testing.assert_close(x.norms(), X.norm(dim=1))
    weights = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(x.combine(weights).to_matrix(), weights.double() @ X)
    torch.testing.assert_close(x[1:3].to_matrix(), X[1:3])
    torch.testing.assert_close(x[torch.tensor([4, 0])].to_matrix(), X[[4, 0]])
    torch.testing.assert_close(x.from_matrix(Y).to_matrix(), Y)
    torch.testing.assert_close(x.dense().to_matrix(), X)
    assert len(x) == 5 and len(x[2:]) == 3


def test_low_rank_is_the_best_and_exact_at_full_rank():
    torch.manual_seed(0)
    x = Gradients({"a": torch.randn(3, 8, 9).double()})
    for rank in (1, 3):
        low = x.low_rank(rank)
        assert isinstance(low.blocks["a"], Factored)
        u, s, vh = torch.linalg.svd(x.blocks["a"])
        best = (u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank]
        torch.testing.assert_close(dense(low.blocks["a"]), best)
    assert x.low_rank(8).blocks["a"] is x.blocks["a"]  # no smaller than the matrix
    exact = Gradients({"a": factored(3, 2, 8, 9).dense()})
    torch.testing.assert_close(exact.low_rank(2).to_matrix(), exact.to_matrix())


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        Gradients({})


LAYERS = [layer_of("x", 3, 4), layer_of("long", 20, 20), layer_of("c", 2, 3, groups=2)]


@given(split=st.integers(1, 5), pos=st.sampled_from([(1, 1), (2, 3), (3, 1)]))
@settings(max_examples=20)
def test_collected_rows_are_in_the_order_of_the_examples(split, pos):
    """Batches of several widths, later examples first; merged, and restored in between."""
    torch.manual_seed(split)
    weights = torch.rand(6).double()
    found, expected = [CollectGradients(LAYERS), CollectGradients(LAYERS)], {}
    for half, (start, stop) in enumerate([(split, 6), (0, split)]):
        for layer in LAYERS:
            r = random_rows(
                layer, stop - start, pos[half], start=start, weights=weights[start:stop], fold=half
            )
            found[half].update(r)
            rows = matrices(Factored(r.a, r.g)) * weights[start:stop, None].sqrt()
            expected.setdefault(layer.name, {})[half] = rows
        found[half].end_batch(r.batch)
    restored = CollectGradients(LAYERS)
    restored.load(found[0].tensors())
    restored.merge(found[1])
    whole, indices, folds = restored.finish()
    assert indices.tolist() == list(range(6)) and restored.n_rows == 6
    assert folds.tolist() == [1] * split + [0] * (6 - split)
    for name, parts in expected.items():
        torch.testing.assert_close(
            dense(whole.blocks[name]).flatten(1), torch.cat([parts[1], parts[0]])
        )
    assert isinstance(whole.blocks["long"], Factored)


def test_half_precision_is_kept_as_single():
    layer = layer_of("x", 2, 3)
    collect, info = CollectGradients([layer]), BatchInfo(torch.arange(1))
    ones = torch.ones(1, 1, 3, dtype=torch.bfloat16)
    collect.update(Rows(layer, ones, ones[..., :2], info))
    collect.end_batch(info)
    assert collect.finish()[0].to_matrix().dtype == torch.float32


def test_nothing_collected_has_no_state():
    assert CollectGradients(LAYERS).tensors().keys() == {"indices", "folds"}
