"""Greedy text is the argmax of each step, whether what was computed is kept or not."""

import pytest
import torch

from headwater.models.gpt import GPT
from headwater.models.greedy import greedy


def test_greedy_text_is_the_argmax_of_each_step():
    torch.manual_seed(0)
    model = GPT(11, context=9, n_layers=2, dim=16, n_heads=2)
    prompts = torch.randint(11, (5, 3))
    ids = prompts
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(model, prompts, 6, batch_size=2), ids[:, 3:])


def test_a_model_that_keeps_what_it_computed_says_the_same():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = torch.randint(11, (5, 3))
    ids = prompts
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(model, prompts, 6), ids[:, 3:])
