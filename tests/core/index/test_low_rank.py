"""Rows as low-rank factors: the best of their size, nothing lost at one position, and as safe as whole rows."""

import pytest
import torch

from headwater.core.files import ArtifactDamaged, ArtifactMismatch
from headwater.core.index import GradientIndex, LoGra, Whitened
from headwater.core.index.encoding import Encoding
from headwater.core.index.low_rank import LowRank
from headwater.numerics.kronecker import singular_pairs
from tests.core.index.test_faults import content, rewritten
from tests.index_builds import build, data, small_fit
from tests.index_cases import built, shared

RANDOM = Whitened(rank=3, damping=0.01, sides="random")
SHAPES = ((1, 4, 6), (1, 4, 6), (2, 5, 3), (1, 1, 7))


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (5, 5)])
def test_singular_pairs_are_the_best_approximation_of_their_rank(shape):
    x = torch.randn(4, 2, *shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    for rank in (1, 2, 3):
        left, right = singular_pairs(x, rank)
        best = (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :]
        torch.testing.assert_close(left.mT @ right, best)
        norms = left.norm(dim=-1), right.norm(dim=-1)
        torch.testing.assert_close(norms[0], norms[1])


@pytest.mark.parametrize("rank", [1, 2, 3, 50])
def test_rows_of_that_rank_come_back(rank):
    factors = LowRank(rank, SHAPES)
    parts = []
    for n, out, in_ in SHAPES:
        few = min(rank, out, in_)
        parts.append((torch.randn(8, n, out, few) @ torch.randn(8, n, few, in_)).flatten(1))
    rows = torch.cat(parts, dim=1)
    numbers = factors.pack(rows)
    expected = sum(n * min(rank * (out + in_), out * in_) for n, out, in_ in SHAPES)
    assert numbers.shape[1] == factors.numbers == expected and factors.dim == rows.shape[1]
    torch.testing.assert_close(factors.unpack(numbers), rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        factors.unpack(numbers, torch.empty_like(rows)), factors.unpack(numbers)
    )
    assert bool((factors.pack(torch.zeros(2, factors.dim)) == 0).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_factors_are_stored_in_every_type(dtype):
    factors = LowRank(2, SHAPES)
    encoding, rows = Encoding(dtype, factors.dim, factors), torch.randn(5, factors.dim)
    stored = encoding.encode(rows)
    assert encoding.bytes_per_row < Encoding(dtype, factors.dim).bytes_per_row
    assert encoding.bytes_per_row == 4 + sum(t[0].numel() * t.itemsize for t in stored.values())
    near = factors.unpack(factors.pack(rows))
    error = (encoding.decode(stored) - near).norm() / near.norm()
    assert float(error) < {"float32": 1e-6, "bfloat16": 0.01, "float16": 0.002, "int8": 0.03}[dtype]
    rows[3, 1] = torch.inf
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        encoding.encode(rows)


@pytest.mark.parametrize("kind", [RANDOM, LoGra(rank=3)])
def test_one_pair_of_a_gradient_of_one_position_loses_nothing(tmp_path, kind):
    fitted, whole = built(tmp_path / "whole", kind=kind)
    _, small = built(tmp_path / "small", kind=kind, factors=1)
    assert small.info()["factors"] == 1 and whole.info()["factors"] is None
    assert small.info()["bytes_per_row"] < whole.info()["bytes_per_row"]
    places = torch.arange(len(whole))
    torch.testing.assert_close(small.rows(places), whole.rows(places), rtol=1e-4, atol=1e-6)
    for mode in ("dot", "cosine", "relatif"):
        a, b = (x.attribute(fitted, shared("mlp").train, keep=4, mode=mode) for x in (whole, small))
        assert a.train_ids == b.train_ids
        torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-5)


def test_several_positions_lose_what_the_best_approximation_loses(tmp_path):
    _, whole = built(tmp_path / "whole", "lm", kind=RANDOM)
    _, small = built(tmp_path / "small", "lm", kind=RANDOM, factors=1)
    rows, found = (x.rows(torch.arange(len(x))) for x in (whole, small))
    assert small.journal.factors is not None
    start = lost = 0
    for n, out, in_ in small.journal.factors["shapes"].values():
        here = slice(start, start := start + n * out * in_)
        if out + in_ < out * in_:
            x = rows[:, here].view(-1, n, out, in_)
            S = torch.linalg.svdvals(x)
            expected = S[..., 1:].square().sum((-1, -2))
            difference = (found[:, here] - rows[:, here]).square().sum(1)
            torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-5)
            lost += float(expected.sum())
    assert lost > 0


def test_factors_are_added_removed_compacted_merged_and_mended_as_rows_are(fitted, tmp_path):
    options = {"kind": RANDOM, "factors": 1, "dtype": "bfloat16"}
    folder, more = tmp_path / "a", data(90, seed=7, prefix="b")
    index = build(fitted, folder, **options)
    index.add(fitted, more)
    other = build(fitted, tmp_path / "b", examples=data(90, seed=8, prefix="c"), **options)
    expected = content(folder)
    raw = bytearray((folder / "rows-00001.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 4
    (folder / "rows-00001.safetensors").write_bytes(raw)
    assert len(GradientIndex.verify(folder)) == 1
    GradientIndex.repair(folder, fitted)
    assert content(folder) == expected
    index = GradientIndex(folder)
    index.remove(index.ids()[:300])
    index.compact()
    merged = GradientIndex.merge(tmp_path / "merged", [index, other])
    assert len(merged) == len(index) + 90 and merged.encoding == index.encoding
    assert GradientIndex.verify(tmp_path / "merged") == []
    plain = build(
        fitted, tmp_path / "c", examples=data(90, seed=9, prefix="d"), kind=RANDOM, dtype="bfloat16"
    )
    with pytest.raises(ArtifactMismatch, match="factors"):
        GradientIndex.merge(tmp_path / "bad", [index, plain])
    with pytest.raises(ArtifactMismatch, match="factors"):
        build(fitted, folder, **options | {"factors": 2})


def test_the_error_told_is_that_of_the_factors(tmp_path, fitted):
    errors = [
        build(fitted, tmp_path / str(f), kind=RANDOM, factors=f).info()["error"] for f in (None, 1)
    ]
    assert errors[1]["whole"]["spearman"] == pytest.approx(errors[0]["whole"]["spearman"], abs=0.01)
    assert errors[1]["dtype_alone"]["spearman"] > 0.999  # one position: rank one


def test_leading_coordinates_have_no_factors(tmp_path, fitted):
    with pytest.raises(ValueError, match=r"sides='random'.*LoGra"):
        build(fitted, tmp_path / "a", kind=Whitened(rank=4, sides="leading"), factors=1)
    auto = build(fitted, tmp_path / "b", kind=Whitened(rank=4, damping=0.01), factors=1)
    assert auto.info()["kind"] == "sketched"
    for rank in (0, -3):
        with pytest.raises(ValueError, match="1 or more factors"):
            build(fitted, tmp_path / "c", kind=RANDOM, factors=rank)


@pytest.mark.parametrize(
    "factors",
    [
        {"rank": 0, "shapes": {}},
        {"rank": 1, "shapes": {}},
        {"rank": 1, "shapes": [1]},
        {"rank": 1.5, "shapes": {"0": [1, 3, 3], "2": [1, 3, 3]}},
        {"rank": 1, "shapes": {"0": [1, 3], "2": [1, 3, 3]}},
        {"rank": 1, "shapes": {"0": [1, 3, 10**15], "2": [1, 3, 3]}},
        {"rank": 10**15, "shapes": {"0": [1, -3, -3], "2": [1, 3, 3]}},
        "none",
    ],
)
def test_factors_that_no_build_wrote_are_refused(tmp_path, fitted, factors):
    folder = tmp_path / "index"
    build(fitted, folder, kind=RANDOM, factors=1)
    rewritten(folder, lambda body: body.update(factors=factors))
    for use in (GradientIndex, GradientIndex.verify):
        with pytest.raises(ArtifactDamaged, match=r"index\.json.*build"):
            use(folder)
