"""Recitation and label memory, where the answer is known."""

import math

import pytest
import torch
from torch import nn

from headwater.audit.memorization import (
    label_memory,
    perplexity,
    recitation,
    recited_examples,
)
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification


class Successor(nn.Module):
    """A language model that says the next number, and 0 after the last."""

    def __init__(self, n_vocab=10):
        super().__init__()
        self.table = nn.Parameter(5 * torch.eye(n_vocab).roll(1, 1))

    def forward(self, ids):
        return self.table[ids]


# Recitation


def test_passages_are_compared_token_by_token():
    counted = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0], [1, 2, 9, 9, 9, 9]])
    found = recitation(Successor(), counted, prefix=2)
    assert found.distances.tolist() == [0.0, 0.25, 1.0]
    assert found.is_strict.tolist() == [True, False, False]
    assert found.is_loose.tolist() == [True, True, False]
    assert found.strict.value == pytest.approx(1 / 3) and found.loose.value == pytest.approx(2 / 3)
    assert found.distance.value == pytest.approx(1.25 / 3)
    assert found.said.tolist() == [[3, 4, 5, 6]] * 3
    assert found.table()["is_strict"] == [True, False, False]
    assert "3 passages: 1 strictly, 2 loosely" in repr(found)


def test_a_stutter_is_told():
    model = Successor(2)
    long = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1, 0]])
    # it says 0 1 0 1 0 1 0: six pairs, of which two are new
    assert recitation(model, long, prefix=2).repeated == pytest.approx(4 / 6)
    assert recitation(Successor(), torch.arange(8)[None], prefix=2).repeated == 0


def test_prefix_and_suffix_must_fit():
    with pytest.raises(ValueError, match="cannot be split into prefix 4 and suffix 3"):
        recitation(Successor(), torch.zeros(1, 6, dtype=torch.int64), prefix=4, suffix=3)


def test_examples_that_are_recited_are_named_and_short_ones_left_out():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 7, 8]])
    data = TensorExamples(ids, ids, ids=["counted", "not"])
    found = recited_examples(Successor(), data, prefix=2, suffix=2)
    assert dict(zip(found.ids, found.is_strict.tolist(), strict=True)) == {
        "counted": True,
        "not": False,
    }
    with pytest.raises(ValueError, match="No example has 5 tokens"):
        recited_examples(Successor(), data, prefix=2, suffix=3)


def test_padding_does_not_count_as_text():
    from headwater.core.examples import DatasetExamples

    rows = [
        {"input_ids": torch.tensor([0, 0, 1, 2, 3, 4]), "attention_mask": torch.tensor([0, 0, 1, 1, 1, 1])},
        {"input_ids": torch.tensor([1, 2, 3, 4, 5, 0]), "attention_mask": torch.tensor([1, 1, 1, 1, 1, 0])},
    ]  # fmt: skip
    found = recited_examples(Successor(), DatasetExamples(rows), prefix=2, suffix=2)
    assert found.is_strict.tolist() == [True, True]


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    ids = torch.randint(7, (5, 6))
    assert perplexity(model, CausalLM(), (ids, ids)) == pytest.approx(7.0, rel=1e-5)


# Labels


def test_wrong_labels_are_still_said_or_put_right():
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    x = torch.eye(3)[[0, 1, 2, 0]]  # the model says 0, 1, 2, 0
    data = TensorExamples(x, torch.tensor([0, 1, 0, 2]))
    found = label_memory(model, Classification(), data, torch.tensor([1, 0, 2, 1]))
    assert found.retained.value == 0.5 and found.recovered.value == 0.25
    assert "4 wrong labels: 50.0 % still predicted, 25.0 % predicted right" in repr(found)
    assert found.table()["predicted_label"] == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="some labels here are right"):
        label_memory(model, Classification(), data, torch.tensor([0, 0, 2, 1]))


def test_one_passage_has_an_interval_too():
    found = recitation(Successor(), torch.tensor([[1, 2, 3, 4]]), prefix=2)
    assert found.strict.low == found.strict.high == 1.0 and math.isfinite(found.distance.value)
