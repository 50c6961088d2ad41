"""Approximate search finds what its measured recall says, and says when FAISS is missing."""

import sys

import pytest
import torch

from headwater.core.index import Approximate
from tests.index_builds import N, build, data, small_fit


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


@pytest.fixture(scope="module")
def index(fitted, tmp_path_factory):
    return build(fitted, tmp_path_factory.mktemp("approximate") / "index", sample=0)


@pytest.mark.parametrize("structure", ["ivf", "hnsw"])
def test_what_is_looked_up_is_scored_exactly_and_mostly_found(structure, index, fitted):
    pytest.importorskip("faiss")
    made = Approximate.build(index, structure, probes=4)
    asked = index.ask(fitted, data(30, seed=9))
    exact, found = index.search(asked, keep=10), index.search(asked, keep=10, approximate=made)
    place = {name: i for i, name in enumerate(exact.train_ids)}
    both = [i for i, name in enumerate(found.train_ids) if name in place]
    torch.testing.assert_close(
        found.values[:, both], exact.values[:, [place[found.train_ids[i]] for i in both]]
    )
    hits = 0
    for lowest in (False, True):
        for a, b in zip(exact.top(10, lowest=lowest), found.top(10, lowest=lowest), strict=True):
            hits += len({exact.train_ids[i] for i in a} & {found.train_ids[i] for i in b})
    recall = hits / (2 * 10 * 30)
    # the recall was measured on other queries: rows of the index
    assert 0.5 < made.recall <= 1 and recall > made.recall - 0.3
    assert found.facts["approximate"] == {"structure": structure, "recall": made.recall}


def test_looking_through_every_list_finds_everything(index, fitted):
    pytest.importorskip("faiss")
    made = Approximate.build(index, "ivf", probes=10_000)
    assert made.recall == pytest.approx(1)
    asked = index.ask(fitted, data(5, seed=9))
    assert (
        index.search(asked, keep=10, approximate=made).train_ids
        == index.search(asked, keep=10).train_ids
    )


def test_filters_and_a_changed_index_are_refused(fitted, tmp_path):
    pytest.importorskip("faiss")
    index = build(fitted, tmp_path / "index", sample=0)
    made, asked = Approximate.build(index, sample=0), index.ask(fitted, data(2, seed=9))
    for options in ({"where": {"source": "web"}}, {"mode": "relatif"}, {"group_by": "source"}):
        with pytest.raises(ValueError, match="no filters"):
            index.search(asked, approximate=made, **options)
    index.add(fitted, data(9, seed=3, prefix="z"))
    with pytest.raises(ValueError, match=f"made of {N} rows"):
        index.search(asked, approximate=made)


def test_a_missing_faiss_is_told_with_its_extra(index, monkeypatch):
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"headwater\[faiss\]"):
        Approximate.build(index)
