"""Adding, removing, compacting and merging: no row is lost or doubled, and answers stay what they were."""

import random

import pytest
import torch

from headwater.core.files import ArtifactError, ArtifactMismatch, ArtifactMissing
from headwater.core.index import GradientIndex, LoGra, Whitened
from tests import index_builds
from tests.index_builds import N, build, data, small_fit

MORE = dict(n=90, seed=7, prefix="b")


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


def ids(index) -> list[str]:
    return sorted(index.ids())


def by_id(index) -> dict[str, torch.Tensor]:
    """Every row that can be found, by its example."""
    live = index.live.nonzero().flatten()
    return dict(zip(index.ids(live), index.rows(live), strict=True))


def scores(index, fitted) -> dict[str, float]:
    found = index.attribute(fitted, data(1, seed=9), keep=len(index))
    return dict(zip(found.train_ids, found.values[0].tolist(), strict=True))


def test_added_rows_are_those_of_an_index_of_their_own(fitted, tmp_path):
    index, more = build(fitted, tmp_path / "a"), data(**MORE)
    own = build(fitted, tmp_path / "b", examples=more)
    before = by_id(index)
    index.add(fitted, more)
    assert len(index) == N + 90 and ids(index) == sorted([*data().ids, *more.ids])
    assert sorted(index.numbers()) == list(range(N + 90))
    for name, row in (before | by_id(own)).items():
        assert torch.equal(by_id(index)[name], row)
    expected = {k: v for part in (before, by_id(own)) for k, v in part.items()}
    assert scores(index, fitted).keys() == expected.keys()


def test_a_build_and_a_repair_go_on_where_memory_does_not_suffice_for_a_batch(
    fitted, tmp_path, monkeypatch
):
    whole, plain = build(fitted, tmp_path / "whole", sample=0), index_builds.Slow.batch

    def batch(self, indices):
        if len(indices) > 10:
            raise torch.OutOfMemoryError("the device is full")
        return plain(self, indices)

    monkeypatch.setattr(index_builds.Slow, "batch", batch)
    with pytest.warns(UserWarning, match="goes on with at most 8 examples"):
        index = build(fitted, tmp_path / "halved", sample=0)
    assert index.ids() == whole.ids()
    places = torch.arange(whole.n_rows)
    torch.testing.assert_close(index.rows(places), whole.rows(places))
    (tmp_path / "halved" / "rows-00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="goes on with at most"):
        GradientIndex.repair(tmp_path / "halved", fitted)
    torch.testing.assert_close(GradientIndex(tmp_path / "halved").rows(places), whole.rows(places))


def test_removed_rows_are_gone_at_once_and_from_the_disk_after_compacting(fitted, tmp_path):
    index = build(fitted, tmp_path / "a")
    gone = random.Random(0).sample(index.ids(), 300)
    everything, size = scores(index, fitted), index.info()["bytes"]
    index.remove(gone)
    left = {k: v for k, v in everything.items() if k not in gone}
    assert len(index) == N - 300 and scores(index, fitted) == pytest.approx(left, rel=1e-6)
    index.compact()
    assert len(index) == index.n_rows == N - 300 and scores(index, fitted) == pytest.approx(
        left, rel=1e-6
    )
    assert index.info()["bytes"] < 0.7 * size and GradientIndex.verify(tmp_path / "a") == []
    own = index.self_influence()
    assert torch.allclose(own, index.rows(torch.arange(len(index))).square().sum(1) / N)
    index.add(fitted, data().subset([data().ids.index(i) for i in gone]))
    assert scores(index, fitted) == pytest.approx(everything, rel=1e-4)


def test_a_compacted_shard_is_mended_from_the_batches_it_came_from(fitted, tmp_path):
    index = build(fitted, tmp_path / "a")
    index.remove([f"a{i}" for i in range(0, N, 3)])
    index.compact()
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for name in sorted(n for n in files if n.startswith(("rows", "ids"))):
        (tmp_path / "a" / name).unlink()
    GradientIndex.repair(tmp_path / "a", fitted)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == files


def test_a_shard_of_which_every_row_was_removed_leaves(fitted, tmp_path):
    index = build(fitted, tmp_path / "a")
    first = index.ids(torch.arange(len(index.shards[0])))
    index.remove(first)
    index.compact()
    assert len(index.shards) == 2 and len(index) == N - len(first)
    index.remove(index.ids())
    with pytest.raises(ValueError, match="delete the folder"):
        index.compact()


def test_a_merged_index_answers_as_its_parts_do(fitted, tmp_path):
    a = build(fitted, tmp_path / "a")
    b = build(fitted, tmp_path / "b", examples=data(**MORE))
    a.remove(["a5", "a17"])
    merged = GradientIndex.merge(tmp_path / "both", [a, b])
    assert ids(merged) == sorted([*a.ids(), *b.ids()]) and GradientIndex.verify(merged.folder) == []
    assert scores(merged, fitted) == pytest.approx(scores(a, fitted) | scores(b, fitted), rel=1e-6)
    merged.compact()  # files that are linked with the parts' are not touched
    assert GradientIndex.verify(tmp_path / "a") == GradientIndex.verify(tmp_path / "b") == []
    path = tmp_path / "both" / "rows-00003.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(ArtifactMismatch, match="other data"):
        GradientIndex.repair(merged.folder, fitted)
    GradientIndex.repair(merged.folder, fitted, data(**MORE))
    assert GradientIndex.verify(merged.folder) == []


def test_projected_second_moments_of_a_merged_index_are_those_of_all_rows(fitted, tmp_path):
    a, b = (
        build(fitted, tmp_path / n, kind=LoGra(rank=3), examples=d, sample=0)
        for n, d in (("a", data()), ("b", data(**MORE)))
    )
    merged = GradientIndex.merge(tmp_path / "both", [a, b])
    rows = merged.rows(torch.arange(len(merged))).double()
    first = next(iter(merged.journal.layers.values()))
    F = rows[:, :first].mT @ rows[:, :first] / len(rows)
    name = next(iter(merged.journal.layers))
    values, vectors = merged.metric(f"values:{name}"), merged.metric(f"vectors:{name}")
    torch.testing.assert_close((vectors * values) @ vectors.mT, F)
    damped = F + 0.1 * values.mean() * torch.eye(len(F)).double()
    own = (rows[:, :first] * torch.linalg.solve(damped, rows[:, :first].mT).mT).sum(1)
    assert bool((merged.squares.double() >= own * (1 - 1e-5)).all())


def test_added_rows_of_projected_gradients_have_the_index_own_lengths(fitted, tmp_path):
    index = build(fitted, tmp_path / "a", kind=LoGra(rank=3), sample=0)
    index.add(fitted, data(**MORE))
    first = index.squares.clone()
    index.remove(["a1"])
    index.compact()
    asked = index.ask(fitted, data(**MORE), measurement="loss")
    place = index.positions_of(data(**MORE).ids)
    torch.testing.assert_close(index.squares[place], asked.squares, rtol=1e-4, atol=0)
    assert len(first) == N + 90


def test_doubled_and_unknown_ids_are_refused(fitted, tmp_path):
    index = build(fitted, tmp_path / "a")
    with pytest.raises(ValueError, match="'a3' and 6 others are in the index already"):
        index.add(fitted, data().subset(range(3, 10)))
    with pytest.raises(ValueError, match="no example 'zebra'"):
        index.remove(["a3", "zebra"])
    assert len(index) == N
    other = build(fitted, tmp_path / "b")
    with pytest.raises(ValueError, match="remove it from one of them"):
        GradientIndex.merge(tmp_path / "both", [index, other])
    assert not (tmp_path / "both").exists()


def test_indexes_of_other_coordinates_are_not_merged(fitted, tmp_path):
    a = build(fitted, tmp_path / "a")
    for name, options in {
        "dtype": {"dtype": "int8"},
        "projection": {"kind": LoGra(rank=2)},
    }.items():
        other = build(fitted, tmp_path / name, examples=data(**MORE), sample=0, **options)
        with pytest.raises(ArtifactMismatch, match=name):
            GradientIndex.merge(tmp_path / "both", [a, other])
    GradientIndex.merge(tmp_path / "one", [a])
    with pytest.raises(ArtifactError, match="holds an index already"):
        GradientIndex.merge(tmp_path / "one", [a])


def test_an_addition_that_stopped_is_invisible_until_it_is_finished(fitted, tmp_path, monkeypatch):
    index, more = build(fitted, tmp_path / "a"), data(600, seed=7, prefix="b")
    real, seen = type(more).batch, []

    def stop(self, indices):
        seen.append(indices)
        if len(seen) > 14:
            raise KeyboardInterrupt
        return real(self, indices)

    monkeypatch.setattr(type(more), "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        index.add(fitted, more)
    monkeypatch.setattr(type(more), "batch", real)
    again = GradientIndex(tmp_path / "a")
    assert len(again) == N and again.info()["unfinished"]
    with pytest.raises(ArtifactMismatch, match="unfinished addition of other data"):
        again.add(fitted, data(**MORE))
    with pytest.raises(ArtifactError, match="unfinished addition"):
        again.compact()
    again.remove(["a1"])
    calls = []
    monkeypatch.setattr(type(more), "batch", lambda s, i: calls.append(i) or real(s, i))
    again.add(fitted, more)
    assert len(again) == N - 1 + 600 and 0 < len(calls) < 19
    assert sorted(again.numbers()) == [n for n in range(N + 600) if n != data().ids.index("a1")]


def test_an_addition_can_be_given_up(fitted, tmp_path, monkeypatch):
    index, more = build(fitted, tmp_path / "a"), data(**MORE)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*s-*")}
    monkeypatch.setattr(type(more), "batch", lambda self, indices: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.add(fitted, more)
    index.drop_pending()
    assert not index.info()["unfinished"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*s-*")} == before


def test_any_order_of_changes_keeps_exactly_the_rows_it_should(fitted, tmp_path):
    draw, index = random.Random(1), build(fitted, tmp_path / "a", sample=0)
    truth = by_id(index)
    expected, spare = set(index.ids()), []
    for step in range(12):
        kind = draw.choice(["add", "remove", "compact"])
        if kind == "add":
            new = data(draw.randrange(1, 60), seed=step, prefix=f"s{step}-")
            index.add(fitted, new)
            expected |= set(new.ids)
            truth |= {k: v for k, v in by_id(index).items() if k not in truth}
        elif kind == "remove":
            spare = draw.sample(sorted(expected), draw.randrange(1, 80))
            index.remove(spare)
            expected -= set(spare)
        else:
            index.compact()
        found = by_id(index)
        assert found.keys() == expected and len(index.ids()) == len(expected) == len(index)
        assert all(torch.equal(found[i], truth[i]) for i in found)
    assert GradientIndex.verify(tmp_path / "a") == []


def test_a_finished_index_is_opened_instead_of_built_again(fitted, tmp_path, monkeypatch):
    build(fitted, tmp_path / "a")
    monkeypatch.setattr(type(fitted.train), "batch", lambda self, indices: 1 / 0)
    assert len(build(fitted, tmp_path / "a")) == N


def test_where_there_is_no_index_it_is_said(tmp_path):
    with pytest.raises(ArtifactMissing, match="headwater index build"):
        GradientIndex(tmp_path / "nothing")


def test_the_error_is_measured_at_build_time(fitted, tmp_path):
    whole = build(fitted, tmp_path / "a", kind=Whitened(rank=None, damping=0.01))
    error = whole.info()["error"]
    assert error["whole"]["spearman"] > 0.9999 and error["whole"]["recall_10"] > 0.98
    assert error["rows"] == 30 and error["curvature"] == "layerwise"
    few = build(
        fitted, tmp_path / "b", kind=Whitened(rank=1, damping=0.01, sides="leading"), dtype="int8"
    )
    rough = few.info()["error"]
    assert rough["whole"]["spearman"] < 0.999 < rough["dtype_alone"]["spearman"] + 0.01
    assert few.info()["kept_share"] < 1
    assert "whole" not in build(fitted, tmp_path / "c", sample=0).info()


def test_indexes_tell_what_they_are(fitted, tmp_path):
    text = repr(build(fitted, tmp_path / "a"))
    assert "700 rows of 28 numbers in float32, whitened" in text
