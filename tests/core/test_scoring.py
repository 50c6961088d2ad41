"""Accumulators of scores: any split merged is the whole, and each equals its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core import scoring
from headwater.core.capture import BatchInfo, Rows
from headwater.core.curvature import Preconditioned
from headwater.core.gradients import Factored, Gradients, dense
from headwater.core.scoring import (
    Norms,
    PairScores,
    ReplicateScores,
    SelfScores,
    Strongest,
    StrongestScores,
    TokenScores,
)
from tests.curvature_cases import layer_of, random_rows

LAYERS = [layer_of("x", 3, 4), layer_of("y", 2, 4, group="x"), layer_of("c", 2, 3, groups=2)]
N, POS, Q = 9, 3, 2
GROUPS = torch.arange(N) % 3


def setting(seed: int = 0, pos: int = POS):
    """Rows of N examples, of which x and y read one tensor; queries, eigenbases and factors."""
    torch.manual_seed(seed)
    rows = {layer.name: random_rows(layer, N, pos) for layer in LAYERS}
    rows["y"] = Rows(rows["y"].layer, rows["x"].a, rows["y"].g, rows["y"].batch)
    queries, bases, factors = {}, {}, {}
    for layer in LAYERS:
        lead = layer.block[:-2]
        queries[layer.name] = torch.randn(Q, *layer.block).double()
        bases[layer.name] = tuple(
            torch.linalg.qr(torch.randn(*lead, d, d).double())[0]
            for d in (layer.shape[2], layer.shape[1])
        )
        factors[layer.name] = torch.rand(3, *layer.block).double()
    bases["y"] = (bases["x"][0], None)
    return list(rows.values()), Gradients(queries), bases, factors


def gradients(rows: list[Rows]) -> Gradients:
    return Gradients({r.layer.name: dense(Factored(r.a, r.g)) for r in rows})


def make(kind: str, queries: Gradients, bases: dict, factors: dict):
    prepared = Preconditioned(queries)
    return {
        "pairs": lambda: PairScores(prepared, N, by_layer=["x", "c"]),
        "strongest": lambda: StrongestScores(prepared, 2, groups=GROUPS, by_layer=["x", "c"]),
        "replicates": lambda: ReplicateScores(queries, bases, factors, N),
        "tokens": lambda: TokenScores(prepared, N, POS),
        "self": lambda: SelfScores(bases, {k: f[0] for k, f in factors.items()}, N),
        "norms": lambda: Norms(N),
    }[kind]()


def feed(accumulator, rows: list[Rows], start: int, stop: int):
    part, shared = slice(start, stop), {}
    info = BatchInfo(torch.arange(start, stop))
    for r in rows:
        a = shared.setdefault(id(r.a), r.a[..., part, :, :])
        accumulator.update(Rows(r.layer, a, r.g[..., part, :, :], info))
    accumulator.end_batch(info)
    return accumulator


@pytest.mark.parametrize("kind", ["pairs", "strongest", "replicates", "tokens", "self", "norms"])
@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(1, N - 1), unique=True, max_size=3).map(sorted),
    pos=st.sampled_from([1, 3]),
)
def test_any_split_merged_or_resumed_is_the_whole(kind, cuts, pos):
    rows, queries, bases, factors = setting(0, pos)
    expected = feed(make(kind, queries, bases, factors), rows, 0, N).tensors()
    merged, resumed = make(kind, queries, bases, factors), make(kind, queries, bases, factors)
    for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
        merged.merge(feed(make(kind, queries, bases, factors), rows, start, stop))
        fresh = make(kind, queries, bases, factors)
        fresh.load(resumed.tensors())
        resumed = feed(fresh, rows, start, stop)
    for found in (merged, resumed):
        assert found.tensors().keys() == expected.keys()
        for name, tensor in expected.items():
            # single precision where per-layer and per-token tables are kept in it
            tolerance = 1e-5 if tensor.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(
                found.tensors()[name], tensor, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("pos", [1, 3])
def test_pairs_equal_inner_products_and_layers_add_up(pos):
    rows, queries, *_ = setting(1, pos)
    found = feed(PairScores(Preconditioned(queries), N, by_layer=["x", "y", "c"]), rows, 0, N)
    torch.testing.assert_close(found.finish(), queries.inner(gradients(rows)))
    total = torch.stack(list(found.by_layer.values())).sum(0)
    torch.testing.assert_close(
        total.double(), found.finish(), rtol=1e-5, atol=1e-5
    )  # kept in float32


def test_the_strongest_and_the_totals_equal_those_of_the_whole_matrix():
    rows, queries, *_ = setting(5)
    whole, prepared = queries.inner(gradients(rows)), Preconditioned(queries)
    found = StrongestScores(prepared, 2, groups=GROUPS, by_layer=["x", "y", "c"])
    for start in range(0, N, 2):
        feed(found, rows, start, min(N, start + 2))
    for side, largest in enumerate((True, False)):
        values, index = whole.topk(2, dim=1, largest=largest)
        torch.testing.assert_close(found.ends[side], values)
        assert torch.equal(found.index[side], index)
    assert found.finish().tolist() == sorted({i for x in found.index for i in x.flatten().tolist()})
    for g in range(3):
        part = whole[:, g == GROUPS]
        torch.testing.assert_close(found.totals[0][:, g], part.clamp(min=0).sum(1))
        torch.testing.assert_close(found.totals[1][:, g], part.clamp(max=0).sum(1))
    pairs = feed(PairScores(prepared, N, by_layer=["x", "y", "c"]), rows, 0, N)
    for name, part in pairs.by_layer.items():
        total = part.abs().sum(1).double()  # kept in float32
        torch.testing.assert_close(found.layer_totals[name], total, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 999), keep=st.integers(0, 6), step=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_the_strongest_of_a_stream_with_ties_are_those_of_the_whole(seed, keep, step):
    whole = torch.randint(-3, 4, (3, 20), generator=torch.Generator().manual_seed(seed)).float()
    found = Strongest(3, keep)
    for places in torch.arange(20).split(step):
        found.add(whole[:, places], places)
    for ends, index, largest in zip(found.ends, found.index, (True, False), strict=True):
        assert torch.equal(ends, whole.double().topk(keep, dim=1, largest=largest).values)
        assert torch.equal(whole.gather(1, index).double(), ends)
        assert all(len(set(row)) == keep for row in index.tolist())
    assert torch.equal(found.totals.sum(0)[:, 0], whole.double().sum(1))


def test_what_streaming_holds_does_not_grow_with_the_examples():
    rows, queries, *_ = setting(6)
    found = StrongestScores(Preconditioned(queries), 2, by_layer=["x"])
    sizes = []
    for _ in range(3):
        feed(found, rows, 0, N)
        sizes.append(sum(t.numel() for t in found.tensors().values()))
    assert sizes == [2 * Q * 2 * 2 + 2 * Q + Q] * 3


@pytest.mark.parametrize("pos", [1, 3, 50])
def test_replicates_and_self_scores_equal_their_formulas(pos, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", 30)  # gradients are formed two or three at a time
    rows, queries, bases, factors = setting(2, pos)
    whole = gradients(rows)

    def rotated(block: torch.Tensor, name: str) -> torch.Tensor:
        Q_A, Q_G = bases[name]
        return (block if Q_G is None else Q_G.mT @ block) @ Q_A

    mine = {n: rotated(b, n) for n, b in whole.blocks.items()}
    asked = {n: rotated(b, n) for n, b in queries.blocks.items()}
    found = feed(ReplicateScores(queries, bases, factors, N), rows, 0, N).finish()
    for r in range(3):
        parts = [((asked[n] * factors[n][r]).flatten(1) @ mine[n].flatten(1).mT) for n in mine]
        torch.testing.assert_close(found[r], sum(parts))
    own = feed(SelfScores(bases, {n: f[0] for n, f in factors.items()}, N), rows, 0, N).finish()
    parts = [(mine[n].square() * factors[n][0]).flatten(1).sum(1) for n in mine]
    torch.testing.assert_close(own, sum(parts))
    norms = feed(Norms(N), rows, 0, N).finish()
    torch.testing.assert_close(norms, whole.to_matrix().norm(dim=1))


def test_tokens_and_the_rest_add_up_to_the_pairs():
    rows, queries, *_ = setting(3)
    found = feed(TokenScores(Preconditioned(queries), N, POS), rows, 0, N)
    total = found.finish().sum(2) + found.elsewhere
    torch.testing.assert_close(total.double(), queries.inner(gradients(rows)), rtol=1e-5, atol=1e-5)
    x, y, c = rows
    for t in range(
        POS
    ):  # a position's part is g_t M a_t, summed over the layers that have positions
        part = sum(
            torch.einsum("no,qoi,ni->qn", r.g[:, t], queries.blocks[r.layer.name], r.a[:, t])
            for r in (x, y)
        )
        torch.testing.assert_close(found.finish()[:, :, t].double(), part, rtol=1e-5, atol=1e-5)
    groups = queries.blocks["c"].flatten(1) @ gradients([c]).to_matrix().mT
    torch.testing.assert_close(found.elsewhere.double(), groups, rtol=1e-5, atol=1e-5)


def test_what_is_left_to_the_end_of_a_batch_is_added_and_layers_are_told_apart():
    class Late(Preconditioned):
        """Half of the scores come when a batch ends."""

        layers_add_up = False

        def layer(self, name, block):
            part = super().layer(name, block)
            self.late = part / 2 if name == "x" else self.late + part / 2
            return part / 2

        def finish_batch(self):
            return self.late

    rows, queries, *_ = setting(4)
    expected = queries.inner(gradients(rows))
    torch.testing.assert_close(feed(PairScores(Late(queries), N), rows, 0, N).finish(), expected)
    found = feed(PairScores(Late(queries), N, by_layer=["x"]), rows, 0, N)
    x = queries.blocks["x"].flatten(1) @ gradients(rows[:1]).to_matrix().mT
    torch.testing.assert_close(found.by_layer["x"].double(), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.finish(), expected)


@pytest.mark.parametrize("kind", ["pairs", "strongest"])
def test_a_gradient_that_is_not_finite_is_named(kind):
    rows, queries, bases, factors = setting()
    rows[0].g[4] = torch.nan
    names = [f"n{i}" for i in range(N)]
    info = BatchInfo(torch.arange(N), ids=names)
    found = make(kind, queries, bases, factors)
    for each in rows:
        found.update(Rows(each.layer, each.a, each.g, info))
    with pytest.raises(FloatingPointError, match=r"example 'n4' and of query 0 .* nan"):
        found.end_batch(info)
