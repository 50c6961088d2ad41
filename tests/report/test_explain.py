"""From scores to evidence: parts add up to the scores, rivals stand beside them, what is known early is told early."""

import pytest

import headwater
from headwater.core.curvature import EKFAC, Dual
from headwater.core.index import GradientIndex, Whitened
from headwater.core.task import CausalLM
from headwater.data.text import Records
from headwater.data.tokens import completion_examples, tokenize
from headwater.report.explain import Rival, explain
from headwater.trace import BM25, Cascade, Influence
from tests.language_cases import llama, tokenizer

TEXTS = (
    "the river runs to the sea",
    "the lake stands by the hill",
    "a river flows from the north",
    "the old city stands by the river",
    "the hill rises in the south",
    "a lake runs to the river in the north",
    "the sea flows to the city",
)


def fitted(curvature=None, model=None):
    records = Records(
        ids=[f"t{i}" for i in range(len(TEXTS))],
        texts=list(TEXTS),
        metadata={"about": ["water", "land", "water", "land", "land", "water", "water"]},
    )
    train = tokenize(records, tokenizer())
    model = (model or llama(layers=2)).double()
    return headwater.fit(
        model,
        train,
        CausalLM(),
        layers=["*proj"],
        curvature=curvature or EKFAC(fisher="empirical"),
        weight_decay=0.01,
    )


def asked(*completions, prompt="the river"):
    return completion_examples(tokenizer(), [prompt] * len(completions), list(completions))


@pytest.fixture(scope="module")
def fit():
    return fitted()


@pytest.mark.parametrize("curvature", [EKFAC(fisher="empirical"), Dual(fisher="empirical")])
def test_what_an_example_did_to_each_token_of_the_completion_adds_up_to_its_score(curvature):
    evidence = explain(
        fitted(curvature), asked(" runs to the old city", " flows"), measurement="log_prob", top=3
    )
    told = [x for a in evidence.answers for _, _, x in a.ranked()]
    assert len(told) > 6
    for influencer in told:
        assert sum(influencer.query_scores) == pytest.approx(influencer.score, rel=1e-4, abs=1e-9)
    lengths = [len(a.raised[0].query_scores) for a in evidence.answers]
    assert lengths == [len(a.completion_tokens) for a in evidence.answers] == [5, 1]


def test_a_tokens_effect_is_the_score_of_the_question_about_that_token_alone(fit):
    query = asked(" runs to the sea")
    answer = explain(fit, query, top=2).answers[0]
    alone = Influence(precision="model").attribute(fit, query.by_token(0), measurement="log_prob")
    for _, _, influencer in answer.ranked():
        column = alone.train_ids.index(influencer.example_id)
        expected = alone.values[:, column].tolist()
        assert list(influencer.query_scores) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_tokens_of_long_completions_are_told_in_stretches(fit, monkeypatch):
    monkeypatch.setattr("headwater.report.explain._EFFECTS", 2)
    answer = explain(fit, asked(" runs to the sea ."), top=2).answers[0]
    for _, _, influencer in answer.ranked():
        parts = influencer.query_scores
        assert len(parts) == 5 and len(set(parts)) == 2  # three tokens together, then two
        assert sum(parts) == pytest.approx(influencer.score, rel=1e-4, abs=1e-9)


def test_texts_that_occur_more_than_once_are_shown_once(fit):
    twice = tokenize(
        Records(ids=[f"t{i}" for i in range(9)], texts=[*TEXTS, TEXTS[0], TEXTS[0]]), tokenizer()
    )
    model = llama(layers=2).double()
    options = {"layers": ["*proj"], "curvature": EKFAC(fisher="empirical"), "weight_decay": 0.01}
    evidence = explain(
        headwater.fit(model, twice, CausalLM(), **options), asked(" runs to the sea"), top=3
    )
    shown = [x for _, _, x in evidence.answers[0].ranked()]
    texts = [x.text for x in shown]
    assert len(set(texts)) == len(texts) == 6 and TEXTS[0] in texts
    first = next(x.example_id for x in shown if x.text == TEXTS[0])
    assert evidence.facts["copies"] == {first: ["t0", "t7", "t8"]}
    assert "copies" not in explain(fit, asked(" runs"), top=2).facts


def test_a_contrast_tells_the_effect_on_the_completion(fit):
    answer = explain(fit, asked(" runs", " stands"), contrast=True, top=2).answers[0]
    assert [len(x.query_scores) for _, _, x in answer.ranked()] == [1] * 4


def test_shares_of_blocks_and_of_modules_each_add_up_to_one(fit):
    answer = explain(fit, asked(" runs"), top=2).answers[0]
    assert set(answer.layers) == {"block 0", "block 1"}
    assert {"mlp.down_proj", "self_attn.q_proj"} <= set(answer.modules)
    for shares in (answer.layers, answer.modules):
        assert sum(shares.values()) == pytest.approx(1)


def test_rivals_stand_beside_the_answer_and_one_that_cannot_run_says_why(fit):
    def missing(*_, **__):
        raise ImportError("bm25s is missing; pip install it")

    rivals = [
        Rival(name="BM25", about="shared words", scores=BM25().attribute),
        Rival(name="none", about="nothing", scores=missing),
    ]
    answer = explain(fit, asked(" runs to the sea"), rivals=rivals, top=3).answers[0]
    words, none = answer.rankings
    assert words.examples[0].example_id == "t0"  # says it word for word
    assert words.examples[0].text == TEXTS[0]
    assert words.examples[0].metadata["about"] == "water"
    scores = [x.score for x in words.examples]
    assert scores == sorted(scores, reverse=True) and min(scores) > 0
    assert none.examples == () and none.skipped == "bm25s is missing; pip install it"


def test_what_is_known_early_is_told_early(fit, tmp_path):
    query, seen = asked(" runs to the sea"), []
    index = GradientIndex.build(fit, tmp_path / "index", kind=Whitened(rank=16, damping=0.01))
    method = Cascade(index=index, candidates=3, k=2, sample=0, sources=())
    final = explain(
        fit, query, influence=method, top=2, partial=lambda stage, e: seen.append((stage, e))
    )
    assert [stage for stage, _ in seen] == ["index", "curvature"]
    early, late = (e.answers[0] for _, e in seen)
    assert early.raised and early.raised[0].token_scores == ()
    ids = [x.example_id for _, _, x in final.answers[0].ranked()]
    assert [x.example_id for _, _, x in late.ranked()] == ids
    assert [x.score for _, _, x in late.ranked()] == [
        x.score for _, _, x in final.answers[0].ranked()
    ]


def test_what_was_found_survives_saving(fit, tmp_path):
    rivals = [Rival(name="BM25", about="shared words", scores=BM25().attribute)]
    evidence = explain(fit, asked(" runs to the sea"), rivals=rivals, top=2)
    evidence.save(tmp_path / "evidence")
    assert headwater.core.evidence.Evidence.load(tmp_path / "evidence").answers == evidence.answers
