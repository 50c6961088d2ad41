"""The last blocks on stored hidden states are the whole model: same logits, same gradients, side by side too."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from headwater.bench.text_workloads import next_token_loss
from headwater.models.last_blocks import LastBlocks, adapted, hidden_states
from headwater.training.loop import train
from headwater.training.optimizers import AdamW
from tests.language_cases import gpt2, llama

IDS = torch.randint(0, 16, (6, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return llama(layers=3, dtype=torch.float64).eval()


def test_logits_on_stored_hidden_states_are_those_of_the_whole_model(model):
    whole = model(input_ids=IDS).logits
    for first in (0, 2):
        found = LastBlocks(model, first)(hidden_states(model, IDS, first))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_gradients_of_adapters_are_those_of_the_whole_model(model):
    """The adapters' increments, added to the weights of the whole model, have the same derivative."""
    tail = adapted(LastBlocks(model, 1), rank=2, seed=3)
    trained = {n: p for n, p in tail.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    next_token_loss(tail(hidden_states(model, IDS, 1)), IDS).sum().backward()
    theta = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    moved = {}
    for name in theta:
        if ".lora_A." in name:
            low, up = theta[name], theta[name.replace(".lora_A.", ".lora_B.")]
            block, rest = name.removeprefix("blocks.").split(".", 1)
            weight = f"model.layers.{int(block) + 1}.{rest.split('.lora_A')[0]}.weight"
            moved[weight] = model.get_parameter(weight).detach() + 2 * up @ low
    logits = functional_call(model, moved, kwargs={"input_ids": IDS}).logits
    loss = next_token_loss(logits, IDS).sum()
    whole = torch.autograd.grad(loss, list(theta.values()))
    for (name, p), g in zip(trained.items(), whole, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-10, msg=name)


def test_adapters_train_side_by_side_on_shared_frozen_weights(model):
    tail, x = LastBlocks(model, 1), hidden_states(model, IDS, 1)
    models = [adapted(tail, rank=2, seed=seed) for seed in (0, 1)]
    assert models[0].head.weight.data_ptr() == tail.head.weight.data_ptr()
    rule, subsets = (
        AdamW(lr=1e-2, batch_size=2, epochs=2),
        torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]),
    )
    kwargs = {"optimizer": rule, "loss": next_token_loss}
    both = train(models, x, IDS, subsets=subsets, seeds=[0, 1], **kwargs)
    alone = train(models[1:], x, IDS, subsets=subsets[1:], seeds=[1], **kwargs)
    assert all("lora" in name for name in both)
    for name, value in alone.items():
        torch.testing.assert_close(both[name][1], value[0], rtol=1e-8, atol=1e-10)


def test_a_model_that_is_built_otherwise_and_a_block_that_is_not_there_are_refused(model):
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not built like Llama"):
        LastBlocks(gpt2(), 0)
    with pytest.raises(ValueError, match="first must be 0 to 2; got 3"):
        LastBlocks(model, 3)
    with pytest.raises(ValueError, match="No parameter of the model requires gradients"):
        frozen = nn.Linear(2, 2).requires_grad_(False)
        train(
            [frozen], torch.ones(2, 2), torch.zeros(2).long(),
            subsets=torch.tensor([[0, 1]]), seeds=[0], optimizer=AdamW(),
        )  # fmt: skip
