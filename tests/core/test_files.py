import os
import shutil
import subprocess

import pytest
import torch

from headwater.core.checkpoint import Checkpoint
from headwater.core.files import ArtifactDamaged, ArtifactMissing, OutOfDisk, read_json, write_json
from headwater.core.store import Artifact, ArtifactWriter
from tests.store_cases import value_of, write


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "nan": float("nan"), "text": "é\n\ud800", "big": 1 << 80}
    write_json(tmp_path / "new" / "run.json", value)
    assert repr(read_json(tmp_path / "new" / "run.json")) == repr(value)
    assert os.listdir(tmp_path / "new") == ["run.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "run.json", 1)
    with pytest.raises(TypeError, match=r"run\.x is a Tensor"):
        write_json(tmp_path / "run.json", {"x": torch.ones(1)})
    assert read_json(tmp_path / "run.json") == 1
    assert os.listdir(tmp_path) == ["run.json"]


def test_broken_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "run.json"
    with pytest.raises(ArtifactMissing, match=r"run\.json does not exist"):
        read_json(path)
    path.write_text('{\n "a": 1,\n "b": oops\n}')
    with pytest.raises(ArtifactDamaged, match=r"run\.json is not valid JSON at line 3, column 7"):
        read_json(path)
    path.write_bytes(b'{\n "a": "\xff"\n}')
    with pytest.raises(ArtifactDamaged, match=r"run\.json is not valid UTF-8 at line 2"):
        read_json(path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path / "a", 1.0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    message = (
        rf"Writing {tmp_path / 'a'} needs 4 MB, but the disk of {tmp_path / 'a'} has 3 MB free. "
        "Make room there, or choose a folder on another disk."
    )
    with (
        pytest.raises(OutOfDisk, match=message),
        ArtifactWriter(tmp_path / "a", kind="fit") as writer,
    ):
        writer.tensor("x", torch.ones(1_000_000))
    with pytest.raises(OSError, match="needs 4 MB"):
        Checkpoint(tmp_path / "c").save({"x": torch.ones(1_000_000)}, {})
    monkeypatch.undo()
    assert value_of(Artifact.open(tmp_path / "a", verify=True)) == 1.0
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
    assert os.listdir(tmp_path / "c") == []


def test_a_disk_that_fills_up_while_writing_is_explained(small_disk, monkeypatch):
    write(small_disk / "a", 1.0)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
    with (
        pytest.raises(OutOfDisk, match="Make room there"),
        ArtifactWriter(small_disk / "a", kind="fit") as writer,
    ):
        writer.tensor("x", torch.ones(300_000))
    table = {"x": torch.rand(300_000).double().tolist()}
    with (
        pytest.raises(OutOfDisk, match="Make room there"),
        ArtifactWriter(small_disk / "a", kind="fit") as writer,
    ):
        writer.table("x", table)
    Checkpoint(small_disk / "c").save({}, {"step": 1})
    with pytest.raises(OutOfDisk, match="Make room there"):
        Checkpoint(small_disk / "c").save({"x": torch.ones(300_000)}, {"step": 2})
    with pytest.raises(OutOfDisk, match="Make room there"):
        write_json(small_disk / "run.json", ["x" * 100] * 20_000)
    assert value_of(Artifact.open(small_disk / "a", verify=True)) == 1.0
    assert Checkpoint(small_disk / "c").load() == ({}, {"step": 1})
    assert sorted(os.listdir(small_disk)) == ["a", "c"]
