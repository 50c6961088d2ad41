"""Similarities equal their definitions, and point the way that is asked."""

from importlib import import_module

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.trace import EmbeddingSimilarity, Random, RepresentationSimilarity
from headwater.trace.similarity import similarity
from tests.curvature_cases import Tokens, case, shared

similarity_module = import_module("headwater.trace.similarity")


def hidden(found, examples):
    return found.model[:2](examples.batch(range(len(examples)))[0]).detach()


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_representations_are_compared_as_defined(metric):
    found = shared("mlp")
    x, y = hidden(found, found.query), hidden(found, found.train)
    expected = torch.zeros(len(x), len(y)).double()
    for q, a in enumerate(x):
        for n, b in enumerate(y):
            if metric == "cosine":
                expected[q, n] = a @ b / (a.norm() * b.norm())
            else:
                expected[q, n] = a @ b if metric == "dot" else -(a - b).norm()
    method, fitted = RepresentationSimilarity(metric=metric), found.fitted(Identity())
    for measurement, sign in (("margin", 1), ("log_prob", 1), ("loss", -1), (None, -1)):
        scores = method.attribute(fitted, found.query, measurement=measurement)
        torch.testing.assert_close(scores.values.double(), sign * expected, rtol=1e-5, atol=1e-6)


def test_signed_by_the_label():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    plain = RepresentationSimilarity().attribute(fitted, found.query).values
    signed = RepresentationSimilarity(signed=True).attribute(fitted, found.query).values
    x, y = (d.batch(range(len(d)))[1] for d in (found.query, found.train))
    same = x[:, None] == y[None, :]
    assert bool(same.any()) and torch.equal(signed, torch.where(same, plain, -plain))
    lm = shared("lm")
    with pytest.raises(ValueError, match="one class an example"):
        RepresentationSimilarity(signed=True).attribute(lm.fitted(Identity()), lm.query)


def test_groups_are_combinations_of_scores():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    weights = torch.tensor([[1.0, -1.0, 0.0, 2.0]])
    for method in (RepresentationSimilarity(), EmbeddingSimilarity(), Random()):
        each = method.attribute(fitted, found.query).values
        group = method.attribute(fitted, found.query, weights=weights, names=["g"])
        torch.testing.assert_close(group.values, weights @ each, rtol=1e-4, atol=1e-6)
        assert group.query_ids == ["g"]


def test_embeddings_are_kept_and_made_again_for_another_model(tmp_path, monkeypatch):
    found, other, method = shared("mlp"), case("mlp", seed=5), EmbeddingSimilarity()
    fitted, folder = found.fitted(Identity()), tmp_path / "embeddings"
    made = method.embedded(fitted, folder)
    plain = method.attribute(fitted, found.query).values
    known = method.attribute(fitted, found.query, known=made).values
    torch.testing.assert_close(known, plain, rtol=1e-4, atol=1e-5)
    calls = []
    real = similarity_module._representations
    monkeypatch.setattr(
        similarity_module, "_representations", lambda *a: calls.append(a) or real(*a)
    )
    assert torch.equal(method.embedded(fitted, folder), made) and not calls
    anew = method.embedded(other.fitted(Identity()), folder)
    assert calls and not torch.equal(anew, made)
    with pytest.raises(ValueError, match="Expected embeddings of"):
        method.attribute(fitted, found.query, known=made[:-1])


def test_embeddings_of_another_model_are_centred():
    found, other = shared("mlp"), case("mlp", seed=5)
    fitted = found.fitted(Identity())
    encoder = case("mlp").fit(Identity())
    object.__setattr__(encoder, "model", other.model)
    x, y = (hidden(other, data) for data in (found.query, found.train))
    mean = y.mean(0)
    expected = -similarity(x - mean, y - mean)
    scores = EmbeddingSimilarity().attribute(fitted, found.query, encoder=encoder)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    plain = EmbeddingSimilarity(center=False).attribute(fitted, found.query, encoder=encoder)
    torch.testing.assert_close(plain.values.double(), -similarity(x, y), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="same training examples"):
        EmbeddingSimilarity().attribute(
            fitted, found.query, encoder=shared("lm").fitted(Identity())
        )


def test_a_vector_of_zeros_is_like_nothing():
    assert similarity(torch.zeros(1, 3), torch.ones(2, 3)).tolist() == [[0, 0]]


def test_random_scores_depend_on_ids_and_seed_alone():
    found = shared("lm")
    fitted = found.fitted(Identity())
    scores = Random().attribute(fitted, found.query)
    one = Random().attribute(fitted, Tokens(found.train.sequences[1:2]))  # has the id "s0"
    assert torch.equal(one.values[0], scores.values[scores.query_ids.index("s0")])
    assert not torch.equal(Random(seed=1).attribute(fitted, found.query).values, scores.values)


def test_random_scores_are_standard_normal():
    from headwater.core.examples import TensorExamples

    found = shared("mlp")
    queries = TensorExamples(torch.randn(2000, 6).double(), torch.zeros(2000).long())
    values = Random().attribute(found.fitted(Identity()), queries).values
    assert abs(float(values.mean())) < 4 / values.numel() ** 0.5
    assert float(values.std()) == pytest.approx(1, abs=0.02)
