"""PNG files as any reader understands them."""

import base64
import struct
import zlib

import pytest
import torch

from headwater.report.pictures import data_uri, png


def chunks(data: bytes) -> dict[bytes, bytes]:
    """The parts of a PNG file, every checksum checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, found = 8, {}
    while place < len(data):
        (length,), name = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length :][:4])[0] == zlib.crc32(name + body)
        found[name], place = body, place + 12 + length
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_read_back_as_it_was(channels):
    pixels = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    parts = chunks(png(pixels))
    assert list(parts) == [b"IHDR", b"IDAT", b"IEND"]
    colour = {1: 0, 3: 2}[channels]
    assert struct.unpack(">IIBBBBB", parts[b"IHDR"]) == (7, 5, 8, colour, 0, 0, 0)
    rows = torch.tensor(list(zlib.decompress(parts[b"IDAT"]))).view(5, 1 + 7 * channels)
    assert rows[:, 0].tolist() == [0] * 5
    assert torch.equal(rows[:, 1:].view(5, 7, channels).permute(2, 0, 1), pixels.long())


def test_a_real_reader_agrees():
    image = pytest.importorskip("PIL.Image")
    import io

    pixels = torch.randint(256, (3, 6, 4), dtype=torch.uint8)
    opened = image.open(io.BytesIO(png(pixels)))
    assert opened.size == (4, 6) and opened.mode == "RGB"
    assert opened.tobytes() == bytes(pixels.permute(1, 2, 0).flatten().tolist())


def test_an_address_holds_nothing_that_would_have_to_be_escaped():
    found = data_uri(torch.randint(256, (1, 64, 64), dtype=torch.uint8))
    head, _, body = found.partition(",")
    assert head == "data:image/png;base64" and chunks(base64.b64decode(body, validate=True))
    assert not set(body) & set("<>&\"'")


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels; got 2"):
        png(torch.zeros(2, 3, 3, dtype=torch.uint8))
