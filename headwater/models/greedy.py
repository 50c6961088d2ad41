"""What a language model says when it always takes the most probable token."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwater.core.capture import evaluation_mode


@torch.no_grad()
def greedy(
    model: Any, prompts: Int[Tensor, "text pos"], n_tokens: int, *, batch_size: int = 64
) -> Int[Tensor, "text n_tokens"]:
    """The most probable continuations, of exactly `n_tokens` tokens, whatever these are.

    Args:
        model: Token numbers to logits, or to an object that carries them as `.logits`. Models of `transformers` keep
            what they have computed; others read everything again for each token.
        prompts: Prompts of one length, without padding.
        n_tokens: Tokens to add to each.
        batch_size: Prompts that are continued together.
    """
    device = next(model.parameters()).device
    caches = getattr(getattr(model, "config", None), "use_cache", None) is not None
    with evaluation_mode(model):
        parts = [
            (_cached if caches else _plain)(model, some.to(device), n_tokens).cpu()
            for some in prompts.split(batch_size)
        ]
    return torch.cat(parts)


def _plain(model: Any, ids: Tensor, n_tokens: int) -> Tensor:
    start = ids.shape[1]
    for _ in range(n_tokens):
        out = model(ids)
        logits = getattr(out, "logits", out)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


def _cached(model: Any, ids: Tensor, n_tokens: int) -> Tensor:
    said, kept = [], None
    for _ in range(n_tokens):
        out = model(input_ids=ids, past_key_values=kept, use_cache=True)
        ids, kept = out.logits[:, -1:].argmax(-1), out.past_key_values
        said.append(ids)
    return torch.cat(said, dim=1)
