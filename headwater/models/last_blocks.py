"""The last blocks of a pretrained decoder, with low-rank adapters: what fine-tuning changes, and nothing below it.

Hidden states of the frozen blocks below do not change in training. Computed once, they are the inputs of a model that
consists of the last blocks, the last norm and the head, and its gradients are those of the whole model.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater.extras import require


class LastBlocks(nn.Module):
    """The blocks of a Llama-like decoder from one on, its norm and its head: hidden states to logits.

    Args:
        model: A decoder of `transformers` with `model.layers`, `model.norm`, `model.rotary_emb` and `lm_head`.
        first: Number of the first block that is kept.

    Raises:
        ValueError: The model is built otherwise, or has no such block.
    """

    def __init__(self, model: Any, first: int):
        super().__init__()
        try:
            body, self.head = model.model, model.lm_head
            blocks, self.norm, self.rotary = body.layers, body.norm, body.rotary_emb
        except AttributeError as error:
            raise ValueError(
                f"{type(model).__name__} is not built like Llama (model.layers, model.norm, model.rotary_emb, lm_head)."
            ) from error
        if not 0 <= first < len(blocks):
            raise ValueError(f"first must be 0 to {len(blocks) - 1}; got {first}.")
        self.blocks = blocks[first:]

    def forward(self, hidden: Float[Tensor, "batch pos dim"]) -> Float[Tensor, "batch pos vocab"]:
        n = hidden.shape[1]
        positions = torch.arange(n, device=hidden.device)[None]
        turned = self.rotary(hidden, positions)
        future = torch.full((n, n), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones cannot be batched by vmap
            for block in self.blocks:
                hidden = block(
                    hidden,
                    attention_mask=future[None, None],
                    position_ids=positions,
                    position_embeddings=turned,
                )
        return self.head(self.norm(hidden))


@torch.no_grad()
def hidden_states(
    model: Any, ids: Int[Tensor, "text pos"], block: int
) -> Float[Tensor, "text pos dim"]:
    """What block number `block` of a decoder reads, for texts of one length without padding."""
    parts = [
        model(input_ids=part, use_cache=False, output_hidden_states=True).hidden_states[block]
        for part in ids.split(16)
    ]
    return torch.cat(parts)


def adapted(module: nn.Module, *, rank: int, seed: int) -> nn.Module:
    """A copy with low-rank adapters on the linear layers of its blocks; all else is frozen, and shared.

    Args:
        module: A module whose `blocks` are adapted.
        rank: Rank of the adapters; their scale is 2.
        seed: Seed of their initial weights.
    """
    peft = require("peft", extra="language")
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks.")
    ]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.inject_adapter_in_model(config, copy.deepcopy(module, shared)).eval()
