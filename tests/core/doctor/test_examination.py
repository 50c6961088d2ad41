import warnings

import pytest
import torch
from torch import nn

from headwater.core.doctor import examine
from headwater.core.task import CausalLM, Classification, MaskedLM
from tests.doctor_cases import Attention, Sentences, failed, images, mlp, sentences


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


def test_nothing_to_follow_is_a_finding():
    diagnosis = examine(mlp(6, 3), images(), Classification(), layers=["elsewhere.*"])
    assert failed(diagnosis) == ["coverage"]
