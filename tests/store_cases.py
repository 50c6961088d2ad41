"""Artifacts to write, and what to ask of them."""

import json
import os
from pathlib import Path

import torch
from hypothesis import strategies as st

from headwater.core.fingerprint import fingerprint_json
from headwater.core.store import ArtifactWriter
from headwater.core.tensor_files import DTYPES

MODEL, DATA = "3f2a" * 16, "91bc" * 16


def is_unicode(name):
    return not any("\ud800" <= character <= "\udfff" for character in name)


dtypes = st.sampled_from(list(DTYPES))
names = st.text(min_size=1, max_size=20).filter(is_unicode).filter("__metadata__".__ne__)
tensor_specs = st.dictionaries(
    names | st.from_regex(r"[a-z./]{1,9}", fullmatch=True),
    st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


def random_tensor(dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    content = torch.randint(high, (n_bytes,), generator=generator, dtype=torch.uint8)
    return content.view(dtype).reshape(shape)


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.reshape(-1).view(
        torch.uint8
    ).tolist() == b.reshape(-1).view(torch.uint8).tolist()


def write(folder, value=1.0, n_tensors=3, **options):
    with ArtifactWriter(
        folder, kind="fit", made_from={"model": MODEL, "data": DATA}, **options
    ) as writer:
        for i in range(n_tensors):
            writer.tensor(f"layer.{i}/A", torch.full((4, 4), value))
        writer.table("layers", {"name": [f"layer.{i}" for i in range(n_tensors)]})
        writer.fact("value", value)


def value_of(artifact):
    """The value that every part of the artifact agrees on."""
    (value,) = {artifact.facts["value"]} | {
        each for _, tensor in artifact.tensors() for each in tensor.flatten().tolist()
    }
    return value


def rewrite_manifest(folder, change):
    """Alter the manifest as an attacker would, with a checksum that fits."""
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["blake2b"]
    path.write_text(json.dumps(manifest | {"blake2b": fingerprint_json(manifest)}))


def hidden(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("."))
