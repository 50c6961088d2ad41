"""Packing loses nothing and takes the room it should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.packing import pack, unpack


@given(bits=st.sampled_from([2, 3, 4]), n=st.integers(1, 100), seed=st.integers(0, 1000))
def test_codes_come_back_and_take_their_bits(bits, n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (n,), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, n), codes)
    assert len(packed) == bits * -(-n // 8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_lie_one_after_the_other(bits):
    codes = torch.tensor([1, 0, 2**bits - 1, 2, 1, 3, 0, 1], dtype=torch.uint8)
    word = sum(int(c) << bits * i for i, c in enumerate(codes))
    assert pack(codes, bits).tolist() == list(word.to_bytes(bits, "little"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="below 4; got 4"):
        pack(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="bits must be 2, 3 or 4; got 5"):
        pack(torch.tensor([4], dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="9 codes of 3 bits are 6 bytes; got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 9)
