"""Levenshtein's distance against the recursion that defines it."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.numerics.edit_distance import levenshtein, normalized_distances

words = st.lists(st.integers(0, 3), max_size=8)


def by_recursion(a, b):
    @cache
    def d(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


@settings(deadline=None)
@given(a=words, b=words)
def test_equals_the_recursion(a, b):
    assert levenshtein(a, b) == by_recursion(tuple(a), tuple(b)) == levenshtein(b, a)


def test_a_shift_by_one_costs_two_however_long_the_text():
    text = list(range(50))
    assert levenshtein([*text[1:], 99], text) == 2


def test_distances_are_relative_to_the_length():
    texts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    others = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert normalized_distances(texts, others).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="one token"):
        normalized_distances(texts[:, :0], others[:, :0])
