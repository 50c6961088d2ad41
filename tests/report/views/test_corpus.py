"""Views of the training data: the survey's own numbers, in every order, quickly, with nothing raw but ids."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from headwater.core.evidence import Evidence
from headwater.core.files import ArtifactMissing
from headwater.core.store import Artifact
from headwater.report.views import corpus
from tests import runs
from tests.index_builds import N, build, small_fit
from tests.report import samples

UNSEEN = "\x00\x07\x1b\u202e\u2066\u200b\u2028\ufeff"


def test_rows_hold_the_numbers_of_the_survey(plain):
    survey, page = runs.survey(), corpus.rows(plain, limit=500)
    assert (page["total"], page["offset"], len(page["rows"])) == (48, 0, 48)
    for i, row in enumerate(page["rows"]):
        assert (row["number"], row["id"], row["title"]) == (i, survey.ids[i], survey.title(i))
        assert row["self_influence"] == float(survey.self_influence[i])
        assert row["loss"] == float(survey.loss[i])
        assert row["length"] == survey.lengths[i] and row["source"] == survey.metadata["topic"][i]
        assert row["outlier"] == (i == 5) and row["n_copies"] == survey.n_copies[i]
        assert row["cluster"] == (int(survey.first[i]) if row["n_copies"] > 1 else None)


@pytest.mark.parametrize("sort", corpus.SORTS)
@pytest.mark.parametrize("descending", [False, True])
def test_pages_put_together_are_the_whole_in_order(plain, sort, descending):
    options = {"sort": sort, "descending": descending}
    pages = [corpus.rows(plain, start, 7, **options)["rows"] for start in range(0, 49, 7)]
    rows = [row for page in pages for row in page]
    sign = -1 if descending else 1
    every = corpus.rows(plain, limit=500)["rows"]
    assert rows == sorted(every, key=lambda row: (sign * row[sort], row["number"]))


def test_a_source_and_a_search_choose_rows(plain):
    found = corpus.rows(plain, source="History", search="BAKERY")
    assert {row["source"] for row in found["rows"]} == {"History"}
    assert found["total"] == 3 and all("bakery" in row["excerpt"] for row in found["rows"])
    assert corpus.rows(plain, search="[.*")["total"] == 0  # no pattern
    assert corpus.rows(plain, search="wiki-01009-2")["rows"][0]["number"] == 32
    assert corpus.rows(plain, offset=99)["rows"] == []


@pytest.mark.parametrize(
    "wrong", [{"sort": "text"}, {"limit": 501}, {"limit": -1}, {"offset": -1}, {"sort": "id; drop"}]
)
def test_what_is_no_order_or_page_is_refused(plain, wrong):
    with pytest.raises(ValueError, match="Expected") as error:
        corpus.rows(plain, **wrong)
    assert "got" in str(error.value)


def test_the_summary_counts_every_example_once(plain):
    view, survey = corpus.summary(plain), runs.survey()
    spread = view["self_influence"]
    assert view["surveyed"] and view["n"] == 48 == sum(spread["counts"])
    assert len(spread["edges"]) == len(spread["counts"]) + 1
    assert spread["edges"][0] == pytest.approx(float(survey.self_influence.min()))
    assert spread["edges"][-1] == pytest.approx(9.0)
    assert [o["number"] for o in view["outliers"]] == [5]
    assert [c["members"] for c in view["clusters"]] == [[i, i + 16] for i in range(4)]
    topics = survey.metadata["topic"]
    sources = {s["name"]: s for s in view["sources"]}
    assert {n: s["n"] for n, s in sources.items()} == {t: topics.count(t) for t in set(topics)}
    of_people = survey.self_influence.double()[[t == "People" for t in topics]]
    assert float(sources["People"]["self_influence"]) == pytest.approx(
        float(of_people.mean()), rel=0.01
    )


def test_the_influence_of_sources_is_that_of_the_saved_traces(plain):
    view = corpus.summary(plain)
    answers = [*samples.evidence().answers[:1], *samples.evidence().answers]  # lava, then trace
    assert len(view["queries"]) == 4 and all(" → " in q for q in view["queries"])
    for source in view["sources"]:
        nets = [next(t.net for t in a.sources if t.name == source["name"]) for a in answers]
        assert source["net"] == nets


def test_an_example_is_whole_without_the_model(plain, hostile):
    survey = runs.survey()
    view = corpus.example(plain, 20)
    assert "".join(p["text"] for p in view["pieces"]) == survey.texts[20]
    assert (view["id"], view["title"], view["truncated"]) == (
        survey.ids[20],
        survey.title(20),
        False,
    )
    assert dict(view["metadata"])["topic"] == survey.metadata["topic"][20]
    assert dict(corpus.example(plain, 1)["metadata"])["near-duplicates"] == "2 of this kind"
    line = corpus.example(hostile, 3)
    assert line["truncated"] and len(line["pieces"][0]["text"]) == corpus.TEXT
    assert dict(line["metadata"])["number"].startswith("1,000,000")


@pytest.mark.parametrize("number", [-1, 48, 10**12])
def test_an_example_that_is_not_there_is_refused(plain, number):
    with pytest.raises(ArtifactMissing) as error:
        corpus.example(plain, number)
    assert "There is no example" in str(error.value)


def test_numbers_are_known_by_id(plain):
    survey = runs.survey()
    assert dict(corpus.numbers(plain)) == {name: i for i, name in enumerate(survey.ids)}


def test_hostile_rows_are_visible_but_for_their_ids(hostile):
    rows, view = corpus.rows(hostile, limit=500)["rows"], corpus.summary(hostile)
    view["outliers"] = [{k: v for k, v in o.items() if k != "id"} for o in view["outliers"]]
    examples = [corpus.example(hostile, i) for i in range(12)]
    shown = [{k: v for k, v in row.items() if k != "id"} for row in [*rows, *examples]]
    text = json.dumps([shown, view], ensure_ascii=False, allow_nan=False)
    assert not [c for c in UNSEEN if c in text]
    assert "⟨RLO⟩" in text and "<script>alert(1)</script>" in text  # as text
    assert all(len(row["excerpt"]) <= 310 * 9 for row in rows)


def test_a_source_is_found_by_the_name_that_is_shown(hostile):
    sources = corpus.summary(hostile)["sources"]
    assert any("⟨NUL⟩" in s["name"] for s in sources)
    for source in sources:
        assert corpus.rows(hostile, source=source["name"])["total"] == source["n"]


def test_without_a_survey_the_examples_of_traces_are_listed_and_it_is_said(tmp_path):
    samples.evidence().save(tmp_path / "traces" / "trace")
    view = corpus.summary(tmp_path)
    ids = {i.example_id for a in samples.evidence().answers for _, _, i in a.ranked()}
    rows = corpus.rows(tmp_path, limit=500)["rows"]
    assert not view["surveyed"] and "headwater survey" in view["told"]
    assert {row["id"] for row in rows} == ids and len(rows) == view["n"]
    assert rows[0]["self_influence"] is None and view["self_influence"] is None
    example = corpus.example(tmp_path, rows[0]["number"])
    assert example["pieces"][0]["text"].startswith(rows[0]["excerpt"][:40])
    assert corpus.numbers(tmp_path) == {} and corpus.n_train(tmp_path) is None


def test_an_index_lists_its_examples_with_their_numbers(tmp_path):
    index = build(small_fit(), tmp_path / "index", sample=0)
    answer = samples.answer(0)
    traced = replace(answer.raised[0], example_id="a7")
    Evidence(answers=(replace(answer, raised=(traced,)),)).save(tmp_path / "traces" / "trace")
    view, page = corpus.summary(tmp_path), corpus.rows(tmp_path, sort="self_influence")
    assert view["n"] == N and not view["surveyed"] and "Examples of the index" in view["told"]
    own = dict(zip(index.ids(), index.self_influence().tolist(), strict=True))
    assert [row["self_influence"] for row in page["rows"]] == sorted(own.values())[:100]
    assert corpus.numbers(tmp_path)["a7"] == 7 and corpus.columns(tmp_path) == ["source", "year"]
    assert corpus.example(tmp_path, 7)["pieces"][0]["text"] == traced.text
    assert "text is not stored" in corpus.example(tmp_path, 8)["pieces"][0]["text"]


def test_an_empty_folder_has_no_examples(tmp_path):
    view = corpus.summary(tmp_path)
    assert (view["n"], view["outliers"], view["clusters"], view["sources"]) == (0, [], [], [])
    assert corpus.rows(tmp_path)["total"] == 0 and corpus.columns(tmp_path) == []


def test_a_new_survey_is_read_and_missing_numbers_come_last(tmp_path):
    run = runs.plain_run(tmp_path / "run", n=16)
    assert corpus.rows(run)["total"] == 16
    survey = runs.survey(20)
    replace(survey, loss=None, lengths=None).save(run / "corpus")
    page = corpus.rows(run, sort="loss", descending=True, limit=500)
    assert page["total"] == 20 and [r["number"] for r in page["rows"]] == list(range(20))
    assert page["rows"][0]["loss"] is None and corpus.summary(run)["loss"] is None


def test_a_file_for_all_keeps_those_of_largest_self_influence(plain):
    found = corpus.every(plain, 5)
    own = runs.survey().self_influence
    assert found["total"] == 48
    assert [r["number"] for r in found["rows"]] == sorted(own.topk(5).indices.tolist())


def test_traces_that_total_by_another_column_are_left_out(tmp_path):
    answer = replace(samples.answer(0), source_column="language")
    Evidence(answers=(answer,)).save(tmp_path / "traces" / "x")
    runs.survey(16).save(tmp_path / "corpus")
    view = corpus.summary(tmp_path)
    assert view["queries"] == [] and all(s["net"] == [] for s in view["sources"])


@pytest.mark.slow
@pytest.mark.parametrize("sort", corpus.SORTS)
def test_pages_of_a_hundred_thousand_examples_follow_on_each_other(tmp_path, sort):
    run = runs.large_run(tmp_path / "run")
    pages = [corpus.rows(run, start, 100, sort, True)["rows"] for start in (0, 100, 50_000, 99_900)]
    values = [row[sort] for page in pages for row in page]
    assert [len(page) for page in pages] == [100] * 4
    assert len({row["number"] for page in pages for row in page}) == 400
    assert values == sorted(values, reverse=True)
    assert corpus.example(run, 99_999)["number"] == 99_999


@pytest.fixture
def hasty():
    """Threads that are changed at every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_search_and_read_at_once_find_what_one_finds(plain, monkeypatch, hasty):
    words = {str(i): np.array([i]) for i in range(12)}  # more than are kept
    survey = corpus._known(plain).artifact
    known = corpus._Known(table=None, told="", source_column=None, artifact=survey)
    monkeypatch.setattr(corpus._Known, "_match", lambda self, source, search: words[search])
    monkeypatch.setattr(
        Artifact, "rows", lambda self, table, a, b: pa.table({"number": range(a, b)})
    )

    def look(seed: int) -> bool:
        draw, right = random.Random(seed), True
        for i in range(6_000):
            word = str(draw.randrange(12))
            right &= known.matching(None, word) is words[word]
            if i % 20 == 0:
                place = draw.randrange(12 * corpus.GROUP)
                right &= known.stored("train", place) == {"number": place}
        return right

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(look, range(8))) == [True] * 8
