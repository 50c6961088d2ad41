"""Accumulators of second moments: any split merged is the whole, and errors are the true ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.capture import BatchInfo, Rows
from headwater.core.curvature.moments import (
    EigenvalueSums,
    LostTrace,
    SecondMoments,
    SharedRotation,
    rotates_first,
)
from headwater.core.target import Enumerated, Loss
from headwater.numerics import kronecker
from tests.curvature_cases import layer_of, random_rows

LAYERS = [layer_of("x", 3, 4), layer_of("y", 2, 4, group="x"), layer_of("c", 2, 3, groups=2)]
N, POS = 12, 3


def whole(seed: int, pos: int = POS) -> list[tuple]:
    """(layer, a, g) of N examples; x and y read the same tensor."""
    torch.manual_seed(seed)
    rows = {layer.name: random_rows(layer, N, pos) for layer in LAYERS}
    rows["y"] = Rows(rows["y"].layer, rows["x"].a, rows["y"].g, rows["y"].batch)
    return list(rows.values())


def feed(accumulator, rows: list[Rows], start: int, stop: int, *, fold: int = 0, weights=None):
    """One batch of the examples from start to stop."""
    part = slice(start, stop)
    info = BatchInfo(torch.arange(start, stop), fold, None if weights is None else weights[part])
    shared: dict[int, torch.Tensor] = {}
    for r in rows:
        a = shared.setdefault(id(r.a), r.a[..., part, :, :])
        accumulator.update(Rows(r.layer, a, r.g[..., part, :, :], info))
    accumulator.end_batch(info)
    return accumulator


def bases(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    found = {}
    for layer in LAYERS:
        groups, out, in_ = layer.shape
        lead = (groups,) if groups > 1 else ()
        Q_A, Q_G = (torch.linalg.qr(torch.randn(*lead, d, d).double())[0] for d in (in_, out))
        found[layer.name] = (Q_A, Q_G)
    found["y"] = (found["x"][0], found["y"][1])
    return found


def make(kind: str):
    if kind == "eigenvalues":
        return EigenvalueSums(LAYERS, bases(), folds=2)
    return SecondMoments(
        LAYERS, reduce=kind == "reduce", max_factor=3 if kind == "diagonal" else 99
    )


def state(accumulator) -> dict:
    return accumulator.tensors()


splits = st.lists(st.integers(1, N - 1), unique=True, max_size=4).map(sorted)
kinds = pytest.mark.parametrize("kind", ["expand", "reduce", "diagonal", "eigenvalues"])


@kinds
@settings(max_examples=15)
@given(cuts=splits, seed=st.integers(0, 99))
def test_any_split_of_batches_merged_or_resumed_is_the_whole(kind, cuts, seed):
    rows = whole(seed)
    together, resumed, parts = make(kind), make(kind), []
    for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
        feed(together, rows, start, stop, fold=start % 2)
        parts.append(feed(make(kind), rows, start, stop, fold=start % 2))
        fresh = make(kind)
        if start:
            fresh.load(state(resumed))  # as if killed and started again before each batch
        resumed = feed(fresh, rows, start, stop, fold=start % 2)
    first, *others = parts
    before = {k: v.clone() for p in others for k, v in state(p).items()}
    for other in others:
        first.merge(other)
    feed(first, rows, 0, 1)  # what is merged in is not changed by what comes later
    for other in others[-1:]:
        for k, v in state(other).items():
            assert torch.equal(v, before[k])
    merged = make(kind)
    for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
        merged.merge(feed(make(kind), rows, start, stop, fold=start % 2))
    expected = state(together)
    for found in (merged, resumed):
        assert state(found).keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state(found)[name], tensor, rtol=1e-12, atol=1e-12)
    assert resumed.relative_error() == pytest.approx(together.relative_error(), rel=1e-9)


def test_second_moments_equal_loops():
    rows = whole(1)
    weights, found = torch.rand(N).double(), SecondMoments(LAYERS)
    feed(feed(found, rows, 0, 5, weights=weights), rows, 5, N, weights=weights)
    moments = found.finish()
    assert moments.keys() == {"A:x", "G:x", "G:y", "A:c", "G:c"}
    for r in rows:
        A = sum(
            torch.einsum("...i,...j->...ij", r.a[..., n, t, :], r.a[..., n, t, :])
            for n in range(N)
            for t in range(POS)
        )
        G = sum(
            weights[n] * torch.einsum("...i,...j->...ij", r.g[..., n, t, :], r.g[..., n, t, :])
            for n in range(N)
            for t in range(POS)
        )
        torch.testing.assert_close(moments[f"A:{r.layer.input_group}"], A / (N * POS))
        torch.testing.assert_close(moments[f"G:{r.layer.name}"], G / (N * POS))


def test_masked_positions_do_not_count():
    layer = layer_of("x", 2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    a, g = (
        torch.randn(2, 3, 3).double() * mask[..., None],
        torch.randn(2, 3, 2).double() * mask[..., None],
    )
    info = BatchInfo(torch.arange(2))
    expand, reduce = SecondMoments([layer]), SecondMoments([layer], reduce=True)
    for moments in (expand, reduce):
        moments.update(Rows(layer, a, g, info, mask))
        moments.end_batch(info)
    torch.testing.assert_close(expand.finish()["A:x"], (a.flatten(0, 1).mT @ a.flatten(0, 1)) / 3)
    means = torch.stack([a[0, :2].mean(0), a[1, 0]])
    torch.testing.assert_close(reduce.finish()["A:x"], means.mT @ means / 2)
    sums = g.sum(1)
    torch.testing.assert_close(reduce.finish()["G:x"], sums.mT @ sums / 2)


@pytest.mark.parametrize("pos", [1, 2, 40])
def test_eigenvalues_equal_loops(pos):
    rows = whole(2, pos)
    weights, Q = torch.rand(N).double(), bases()
    found = EigenvalueSums(LAYERS, Q, folds=2)
    feed(feed(found, rows, 0, 5, fold=0, weights=weights), rows, 5, N, fold=1, weights=weights)
    assert found.n_examples.tolist() == [5, 7]
    for r in rows:
        Q_A, Q_G = Q[r.layer.name]
        each = [
            weights[n] * (Q_G.mT @ r.g[..., n, :, :].mT @ r.a[..., n, :, :] @ Q_A).square()
            for n in range(N)
        ]
        sums = found.finish()[r.layer.name]
        torch.testing.assert_close(sums[0], sum(each[:5]))
        torch.testing.assert_close(sums[1], sum(each[5:]))
    assert rotates_first(rows[0]) == (pos < 40)


def test_inputs_that_layers_share_are_rotated_once(monkeypatch):
    calls = []
    rotate = kronecker.rotate

    def counted(x, Q):
        calls.extend([x.shape] if Q is not None else [])
        return rotate(x, Q)

    monkeypatch.setattr(kronecker, "rotate", counted)
    found = EigenvalueSums(LAYERS, bases(), folds=1)
    feed(found, whole(0), 0, N)
    first = [shape for shape in calls if shape[-1] == 4]
    assert len(first) == 1  # the layers x and y read one tensor of side 4
    shared = SharedRotation()
    a, Q = torch.randn(2, 1, 4).double(), bases()["x"][0]
    assert shared(a, Q) is shared(a, Q)
    torch.testing.assert_close(shared(a.clone(), Q), a @ Q)
    shared.clear()
    assert torch.equal(shared(a, None), a)


@pytest.mark.parametrize("rank", [1, 30])
def test_the_relative_error_is_the_true_one(rank):
    # inputs of one strong direction or of many, of which each batch sees 25 at positions that vary in number
    torch.manual_seed(0)
    layer = layer_of("x", 2, 30)
    root = torch.randn(rank, 30).double() / torch.arange(1, rank + 1)[:, None]
    truth, runs, told = root.mT @ root, [], []
    for _ in range(60):
        moments = SecondMoments([layer])
        for _ in range(40):
            n = int(torch.randint(10, 40, ()))
            a, info = (torch.randn(n, 1, rank).double() @ root), BatchInfo(torch.arange(n))
            moments.update(Rows(layer, a, torch.ones(n, 1, 2).double(), info))
            moments.end_batch(info)
        runs.append((moments.finish()["A:x"] - truth).square().sum())
        told.append(moments.relative_error())
    actual = float(torch.stack(runs).mean().sqrt() / truth.norm())
    ratios = torch.tensor(told) / actual
    # 40 batches and 16 probes tell a standard error to about a sixth; almost all must be within 1.5
    assert 0.85 < float(ratios.mean()) < 1.15
    assert float(((ratios < 1.5) & (ratios > 1 / 1.5)).double().mean()) > 0.9


def test_diagonals_have_errors_as_well():
    rows, moments = whole(3), SecondMoments(LAYERS, max_factor=1)
    for i in range(4):
        assert moments.relative_error() == (float("inf") if i else 0.0)
        feed(moments, rows, 3 * i, 3 * i + 3)
    assert 0.05 < moments.relative_error() < 1
    assert not moments.is_full("A:x") and moments.finish()["A:c"].shape == (2, 3)


def test_the_spectrum_has_an_error_when_all_folds_were_seen():
    rows, found = whole(4), EigenvalueSums(LAYERS, bases(), folds=2)
    assert feed(found, rows, 0, 6, fold=0).relative_error() == float("inf")
    assert 0 < feed(found, rows, 6, N, fold=1).relative_error() < 2
    assert EigenvalueSums(LAYERS, bases()).relative_error() == float("inf")


def test_half_precision_is_summed_in_single():
    layer = layer_of("x", 2, 3)
    moments, sums = SecondMoments([layer]), EigenvalueSums([layer], {"x": (None, None)})
    ones = torch.ones(1, 1, 3, dtype=torch.bfloat16)
    info = BatchInfo(torch.arange(1))
    for _ in range(400):  # in bfloat16 a sum of ones stays at 256
        for accumulator in (moments, sums):
            accumulator.update(Rows(layer, ones, ones[..., :2], info))
            accumulator.end_batch(info)
    assert float(moments.sums["A:x"][0, 0]) == 400 == float(sums.sums["x"][0, 0, 0])


def test_lost_trace_survives_an_interruption():
    first, second, info = Enumerated(0.1), Enumerated(0.1), BatchInfo(torch.arange(1))
    before = LostTrace(first)
    first.lost.append((0.5, 2))
    before.end_batch(info)
    after = LostTrace(second)
    after.load(before.tensors())
    second.lost.append((0.0, 6))
    after.end_batch(info)
    assert after.share == pytest.approx(1 / 8)
    after.merge(before)
    assert after.share == pytest.approx(2 / 10)
    assert LostTrace(Loss()).share is None
