"""Recitation, label memory and the spectrum, where the answer is known."""

import math

import pytest
import torch
from torch import nn

import headwater
from headwater.audit.memorization import (
    label_memory,
    perplexity,
    recitation,
    recited_examples,
    spectrum,
)
from headwater.core.curvature import KFAC
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification
from headwater.forget import CurvatureEdit
from headwater.models.gpt import GPT
from tests.cases import mlp, mlp_data


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


# The spectrum


def _fit():
    torch.manual_seed(0)
    return headwater.fit(mlp(), mlp_data(60), Classification(), curvature=KFAC(fisher="empirical"))


@pytest.mark.parametrize("by", ["input", "pair"])
def test_the_bands_of_a_layer_add_up_to_what_it_does(by):
    from headwater.audit.memorization import _bands
    from headwater.forget.base import eigen

    fit = _fit()
    layer = next(iter(fit.followed))
    W = fit.model[0].weight.detach()
    parts = _bands(W, eigen(fit, layer), (0.1, 0.4, 1.0), by)
    torch.testing.assert_close(sum(parts), W, rtol=0, atol=1e-12)
    for i, part in enumerate(parts):  # orthogonal to each other
        for other in parts[i + 1 :]:
            assert abs(float((part * other).sum())) < 1e-12


def test_activity_is_the_norm_of_what_a_band_returns():
    fit, x = _fit(), torch.randn(7, 5).double()
    data = TensorExamples(x, torch.zeros(7, dtype=torch.int64))
    found = spectrum(fit, {"clean": data, "same": data}, layers=("0",), bands=(1.0,))
    expected = (x @ fit.model[0].weight.detach().mT).norm(dim=1)
    torch.testing.assert_close(found.activity["same"][:, 0, 0], expected, rtol=1e-10, atol=0)
    assert found.ratio("same", 0, 0).value == pytest.approx(1.0)
    assert found.sensitivity("same") == pytest.approx(1.0)
    assert found.table()["band"] == ["0-100 %"]


def test_inputs_along_rare_directions_light_up_the_last_band():
    torch.manual_seed(0)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.1, 0.1]).double()
    x, y = scales * torch.randn(200, 5).double(), torch.randint(3, (200,))
    model = mlp()
    fit = headwater.fit(model, (x, y), Classification(), curvature=KFAC(fisher="empirical"))
    rare = torch.zeros(20, 5).double()
    rare[:, 3:] = torch.randn(20, 2).double()
    sets = {
        "clean": TensorExamples(x[:50], y[:50]),
        "rare": TensorExamples(rare, y[:20]),
    }
    found = spectrum(fit, sets, layers=("0",), bands=(0.4, 0.6, 1.0))
    table = found.table()
    assert table["ratio"][-1] > 3 > 1 > table["ratio"][0]
    assert table["low"][-1] > 1
    assert found.sensitivity("rare") == pytest.approx(table["ratio"][-1])
    assert "rare" in repr(found) and found.passes == pytest.approx(70 / 200 / 3)
    edited = CurvatureEdit(keep_mass=0.99, layers=("0",)).edit(fit).applied(model)
    with torch.no_grad():  # what the band says is what the edit takes
        lost = [
            float((edited[0](v) - model[0](v)).norm() / (model[0](v) - model[0].bias).norm())
            for v in (rare, x)
        ]
    assert lost[0] > 1.5 * lost[1]


def test_positions_that_are_padding_are_not_active():
    torch.manual_seed(0)
    model = GPT(9, context=8, n_layers=1, dim=8, n_heads=2)
    ids = torch.randint(9, (30, 8))
    fit = headwater.fit(model, (ids, ids), CausalLM(), curvature=KFAC(fisher="empirical"))
    from headwater.core.examples import DatasetExamples

    def padded(n):
        row = ids[0, : 8 - n]
        fill = torch.zeros(n, dtype=torch.int64)
        return {
            "input_ids": torch.cat([row, fill]),
            "attention_mask": torch.cat([torch.ones_like(row), fill]),
            "labels": torch.cat([row, fill - 100]),
        }

    long = DatasetExamples([padded(0) | {"input_ids": ids[0]}])
    short = DatasetExamples([{k: v[:5] for k, v in padded(3).items()}])
    with_padding = DatasetExamples([padded(3)])
    sets = {"clean": short, "padded": with_padding, "long": long}
    found = spectrum(fit, sets, layers=("*.up",))
    torch.testing.assert_close(found.activity["padded"], found.activity["clean"], rtol=1e-5, atol=0)
    assert not torch.allclose(found.activity["long"], found.activity["clean"], rtol=1e-3)


def test_sets_and_bands_are_checked():
    fit, data = _fit(), mlp_data(4)
    with pytest.raises(ValueError, match="another set to compare"):
        spectrum(fit, {"clean": data})
    with pytest.raises(ValueError, match="ascend to 1"):
        spectrum(fit, {"clean": data, "other": data}, bands=(0.5, 0.2, 1.0))


def test_infinite_numbers_stay_out_of_the_interval():
    found = recitation(Successor(), torch.tensor([[1, 2, 3, 4]]), prefix=2)
    assert found.strict.low == found.strict.high == 1.0 and math.isfinite(found.distance.value)
