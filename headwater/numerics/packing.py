"""Codes of a few bits, packed without gaps: eight of them in as many bytes as each has bits."""

import torch
from jaxtyping import UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " byte"]:
    """Codes below 2**bits as bytes, filled up with zeros to a multiple of eight codes.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist()
        [57, 1]
    """
    _check(bits)
    if len(codes) and int(codes.max()) >> bits:
        raise ValueError(f"Expected codes below {1 << bits}; got {int(codes.max())}.")
    filled = torch.cat([codes, codes.new_zeros(-len(codes) % 8)]).reshape(-1, 8).long()
    word = (filled << bits * torch.arange(8, device=codes.device)).sum(1)
    at = 8 * torch.arange(bits, device=codes.device)
    return ((word[:, None] >> at) & 255).to(torch.uint8).flatten()


def unpack(packed: UInt8[Tensor, " byte"], bits: int, n: int) -> UInt8[Tensor, " n"]:
    """The first n codes of `pack`.

    Example:
        >>> unpack(torch.tensor([57, 1], dtype=torch.uint8), 2, 5).tolist()
        [1, 2, 3, 0, 1]
    """
    _check(bits)
    expected = -(-n // 8) * bits
    if len(packed) != expected:
        raise ValueError(f"{n} codes of {bits} bits are {expected} bytes; got {len(packed)}.")
    kind = torch.int32 if bits < 4 else torch.int64
    at = torch.arange(bits, device=packed.device, dtype=kind)
    word = (packed.reshape(-1, bits).to(kind) << 8 * at).sum(1, dtype=kind)
    shifts = bits * torch.arange(8, device=packed.device, dtype=kind)
    codes = (word[:, None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten()[:n]


def _check(bits: int) -> None:
    if bits not in (2, 3, 4):
        raise ValueError(f"bits must be 2, 3 or 4; got {bits}.")
