import os

import pytest

from headwater.core import files
from headwater.core.files import ArtifactDamaged, ArtifactError
from headwater.core.store import Artifact
from tests.store_cases import rewrite_manifest, write


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "tensors-00000.safetensors/../../secret", "..", "", "a\0b"],
)
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    write(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    entry = {"bytes": 1, "blake2b": "00"}
    rewrite_manifest(tmp_path / "a", lambda m: m["files"].update({name: entry}))
    with pytest.raises(ArtifactDamaged, match="no file of an artifact"):
        Artifact.open(tmp_path / "a")


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "manifest.json"])
def test_links_and_pipes_in_the_place_of_files_are_refused(tmp_path, name):
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactDamaged, match=f"{name} is not a regular file"):
        Artifact.open(tmp_path / "a")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactDamaged, match=f"{name} is not a regular file"):
        Artifact.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", 3),
        ("files", []),
        ("files", {"tensors-00000.safetensors": 3}),
        ("files", {"tensors-00000.safetensors": {"bytes": "3", "blake2b": ""}}),
        ("tensors", {"x": {"shard": "../x", "dtype": "F32", "shape": []}}),
        ("tensors", {"x": {"shard": ["unhashable"], "dtype": "F32", "shape": []}}),
        ("tensors", {"x": None}),
        ("tables", {"t": ["unhashable"]}),
        ("tables", {"t": "tensors-00000.safetensors"}),
        ("made_from", {"model": 3}),
        ("facts", None),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path, key, value):
    write(tmp_path / "a")
    rewrite_manifest(tmp_path / "a", lambda manifest: manifest.update({key: value}))
    with pytest.raises(ArtifactDamaged, match=r"manifest\.json"):
        Artifact.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not valid JSON at line 1"),
        ("[]", "names no format"),
        ('{"format": 2}', "has format 2; Headwater .* reads format 1"),
        ('{"format": 1}', "has changed since it was written"),
        ('{"format": 1, "x": {"$float": "nan", "y": 1}}', "has changed since it was written"),
        ("[" * 100_000, "not JSON that can be read"),
        ("9" * 100_000, "not JSON that can be read"),
        ('{"$float": []}', "not JSON that can be read"),
    ],
)
def test_a_manifest_that_headwater_did_not_write_is_refused(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(tmp_path)


def test_a_manifest_of_boundless_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    write(tmp_path / "small", n_tensors=0)
    with pytest.raises(ArtifactError, match="keep long lists in a table"):
        write(tmp_path / "large", n_tensors=100)
    assert not (tmp_path / "large").exists()
    (tmp_path / "small" / "manifest.json").write_text(" " * 1001)
    with pytest.raises(ArtifactDamaged, match="larger than 1,000 bytes"):
        Artifact.open(tmp_path / "small")
