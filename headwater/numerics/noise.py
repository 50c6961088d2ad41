"""Random numbers that depend on what they are for, not on the order in which they are drawn.

A label drawn for an example must be the same whatever the batch it stands in, so that a fit does not depend on
batching, resuming or the number of processes. Each number is a hash of (seed, key, counter): the finaliser of
SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators").
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copy the sign; hashing wants zeros


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keys(names: Iterable[str]) -> Int[Tensor, " example"]:
    """A 64-bit key for each name, the same on every machine."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor(
        [int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64
    )


def bits(
    key: Int[Tensor, "*shape"], counter: Int[Tensor, "*shape"], seed: int
) -> Int[Tensor, "*shape"]:
    """64 random bits for each (key, counter) under a seed."""
    step = (_GOLDEN * (seed + 1) + (1 << 63)) % (1 << 64) - (1 << 63)  # wrapped to 64 bits
    return _mix(_mix(key + step) + _GOLDEN * (counter + 1))


def uniform(
    key: Int[Tensor, "*shape"], counter: Int[Tensor, "*shape"], seed: int
) -> Float[Tensor, "*shape"]:
    """Uniform numbers in (0, 1), float64, one for each (key, counter) under a seed.

    Example:
        >>> a = uniform(torch.tensor([7, 8]), torch.tensor([0, 0]), seed=1)
        >>> b = uniform(torch.tensor([8, 7]), torch.tensor([0, 0]), seed=1)
        >>> bool((a == b.flip(0)).all())
        True
    """
    x = bits(key, counter, seed)
    return (_shift_right(x, 12).double() + 0.5) * 2.0**-52  # 52 bits: one more would round up to 1


def normal(
    key: Int[Tensor, "*shape"], counter: Int[Tensor, "*shape"], seed: int
) -> Float[Tensor, "*shape"]:
    """Standard normal numbers by the Box–Muller transform of two uniform ones."""
    radius = (-2 * uniform(key, 2 * counter, seed).log()).sqrt()
    return radius * (2 * math.pi * uniform(key, 2 * counter + 1, seed)).cos()
