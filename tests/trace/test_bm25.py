"""BM25 equals its formula, on words from metadata, from a tokenizer, or from token ids."""

import math

import pytest
import torch

from headwater.core.curvature import Identity
from headwater.data.tokens import TextExamples, Tokens
from headwater.trace import BM25
from headwater.trace.bm25 import bm25, words_of
from tests.curvature_cases import shared
from tests.language_cases import tokenizer

DOCUMENTS = [
    ["the", "river", "flows", "to", "the", "sea"],
    ["the", "lake"],
    ["old", "city", "by", "the", "river", "river"],
    [],
]


def brute_force(queries, documents, k1, b):
    n, length = len(documents), sum(map(len, documents)) / len(documents)
    found = torch.zeros(len(queries), n).double()
    for q, query in enumerate(queries):
        for d, document in enumerate(documents):
            for word in query:
                holding = sum(word in other for other in documents)
                idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
                count = document.count(word)
                if count:
                    norm = k1 * (1 - b + b * len(document) / length)
                    found[q, d] += idf * count / (count + norm)
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (2.0, 0.0)])
def test_equals_the_formula(k1, b):
    queries = [["river"], ["the", "old", "lake"], ["the", "the", "mountain"], ["none"], []]
    expected = brute_force(queries, DOCUMENTS, k1, b)
    torch.testing.assert_close(
        bm25(queries, DOCUMENTS, k1=k1, b=b), expected, rtol=1e-5, atol=1e-6
    )  # the library keeps float32


def examples(texts, **metadata):
    words = tokenizer()
    made = [words(text)["input_ids"] for text in texts]
    return TextExamples(
        [Tokens(ids, [True] * len(ids)) for ids in made],
        words,
        ids=[f"t{i}" for i in range(len(texts))],
        metadata=metadata,
    )


def test_words_come_from_a_column_or_the_tokens():
    made = examples(["the river flows", "old city"], text=["The River, flows!", "Old-city"])
    assert words_of(made) == [["the", "river", "flows"], ["old", "city"]]
    assert words_of(made, "text") == [["the", "river", "flows"], ["old", "city"]]
    assert words_of(made.subset([1])) == [["old", "city"]]
    lm = shared("lm")
    assert words_of(lm.train) == [[str(i) for i in s] for s in lm.train.sequences]
    with pytest.raises(ValueError, match="no metadata column 'body'; there are: text"):
        words_of(made, "body")
    with pytest.raises(ValueError, match="BM25 compares words"):
        words_of(shared("mlp").train)


def test_a_like_example_lowers_the_loss_and_raises_the_rest():
    found = shared("lm")
    fitted = found.fitted(Identity())
    expected = bm25(words_of(found.query), words_of(found.train)).float()
    assert float(expected.max()) > 0
    assert torch.equal(BM25().attribute(fitted, found.query).values, -expected)
    raised = BM25().attribute(fitted, found.query, measurement="log_prob")
    assert torch.equal(raised.values, expected) and "arXiv:2407.03618" in raised.facts["papers"]
