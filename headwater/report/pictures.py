"""Small pictures inside a page: PNG files as data, written with nothing but zlib."""

import base64
import struct
import zlib

import torch
from jaxtyping import UInt8
from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR = {1: 0, 3: 2}  # channels and PNG's colour type


def png(pixels: UInt8[Tensor, "channel row column"]) -> bytes:
    r"""A PNG file of 8 bits a channel, grey or red, green and blue.

    Raises:
        ValueError: There are neither 1 nor 3 channels.

    Example:
        >>> png(torch.zeros(1, 2, 2, dtype=torch.uint8))[:4]
        b'\x89PNG'
    """
    channels, height, width = pixels.shape
    if channels not in _COLOUR:
        raise ValueError(f"A picture has 1 or 3 channels; got {channels}.")
    # every row begins with the number of its filter, 0 for none
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).cpu()
    filtered = torch.cat([rows.new_zeros(height, 1), rows], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR[channels], 0, 0, 0)
    body = zlib.compress(bytes(filtered.flatten().tolist()), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def data_uri(pixels: UInt8[Tensor, "channel row column"]) -> str:
    """The same as the address of an image: base64, which needs no escaping."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
