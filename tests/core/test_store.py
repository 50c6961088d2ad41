import shutil
import struct
import subprocess
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.files import ArtifactDamaged, ArtifactError, ArtifactMismatch, ArtifactMissing
from headwater.core.store import Artifact, ArtifactWriter
from tests.store_cases import (
    DATA,
    MODEL,
    random_tensor,
    rewrite_manifest,
    same_bits,
    tensor_specs,
    value_of,
    write,
)


@settings(max_examples=60, deadline=None)
@given(specs=tensor_specs, shard_bytes=st.sampled_from([0, 40, 1 << 30]))
def test_every_dtype_shape_and_name_comes_back(tmp_path_factory, specs, shard_bytes):
    folder = tmp_path_factory.mktemp("store") / "artifact"
    tensors = {name: random_tensor(*spec) for name, spec in specs.items()}
    with ArtifactWriter(folder, kind="fit", shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.tensor(name, tensor)
    artifact = Artifact.open(folder, "fit", verify=True)
    assert artifact.tensor_names == tuple(tensors)
    assert all(same_bits(tensors[name], tensor) for name, tensor in artifact.tensors())
    shutil.rmtree(folder)


def test_strided_shared_and_later_changed_tensors_are_stored_as_they_were(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    with ArtifactWriter(tmp_path / "a", kind="fit") as writer:
        writer.tensor("x", x)
        writer.tensor("x.T", x.T)
        writer.tensor("row", x[1])
        writer.tensor("wide", torch.tensor([7.0]).expand(3))
        writer.tensor("leaf", torch.nn.Parameter(torch.ones(2)))
        x.zero_()
    artifact = Artifact.open(tmp_path / "a")
    expected = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(artifact.tensor("x"), expected)
    assert torch.equal(artifact.tensor("x.T"), expected.T)
    assert torch.equal(artifact.tensor("row"), expected[1])
    assert artifact.tensor("wide").tolist() == [7.0] * 3
    assert artifact.tensor("leaf").tolist() == [1.0] * 2


def test_facts_tables_and_origins_come_back(tmp_path):
    facts = {"lr": 0.1, "nan": float("nan"), "options": {"layers": ["a", "é", "\ud800"]}}
    columns = {"id": ["a", None], "score": [0.5, float("nan")], "tags": [[1], []]}
    with ArtifactWriter(tmp_path / "a", "scores", facts, {"model": MODEL}) as writer:
        writer.table("plain/columns", columns)
        writer.table("arrow", pyarrow.table({"x": [1, 2]}))
        writer.fact("late", [1, None])
    artifact = Artifact.open(tmp_path / "a", kind="scores", verify=True)
    assert repr(artifact.facts) == repr(facts | {"late": [1, None]})
    assert artifact.made_from == {"model": MODEL}
    assert artifact.table_names == ("plain/columns", "arrow")
    assert artifact.tensor_names == ()
    assert repr(artifact.table("plain/columns").to_pydict()) == repr(columns)
    assert artifact.table("arrow").to_pydict() == artifact.table("arrow").to_pydict()
    assert artifact.manifest["torch"] == torch.__version__
    assert artifact.manifest["format"] == 1


def test_tensors_go_into_shards_of_the_asked_size(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="fit", shard_bytes=100) as writer:
        for i, n in enumerate([10, 10, 10, 50, 1]):  # float32: 40 + 40 | 40 | 200 | 4 bytes
            writer.tensor(str(i), torch.ones(n))
    artifact = Artifact.open(tmp_path / "a", verify=True)
    shards = [artifact.manifest["tensors"][str(i)]["shard"][-17:-12] for i in range(5)]
    assert shards == ["00000", "00000", "00001", "00002", "00003"]


def test_tensors_are_mapped_and_writing_into_them_leaves_the_file_alone(tmp_path):
    write(tmp_path / "a")
    tensor = Artifact.open(tmp_path / "a").tensor("layer.0/A")
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "a") in Path("/proc/self/maps").read_text()
    tensor.zero_()
    assert value_of(Artifact.open(tmp_path / "a", verify=True)) == 1.0


def test_prefixes_select_tensors(tmp_path):
    write(tmp_path / "a", n_tensors=11)
    found = [name for name, _ in Artifact.open(tmp_path / "a").tensors("layer.1")]
    assert found == ["layer.1/A", "layer.10/A"]


def test_checksums_are_those_of_b2sum(tmp_path):
    if not shutil.which("b2sum"):
        pytest.skip("b2sum is not installed")
    write(tmp_path / "a")
    files = Artifact.open(tmp_path / "a").manifest["files"]
    for name, facts in files.items():
        printed = subprocess.check_output(["b2sum", "-l", "256", tmp_path / "a" / name], text=True)
        assert printed.split()[0] == facts["blake2b"]


def test_names_and_values_that_cannot_be_stored_are_refused(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="fit") as writer:
        writer.tensor("x", torch.ones(1))
        writer.table("t", {"a": [1]})
        with pytest.raises(ValueError, match="A tensor named 'x' was written already"):
            writer.tensor("x", torch.ones(1))
        with pytest.raises(ValueError, match="A table named 't' was written already"):
            writer.table("t", {"a": [1]})
        for name in ("", "__metadata__", "\ud800", "x" * 1001):
            with pytest.raises(ValueError, match="cannot name a tensor"):
                writer.tensor(name, torch.ones(1))
        with pytest.raises(TypeError, match="complex128, which cannot be stored"):
            writer.tensor("c", torch.ones(1, dtype=torch.complex128))
        with pytest.raises(TypeError, match="dense"):
            writer.tensor("s", torch.eye(2).to_sparse())
        with pytest.raises(TypeError, match=r"facts\.where is a PosixPath"):
            writer.fact("where", tmp_path)
        for columns in ({"a": [1], "b": [1, 2]}, {"a": [1, "x"]}):
            with pytest.raises(ValueError, match="Table 'u' cannot be stored"):
                writer.table("u", columns)
    artifact = Artifact.open(tmp_path / "a", verify=True)
    assert (artifact.tensor_names, artifact.table_names) == (("x",), ("t",))


def test_a_writer_outside_a_with_block_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="use it as `with"):
        ArtifactWriter(tmp_path / "a", kind="fit").tensor("x", torch.ones(1))


@pytest.mark.parametrize(
    "name", ["tensors-00000.safetensors", "table-00000.parquet", "manifest.json"]
)
def test_a_flipped_bit_is_found_and_its_file_named(tmp_path, name):
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=name):
            Artifact.open(tmp_path / "a", verify=True)
    path.write_bytes(whole)
    Artifact.open(tmp_path / "a", verify=True)


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "table-00000.parquet"])
@pytest.mark.parametrize("change", [-1, +1])
def test_a_file_of_another_size_is_found_on_opening(tmp_path, name, change):
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"\0")
    expected = rf"{name} has {len(data) + change:,} bytes, manifest.json says {len(data):,}"
    with pytest.raises(ArtifactDamaged, match=expected):
        Artifact.open(tmp_path / "a")
    path.unlink()
    with pytest.raises(ArtifactDamaged, match=f"{name} is missing"):
        Artifact.open(tmp_path / "a")


def test_a_manifest_that_disagrees_with_a_shard_is_refused(tmp_path):
    write(tmp_path / "a")

    def rename(manifest):
        manifest["tensors"]["other"] = manifest["tensors"].pop("layer.0/A")

    def reshape(manifest):
        manifest["tensors"]["layer.1/A"]["shape"] = [16]

    rewrite_manifest(tmp_path / "a", reshape)
    with pytest.raises(ArtifactDamaged, match=r"holds 'layer.1/A' as F32 \[4, 4\]"):
        Artifact.open(tmp_path / "a").tensor("layer.1/A")
    rewrite_manifest(tmp_path / "a", rename)
    with pytest.raises(ArtifactDamaged, match="does not hold the tensors"):
        Artifact.open(tmp_path / "a")


def test_a_shard_with_an_absurd_header_is_refused(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "a" / "tensors-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 1 << 60)
    path.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=r"tensors-00000\.safetensors cannot be read"):
        Artifact.open(tmp_path / "a")


def test_an_artifact_of_another_model_or_other_data_is_refused_by_name(tmp_path):
    write(tmp_path / "a")
    artifact = Artifact.open(tmp_path / "a")
    artifact.require()
    artifact.require(model=MODEL, data=DATA)
    with pytest.raises(ArtifactMismatch) as one:
        artifact.require(model=DATA, data=DATA)
    assert str(one.value) == (
        f"The fit in {tmp_path / 'a'} was made from another model (saved 3f2a3f2a3f2a…, given "
        "91bc91bc91bc…); run `headwater fit` again, or point to the model it was made from."
    )
    with pytest.raises(ArtifactMismatch, match=r"other data .* and another task \(saved nothing"):
        artifact.require(data=MODEL, task=DATA)


def test_another_kind_is_refused(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ArtifactMismatch, match="holds a fit, not an index; point to an index"):
        Artifact.open(tmp_path / "a", kind="index")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ArtifactMissing, match=r"no artifact in .*nowhere \(no such folder\)"):
        Artifact.open(tmp_path / "nowhere" / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no manifest\.json"):
        Artifact.open(tmp_path)
    write(tmp_path / "a")
    artifact = Artifact.open(tmp_path / "a")
    with pytest.raises(ArtifactMissing, match=r"no tensor 'x'; it has 3 tensors: layer\.0/A, "):
        artifact.tensor("x")
    with pytest.raises(ArtifactMissing, match="no table 'x'; it has 1 tables: layers"):
        artifact.table("x")
