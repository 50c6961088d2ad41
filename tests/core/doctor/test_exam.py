import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.core.doctor import check_loss, examine
from headwater.core.examples import TensorExamples
from headwater.core.task import Classification, FunctionTask, MaskedLM
from tests.doctor_cases import Attention, Forward, Sentences, failed, images, mlp, sentences


def test_a_loss_that_is_a_mean_over_the_batch_is_found():
    class Mean(Classification):
        def loss(self, model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

    def divided(model, batch):
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return each / len(each)

    scalar = examine(mlp(6, 3), images(), Mean())
    assert failed(scalar) == ["loss"]
    assert "reduction='none'" in scalar["loss"].remedy
    shared = examine(mlp(6, 3), images(), FunctionTask(loss_with=divided))
    assert "batching" in failed(shared)
    assert "divided by 4" in shared["batching"].detail
    with pytest.raises(ValueError, match="depends on the batch"):
        check_loss(mlp(6, 3), FunctionTask(loss_with=divided), images().batch(range(4)))


def test_a_loss_that_cannot_be_computed_is_a_finding_and_no_crash():
    diagnosis = examine(mlp(5, 3), images(), Classification())
    assert failed(diagnosis) == ["loss"]
    assert "RuntimeError" in diagnosis["loss"].detail


def test_a_label_without_an_output_is_found_in_examples_that_are_not_looked_at():
    data = images(200)
    data.tensors[1][199] = 3
    diagnosis = examine(mlp(6, 3), data, Classification())
    assert failed(diagnosis) == ["classes"]
    assert "example '199' is 3" in diagnosis["classes"].detail
    assert "output for every class" in diagnosis["classes"].remedy


def test_hidden_functional_dropout_is_found():
    model = Forward(lambda self, x: self.head(F.dropout(x, 0.5)), head=nn.Linear(6, 3))
    diagnosis = examine(model, images(), Classification())
    assert "repeats" in failed(diagnosis)
    assert "training=self.training" in diagnosis["repeats"].remedy
    assert diagnosis.layers == ()
    assert diagnosis["gradients"].status == "warn"


def test_dropout_modules_in_training_mode_are_no_finding():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    assert examine(model, images(), Classification()).ok


def test_attention_that_ignores_the_mask_is_found():
    diagnosis = examine(Attention(masked=False), Sentences(sentences()), MaskedLM())
    assert {"batching", "padding", "mask", "padded gradients"} <= set(failed(diagnosis))
    assert "attention_mask" in diagnosis["padding"].remedy


def test_a_mask_that_lets_the_tokens_under_it_through_is_found():
    class Leaky(Attention):
        def forward(self, input_ids, attention_mask):
            hidden = (input_ids * (1 - attention_mask)).sum(1, keepdim=True)[..., None]
            return super().forward(input_ids, attention_mask) * (1 + hidden)

    diagnosis = examine(Leaky(), Sentences(sentences()), MaskedLM())
    assert diagnosis["padding"].status == "ok"  # zeros under the mask do not show
    assert failed(diagnosis) == ["mask"]


def test_a_full_context_leaves_the_padding_unchecked_with_a_warning():
    class Positioned(Attention):
        def __init__(self):
            super().__init__()
            self.place = nn.Embedding(10, 8).double()

        def forward(self, input_ids, attention_mask):
            places = self.place(torch.arange(input_ids.shape[1])[None])
            weights = attention_mask[..., None].double()
            return self.head((self.embed(input_ids) + places) * weights)

    diagnosis = examine(Positioned(), Sentences(sentences()), MaskedLM())
    assert diagnosis["padding"].status == "warn"
    assert "not checked" in diagnosis["padding"].detail


def test_random_augmentation_is_found():
    class Augmented(TensorExamples):
        def batch(self, indices):
            x, y = super().batch(indices)
            return x + torch.randn_like(x), y

    data = Augmented(torch.randn(8, 6).double(), torch.randint(3, (8,)))
    assert "data" in failed(examine(mlp(6, 3), data, Classification()))
