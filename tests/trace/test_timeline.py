import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import Dense
from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactDamaged
from headwater.core.task import Classification
from headwater.trace.source import Source
from headwater.trace.timeline import Timeline, timeline
from headwater.training.optimizers import SGD, Stage
from headwater.training.run import train_model

TASK = Classification(measurement_of="log_prob")
FIRST, SECOND = torch.arange(8), torch.arange(8, 14)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fit and the record of a run of two stages; the queries are an example of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, names = torch.randn(14, 4).double(), [f"e{i}" for i in range(14)]
    topic = {"topic": ["a", "b"] * 7}
    data = TensorExamples(x, torch.arange(14) % 3, ids=names, metadata=topic)
    rule = SGD(lr=0.3, momentum=0.5, batch_size=4, epochs=6, weight_decay=0.05)
    stages = [
        Stage(optimizer=rule, examples=FIRST, name="pretrain"),
        Stage(optimizer=replace(rule, epochs=3), examples=SECOND, name="fine-tune"),
    ]
    folder = tmp_path_factory.mktemp("run")
    record = train_model(model, data, TASK, stages, folder=folder, checkpoints=6)
    fit = headwater.fit(model, data, TASK, curvature=Dense())
    return fit, data.subset([1, 9]), record


@pytest.fixture(scope="module")
def found(trained):
    fit, queries, record = trained
    return timeline(fit, queries, trajectory=record, source=Source(segments=3), check=True)


def test_segments_add_up_to_the_attribution(trained, found):
    fit, queries, record = trained
    scores = Source(segments=3).attribute(fit, queries, trajectory=record)
    torch.testing.assert_close(found.scores().values, scores.values)
    assert found.gap < 1e-6 and "check: the sum is the attribution" in repr(found)
    assert found.facts["segments"] == scores.facts["segments"]
    assert found.facts["curvature"] == scores.facts["curvature"]
    assert (found.measurement, found.facts["unit"]) == ("log_prob", "nats")
    parts = Source(segments=3).by_segment(fit, queries, trajectory=record)
    torch.testing.assert_close(found.values, parts.float())


def test_each_stage_is_credited_with_its_own_examples_alone(found):
    stages = found.by_stage
    assert [s.name for s in found.stages] == ["pretrain", "fine-tune"]
    assert stages.shape == (2, 2, 14)
    assert not stages[0][:, SECOND].any() and not stages[1][:, FIRST].any()
    # a query that was trained on is raised by itself, in its own stage
    assert stages[0, 0, 1] > 0 and stages[1, 1, 9] > 0
    torch.testing.assert_close(stages.sum(0), found.values.sum(0))


def test_sums_and_strongest_examples_are_those_of_the_scores(found):
    v = found.values.double()
    torch.testing.assert_close(found.net, v.sum(2))
    torch.testing.assert_close(found.raised, v.where(v > 0, 0.0).sum(2))
    torch.testing.assert_close(found.raised + found.lowered, found.net)
    names = found.strongest(2, 1, k=20)
    assert {name for name, _ in names} == {f"e{i}" for i in SECOND.tolist()}  # no others were seen
    sizes = [abs(value) for _, value in names]
    assert sizes == sorted(sizes, reverse=True)
    assert dict(names)["e9"] == pytest.approx(float(v[2, 1, 9]))


def test_totals_by_a_column_are_those_of_each_segment(found):
    totals = found.by("topic")
    assert len(totals) == 3 and totals[0].names == ["a", "b"]
    torch.testing.assert_close(totals[1].net[:, 1], found.values[1][:, 1::2].sum(1))
    row = found.rows(0, top=2, column="topic")[1]
    assert row["totals"] == pytest.approx(dict(zip("ab", totals[1].net[0].tolist(), strict=True)))
    assert (row["stage"], len(row["strongest"])) == ("pretrain", 2)
    assert row["net"] == pytest.approx(sum(row["totals"].values()), rel=1e-5)


def test_is_a_table_of_text_and_of_pandas(found):
    lines = repr(found).splitlines()
    assert lines[0].startswith("Timeline(2 queries × 3 segments of 18 steps × 14 training examples")
    assert next(line.split()[:2] for line in lines if "pretrain" in line) == ["0-6", "pretrain"]
    assert sum(line.split()[0] == "all" for line in lines) == 2
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert len(frame) == 3 * 2 * 14
    assert list(frame.columns[:6]) == ["segment", "stage", "start", "stop", "query", "train"]
    assert frame["score"].sum() == pytest.approx(float(found.values.sum()), rel=1e-4)


def test_comes_back_from_its_folder(found, tmp_path):
    found.save(tmp_path / "kept")
    again = Timeline.load(tmp_path / "kept")
    assert torch.equal(again.values, found.values)
    assert (again.segments, again.stages) == (found.segments, found.stages)
    for name in ("losses", "query_ids", "queries", "train_ids", "metadata", "texts", "gap"):
        assert getattr(again, name) == getattr(found, name), name
    assert repr(again) == repr(found)
    assert {p.suffix for p in (tmp_path / "kept").iterdir()} <= {
        ".safetensors",
        ".json",
        ".parquet",
    }
    manifest = next((tmp_path / "kept").glob("*.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "scores"}))
    with pytest.raises((ArtifactDamaged, ValueError)):
        Timeline.load(tmp_path / "kept")


def test_a_plot_has_a_panel_a_query_and_a_bar_a_segment(found):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    named = replace(found, queries=["costs $5 and $6\x1b[31m", "another"])
    figure = named.plot()
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "costs $5 and $6\\x1b[31m",
        "another",
    ]
    bars = [(b.get_x(), b.get_width(), b.get_height()) for b in panels[0].patches]
    assert [b[:2] for b in bars] == [(s.start, s.steps) for s in found.segments] * 2
    heights = [*found.raised[:, 0].tolist(), *found.lowered[:, 0].tolist()]
    assert [b[2] for b in bars] == pytest.approx(heights)
    assert {"pretrain", "fine-tune"} <= {t.get_text() for t in panels[1].texts}
    assert len(found.plot(queries=[1]).axes) == 2  # the panel, and its loss curve
    silent = replace(found, losses=[float("nan")] * 18)
    assert len(silent.plot(queries=[1]).axes) == 1
    pyplot.close("all")


def test_the_strongest_examples_are_kept_with_their_texts(trained, monkeypatch):
    fit, queries, record = trained
    monkeypatch.setattr(TensorExamples, "tokens", lambda self, i: ["text", f" {i}"], raising=False)
    made = timeline(fit, queries, trajectory=record, top=1)
    assert made.queries == ["e1", "e9"]  # which have no texts
    for segment in range(3):
        name = made.strongest(segment, 0, 1)[0][0]
        assert made.texts[name] == f"text {name[1:]}"
    assert len(made.texts) <= 6 and made.gap is None


def test_there_are_as_many_segments_as_stages_at_least(trained):
    fit, queries, record = trained
    assert len(timeline(fit, queries, trajectory=record)) == 3
    with pytest.raises(ValueError, match="1 segments need a checkpoint each"):
        timeline(fit, queries, trajectory=record, source=Source(segments=1))


def test_values_of_another_shape_are_refused(found):
    with pytest.raises(ValueError, match=r"Expected values \(3, 2, 14\)"):
        replace(found, values=found.values[:2])
