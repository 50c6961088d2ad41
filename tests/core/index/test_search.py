"""Searching an index: the exact scan equals the whole product, filters and duplicates do what they say."""

import pytest
import torch

from headwater.core.files import ArtifactMismatch
from headwater.core.index import GradientIndex, LoGra, Whitened, search
from headwater.core.index.search import clusters
from headwater.core.index.stored import StoredRows
from headwater.numerics.ranks import spearman
from headwater.trace import Indexed, Influence
from tests.curvature_cases import shared
from tests.index_builds import N, build, data, small_fit
from tests.index_cases import built


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


@pytest.fixture(scope="module")
def index(fitted, tmp_path_factory):
    return build(fitted, tmp_path_factory.mktemp("search") / "index")


@pytest.fixture(scope="module")
def queries():
    return data(5, seed=9, prefix="q")


def products(index, fitted, queries):
    """All inner products (query, row) at once, in memory."""
    return index.ask(fitted, queries).rows @ index.rows(torch.arange(index.n_rows)).mT


def test_the_scan_finds_what_the_whole_product_has(index, fitted, queries):
    whole = -products(index, fitted, queries) / N
    found = index.attribute(fitted, queries, keep=7)
    for q, row in enumerate(whole):
        for lowest in (False, True):
            best = row.topk(7, largest=not lowest).indices
            names = [found.train_ids[i] for i in found.top(7, lowest=lowest)[q]]
            assert names == index.ids(best)
    place = index.positions_of(found.train_ids)
    torch.testing.assert_close(found.values, whole[:, place], rtol=1e-5, atol=1e-9)
    assert found.n_train == N and found.kept == index.numbers(place)


@pytest.mark.parametrize("n_queries", [1, 5])
def test_many_small_blocks_tell_what_one_tells(n_queries, index, fitted, queries, monkeypatch):
    asked = queries.subset(range(n_queries))
    at_once = index.attribute(fitted, asked, keep=7)
    monkeypatch.setattr(search, "_BLOCK_BYTES", 1)  # blocks of 16 rows
    monkeypatch.setattr(search, "_SCORE_ROWS", 50)
    blocks = [
        len(rows) for rows, *_ in search.blocks(StoredRows(index.folder), once=n_queries == 1)
    ]
    assert max(blocks) == (50 if n_queries == 1 else 16) and sum(blocks) == N
    found = index.attribute(fitted, asked, keep=7)
    assert found.kept == at_once.kept
    torch.testing.assert_close(found.values, at_once.values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    "kind", [Whitened(rank=4, damping=0.01, sides="leading"), LoGra(rank=4)], ids=["w", "l"]
)
def test_scores_from_disk_equal_scores_in_memory(kind, dtype, fitted, queries, tmp_path):
    index = build(fitted, tmp_path, dtype=dtype, kind=kind, sample=0)
    rows = index.project(fitted, data())
    ready = index.ask(fitted, queries).rows
    place = index.positions_of(data().ids)
    found = index.attribute(fitted, queries, keep=N)
    from_disk = found.values[:, torch.tensor(found.kept).argsort()]
    stored = -(ready @ index.rows(place).mT) / N
    torch.testing.assert_close(from_disk, stored, rtol=1e-5, atol=1e-9)
    if kind == LoGra(rank=4):
        return  # its curvature is that of the rounded rows
    exact = -(ready @ rows.mT) / N
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 1e-2, "int8": 4e-2}[dtype]
    lengths = ready.norm(dim=1)[:, None] * rows.norm(dim=1) / N
    assert bool(((from_disk - exact).abs() <= tolerance * lengths).all())
    assert float(spearman(from_disk, exact).min()) > 0.999


def test_cosine_and_relatif_divide_as_they_say(index, fitted, queries):
    whole, rows = products(index, fitted, queries), index.rows(torch.arange(index.n_rows))
    own, asked = rows.norm(dim=1), index.ask(fitted, queries).rows.norm(dim=1)
    for mode, by in (("relatif", own), ("cosine", own * asked[:, None])):
        found = index.attribute(fitted, queries, keep=N, mode=mode)
        place = index.positions_of(found.train_ids)
        expected = (-whole / by)[:, place]
        torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)
        assert found.unit == ""
    assert float(found.values.abs().max()) <= 1 + 1e-5


def test_relatif_of_projected_gradients_divides_by_self_influence(fitted, queries, tmp_path):
    index = build(fitted, tmp_path, kind=LoGra(rank=3), sample=0)
    asked = index.ask(fitted, data(), measurement="loss")  # the training examples themselves
    own = (asked.rows * index.project(fitted, data())).sum(1)
    torch.testing.assert_close(
        index.self_influence()[torch.tensor(index.numbers()).argsort()], own / N, rtol=1e-4, atol=0
    )
    dot, relatif = (index.attribute(fitted, queries, keep=N, mode=m) for m in ("dot", "relatif"))
    by = dict(zip(data().ids, own.tolist(), strict=True))
    place = [dot.train_ids.index(i) for i in relatif.train_ids]
    length = torch.tensor([by[i] for i in relatif.train_ids]).sqrt()
    torch.testing.assert_close(
        relatif.values, N * dot.values[:, place] / length, rtol=1e-3, atol=1e-6
    )


def test_a_row_of_zeros_has_cosine_zero():
    assert clusters(torch.zeros(2, 3), least=0.5).tolist() == [0, 1]


def test_filters_look_only_among_what_matches(index, fitted, queries):
    metadata = data().metadata
    cases = {
        "a value": ({"source": "book"}, lambda i: metadata["source"][i] == "book"),
        "values": ({"source": ["book", "none"]}, lambda i: metadata["source"][i] == "book"),
        "a range": ({"year": (100, 200)}, lambda i: 100 <= i <= 200),
        "half a range": ({"year": (650, None)}, lambda i: i >= 650),
        "as text": ({"year": ("100", "200")}, lambda i: 100 <= i <= 200),
        "both": ({"year": (None, 99), "source": {"web"}}, lambda i: i < 100 and i % 3 > 0),
        "ids": ({"id": ["a3", "a4"]}, lambda i: i in (3, 4)),
    }
    for name, (where, expected) in cases.items():
        found = index.attribute(fitted, queries, keep=N, where=where)
        assert sorted(found.kept) == [i for i in range(N) if expected(i)], name
        assert found.n_train == len(found.kept)


def test_filters_that_cannot_be_are_refused(index, fitted, queries):
    for where, message in (
        ({"colour": "red"}, "no metadata column 'colour'.*source, year"),
        ({"source": "film"}, "No example of the index .* matches"),
        ({"year": ("soon", None)}, "cannot be compared"),
        ({"year": (1, 2, 3)}, "a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            index.attribute(fitted, queries, where=where)


def test_metadata_of_several_types_can_be_filtered_too(fitted, tmp_path):
    mixed = data(60)
    mixed.metadata = {"tag": [i if i % 2 else "even" for i in range(60)]}
    index = build(fitted, tmp_path, examples=mixed, sample=0)
    found = index.attribute(fitted, data(1, seed=9), keep=60, where={"tag": ["even", "7"]})
    assert sorted(found.kept) == sorted([*range(0, 60, 2), 7])
    assert found.metadata["tag"][found.kept.index(7)] == 7


@pytest.mark.parametrize(
    ("years", "low", "found"),
    [
        ([str(1990 + i) for i in range(9)], "1995", None),  # texts beside whole numbers
        ([1990.5 + i for i in range(9)], "1995", 4),  # numbers go together
        ([1990, "late", None] * 3, "1995", None),
        ([None] * 9, "695", 5),
    ],
)
def test_metadata_of_another_type_in_added_data_are_kept_and_filtered(
    years, low, found, fitted, tmp_path
):
    index, more = build(fitted, tmp_path / "a", sample=0), data(9, seed=5, prefix="b")
    more.metadata["year"] = years
    index.add(fitted, more)
    kept = dict(
        zip(index.ids(), index.metadata(index.live.nonzero().flatten())["year"], strict=True)
    )
    assert [kept[f"b{i}"] for i in range(9)] == years and [kept[f"a{i}"] for i in range(9)] == [
        *range(9)
    ]
    asked = index.ask(fitted, data(2, seed=9, prefix="q"))
    assert index.search(asked, where={"year": ["7"]}).train_ids == ["a7"]
    if found is None:
        with pytest.raises(ValueError, match=r"several types.*name the values"):
            index.search(asked, where={"year": (low, None)})
        first = index.search(asked, where={"year": [years[0]]}).train_ids
        assert first == ["b0", "b3", "b6"][: years.count(years[0])]
    else:
        names = index.search(asked, where={"year": (None, low), "source": ["web"]}).train_ids
        assert len(index.search(asked, where={"year": (low, None)}, keep=N).train_ids) == found
        assert "a1" in names
    assert GradientIndex.verify(index.folder) == []


def test_a_column_that_added_data_lack_is_empty_there(fitted, tmp_path):
    index, more = build(fitted, tmp_path / "a", sample=0), data(4, seed=5, prefix="b")
    mixed = data(4, seed=6, prefix="c")
    del more.metadata["source"]
    mixed.metadata["source"] = ["web", 1, [2], None]
    index.add(fitted, mixed)
    index.add(fitted, more)
    asked = index.ask(fitted, data(2, seed=9, prefix="q"))
    assert index.search(asked, where={"source": ["1"]}).train_ids == ["c1"]
    found = index.search(asked, where={"id": ["b1", "a1", "c2"]})
    assert dict(zip(found.train_ids, found.metadata["source"], strict=True)) == {
        "a1": "web",
        "b1": None,
        "c2": [2],
    }
    assert "None" in index.search(asked, group_by="source").totals.names


def test_near_duplicates_are_shown_as_one_with_their_number(fitted, tmp_path):
    some = data(80)
    x, y = some.tensors
    order = [*range(80), *[3] * 5, *[8] * 2]
    copies = type(some)(x[order], y[order], ids=[f"c{i}" for i in range(len(order))])
    index = build(fitted, tmp_path, examples=copies, sample=0)
    query = some.subset([3])
    plain = index.attribute(fitted, query, keep=8)
    assert len(set(plain.train_ids) & {"c3", *[f"c{i}" for i in range(80, 85)]}) == 6
    found = index.attribute(fitted, query, keep=8, copies=0.999)
    count = dict(zip(found.train_ids, found.metadata["copies"], strict=True))
    leader = next(i for i in count if count[i] == 6)
    assert set(found.facts["copies"][leader]) == {"c3", *[f"c{i}" for i in range(80, 85)]}
    assert len(found.top(8)[0]) == 8 and len(set(found.train_ids)) == len(found.train_ids)
    by_text = index.attribute(
        fitted, query, keep=8, content=lambda name: tuple(x[order[int(name[1:])]].tolist())
    )
    assert max(by_text.metadata["copies"]) == 6


def test_duplicates_are_found_through_others():
    angle = torch.arange(5) * 0.03
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert float(rows[0] @ rows[4]) < 0.999  # not by themselves
    assert clusters(rows, least=0.999).tolist() == [0] * 5
    assert clusters(torch.eye(3), least=0.5, content=["x", "y", "x"]).tolist() == [0, 1, 0]


def test_totals_by_a_column_are_those_of_all_rows(index, fitted, queries):
    whole = index.attribute(fitted, queries, keep=N)
    few = index.attribute(fitted, queries, keep=2, group_by="source")
    expected, found = whole.by("source"), few.by("source")
    assert found.names == expected.names and found.counts == expected.counts
    torch.testing.assert_close(found.raised, expected.raised, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.lowered, expected.lowered, rtol=1e-4, atol=1e-7)
    some = index.attribute(fitted, queries, keep=2, group_by="source", where={"year": (0, 9)})
    assert sum(some.by("source").counts) == 10


def test_parts_of_layers_add_up(index, fitted, queries):
    found = index.attribute(fitted, queries, keep=4, by_layer=True)
    torch.testing.assert_close(found.by_layer.sum(0), found.values, rtol=1e-5, atol=1e-8)


def test_groups_of_queries_and_contrasts_are_linear(index, fitted, queries):
    weights = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]])
    both = index.attribute(fitted, queries, keep=N)
    found = index.attribute(fitted, queries, keep=N, weights=weights, names=["why"])
    assert found.query_ids == ["why"]
    by = {i: float(both.values[0, j] - both.values[1, j]) for j, i in enumerate(both.train_ids)}
    assert dict(zip(found.train_ids, found.values[0].tolist(), strict=True)) == pytest.approx(
        by, rel=1e-3, abs=1e-7
    )
    with pytest.raises(ValueError, match=r"weights \(group, query\)"):
        index.attribute(fitted, queries, weights=torch.ones(1, 3))


def test_options_that_mean_nothing_are_refused(index, fitted, queries):
    for options in ({"keep": 0}, {"mode": "l3"}):
        with pytest.raises((ValueError, TypeError)):
            index.attribute(fitted, queries, **options)


def test_answers_do_not_depend_on_how_rows_are_cut_into_shards(fitted, queries, tmp_path, index):
    other = build(fitted, tmp_path, shard_bytes=1 << 28)
    assert len(other.shards) == 1
    a, b = (i.attribute(fitted, queries, keep=9) for i in (index, other))
    assert a.train_ids == b.train_ids
    torch.testing.assert_close(a.values, b.values)


def test_the_method_looks_up_what_influence_computes(tmp_path):
    case, (fitted, index) = shared("lm"), built(tmp_path / "a", "lm")
    control = GradientIndex.build(
        fitted, tmp_path / "b", kind=Whitened(rank=None, damping=0.01), dtype="float32",
        examples=case.query, sample=0,
    )  # fmt: skip
    method = Indexed(index=index, heldout=control, keep=4)
    found = method.attribute(fitted, case.query, by_layer=True, group_by="source")
    exact = Influence(damping=0.01, n_intervals=0)
    expected = exact.attribute(fitted, case.query, control=case.query)
    place = torch.tensor(found.kept)
    torch.testing.assert_close(found.values, expected.values[:, place], rtol=1e-4, atol=1e-6)
    order = torch.tensor(control.numbers()).argsort()
    torch.testing.assert_close(found.control[:, order], expected.control, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.significance, expected.significance[:, place])
    parts, rest = method.tokens(fitted, case.query, [0, 2])
    torch.testing.assert_close(
        parts.sum(2) + rest, expected.values[:, [0, 2]], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match="heldout"):
        method.attribute(fitted, case.query, control=case.query)


def test_a_fit_of_other_layers_is_refused_by_name(index, fitted):
    from headwater.core.fit import fit

    other = fit(fitted.model, data(), fitted.task, curvature="identity", layers=["0.*"])
    with pytest.raises(ArtifactMismatch, match="covers 2 layers, the fit follows 1"):
        index.ask(other, data(2, seed=2))


def test_held_out_examples_that_were_removed_are_not_counted_and_other_coordinates_refused(
    index, fitted, queries, tmp_path
):
    heldout = build(fitted, tmp_path / "a", examples=data(60, seed=4, prefix="h"), sample=0)
    heldout.remove([f"h{i}" for i in range(0, 60, 2)])
    method = Indexed(index=index, heldout=heldout, keep=5)
    left = build(
        fitted,
        tmp_path / "b",
        examples=data(60, seed=4, prefix="h").subset([*range(1, 60, 2)]),
        sample=0,
    )
    one, two = (
        m.attribute(fitted, queries) for m in (method, Indexed(index=index, heldout=left, keep=5))
    )
    assert one.control.shape[1] == 30
    torch.testing.assert_close(one.control.sort(1).values, two.control.sort(1).values)
    torch.testing.assert_close(one.significance, two.significance)
    kind = Whitened(rank=4, damping=0.02, sides="leading")
    other = build(fitted, tmp_path / "c", examples=data(60, seed=4), kind=kind, sample=0)
    with pytest.raises(ArtifactMismatch, match="another projection"):
        Indexed(index=index, heldout=other, keep=5).attribute(fitted, queries)
