"""The cascade scores what it finds exactly, finds what the index cannot see, and tells what it may have missed."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import EKFAC
from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactMismatch
from headwater.core.index import GradientIndex, LoGra, Whitened
from headwater.core.scores import Scores
from headwater.core.task import CausalLM, Classification
from headwater.trace import BM25, Cascade, EmbeddingSimilarity, Influence
from tests.curvature_cases import TinyLM, Tokens, shared
from tests.index_builds import N, build, data, small_fit
from tests.index_cases import built

DAMPING = 0.01
HARDLY = Whitened(rank=1, sides="leading", damping=0.1)


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


@pytest.fixture(scope="module")
def index(fitted, tmp_path_factory):
    return build(fitted, tmp_path_factory.mktemp("cascade") / "index")


@pytest.fixture(scope="module")
def queries():
    return data(5, seed=9, prefix="q")


@pytest.fixture(scope="module")
def exact(fitted, queries):
    return Influence(damping=DAMPING, n_intervals=0, precision="model").attribute(fitted, queries)


def ends(scores, k):
    """Ids of the strongest on each side of each query."""
    return [
        [[scores.train_ids[i] for i in row] for row in scores.top(k, lowest=lowest)]
        for lowest in (False, True)
    ]


def stage(scores, name):
    return next(s for s in scores.facts["stages"] if s["name"] == name)


@pytest.mark.parametrize("name", ["mlp", "lm"])
def test_with_everything_as_candidates_it_is_influence(name, tmp_path):
    case, (fit, index) = shared(name), built(tmp_path, name)
    n = len(case.train)
    options = {"by_layer": True, "control": case.query}
    method = Cascade(index=index, candidates=n, k=3, keep=None, n_intervals=2)
    found = method.attribute(fit, case.query, **options)
    whole = Influence(damping=DAMPING, n_intervals=2, precision="model")
    expected = whole.attribute(fit, case.query, **options)
    assert found.kept == list(range(n)) and found.train_ids == expected.train_ids
    for field in ("values", "low", "high", "significance", "control", "by_layer", "layer_totals"):
        assert torch.equal(
            getattr(found, field).nan_to_num(9), getattr(expected, field).nan_to_num(9)
        )
    told = stage(found, "curvature")
    assert told["missed"]["estimate"] == told["missed"]["at_most"] == 0 and found.unit == "nats"
    parts, rest = method.tokens(fit, case.query, [0, 2])
    torch.testing.assert_close(parts.sum(2) + rest, expected.values[:, [0, 2]])


def test_with_an_index_of_full_rank_the_top_ten_are_those_of_influence(
    fitted, queries, exact, tmp_path
):
    kind = Whitened(rank=None, damping=DAMPING)
    index = build(fitted, tmp_path, kind=kind)
    found = Cascade(index=index, candidates=20, sample=0, keep=10).attribute(fitted, queries)
    assert ends(found, 10) == ends(exact, 10)
    assert stage(found, "curvature")["missed"] is None


def test_scores_are_exact_whatever_the_index_is_worth(fitted, queries, exact, index):
    found = Cascade(index=index, candidates=7, sample=9, keep=None).attribute(fitted, queries)
    # batches of other examples: sums in float32 in another order
    torch.testing.assert_close(found.values, exact.values[:, found.kept], rtol=1e-4, atol=1e-6)
    assert 7 <= len(found.kept) < N / 2 and found.n_train == N
    assert found.facts["damping"]["value"] == DAMPING  # the index's own


def test_the_strongest_of_what_was_scored_are_kept(fitted, queries, index):
    whole = Cascade(index=index, candidates=20, keep=None).attribute(fitted, queries)
    kept = Cascade(index=index, candidates=20, keep=4).attribute(fitted, queries)
    assert ends(kept, 4) == ends(whole, 4) and len(kept.kept) <= 5 * 8


@pytest.fixture(scope="module")
def planted():
    """Sequences of few words, one of rare words alone, and a query of the same."""
    torch.manual_seed(0)
    words = torch.randint(1, 6, (60, 6)).tolist()
    words[41] = [8, 9, 8, 9, 8, 9]
    train, query = Tokens(words, n_vocab=10), Tokens([[8, 9, 8, 9]], n_vocab=10)
    model = TinyLM(n_vocab=10).double()
    fit = headwater.fit(
        model, train, CausalLM(), curvature=EKFAC(folds=1), layers=["embed.*"], batch_size=16
    )
    return fit, query


def test_what_the_index_cannot_see_is_found_by_its_words(planted, tmp_path):
    fit, query = planted
    index = GradientIndex.build(fit, tmp_path, kind=HARDLY, sample=0)
    best = Influence(damping=0.1, n_intervals=0).attribute(fit, query).top(1, lowest=True)[0]
    assert best == [41]
    options = {"index": index, "candidates": 1, "k": 1, "sample": 0}
    blind = Cascade(sources=(), **options).attribute(fit, query)
    found = Cascade(**options).attribute(fit, query)  # BM25, as these are texts
    assert 41 not in blind.kept and found.top(1, lowest=True)[0] == [found.kept.index(41)]
    told = stage(found, "BM25")
    assert told["examples"] == told["only"] == 1 and told["passes"] == 0
    assert "arXiv:2407.03618" in found.facts["papers"]
    headwater.cite(found)


def test_without_its_library_words_are_left_out_and_it_is_said(planted, tmp_path, monkeypatch):
    from headwater.trace import bm25

    def missing(module, *, extra):
        raise ImportError(f"pip install 'headwater[{extra}]'")

    monkeypatch.setattr(bm25, "require", missing)
    fit, query = planted
    index = GradientIndex.build(fit, tmp_path, kind=HARDLY, sample=0)
    found = Cascade(index=index, candidates=5, k=2).attribute(fit, query)
    assert "headwater[text]" in stage(found, "BM25")["skipped"] and len(found.kept) > 1


def test_other_methods_add_candidates(fitted, queries, index):
    plain, more = (
        Cascade(index=index, sources=s, candidates=9, sample=0, keep=None)
        for s in ((), (EmbeddingSimilarity(),))
    )
    a, b = (m.attribute(fitted, queries) for m in (plain, more))
    similar = EmbeddingSimilarity().attribute(fitted, queries).values.abs().topk(9).indices
    assert set(b.kept) == set(a.kept) | set(similar.flatten().tolist())
    told = stage(b, "EmbeddingSimilarity")
    assert told["only"] == len(set(b.kept) - set(a.kept)) > 0
    assert 1 < told["passes"] < 1.2  # all training data, the queries, and a look for the module
    with pytest.raises(ValueError, match="compares words"):
        replace(plain, sources=(BM25(),)).attribute(fitted, queries)


def test_the_refined_are_scored_by_the_exact_matrix(fitted, queries, tmp_path):
    index = build(fitted, tmp_path, kind=Whitened(rank=2, damping=0.1, sides="leading"), sample=0)
    steps = {"cg_steps": 6, "cg_tolerance": 0.1}
    method = Cascade(index=index, candidates=40, refine=10, sample=30, **steps)
    found = method.attribute(fitted, queries, control=queries)
    whole = Influence(damping=0.1, **steps).attribute(fitted, queries, control=queries)
    assert 10 <= len(found.kept) <= 5 * 20 + 30
    torch.testing.assert_close(found.values, whole.values[:, found.kept], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.control, whole.control, rtol=1e-4, atol=1e-6)
    told = stage(found, "exact matrix")
    assert told["passes"] > told["cg_steps"] > 0 and told["damping"]["value"] == 0.1
    first = Cascade(index=index, candidates=40, keep=10, sample=30).attribute(fitted, queries)
    assert set(first.kept) <= set(found.kept)
    scored = Cascade(index=index, candidates=40, keep=None, sample=30).attribute(fitted, queries)
    names = [scored.index(i) for i in range(len(scored.train_ids))]
    values = whole.values[:, names]
    best = torch.cat([values.topk(10).indices, (-values).topk(10).indices]).tolist()
    missing = sum(names[i] not in found.kept for row in best for i in row) / 100
    assert told["missed"]["at_most"] >= missing


def test_filters_and_removed_rows_hold_for_every_source_and_the_sample(fitted, queries, tmp_path):
    index = build(fitted, tmp_path)
    index.remove(["a0", "a3"])
    where = {"source": ["book"], "year": (0, 299)}
    method = Cascade(
        index=index, sources=(EmbeddingSimilarity(),), where=where, candidates=30, keep=None
    )
    found = method.attribute(fitted, queries)
    assert set(found.metadata["source"]) == {"book"} and max(found.kept) < 300
    assert not {0, 3} & set(found.kept) and found.n_train == 98
    assert len(found.kept) == 98  # the sample takes the rest
    with pytest.raises(ValueError, match="No example of the index"):
        replace(method, where={"source": ["radio"]}).attribute(fitted, queries)


def test_duplicates_are_shown_as_one_with_their_number(tmp_path):
    one = data(40)
    x, y = (t.repeat(3, 1) if t.ndim > 1 else t.repeat(3) for t in one.tensors)
    train = TensorExamples(x, y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    fit = headwater.fit(model, train, Classification(), curvature=EKFAC(folds=1))
    index = GradientIndex.build(fit, tmp_path, kind=Whitened(rank=None, damping=0.1), sample=0)
    asked = data(1, seed=5)
    for options in ({"copies": 0.999}, {"content": lambda name: int(name) % 40}):
        method = Cascade(index=index, candidates=30, keep=5, sample=10, **options)
        found = method.attribute(fit, asked)
        assert len({i % 40 for i in found.kept}) == len(found.kept) == 10
        assert set(found.metadata["copies"]) == {3}
    refined = replace(method, refine=10, cg_steps=50).attribute(fit, asked)
    assert len(refined.metadata["copies"]) == len(refined.kept)


def test_contrasts_names_and_totals(fitted, queries, index, exact):
    weights = torch.tensor([[1.0, -1.0, 0, 0, 0]])
    method = Cascade(index=index, candidates=20)
    found = method.attribute(
        fitted, queries, weights=weights, names=["why"], group_by="source", measurement="loss"
    )
    assert found.query_ids == ["why"]
    torch.testing.assert_close(
        found.values, weights @ exact.values[:, found.kept], rtol=1e-3, atol=1e-6
    )
    looked = index.search(index.ask(fitted, queries, weights=weights), group_by="source")
    assert torch.equal(found.by("source").net, looked.by("source").net)
    assert sum(found.by("source").counts) == N


def test_an_index_of_other_coordinates_does_as_well(fitted, queries, tmp_path):
    index = build(fitted, tmp_path, kind=LoGra(rank=4), sample=0)
    found = Cascade(index=index, damping=DAMPING, candidates=20).attribute(fitted, queries)
    whole = Influence(damping=DAMPING, n_intervals=0).attribute(fitted, queries)
    torch.testing.assert_close(found.values, whole.values[:, found.kept], rtol=1e-4, atol=1e-6)


def test_added_data_are_scored_in_the_units_of_the_fit(fitted, queries, tmp_path, exact):
    index, more = build(fitted, tmp_path), data(40, seed=4, prefix="b")
    index.add(fitted, more)
    both = TensorExamples(
        *(torch.cat(p) for p in zip(data().tensors, more.tensors, strict=True)),
        ids=data().ids + more.ids,
    )
    joined = replace(fitted, train=both)
    found = Cascade(index=index, candidates=N, keep=None).attribute(joined, queries)
    assert len(found.kept) == N + 40
    torch.testing.assert_close(found.values[:, :N], exact.values, rtol=1e-4, atol=1e-6)
    with pytest.raises(ArtifactMismatch, match="join the data"):
        Cascade(index=index).attribute(fitted, queries)
    with pytest.raises(ValueError, match="leave out refine"):
        Cascade(index=index, refine=10).attribute(joined, queries)
    other = replace(fitted, train=replace_ids(both))
    with pytest.raises(ArtifactMismatch, match="not those of the index"):
        Cascade(index=index).attribute(other, queries)


def replace_ids(examples):
    return TensorExamples(*examples.tensors, ids=[f"z{i}" for i in range(len(examples))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be 1 or more"),
        ({"k": 0}, "k must be 1 or more"),
        ({"sample": -1}, "sample must be 0 or more"),
        ({"refine": 3}, "refine must be 0, or k=10 and more"),
        ({"cg_steps": 0}, "cg_steps must be 1 or more"),
        ({"confidence_level": 1.0}, "confidence_level must lie between"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, index):
    with pytest.raises(ValueError, match=message):
        Cascade(index=index, **options)


def test_it_repeats_itself_and_is_saved(fitted, queries, index, tmp_path):
    method = Cascade(index=index, candidates=10, n_intervals=2)
    a, b = (method.attribute(fitted, queries) for _ in range(2))
    assert torch.equal(a.values, b.values) and a.train_ids == b.train_ids
    assert stage(a, "curvature")["missed"] == stage(b, "curvature")["missed"]
    a.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert torch.equal(again.values, a.values)
    assert json.loads(json.dumps(again.facts)) == json.loads(json.dumps(a.facts))


@pytest.mark.slow
def test_on_digits_the_limits_cover_what_is_missing(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1500]), y[:1500]).backward()
        optimizer.step()
    fit = headwater.fit(
        model, (x[:1500], y[:1500]), Classification(), curvature=EKFAC(folds=1), batch_size=500
    )
    kind = Whitened(rank=2, sides="leading", damping=0.01)
    index = GradientIndex.build(fit, tmp_path, kind=kind, sample=0)
    asked = TensorExamples(x[1500:1560], y[1500:1560])
    truth = Influence(damping=0.01, n_intervals=0).attribute(fit, asked).values
    rates, lost = {"at_most": 0.0, "high": 0.0}, 0.0
    for q in range(len(asked)):
        method = Cascade(index=index, candidates=20, sample=100, keep=10, seed=q)
        found = method.attribute(fit, asked.subset([q]))
        best = [set((s * truth[q]).topk(10).indices.tolist()) for s in (1, -1)]
        missing = sum(len(b - set(found.kept)) for b in best) / 20
        told, lost = stage(found, "curvature")["missed"], lost + missing / len(asked)
        for limit in rates:
            rates[limit] += (told[limit] >= missing - 1e-9) / len(asked)
    assert lost > 0.05  # so that there is something to cover
    assert rates["at_most"] >= 0.95
    assert rates["high"] >= 0.85
