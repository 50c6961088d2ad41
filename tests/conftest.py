"""Settings that all tests share. Nothing of headwater is imported here: jaxtyping comes first."""

import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file fails at once
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the cores to others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# Same examples every time; no deadline, because the first call of an operation in torch is slow.
settings.register_profile("headwater", deadline=None, derandomize=True)
settings.load_profile("headwater")


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same state of torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 24 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
