"""The view of a trace holds the evidence's own numbers, and no text that could do anything."""

import json
import math
from dataclasses import replace

import pytest

from headwater.core.evidence import Evidence, Ranking
from headwater.report.views.answer import trace_view
from tests.report import samples


def cards(view: dict) -> list[dict]:
    return [c for a in view["answers"] for side in a["sides"] for c in side["cards"]]


def strings(value, path=()):
    """Every string of a view with the names that lead to it."""
    if isinstance(value, str):
        yield path, value
    for name, each in value.items() if isinstance(value, dict) else ():
        yield (*path, "a key"), name
        yield from strings(each, (*path, name))
    for each in value if isinstance(value, list) else ():
        yield from strings(each, path)


def test_numbers_and_positions_are_those_of_the_evidence():
    found = samples.evidence()
    view = trace_view(found, "trace", {"wiki-01009": 4})
    answer, shown = found.answers[0], view["answers"][0]
    side = shown["sides"][0]
    ranked = [i for _, _, i in answer.ranked()]
    limit = 1.04 * max(abs(v) for i in ranked for v in (i.score, i.low, i.high))
    for influencer, card in zip(answer.raised, side["cards"], strict=True):
        assert card["id"] == influencer.example_id
        assert card["score_value"] == influencer.score
        assert float(card["score"]) == pytest.approx(influencer.score, abs=5e-4)
        assert card["at"] == pytest.approx(50 + 50 * influencer.score / limit, abs=1e-3)
        assert card["significant"] == (influencer.significance <= 0.05)
        text = "".join(p["text"] for p in card["full"] or card["excerpt"])
        assert text == influencer.text
        assert card["raw_metadata"]["topic"] == influencer.metadata["topic"]
    assert side["cards"][0]["number"] == 4 and side["cards"][1]["number"] is None
    assert shown["n_train"] == f"{answer.n_train:,}"
    totals = {t.name: [t.raised, t.lowered, t.net] for t in answer.sources}
    assert {row["name"]: row["values"] for row in shown["sources"]["rows"]} == totals
    assert json.loads(json.dumps(view, allow_nan=False)) == view


def test_columns_of_few_values_are_offered_for_filtering():
    view = trace_view(samples.evidence())
    topics = {c["raw_metadata"]["topic"] for c in cards(view)}
    assert view["columns"]["topic"] == sorted(topics)
    assert "language" not in view["columns"]  # one value only
    assert "year" not in view["columns"]  # none at all


def test_examples_of_one_text_are_one_card_with_the_ids_of_all():
    answer = samples.answer(0)
    twin = replace(answer.raised[0], example_id="twin", score=0.001)
    view = trace_view(Evidence(answers=(replace(answer, raised=(*answer.raised, twin)),)))
    first, *others = view["answers"][0]["sides"][0]["cards"]
    assert len(others) == len(answer.raised) - 1
    assert (first["copies"], first["copy_ids"]) == (2, [answer.raised[0].example_id, "twin"])
    assert first["score_value"] == answer.raised[0].score
    assert all(card["copies"] == 1 and card["copy_ids"] == [] for card in others)


def test_near_duplicates_that_a_search_merged_are_counted():
    answer = samples.answer(0)
    name = answer.raised[0].example_id
    found = Evidence(answers=(answer,), facts={"copies": {name: [name, "b", "c"]}})
    first = trace_view(found, "trace", {name: 4, "c": 9})["answers"][0]["sides"][0]["cards"][0]
    assert (first["copies"], first["copy_ids"]) == (3, [name, "b", "c"])
    assert first["copy_numbers"] == [4, None, 9]


def test_what_an_example_did_to_each_token_of_the_completion_is_heat():
    answer = samples.answer(0)
    n = len(answer.completion_tokens)
    scores = (0.5, *(0.0,) * (n - 2), -0.5)
    first = replace(answer.raised[0], query_scores=scores)
    answer = replace(answer, raised=(first, *answer.raised[1:]))
    heat = cards(trace_view(Evidence(answers=(answer,))))[0]["query_heat"]
    assert "".join(p["text"] for p in heat) == "".join(answer.completion_tokens)
    assert [p["heat"] for p in heat if p["heat"]] == ["u4", "d4"]
    assert cards(trace_view(Evidence(answers=(answer,))))[1]["query_heat"] == []


def test_other_methods_stand_beside_the_answer_with_what_they_share():
    answer = replace(samples.answer(0), raised=samples.answer(0).raised[:2])
    (a, b), c = answer.raised, samples.answer(0).raised[2]
    rankings = (
        Ranking(method="BM25", about="shared words", examples=(b, c)),
        Ranking(method="embedding", skipped="no index"),
    )
    found = Evidence(answers=(replace(answer, rankings=rankings),))
    own, words, none = trace_view(found)["answers"][0]["rankings"]
    assert [row["id"] for row in own["rows"]] == [a.example_id, b.example_id]
    assert [row["also"] for row in own["rows"]] == [[], ["BM25"]] and own["unit"] == "nats"
    assert [row["also"] for row in words["rows"]] == [["influence"], []]
    assert none["rows"] == [] and none["skipped"] == "no index"
    assert trace_view(Evidence(answers=(answer,)))["answers"][0]["rankings"] == []


def test_no_text_can_mislead_and_only_ids_stay_as_they_are():
    view = trace_view(samples.hostile(), "\u202eback")
    raw = {
        (path[-1], text)
        for path, text in strings(view)
        if any(c in text for c in "\x00\x07\x1b\u202e\u2066\u200b\u2028\ufeff\ud800")
    }
    assert {name for name, _ in raw} == {"id"}
    assert view["name"] == "⟨RLO⟩back"
    json.dumps(view, allow_nan=False)


def test_a_metadata_column_named_id_is_no_exception():
    bad = replace(samples.answer(0).raised[0], metadata={"id": "\u202e", "copy_ids": "\x00"})
    view = trace_view(Evidence(answers=(replace(samples.answer(0), raised=(bad,)),)))
    assert cards(view)[0]["raw_metadata"] == {"id": "⟨RLO⟩", "copy_ids": "⟨NUL⟩"}


def test_what_is_not_finite_is_null():
    bad = replace(samples.answer(0).raised[0], score=math.nan, low=math.inf, significance=None)
    view = trace_view(
        Evidence(answers=(replace(samples.answer(0), raised=(bad,), value=math.nan),))
    )
    card = cards(view)[0]
    assert (card["score_value"], card["at"], card["span"]) == (None, None, None)
    assert card["significant"] is None and card["p"] == "–"


def test_stages_of_a_cascade_are_told():
    facts = {"stages": [{"name": "index", "examples": 12, "seconds": 0.5, "passes": 0.25}]}
    view = trace_view(Evidence(answers=(samples.answer(0),), facts=facts))
    told = view["answers"][0]["stages"]
    assert told == [{"name": "index", "told": "12 examples; 0.5 s, 25 % of a pass over the data"}]
