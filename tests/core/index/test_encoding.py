"""What is stored of a row, and how far it is from the row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.index.encoding import STRETCH, Encoding

# relative error of one number: half a unit in the last place
HALF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("dtype", HALF)
def test_floats_are_rounded_to_the_nearest(dtype):
    encoding, rows = Encoding(dtype, 100), torch.randn(7, 100)
    found = encoding.decode(encoding.encode(rows))
    assert bool(((found - rows).abs() <= HALF[dtype] * rows.abs() + 2.0**-25).all())


@given(dim=st.integers(1, 200), seed=st.integers(0, 99), size=st.floats(1e-20, 1e20))
@settings(max_examples=40, deadline=None)
def test_eight_bits_are_off_by_half_a_step_of_the_stretchs_scale(dim, seed, size):
    encoding = Encoding("int8", dim)
    rows = size * torch.randn(3, dim, generator=torch.Generator().manual_seed(seed))
    stored = encoding.encode(rows)
    found = encoding.decode(stored)
    padded = torch.nn.functional.pad(rows, (0, -dim % STRETCH)).unflatten(1, (-1, STRETCH))
    largest = padded.abs().amax(-1).repeat_interleave(STRETCH, 1)[:, :dim]
    # half a step, and where the scale was rounded down by up to 2^-9 the largest numbers are cut by as much
    assert bool(((found - rows).abs() <= largest * (0.51 / 127 + 2.0**-8)).all())
    bytes_stored = sum(t.nbytes for t in stored.values())
    assert bytes_stored == 3 * (encoding.bytes_per_row - 4)


def test_zeros_stay_zeros():
    encoding = Encoding("int8", 70)
    assert not encoding.decode(encoding.encode(torch.zeros(2, 70))).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_what_is_not_finite_is_refused(dtype):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        Encoding(dtype, 3).encode(torch.tensor([[0.0, float("nan"), 1.0]]))


def test_numbers_too_large_for_a_type_are_refused_with_a_remedy():
    with pytest.raises(FloatingPointError, match="bfloat16"):
        Encoding("float16", 2).encode(torch.tensor([[1e6, 0.0]]))
