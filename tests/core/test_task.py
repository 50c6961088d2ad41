from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.core.prediction import IGNORE, Categorical
from headwater.core.task import (
    CausalLM,
    Classification,
    FunctionTask,
    LabelError,
    MaskedLM,
    Regression,
    Seq2Seq,
    measurement_function,
)
from tests.cases import Net, mlp, numbers


def language_net():
    def run(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.embed(input_ids).cumsum(1)))

    return Net(run, embed=nn.Embedding(9, 4), head=nn.Linear(4, 9)).double()


def language_batch():
    ids, mask = torch.randint(9, (3, 5)), torch.ones(3, 5).long()
    mask[1, 3:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[0, :2] = IGNORE  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_classification_is_cross_entropy():
    model, (x, y) = mlp(), numbers(5)
    expected = F.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(Classification().loss(model, (x, y)), expected)
    named = Net(lambda self, x: SimpleNamespace(logits=self.m(x)), m=model)
    torch.testing.assert_close(Classification().loss(named, {"x": x, "labels": y}), expected)
    torch.testing.assert_close(Classification().loss(named, UserDict(x=x, labels=y)), expected)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
def test_regression_is_half_the_squared_error(shape):
    x, y = torch.randn(2, 4, *shape, dtype=torch.float64)
    expected = 0.5 * (x - y).square().reshape(4, -1).sum(1)
    torch.testing.assert_close(Regression().loss(nn.Identity(), (x, y)), expected)


def test_a_language_model_is_scored_on_the_next_token():
    model, batch = language_net(), language_batch()
    logits = model(batch["input_ids"]).logits
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for t in range(4):
            if batch["labels"][i, t + 1] != IGNORE:
                expected[i] -= logits[i, t].log_softmax(0)[batch["labels"][i, t + 1]]
    task = CausalLM()
    torch.testing.assert_close(task.loss(model, batch), expected)
    assert task.token_loss(model, batch).shape == (3, 4)
    assert torch.equal(task.masks(batch)[""], batch["attention_mask"].bool())
    pair = batch["input_ids"], batch["labels"]
    torch.testing.assert_close(task.loss(model, pair), expected)
    assert task.masks(pair) == {}


def test_a_token_after_padding_is_not_scored():
    model, ids = language_net(), torch.tensor([[0, 0, 5, 3]])
    mask = torch.tensor([[0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}
    assert CausalLM().predict(model, batch).mask.tolist() == [[False, False, True]]


def test_a_masked_language_model_is_scored_where_tokens_are_masked():
    model, batch = language_net(), language_batch()
    logits, labels = model(batch["input_ids"]).logits, batch["labels"]
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(MaskedLM().loss(model, batch), each.view(3, 5).sum(1))


def test_the_last_position_of_each_text_can_be_left_out_on_either_side_of_its_padding():
    task = CausalLM(last_position=False)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    batch = {"labels": torch.zeros(3, 4, dtype=torch.long), "attention_mask": mask}
    expected = [[True, True, False, False], [False, False, True, False], [True, True, True, False]]
    assert task.masks(batch)[""].tolist() == expected
    del batch["attention_mask"]
    assert task.masks(batch)[""].tolist() == [[True, True, True, False]] * 3


def test_masks_of_a_decoder_reach_to_its_last_scored_label():
    labels = torch.tensor([[4, IGNORE, 2, IGNORE], [1, IGNORE, IGNORE, IGNORE]])
    source = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": source, "attention_mask": source, "labels": labels}
    masks = Seq2Seq().masks(batch)
    assert masks[""].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert torch.equal(masks["encoder"], source.bool()) and "model.encoder" in masks
    given = torch.ones(2, 4).long()
    assert Seq2Seq().masks(batch | {"decoder_attention_mask": given})[""].all()


def test_measurements_are_found_by_name():
    model, batch = mlp(), numbers(5)
    prediction = Classification().predict(model, batch)
    for name, expected in [
        ("loss", prediction.loss()),
        ("log_prob", -prediction.loss()),
        ("margin", prediction.margin()),
        (lambda p: p.logits[:, 0, 1], model(batch[0])[:, 1]),
    ]:
        actual = Classification(measurement_of=name).measurement(model, batch)
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="among loss, log_prob, margin; got 'marign'"):
        measurement_function("marign")
    with pytest.raises(ValueError, match="margin needs classes"):
        Regression(measurement_of="margin").measurement(
            nn.Linear(5, 1).double(), (batch[0], torch.ones(4, 1))
        )


def test_a_task_of_functions_uses_what_it_is_given():
    model, batch = mlp(), numbers(5)
    expected = Classification().loss(model, batch)

    def predict(model, batch):
        return Categorical(model(batch[0])[:, None], batch[1][:, None])

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    torch.testing.assert_close(FunctionTask(predict_with=predict).loss(model, batch), expected)
    only = FunctionTask(loss_with=loss, label="mine")
    torch.testing.assert_close(only.loss(model, batch), expected)
    torch.testing.assert_close(only.measurement(model, batch), expected)
    assert only.name == "FunctionTask[mine]" and only.masks(batch) == {}
    measured = FunctionTask(loss_with=loss, measure_with=lambda m, b: -loss(m, b))
    torch.testing.assert_close(measured.measurement(model, batch), -expected)
    with pytest.raises(ValueError, match=r"only knows its loss.*fisher='empirical'"):
        only.predict(model, batch)
    with pytest.raises(ValueError, match="got neither"):
        FunctionTask()


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        (Classification(), (torch.ones(2, 3, 4), torch.ones(2)), r"returned \(2, 3, 4\)"),
        (Regression(), (torch.ones(2, 3), torch.ones(2)), "must hold as many numbers"),
        (
            Classification(),
            {"input": torch.ones(2, 3)},
            "Expected `labels` in the batch; it has input",
        ),
    ],
)
def test_what_does_not_fit_is_refused(task, batch, message):
    with pytest.raises(ValueError, match=message):
        task.loss(nn.Identity(), batch)


def test_a_model_that_returns_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"object with `.logits`"):
        Classification().loss(Net(lambda self, x: [x]), (torch.ones(2, 3), torch.ones(2)))


@pytest.mark.parametrize("label", [3, -1, -100])
def test_a_label_that_the_model_has_no_output_for_is_refused(label):
    batch = torch.randn(4, 5).double(), torch.tensor([0, 2, label, 1])
    with pytest.raises(LabelError, match=rf"row 2 of the batch is {label}, .* for labels 0 to 2\."):
        Classification().loss(nn.Linear(5, 3).double(), batch)


def test_labels_are_not_looked_at_inside_vmap():
    model, (x, y) = (
        nn.Linear(5, 3).double(),
        (torch.randn(4, 5).double(), torch.tensor([0, 2, 1, 1])),
    )
    expected = Classification().loss(model, (x, y))
    one = torch.func.vmap(lambda a, b: Classification().loss(model, (a[None], b[None])).sum())
    torch.testing.assert_close(one(x, y), expected)
