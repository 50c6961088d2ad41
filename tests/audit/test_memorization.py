"""Recitation and label memory, where the answer is known."""

import math

import pytest
import torch
from torch import nn

import headwater
from headwater.audit.memorization import (
    label_memory,
    owed_to_itself,
    perplexity,
    ranking_kept,
    recitation,
    recited_examples,
)
from headwater.audit.mislabel import SelfInfluence
from headwater.audit.subject import Subject
from headwater.core.curvature import Dense
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification
from headwater.numerics.ranks import spearman


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


def test_the_ranking_of_next_tokens_is_kept_by_the_model_itself_and_lost_by_a_change():
    model, other = Successor(), Successor()
    with torch.no_grad():  # tokens in the order 1, 2, …, 0 behind every one
        for each in (model, other):
            each.table.copy_(torch.linspace(1, 0, 10).roll(1).expand(10, 10))
        other.table[3] = other.table[3].flip(0)
    ids = torch.tensor([[1, 2, 4, 5], [1, 3, 3, 5]])
    data = (ids, ids)
    same = ranking_kept(model, model, CausalLM(), data)
    assert same.value == same.low == same.high == 1
    # behind 3 it ranks 8, 7, …, 0, 9 where the first had 1, 2, …, 9, 0: of worth 3, 4, …, 10, 1, 2
    discounted = [1 / math.log2(r + 2) for r in range(10)]
    worth = [3, 4, 5, 6, 7, 8, 9, 10, 1, 2]
    best = sum(w * d for w, d in zip(range(10, 0, -1), discounted, strict=True))
    lost = sum(w * d for w, d in zip(worth, discounted, strict=True)) / best
    found = ranking_kept(other, model, CausalLM(), data)
    assert found.n == 2 and found.value == pytest.approx((1 + (1 + lost + lost) / 3) / 2)


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


RIDGE = 0.02


def softmax_regression(x, y, weight):
    """Weights (class, feature) of the least weighted mean loss with a ridge, by Newton's method."""
    theta = torch.zeros(3 * x.shape[1], dtype=torch.float64)

    def objective(t):
        loss = nn.functional.cross_entropy(x @ t.view(3, -1).T, y, reduction="none")
        return (weight * loss).sum() / len(x) + RIDGE / 2 * t.square().sum()

    for _ in range(12):
        g = torch.func.grad(objective)(theta)
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), g)
    assert float(torch.func.grad(objective)(theta).abs().max()) < 1e-12
    return theta.view(3, -1)


def test_what_labels_owe_to_themselves_is_what_leaving_them_out_takes_away():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = x.argmax(1)
    y[:4] = (y[:4] + 1) % 3  # wrong ones, learnt by heart as far as three inputs allow
    whole = torch.ones(40, dtype=torch.float64)
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(softmax_regression(x, y, whole))
    fit = headwater.fit(model, (x, y), Classification(), curvature=Dense(), weight_decay=RIDGE)
    subject = Subject(fit)
    p, loss = subject.final.probability, subject.final.loss
    own = SelfInfluence(damping=RIDGE).measure(subject)

    def lost(share):
        """What leaving out that share of each example takes from its label's probability."""
        after = []
        for i in range(40):
            weight = whole.clone()
            weight[i] -= share
            after.append((softmax_regression(x, y, weight) @ x[i]).softmax(0)[y[i]])
        return p - torch.stack(after)

    # a share of the self-influence is that of the whole to first order
    torch.testing.assert_close(owed_to_itself(loss, 1e-4 * own), lost(1e-4), rtol=1e-3, atol=1e-12)
    actual = lost(1.0)
    plain, exact = (owed_to_itself(loss, own, exact=e) for e in (False, True))
    for found in (plain, exact):
        assert float(spearman(found[None], actual[None])) > 0.98
    # without the example there is less curvature to hold it, which the leverage knows
    assert bool((plain < actual).all()) and bool((plain > 0.6 * actual).all())
    assert float((exact - actual).norm()) < 0.3 * float((plain - actual).norm())


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_of_two_classes_the_leverage_is_the_share_of_the_curvature(p):
    """One parameter beside a ridge: without the example nothing but the ridge holds it."""
    ridge, odds = 0.05, math.log(p / (1 - p))
    curvature, gradient = p * (1 - p), 1 - p
    own = torch.tensor([gradient**2 / (curvature + ridge)], dtype=torch.float64)
    assert p * float(own) / (1 - p) == pytest.approx(curvature / (curvature + ridge))
    expected = p - 1 / (1 + math.exp(gradient / ridge - odds))  # a step of g / ρ
    loss = torch.tensor([-math.log(p)], dtype=torch.float64)
    assert float(owed_to_itself(loss, own, exact=True)) == pytest.approx(expected, abs=1e-9)


def test_what_changes_nothing_owes_nothing_and_no_label_owes_more_than_it_has():
    p = torch.tensor([0.2, 0.9, 1.0 - 1e-9], dtype=torch.float64)
    loss, zero = -p.log(), torch.zeros(3).double()
    torch.testing.assert_close(owed_to_itself(loss, zero), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(owed_to_itself(loss, zero - 1e-9), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(owed_to_itself(loss, zero + 999), p)
    assert owed_to_itself(zero, zero).tolist() == [0, 0, 0]  # certain, and nothing says why
