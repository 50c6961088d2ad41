import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headwater.core.fingerprint import (
    byte_chunks,
    fingerprint_json,
    fingerprint_model,
    fingerprint_tensors,
    portable,
    revive,
    short,
)


def test_short_keeps_twelve_characters():
    assert short("0123456789abcdef") == "0123456789ab"


@given(bit=st.integers(0, 12 * 32 - 1))
def test_any_flipped_bit_changes_the_fingerprint(bit):
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    flipped = tensor.clone()
    flipped.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    assert fingerprint_tensors([("x", tensor)]) != fingerprint_tensors([("x", flipped)])


@given(order=st.permutations(["a", "b", "c"]))
def test_the_order_of_tensors_does_not_matter(order):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.tensor(1.0)}
    assert fingerprint_tensors((k, tensors[k]) for k in order) == fingerprint_tensors(
        tensors.items()
    )


def test_name_shape_and_dtype_count():
    x = torch.zeros(2, 6)
    others = [("y", x), ("x", x.view(3, 4)), ("x", x.int()), ("x", x[:1]), ("x", x.view(12))]
    digests = {fingerprint_tensors([pair]) for pair in [("x", x), *others]}
    assert len(digests) == 1 + len(others)


def test_a_repeated_name_is_refused():
    with pytest.raises(ValueError, match="Two tensors are named 'x'"):
        fingerprint_tensors([("x", torch.ones(1)), ("x", torch.ones(1))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_layout_in_memory_does_not_matter(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for view in (x.mT.contiguous().mT, x.flip(0).flip(0), x.repeat(1, 1, 2)[..., :4]):
        assert fingerprint_tensors([("x", view)]) == fingerprint_tensors([("x", x)])


def test_views_that_only_promise_a_conjugate_are_resolved():
    x = torch.tensor([1 + 2j, 3 - 4j])
    conjugate = torch.tensor([1 - 2j, 3 + 4j])
    assert fingerprint_tensors([("x", x.conj())]) == fingerprint_tensors([("x", conjugate)])


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    limit=st.integers(1, 64),
    transpose=st.booleans(),
)
def test_chunks_join_to_the_bytes_of_the_tensor(shape, limit, transpose):
    x = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    x = x.permute(list(reversed(range(x.dim())))) if transpose else x
    chunks = list(byte_chunks(x, limit))
    assert b"".join(chunks) == x.numpy().tobytes()
    assert all(chunk.nbytes <= max(limit, 2) for chunk in chunks)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"]
)
def test_tensors_without_plain_content_are_refused(tensor):
    with pytest.raises(TypeError, match="Expected a dense tensor"):
        fingerprint_tensors([("x", tensor)])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.zeros(1), persistent=False)


def test_a_model_is_known_by_parameters_and_persistent_buffers():
    model = Tied()
    before = fingerprint_model(model)
    model.cache += 1
    model.eval().requires_grad_(False)
    assert fingerprint_model(model) == before
    model.norm.running_mean += 1
    moved = fingerprint_model(model)
    model.head.weight.data[0, 0] += 1
    assert len({before, moved, fingerprint_model(model)}) == 3


def test_tying_changes_nothing_while_the_values_are_equal():
    model = Tied()
    before = fingerprint_model(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert fingerprint_model(model) == before


def test_the_order_of_modules_does_not_matter():
    a, b = nn.Linear(2, 3), nn.Linear(3, 2)
    assert fingerprint_model(nn.ModuleDict({"a": a, "b": b})) == fingerprint_model(
        nn.ModuleDict({"b": b, "a": a})
    )
    assert fingerprint_model(nn.ModuleDict({"a": a, "b": b})) != fingerprint_model(
        nn.ModuleDict({"b": a, "a": b})
    )


class Extra(nn.Linear):
    extra = object()

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_state_that_cannot_be_read_is_named_in_a_warning():
    model = Extra(1, 1)
    with pytest.warns(UserWarning, match="_extra_state"):
        fingerprint_model(model)
    model.extra = {"scale": 2.0}
    before = fingerprint_model(model)
    model.extra = {"scale": 3.0}
    assert fingerprint_model(model) != before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=json_values)
def test_portable_is_json_without_nan_and_repeats_itself(value):
    once = portable(value)
    back = json.loads(json.dumps(once, allow_nan=False), object_hook=revive)
    assert repr(back) == repr(value)  # repr, as NaN differs from itself
    assert repr(portable(once)) == repr(once)
    assert fingerprint_json(value) == fingerprint_json(once) == fingerprint_json(back)


def test_numpy_scalars_and_tuples_are_made_plain():
    assert portable({"a": (np.float32(0.5), np.int64(2))}) == {"a": [0.5, 2]}


def test_the_order_of_keys_does_not_matter_and_values_do():
    assert fingerprint_json({"a": 1, "b": 2}) == fingerprint_json({"b": 2, "a": 1})
    assert fingerprint_json({"a": 1}) != fingerprint_json({"a": 2})


@pytest.mark.parametrize("value", [torch.ones(1), {1, 2}, {1: 2}, {"$float": 3}, b"x"])
def test_what_json_cannot_hold_is_refused_with_its_place(value):
    with pytest.raises(TypeError, match=r"facts\.options\[1\]"):
        portable({"options": [0, value]}, "facts")
