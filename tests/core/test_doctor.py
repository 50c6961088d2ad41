import json
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.core import doctor
from headwater.core.doctor import check_loss, examine
from headwater.core.examples import DatasetExamples, TensorExamples
from headwater.core.task import CausalLM, Classification, FunctionTask, MaskedLM


class Sentences(DatasetExamples):
    """Token sequences, padded on the right."""

    def __init__(self, sequences, labels=None):
        super().__init__(sequences, collate=self.pad, lengths=[len(s) for s in sequences])
        self.labels = sequences if labels is None else labels
        self.dataset = list(zip(sequences, self.labels, strict=True))

    @staticmethod
    def pad(pairs):
        def side(which, value):
            rows = [pair[which] for pair in pairs]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = side(0, 0)
        ones = [torch.ones_like(pair[0]) for pair in pairs]
        mask = nn.utils.rnn.pad_sequence(ones, batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": side(1, -100)}


def sentences(n=6, first=(1,)):
    return [
        torch.cat([torch.tensor(first), torch.randint(2, 30, (4 + i,))]).long() for i in range(n)
    ]


def images(n=12):
    return TensorExamples(torch.randn(n, 6).double(), torch.randint(3, (n,)))


def mlp(*sizes):
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.Tanh())][:-1]).double()


class Attention(nn.Module):
    """One layer of attention over embedded tokens; it looks at the mask only when it is told to."""

    def __init__(self, masked=True, vocab=30, dim=8):
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocab, dim), nn.Linear(dim, dim)
        self.head, self.masked = nn.Linear(dim, vocab), masked
        self.double()

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids)
        weights = h @ h.mT
        if self.masked:
            weights = weights.masked_fill(~attention_mask[:, None].bool(), -1e9)
        return self.head(torch.tanh(self.mix(weights.softmax(-1) @ h)))


class Forward(nn.Module):
    """A model whose forward pass is a function of itself."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward
        self.double()

    def forward(self, x):
        return self.run(self, x)


@pytest.fixture
def unproven(monkeypatch):
    """Layers as their modules suggest, without the proof that `follow` makes for itself."""
    monkeypatch.setattr(doctor, "follow", partial(doctor.follow, prove=False))


def failed(diagnosis):
    return [check.name for check in diagnosis.checks if check.status == "fail"]


def test_a_healthy_mlp_passes_and_is_left_as_it_was():
    model = mlp(6, 5, 3)
    model.train()
    model[0].weight.requires_grad_(False)
    diagnosis = examine(model, images(), Classification(), layers="all")
    assert diagnosis.ok
    assert [layer.name for layer in diagnosis.layers] == ["0", "2"]
    # Rounding of float64 in sums of a few terms.
    assert max(layer.relative_error for layer in diagnosis.layers) < 1e-13
    assert diagnosis.coverage == 1.0
    assert sum(layer.share for layer in diagnosis.layers) == pytest.approx(1.0)
    assert model.training and model[2].training
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_small_convolutional_network_with_batch_norm_passes():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    data = (torch.randn(10, 1, 6, 6), torch.randint(3, (10,)))
    diagnosis = examine(model.train(), data, Classification())
    assert diagnosis.ok
    assert "evaluation mode" in diagnosis["batch norm"].detail
    assert len(diagnosis.layers) == 4


def test_a_masked_attention_model_passes_padding_and_mask_checks():
    diagnosis = examine(Attention(), Sentences(sentences()), MaskedLM())
    assert diagnosis.ok
    assert {"padding", "mask", "padded gradients"} <= {c.name for c in diagnosis.checks}


def test_a_tiny_llama_passes_and_names_its_tied_modules():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    diagnosis = examine(model, Sentences(sentences()), CausalLM(), n=2)
    assert diagnosis.ok
    assert ("model.embed_tokens", "lm_head") in diagnosis.tied
    assert diagnosis["padded gradients"].status == "ok"

    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
    fresh = examine(adapted, Sentences(sentences()), CausalLM(), n=2)
    assert fresh.ok
    assert fresh["adapter"].status == "warn"
    assert "zero gradients" not in {c.name for c in fresh.checks}
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained = examine(adapted, Sentences(sentences()), CausalLM(), n=2)
    assert trained.ok
    assert "adapter" not in {c.name for c in trained.checks}
    assert 0 < trained.coverage < 0.2


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


def test_a_parameter_that_also_acts_outside_its_module_is_a_fail_that_names_its_layer(unproven):
    model = Forward(
        lambda self, x: self.head(torch.tanh(F.linear(torch.tanh(self.mid(x)), self.mid.weight))),
        mid=nn.Linear(6, 6, bias=False),
        head=nn.Linear(6, 3),
    )
    diagnosis = examine(model, images(), Classification())
    assert failed(diagnosis)[0] == "gradients"
    by_name = {layer.name: layer for layer in diagnosis.layers}
    assert by_name["mid"].status == "fail"
    assert by_name["mid"].relative_error > 0.4
    assert by_name["head"].status == "ok"
    assert "skip=['mid']" in diagnosis["gradients"].remedy
    skipped = examine(model, images(), Classification(), skip=["mid"])
    assert skipped.ok
    assert [left.name for left in skipped.left_out] == ["mid.weight"]


def test_a_module_that_reads_sequence_first_is_found_only_in_a_batch(unproven):
    model = Forward(
        lambda self, x: self.head(self.mid(x.transpose(0, 1)).tanh().transpose(0, 1).sum(1)),
        mid=nn.Linear(5, 4),
        head=nn.Linear(4, 3),
    )
    data = (torch.randn(9, 7, 5).double(), torch.randint(3, (9,)))
    diagnosis = examine(model, data, Classification())
    assert diagnosis["gradients"].status == "ok"
    assert failed(diagnosis) == ["batched gradients"]
    assert "'mid'" in diagnosis["batched gradients"].remedy
    assert next(x for x in diagnosis.layers if x.name == "mid").status == "fail"


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


def test_examples_without_a_scored_token_are_named():
    ids = sentences(5)
    labels = [x if i != 2 else torch.full_like(x, -100) for i, x in enumerate(ids)]
    some = examine(Attention(), Sentences(ids, labels), MaskedLM())
    assert some["labels"].status == "warn"
    assert some["labels"].detail.endswith(": 2")
    none = examine(Attention(), Sentences(ids, [torch.full_like(x, -100) for x in ids]), MaskedLM())
    assert "labels" in failed(none)
    # The first label is never scored by next-token prediction.
    first = [torch.cat([x[:1], torch.full_like(x[1:], -100)]) for x in ids]
    assert "labels" in failed(examine(Attention(), Sentences(ids, first), CausalLM()))


def test_a_doubled_first_token_is_found_and_a_repeated_word_is_not():
    doubled = examine(Attention(), Sentences(sentences(first=(1, 1))), MaskedLM())
    assert doubled["first token"].status == "warn"
    assert doubled.ok
    once = [torch.tensor([7 + i, 7 + i, 3, 4]) for i in range(6)]
    names = {c.name for c in examine(Attention(), Sentences(once), MaskedLM()).checks}
    assert "first token" not in names


def test_weights_that_are_not_finite_are_named():
    model = mlp(6, 5, 3)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    diagnosis = examine(model, images(), Classification())
    assert {"weights", "loss"} <= set(failed(diagnosis))
    assert "2.bias" in diagnosis["weights"].detail


def test_modules_that_never_run_and_layers_without_gradient_are_named():
    model = Forward(
        lambda self, x: self.head(self.mid(x).clamp(max=-100.0)) + 0 * self.loose(x).detach(),
        mid=nn.Linear(6, 4),
        head=nn.Linear(4, 3),
        idle=nn.Linear(2, 2),
        loose=nn.Linear(6, 3),
    )
    diagnosis = examine(model, images(), Classification())
    assert diagnosis.ok
    assert "loose" in diagnosis["unused"].detail
    assert "mid" in diagnosis["zero gradients"].detail
    assert "mid" not in diagnosis["unused"].detail
    told = diagnosis["coverage"].detail + diagnosis["unused"].detail
    assert "idle" in told


def test_batch_norm_without_running_statistics_is_a_fail():
    model = nn.Sequential(
        nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    ).double()
    assert {"batch norm", "alone"} <= set(failed(examine(model, images(), Classification())))


def test_gradient_checkpointing_is_a_warning():
    model = mlp(6, 3)
    model.gradient_checkpointing = True
    assert examine(model, images(), Classification())["checkpointing"].status == "warn"


def test_random_augmentation_is_found():
    class Augmented(TensorExamples):
        def batch(self, indices):
            x, y = super().batch(indices)
            return x + torch.randn_like(x), y

    data = Augmented(torch.randn(8, 6).double(), torch.randint(3, (8,)))
    assert "data" in failed(examine(mlp(6, 3), data, Classification()))


def test_fewer_positions_than_a_side_is_a_warning():
    diagnosis = examine(mlp(6, 3), images(5), Classification())
    assert diagnosis["rank"].status == "warn"
    assert diagnosis.ok
    assert "rank" not in {c.name for c in examine(mlp(6, 3), images(50), Classification()).checks}


def test_reused_modules_and_quantized_weights_are_proven_too():
    class Quantized(nn.Module):
        in_features, out_features = 6, 6

        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (6, 6), dtype=torch.int8))

        def forward(self, x):
            return F.linear(x, self.codes.to(x) / 8)

    model = Forward(
        lambda self, x: self.head(self.mid(torch.tanh(self.mid(self.low(x))))),
        low=Quantized(),
        mid=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    layers = ["low.weight", "mid.*", "head.*"]
    diagnosis = examine(model, images(), Classification(), layers=layers)
    assert diagnosis.ok
    assert ("mid", 2) in diagnosis.reused
    assert "low" in {layer.name for layer in diagnosis.layers}
    assert "unused" not in {check.name for check in diagnosis.checks}


def test_an_error_of_rounding_alone_is_a_warning():
    model = mlp(6, 5, 3).float()
    data = (torch.randn(12, 6), torch.randint(3, (12,)))
    diagnosis = examine(model, data, Classification(), tolerance=1e-12)
    assert diagnosis.ok
    assert any(layer.status == "warn" for layer in diagnosis.layers)
    assert "float64 agrees" in diagnosis["batched gradients"].detail


def test_nothing_to_follow_is_a_finding():
    diagnosis = examine(mlp(6, 3), images(), Classification(), layers=["elsewhere.*"])
    assert failed(diagnosis) == ["coverage"]


def test_a_diagnosis_is_rows_json_and_a_short_text():
    calls = []
    diagnosis = examine(
        mlp(6, 3), images(5), Classification(), progress=lambda *step: calls.append(step)
    )
    assert calls[-1] == (4, 4, "gradients")
    assert {"name", "status", "detail", "remedy"} == set(diagnosis.to_rows()[0])
    assert diagnosis.to_rows("layers")[0]["name"] == "0"
    written = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert written["ok"] is True
    assert written["coverage"] == 1.0
    assert "rank" in repr(diagnosis) and "repeats" not in repr(diagnosis)
    broken = replace(diagnosis.checks[0], status="fail")
    assert not replace(diagnosis, checks=(broken,)).ok
