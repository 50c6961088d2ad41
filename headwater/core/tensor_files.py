"""Tensors in files of the safetensors format, written piece by piece from where they lie."""

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from headwater.core.files import HashedFile
from headwater.core.fingerprint import byte_chunks, require_dense

MAX_NAME_LENGTH = 1000

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def check_name(name: str, what: str, taken: Mapping | tuple) -> None:
    """Refuse a name that is taken, or that a file cannot hold."""
    if name in taken:
        raise ValueError(f"A {what} named {name!r} was written already; choose another name.")
    if not 0 < len(name) <= MAX_NAME_LENGTH or name == "__metadata__" or not _is_text(name):
        raise ValueError(
            f"{name[:50]!r} cannot name a {what}; expected 1 to {MAX_NAME_LENGTH} characters of "
            "valid Unicode other than '__metadata__'."
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a kind that a file cannot hold."""
    require_dense(tensor)
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(
            f"Tensor {name!r} is {tensor.dtype}, which cannot be stored; expected one of {known}."
        )


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def header_of(
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file in the safetensors format, and where each tensor's bytes start in it.

    The widest numbers come first, so that each tensor begins at a multiple of its item's size.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts, end = {}, 0
    for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        starts[name], end = end, end + dtype.itemsize * prod(shape)
        offsets = [starts[name], end]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    lead = struct.pack("<Q", len(text)) + text
    return lead, {name: len(lead) + start for name, start in starts.items()}


def write_tensors(
    file: HashedFile, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write the safetensors format: length of the header, header, bytes of the tensors."""
    lead, starts = header_of({n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)
    file.write(lead)
    for name in starts:
        for chunk in byte_chunks(tensors[name]):
            file.write(chunk)
