"""A small decoder for text: pre-norm blocks, learned positions, plain modules that can be followed.

Radford, Wu, Child, Luan, Amodei and Sutskever (2019), "Language Models are Unsupervised Multitask Learners". Query,
key and value are three linear layers here, and attention is written out, so that it can be differentiated as often as
anyone likes.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwater.core.sections import Step


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        dim: Width of the residual stream.
        n_heads: Heads; `dim` is a multiple.
    """

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim must be a multiple of n_heads; got {dim} and {n_heads}.")
        self.n_heads = n_heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch pos dim"], seen: Tensor
    ) -> Float[Tensor, "batch pos dim"]:
        q, k, v = (
            layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a residual stream."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, n_heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), seen)
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class Divide(nn.Module):
    """A LayerNorm that is told the variance to divide by.

    Args:
        norm: The norm, whose gain, bias and epsilon it takes.
    """

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    @property
    def bias(self) -> Tensor:
        """What it adds whatever it reads."""
        return self.norm.bias

    def forward(self, x: Tensor, variance: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.norm.eps) * self.norm.weight + self.norm.bias


def _measured(x: Tensor) -> tuple[Tensor, Tensor]:
    """The stream, and beside it the variance that a norm divides by."""
    return x, x.var(-1, correction=0, keepdim=True)


class GPT(nn.Module):
    """A small language model.

    Args:
        n_vocab: Number of tokens.
        context: Most positions of a text.
        n_layers: Number of blocks.
        dim: Width of the residual stream.
        n_heads: Attention heads.
        tied: Whether the head reads the embedding's weight.
        seed: Seed of the initial weights: normal with standard deviation 0.02, those that write
            into the residual stream by √(2 n_layers) smaller.

    Example:
        >>> GPT(50, n_layers=2, dim=32)(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 7, 50])
    """

    def __init__(
        self,
        n_vocab: int,
        *,
        context: int = 128,
        n_layers: int = 4,
        dim: int = 256,
        n_heads: int = 4,
        tied: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.context = context
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.manual_seed(seed)
            self.embed, self.position = nn.Embedding(n_vocab, dim), nn.Embedding(context, dim)
            blocks = [Block(dim, n_heads) for _ in range(n_layers)]
            self.blocks = nn.ModuleList(blocks)
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, n_vocab, bias=False)
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            for block in blocks:
                for layer in (block.attention.out, block.down):
                    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * n_layers))
        if tied:
            self.head.weight = self.embed.weight

    def forward(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        x, seen = self._embedded(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, seen)
        return self.head(self.norm(x))

    def _embedded(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None
    ) -> tuple[Float[Tensor, "batch pos dim"], Tensor]:
        """The residual stream at its beginning, and which positions each position sees."""
        length = most = input_ids.shape[1]
        if length > self.context and attention_mask is not None:
            most = int(attention_mask.sum(1).max())  # padding takes no position
        if most > self.context:
            raise ValueError(f"Expected at most {self.context} tokens; got {most}. Cut the text.")
        steps = torch.arange(length, device=input_ids.device)
        seen, positions = steps[:, None] >= steps, steps.expand_as(input_ids)
        if attention_mask is not None:  # padding may stand on either side
            real = attention_mask.bool()
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
            itself = steps[:, None] == steps
            seen = ((seen & real[:, None]) | itself)[:, None]
        return self.embed(input_ids) + self.position(positions), seen

    def steps(self, *, variance: bool = False) -> list[Step]:
        """The forward pass between places that everything flows through.

        Of block i these are "blocks.i" and "blocks.i.mlp", where the residual stream is alone, and "blocks.i.down",
        where the perceptron's neurons run beside it.

        Args:
            variance: Let the variance that each norm divides by run beside the stream, kept apart from it, in
                "blocks.i", "blocks.i.mlp" and "norm"; behind each of the places before it is computed.
        """

        def embedded(batch: Any) -> tuple[Tensor, Tensor]:
            return self._embedded(batch["input_ids"], batch.get("attention_mask"))

        def normed(norm: nn.LayerNorm) -> nn.Module:
            return Divide(norm) if variance else norm

        def attend(block: Block, norm: nn.Module):
            def step(parts: tuple[Tensor, ...], batch: Any) -> tuple[Tensor, ...]:
                return (parts[0] + block.attention(norm(*parts), embedded(batch)[1]),)

            return step

        def expand(block: Block, norm: nn.Module):
            def step(parts: tuple[Tensor, ...], batch: Any) -> tuple[Tensor, ...]:
                return parts[0], nn.functional.gelu(block.up(norm(*parts)))

            return step

        def contract(block: Block):
            return lambda parts, batch: (parts[0] + block.down(parts[1]),)

        found = [Step("embed", lambda parts, batch: (embedded(batch)[0],), (self.embed,))]

        def add(name: str, run: Any, *modules: nn.Module, measured: bool = False) -> None:
            if measured and variance:
                found.append(Step(f"{name}.variance", lambda parts, batch: _measured(parts[0])))
            found.append(Step(name, run, modules, apart=(1,) if measured and variance else ()))

        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            one, two = normed(block.norm_1), normed(block.norm_2)
            attention = block.attention.modules()
            add(f"blocks.{i}", attend(block, one), one, *attention, measured=True)
            add(f"blocks.{i}.mlp", expand(block, two), two, block.up, measured=True)
            add(f"blocks.{i}.down", contract(block), block.down)
        last = normed(self.norm)
        add("norm", lambda parts, batch: (last(*parts),), last, measured=True)
        add("head", lambda parts, batch: (self.head(parts[0]),), self.head)
        return found
