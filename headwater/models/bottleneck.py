r"""Inverted-bottleneck perceptrons: dense layers only, and they scale.

Bachmann, Anagnostidis and Hofmann (2023), "Scaling MLPs: A Tale of Inductive Bias", arXiv:2306.13575.

$$x_0 = W_\text{in} u + b, \qquad x \leftarrow x + W_c\, \mathrm{gelu}(W_e\, \mathrm{LN}(x) + b_e) + b_c,
\qquad \text{logits} = W_\text{out} x$$

with $W_e$ from m to 4m and $W_c$ back, and no norm before the logits.
"""

import re

import torch
from torch import Tensor, nn


class InvertedBottleneck(nn.Module):
    """One residual block: a norm, an expansion, a GELU, and a contraction.

    Args:
        width: Width m of the residual stream.
        expansion: How many times wider the middle is.
    """

    def __init__(self, width: int, expansion: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(nn.functional.gelu(self.expand(self.norm(x))))


class BottleneckMLP(nn.Module):
    """A perceptron of inverted bottlenecks, on images held as vectors.

    Args:
        d_in: Width of the input; images are flattened.
        d_out: Number of classes.
        width: Width m of the residual stream.
        depth: Number of blocks D.
        expansion: How many times wider a block's middle is.
        seed: Seed of the initial weights (PyTorch's default for linear layers).

    Example:
        >>> sum(p.numel() for p in BottleneckMLP(12288, 11230, width=512, depth=6).parameters())
        24657374
    """

    def __init__(
        self, d_in: int, d_out: int, *, width: int, depth: int, expansion: int = 4, seed: int = 0
    ):
        super().__init__()
        self.d_in = d_in
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.manual_seed(seed)
            self.embed = nn.Linear(d_in, width)
            self.blocks = nn.ModuleList(InvertedBottleneck(width, expansion) for _ in range(depth))
            self.head = nn.Linear(width, d_out)

    @classmethod
    def named(cls, name: str, d_in: int, d_out: int, *, seed: int = 0) -> "BottleneckMLP":
        """The model of a published name, such as "B_6-Wi_512": six blocks of width 512.

        Raises:
            ValueError: The name does not have that form.
        """
        parts = re.fullmatch(r"B_(\d+)-Wi_(\d+)", name)
        if parts is None:
            raise ValueError(f"Expected a name such as 'B_6-Wi_512'; got {name!r}.")
        depth, width = map(int, parts.groups())
        return cls(d_in, d_out, width=width, depth=depth, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.d_in:
            raise ValueError(f"Expected inputs of {self.d_in} numbers; got {x.shape[1]}.")
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
