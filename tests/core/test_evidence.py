import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.evidence import Answer, Evidence, Influencer, SourceTotal, plain
from headwater.core.files import ArtifactMismatch
from headwater.core.store import Artifact, ArtifactWriter

from ..report import samples


def with_score(score: float, **changes) -> Evidence:
    influencer = Influencer(example_id="a", score=score, **changes)
    answer = Answer(
        query_id="q", prompt="p", completion="c", value=-1.0, n_train=1, raised=(influencer,)
    )
    return Evidence(answers=(answer,))


def strict(content: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(content, parse_constant=refuse)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    evidence = samples.evidence()
    evidence.save(tmp_path / "evidence")
    assert Evidence.load(tmp_path / "evidence") == evidence


def test_evidence_without_answers_or_examples_survives_saving(tmp_path):
    bare = Answer(query_id="q", prompt="", completion="", value=0.0, n_train=0)
    for name, answers in (("none", ()), ("bare", (bare,))):
        evidence = Evidence(answers=answers)
        evidence.save(tmp_path / name)
        assert Evidence.load(tmp_path / name) == evidence


@settings(max_examples=15)  # each writes and syncs a folder
@given(
    text=st.text(),
    numbers=st.lists(st.floats(allow_nan=False), min_size=1, max_size=4),
    metadata=st.dictionaries(
        st.text(),
        st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    ),
)
def test_any_text_and_number_survives_saving(tmp_path_factory, text, numbers, metadata):
    folder = tmp_path_factory.mktemp("evidence") / "saved"
    evidence = with_score(
        numbers[0],
        tokens=(text,) * len(numbers),
        token_scores=tuple(numbers),
        metadata=metadata,
        low=numbers[-1],
    )
    evidence.save(folder)
    assert Evidence.load(folder) == evidence


def test_hostile_text_can_be_saved_and_only_half_characters_are_replaced(tmp_path):
    evidence = samples.hostile()
    evidence.save(tmp_path / "evidence")
    loaded = Evidence.load(tmp_path / "evidence").answers[0]
    assert loaded.prompt == evidence.answers[0].prompt.replace("\ud800", "\ufffd")
    assert len(loaded.raised) == len(loaded.lowered) == 1


def test_numbers_that_are_not_finite_survive_saving_and_are_null_in_json(tmp_path):
    evidence = with_score(
        math.nan, low=-math.inf, metadata={"x": math.nan}, tokens=("t",), loss=None
    )
    evidence.save(tmp_path / "evidence")
    loaded = Evidence.load(tmp_path / "evidence").answers[0].raised[0]
    assert math.isnan(loaded.score)
    assert loaded.low == -math.inf
    assert loaded.high is None
    written = strict(evidence.to_json())["answers"][0]["raised"][0]
    assert written["score"] is None
    assert written["low"] is None
    assert written["metadata"] == {"x": None}


def test_json_holds_everything_and_is_strict():
    evidence = samples.evidence()
    written = strict(evidence.to_json())
    assert written["facts"]["cost"] == {"fit": 2.81, "scores": 0.93}
    assert [a["query_id"] for a in written["answers"]] == ["lava", "leaves", "kepler"]
    first = evidence.answers[0].raised[0]
    assert written["answers"][0]["raised"][0]["score"] == first.score
    assert tuple(written["answers"][0]["raised"][0]["token_scores"]) == first.token_scores
    strict(samples.hostile().to_json())


def test_numbers_of_array_libraries_become_plain():
    torch = pytest.importorskip("torch")
    value = plain({"a": torch.tensor([1.0, math.nan]), "b": torch.tensor(2), 3: (True, None)})
    assert value == {"a": [1.0, None], "b": 2, "3": [True, None]}
    assert plain(torch.ones(1).numpy()[0]) == 1.0


def test_pandas_has_one_row_for_each_ranked_example():
    pytest.importorskip("pandas")
    evidence = samples.evidence(2, n=3)
    table = evidence.to_pandas()
    assert len(table) == 2 * 2 * 3
    assert list(table["rank"]) == [1, 2, 3] * 4
    assert list(table["side"]) == (["raised"] * 3 + ["lowered"] * 3) * 2
    assert (table.loc[table["side"] == "lowered", "score"] < 0).all()
    assert table["title"][0] == "Basalt"


def test_a_metadata_column_does_not_hide_a_column_of_the_result():
    pytest.importorskip("pandas")
    table = with_score(0.5, metadata={"score": "mine", "topic": "t"}).to_pandas()
    assert table["score"][0] == 0.5
    assert table["metadata.score"][0] == "mine"
    assert table["topic"][0] == "t"


def test_a_table_without_rows_still_has_its_columns():
    pytest.importorskip("pandas")
    assert "score" in Evidence(answers=()).to_pandas().columns


def test_token_scores_must_match_the_tokens():
    with pytest.raises(ValueError, match="each of the 2 tokens; got 1"):
        Influencer(example_id="a", score=0.0, tokens=("x", "y"), token_scores=(0.1,))
    with pytest.raises(ValueError, match="completion_log_probs must be empty or"):
        replace(samples.answer(0), completion_log_probs=(0.0,))


def test_repr_shows_signs_and_lets_no_control_character_through():
    shown = repr(samples.evidence())
    assert shown.startswith("Evidence: 3 answers, 7,561 training examples")
    assert "+0.412 [0.32, 0.5]" in shown
    assert "-0.272 [-0.35, -0.2]" in shown
    hostile = repr(samples.hostile())
    assert all(c.isprintable() or c == "\n" for c in hostile)
    assert len(hostile) < 2000


def test_another_kind_of_artifact_is_refused(tmp_path):
    with ArtifactWriter(tmp_path / "scores", kind="scores"):
        pass
    with pytest.raises(ArtifactMismatch, match="evidence"):
        Evidence.load(tmp_path / "scores")


def test_the_saved_tables_can_be_read_without_headwater_classes(tmp_path):
    samples.evidence().save(tmp_path / "evidence")
    table = Artifact.open(tmp_path / "evidence").table("sources")
    first = table.to_pylist()[0]
    assert first.pop("answer") == 0
    assert SourceTotal(**first) == samples.evidence().answers[0].sources[0]
