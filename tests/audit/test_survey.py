"""The survey: numbers by their definitions, what stands out, and what can be read again without the model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from headwater.audit.survey import Survey, excerpt, likely_source, survey
from headwater.core.checkpoint import Cadence, Checkpoint
from headwater.core.examples import TensorExamples
from headwater.core.fit import fit
from headwater.core.index import GradientIndex, Whitened
from headwater.core.store import Artifact
from headwater.core.task import Classification
from headwater.trace import Influence
from tests import runs

N = 40


class Written(TensorExamples):
    """Examples that read as something; 3 and 7 alike."""

    def tokens(self, index: int) -> list[str]:
        return ["text ", str(3 if index == 7 else index)]


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    x, y = torch.randn(N, 6, dtype=torch.float64), torch.randint(3, (N,))
    x[9] *= 12  # far out
    x[21], y[21] = 1.001 * x[20], y[20]
    metadata = {
        "name": [f"n{i}" for i in range(N)],
        "topic": ["a" if i % 2 else "b" for i in range(N)],
    }
    data = Written(x, y, ids=[f"e{i}" for i in range(N)], metadata=metadata)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return fit(model, data, Classification(), curvature="ekfac", batch_size=8)


def test_self_influence_and_loss_are_those_of_their_definitions(fitted):
    found = survey(fitted)
    expected = Influence().self_influence(fitted)
    torch.testing.assert_close(found.self_influence, expected)
    x, y = fitted.train.tensors
    losses = nn.functional.cross_entropy(fitted.model(x), y, reduction="none")
    torch.testing.assert_close(found.loss, losses.detach().float())
    assert found.facts["passes"] == "1 with gradients"
    assert found.facts["made_from"] == fitted.made_from


def test_outliers_lie_above_the_fence_of_the_logarithms(fitted):
    found = survey(fitted)
    logs = found.self_influence.double().log()
    low, high = logs.quantile(torch.tensor([0.25, 0.75]).double())
    assert found.outlier.tolist() == (logs > high + 1.5 * (high - low)).tolist()
    assert found.top(3) == found.self_influence.topk(3).indices.tolist()


def test_equal_texts_are_duplicates_and_sources_are_guessed(fitted):
    found = survey(fitted)
    expected = [3 if i == 7 else i for i in range(N)]
    assert found.first.tolist() == expected
    assert [found.n_copies[i] for i in (3, 7, 8)] == [2, 2, 1]
    assert found.source_column == "topic" and found.title(4) == "n4"
    assert survey(fitted, source="name").source_column == "name"
    with pytest.raises(ValueError, match="no column 'year'; their columns are: name, topic"):
        survey(fitted, source="year")


def test_the_rows_of_an_index_stand_in_for_gradients(fitted, tmp_path):
    index = GradientIndex.build(fitted, tmp_path / "index", kind=Whitened(rank=4), sample=0)
    found = survey(fitted, index=index, least=0.99)
    torch.testing.assert_close(found.self_influence, index.self_influence().float())
    assert found.facts["passes"] == "1 forward" and "index" in found.facts["self_influence"]
    torch.testing.assert_close(found.loss, survey(fitted).loss)
    assert found.first[7] == 3  # by their texts
    rows = nn.functional.normalize(index.rows(torch.arange(N)), dim=1)
    near = (rows[20] @ rows[21]) >= 0.99
    assert (int(found.first[21]) == 20) == bool(near) and bool(near)


def test_an_index_that_lacks_an_example_is_passed_by(fitted, tmp_path):
    index = GradientIndex.build(fitted, tmp_path / "index", kind=Whitened(rank=4), sample=0)
    index.remove(["e5"])
    found = survey(fitted, index=index)
    assert found.facts["passes"] == "1 with gradients"
    torch.testing.assert_close(found.self_influence, Influence().self_influence(fitted))


def test_a_stopped_survey_goes_on_where_it_stopped(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(Cadence, "due", property(lambda self: True))  # keep every state

    def stop(done, total, note):
        if done == 3:
            raise KeyboardInterrupt

    place = Checkpoint(tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        survey(fitted, checkpoint=place, progress=stop)
    seen: list[int] = []
    found = survey(fitted, checkpoint=place, progress=lambda done, *_: seen.append(done))
    whole = survey(fitted)
    torch.testing.assert_close(found.loss, whole.loss)
    torch.testing.assert_close(found.self_influence, whole.self_influence)
    assert seen[0] > 1 and seen[-1] == 5


def test_a_survey_is_read_as_it_was_saved(tmp_path):
    for made in (runs.survey(), replace(runs.survey(), loss=None, lengths=None, texts=None)):
        made.save(tmp_path / "corpus")
        found = Survey.load(tmp_path / "corpus")
        assert (found.ids, found.metadata, found.texts) == (made.ids, made.metadata, made.texts)
        torch.testing.assert_close(found.self_influence, made.self_influence)
        assert (found.loss is None) == (made.loss is None) and found.lengths == made.lengths
        assert found.first.tolist() == made.first.tolist()
        assert found.outlier.tolist() == made.outlier.tolist() and found.facts == made.facts
        assert found.table() == made.table()


def test_hostile_texts_and_huge_numbers_are_kept_as_far_as_unicode_goes(tmp_path):
    made = runs.hostile_survey()
    made.save(tmp_path / "corpus")
    found = Survey.load(tmp_path / "corpus")
    assert found.texts == [t.replace("\ud800", "?") for t in made.texts]
    numbers = found.metadata["number"]
    assert numbers[1] == runs.HUGE and math.isnan(numbers[0])
    assert found.metadata["<script>alert(11)</script>"] == list(range(200))
    assert "\x00" in found.texts[5] and len(found.texts[3]) == len(runs.LINE)


def test_one_text_is_read_without_the_others(tmp_path):
    made = runs.survey(700)
    made.save(tmp_path / "corpus")
    artifact = Artifact.open(tmp_path / "corpus", kind="survey")
    for start, stop in ((0, 1), (255, 257), (699, 700), (699, 900), (900, 901)):
        rows = artifact.rows("texts", start, stop).column("text").to_pylist()
        assert rows == made.texts[start:stop]


def test_columns_of_another_length_are_refused():
    with pytest.raises(
        ValueError, match="'topic' must have one value for each of 48 examples; got 1"
    ):
        replace(runs.survey(), metadata={"topic": ["x"]})
    assert len(runs.survey()) == 48


def test_excerpts_are_short_and_on_one_line():
    assert excerpt("a\n b\t\tc") == "a b c" and excerpt("") == ""
    long = excerpt("word " * 10_000)
    assert len(long) == 300 and long.endswith("…")
    assert excerpt("x " * 140) == ("x " * 140).strip()


def test_a_source_has_few_values():
    n = 1000
    assert (
        likely_source({"id": list(range(n)), "same": ["x"] * n, "lang": ["a", "b"] * 500}) == "lang"
    )
    assert likely_source({"id": list(range(n))}) is None


def test_the_table_and_the_repr_tell_what_stands_out():
    found = runs.survey()
    assert "48 training examples, 1 outliers, 4 groups of near-duplicates" in repr(found)
    assert "Great Fire of 1666" in repr(found).splitlines()[1]
    frame = found.to_pandas()
    assert frame["self_influence"].tolist() == found.self_influence.tolist()
    assert json.loads(json.dumps(found.table()["cluster"][:2])) == [0, 1]


def test_the_plot_counts_every_example():
    pytest.importorskip("matplotlib")
    axes = runs.survey().plot().axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 48
    assert axes.get_legend().get_texts()[1].get_text() == "1 outliers"
