"""Scores: significance, tables, saving, contrasts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.core.scores import GroupTotals, Scores, significance


def scores(**more) -> Scores:
    values = torch.tensor([[0.5, -2.0, 3.0, 1.0], [-1.0, 4.0, 0.0, -3.0]])
    defaults = {
        "values": values,
        "query_ids": ["first", "second"],
        "train_ids": ["a", "b", "c", "d"],
        "low": values - 1,
        "high": values + 1,
        "metadata": {"source": ["x", "y", "x", "y"], "year": [1, 2, 3, 4]},
        "facts": {
            "method": "influence",
            "made_from": {"model": "1" * 64},
            "damping": {"value": 0.1},
        },
    }
    return Scores(**defaults | more)


@given(
    values=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    control=st.lists(st.floats(-3, 3), min_size=1, max_size=9),
)
def test_significance_counts_held_out_examples_that_reach_the_score(values, control):
    found = significance(*(torch.tensor([x], dtype=torch.float64) for x in (values, control)))
    for p, s in zip(found[0].tolist(), values, strict=True):
        reach = sum(c >= s if s >= 0 else c <= s for c in control)
        assert p == pytest.approx((1 + reach) / (1 + len(control)), rel=1e-6)


def test_significance_is_uniform_where_nothing_was_learned():
    torch.manual_seed(0)
    values, control = torch.randn(1, 4000), torch.randn(1, 999)
    p = significance(values, control)[0]
    # the score picks its side, so half of all p-values lie below a quarter: a share of 2 p is reached
    for level in (0.05, 0.2):
        assert float((p <= level).double().mean()) == pytest.approx(2 * level, abs=0.04)


def test_top_of_both_sides():
    assert scores().top(2) == [[2, 3], [1, 2]]
    assert scores().top(1, lowest=True) == [[1], [3]]
    assert len(scores().top(99)[0]) == 4


def test_totals_by_a_column():
    totals = scores().by("source")
    assert totals.names == ["x", "y"] and totals.counts == [2, 2]
    assert totals.raised.tolist() == [[3.5, 1.0], [0.0, 4.0]]
    assert totals.lowered.tolist() == [[0.0, -2.0], [-1.0, -3.0]]
    assert totals.net.tolist() == [[3.5, -1.0], [-1.0, 1.0]]
    assert scores().by("year").names == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match="no metadata column 'author'; there are: source, year"):
        scores().by("author")


def some_kept(**more) -> Scores:
    totals = GroupTotals(
        column="source",
        names=["x", "y"],
        counts=[50, 49],
        raised=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        lowered=torch.tensor([[0.0, -2.0], [-1.0, -3.0]]),
    )
    return scores(kept=[4, 7, 50, 98], n_train=99, totals=totals, **more)


def test_scores_of_the_strongest_know_their_numbers_and_the_totals_of_all(tmp_path):
    found = some_kept(layer_totals=torch.rand(1, 2), layers=["fc"])
    assert [found.index(i) for i in range(4)] == [4, 7, 50, 98]
    assert found.by("source").net.tolist() == [[1.0, 0.0], [2.0, 1.0]]
    with pytest.raises(ValueError, match=r"strongest 4 of 99.*group_by='year'"):
        found.by("year")
    assert "4 training examples kept of 99" in repr(found)
    found.save(tmp_path / "scores")
    back = Scores.load(tmp_path / "scores")
    assert back.kept == found.kept and back.n_train == 99
    assert torch.equal(back.by("source").raised, found.by("source").raised)
    assert back.layer_totals is not None and torch.equal(back.layer_totals, found.layer_totals)
    with pytest.raises(ValueError, match="need n_train and a number for each of the 4"):
        scores(kept=[1, 2])


def test_some_columns_keep_all_that_is_theirs():
    whole = some_kept()
    values = whole.values
    layers = torch.stack([values, 2 * values])
    some = some_kept(low=values - 1, high=values + 1, by_layer=layers).only([1])
    assert some.train_ids == [whole.train_ids[1]] and some.kept == [whole.kept[1]]
    assert some.n_train == whole.n_train and some.query_ids == whole.query_ids
    for name, expected in (("values", values), ("low", values - 1), ("high", values + 1)):
        assert torch.equal(getattr(some, name), expected[:, [1]])
    assert torch.equal(some.by_layer, layers[..., [1]])
    assert all(v == [whole.metadata[k][1]] for k, v in some.metadata.items())


def test_a_contrast_is_the_difference():
    held = torch.tensor([[0.0, 1.0], [2.0, -2.0]])
    mine, other = scores(control=held), scores(values=torch.ones(2, 4), control=torch.zeros(2, 2))
    found = mine - other
    assert torch.equal(found.values, mine.values - 1) and found.query_ids[0] == "first - first"
    assert found.low is None and torch.equal(found.control, held)
    assert torch.equal(found.significance, significance(found.values, held))
    assert (mine - scores()).significance is None
    with pytest.raises(ValueError, match="same training examples"):
        mine - scores(train_ids=["e", "f", "g", "h"])


def test_shapes_must_match_the_ids():
    with pytest.raises(ValueError, match=r"Expected scores \(2, 4\).*got \(1, 4\)"):
        Scores(values=torch.zeros(1, 4), query_ids=["a", "b"], train_ids=list("cdef"))


def test_comes_back_from_its_folder(tmp_path):
    full = scores(
        significance=torch.rand(2, 4),
        control=torch.randn(2, 3),
        by_layer=torch.randn(2, 2, 4),
        layers=["l1", "l2"],
        measurement="margin",
    )
    full.save(tmp_path / "full")
    again = Scores.load(tmp_path / "full")
    for name in ("values", "low", "high", "significance", "control", "by_layer"):
        assert torch.equal(getattr(again, name), getattr(full, name))
    for name in ("query_ids", "train_ids", "measurement", "layers", "metadata", "facts"):
        assert getattr(again, name) == getattr(full, name)
    scores(low=None, high=None, metadata={}).save(tmp_path / "bare")
    bare = Scores.load(tmp_path / "bare")
    assert bare.low is None and bare.by_layer is None and bare.metadata == {}


def test_a_table_has_a_row_for_each_pair():
    pytest.importorskip("pandas")
    table = scores(significance=torch.full((2, 4), 0.5)).to_pandas()
    assert list(table) == [
        "query",
        "train",
        "score",
        "low",
        "high",
        "significance",
        "source",
        "year",
    ]
    assert len(table) == 8 and table.iloc[2].to_dict()["score"] == 3.0
    ends = scores().to_pandas(top=1)
    assert ends["train"].tolist() == ["c", "b", "b", "d"]
    assert ends["score"].tolist() == [3.0, -2.0, 4.0, -3.0]
    assert len(scores().to_pandas(top=4)) == 8  # both ends meet, and no pair is told twice


def test_a_figure_shows_the_strongest_examples():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = scores(low=torch.full((2, 4), float("nan"))).plot(1, top=1).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "d"]
    assert axes.get_xlabel() == "change of loss (nats)" and axes.get_title() == "second"


def test_the_representation_is_a_small_table():
    text = repr(scores())
    assert "2 queries × 4 training examples" in text and "raised by c +3, d +1, a +0.5" in text
    twice = repr(scores(query_ids=["same", "same"]))
    assert "c +3" in twice and "b +4" in twice
    many = Scores(values=torch.zeros(7, 1), query_ids=list("abcdefg"), train_ids=["t"])
    assert "and 2 more queries" in repr(many) and len(many) == 7


def test_metadata_of_several_types_come_back_as_they_were(tmp_path):
    columns = {
        "mixed": [1, "a", None, 2.5],
        "nested": [{"a": 1}, {"b": [2]}, {}, None],
        "plain": ["x", None, "y", "z"],
        "number": [1, 2, None, 4],
    }
    scores(metadata=columns).save(tmp_path / "some")
    assert Scores.load(tmp_path / "some").metadata == columns
