import os

import pytest
import torch
from hypothesis import given, settings

from headwater.core import checkpoint as module
from headwater.core.checkpoint import Cadence, Checkpoint
from tests.store_cases import random_tensor, same_bits, tensor_specs


@settings(max_examples=30, deadline=None)
@given(specs=tensor_specs)
def test_a_checkpoint_brings_every_tensor_back(tmp_path_factory, specs):
    checkpoint = Checkpoint(tmp_path_factory.mktemp("store") / "checkpoint")
    tensors = {name: random_tensor(*spec) for name, spec in specs.items()}
    checkpoint.save(tensors, {"step": 3, "loss": float("inf")})
    loaded, facts = checkpoint.load()
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(tensors[name], loaded[name]) for name in tensors)
    assert facts == {"step": 3, "loss": float("inf")}


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.load() is None
    for step in range(4):
        checkpoint.save({"x": torch.full((3,), float(step))}, {"step": step})
    older, newest = sorted(os.listdir(tmp_path / "c"))
    whole = (tmp_path / "c" / newest).read_bytes()
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 16
        (tmp_path / "c" / newest).write_bytes(broken)
        if whole[position] == ord(" "):
            continue  # padding of the header
        with pytest.warns(UserWarning, match=f"{newest} cannot be used"):
            tensors, facts = checkpoint.load()
        assert facts == {"step": 2}
        assert tensors["x"].tolist() == [2.0] * 3
    (tmp_path / "c" / older).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=f"{newest} cannot be used"),
        pytest.warns(UserWarning, match=f"{older} cannot be used"),
    ):
        assert checkpoint.load() is None
    checkpoint.save({}, {"step": 9})
    assert checkpoint.load() == ({}, {"step": 9})
    checkpoint.clear()
    assert not (tmp_path / "c").exists()
    checkpoint.clear()


def test_clearing_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Checkpoint(tmp_path).save({}, {})
    Checkpoint(tmp_path).clear()
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_what_was_loaded_is_not_touched_by_the_next_save(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save({"x": torch.ones(3)}, {})
    for _ in range(4):  # in and out of its own files
        tensors, _ = checkpoint.load()
        tensors["x"] += 1
        checkpoint.save(tensors, {})
    assert checkpoint.load()[0]["x"].tolist() == [5.0] * 3


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    cadence, always = Cadence(30.0), Cadence(0.0)
    now[0] = 30.0
    assert not cadence.due and always.due
    now[0] = 30.1
    assert cadence.due
    for each in (cadence, always):
        with each.saving():
            now[0] += 4.0  # it took so long
    began = now[0]
    now[0] = began + 75.0
    assert not cadence.due and always.due
    now[0] = began + 80.1
    assert cadence.due
