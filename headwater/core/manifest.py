"""What the manifest of an artifact may say; anything else is refused."""

import json
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headwater import __version__
from headwater.core import files
from headwater.core.files import ArtifactDamaged, ArtifactError, ArtifactMissing, read_json
from headwater.core.fingerprint import fingerprint_json

FORMAT = 1
MANIFEST = "manifest.json"
REMEDY = "Make it again, or restore it from a copy."
FILE_NAME = re.compile(r"(tensors-\d{5,}\.safetensors|table-\d{5,}\.parquet)")


def encode_manifest(content: dict[str, Any], folder: Path) -> bytes:
    """The text of a manifest for the artifact in `folder`, with versions, time and a checksum of its own."""
    manifest = {
        "format": FORMAT,
        "headwater": __version__,
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    } | content
    text = json.dumps(manifest | {"blake2b": fingerprint_json(manifest)}, indent=1).encode()
    if len(text) > files.MAX_JSON_BYTES:
        raise ArtifactError(
            f"The {MANIFEST} of {folder} would have {len(text):,} bytes, more than "
            f"{files.MAX_JSON_BYTES:,}; keep long lists in a table instead of in facts, and many "
            "small tensors in one."
        )
    return text


def read_manifest(folder: Path, place: Path) -> dict[str, Any]:
    """The manifest in `place` of the artifact that people know as `folder`, checked in every part."""
    path = place / MANIFEST
    if not os.path.lexists(path):
        state = "it has no manifest.json" if folder.is_dir() else "no such folder"
        raise ArtifactMissing(
            f"There is no artifact in {folder} ({state}); make it first, or check the path."
        )
    check_size(path)
    manifest = read_json(path)
    check_format(manifest, path)
    shape_of = {"files": dict, "tensors": dict, "tables": dict, "facts": dict, "made_from": dict}
    wrong = [key for key, kind in shape_of.items() if not isinstance(manifest.get(key), kind)]
    if wrong or not isinstance(manifest.get("kind"), str):
        raise ArtifactDamaged(f"{path} lacks {', '.join(wrong) or 'its kind'}. {REMEDY}")
    listed = manifest["files"]
    for name, facts in listed.items():
        if not FILE_NAME.fullmatch(name):
            raise ArtifactDamaged(
                f"{path} names the file {name!r}, which is no file of an artifact; it is refused, "
                "as a path could lead out of the folder."
            )
        if not (_has(facts, bytes=int, blake2b=str) and facts["bytes"] >= 0):
            raise ArtifactDamaged(f"{path} says nothing of use on the file {name!r}. {REMEDY}")
    for name, entry in manifest["tensors"].items():
        if not (
            _has(entry, shard=str, dtype=str, shape=list)
            and entry["shard"] in listed
            and entry["shard"].endswith(".safetensors")
        ):
            raise ArtifactDamaged(f"{path} says nothing of use on the tensor {name!r}. {REMEDY}")
    for name, file in manifest["tables"].items():
        if not isinstance(file, str) or file not in listed or not file.endswith(".parquet"):
            raise ArtifactDamaged(f"{path} says nothing of use on the table {name!r}. {REMEDY}")
    if not all(isinstance(digest, str) for digest in manifest["made_from"].values()):
        raise ArtifactDamaged(f"{path}: made_from must hold fingerprints. {REMEDY}")
    return manifest


def check_size(path: Path, expected: int | None = None) -> None:
    """Refuse what is missing, no regular file, or of another size than the manifest says."""
    try:
        found = os.lstat(path)
    except FileNotFoundError as error:
        raise ArtifactDamaged(f"{path} is missing. {REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactDamaged(f"{path} is not a regular file; links and the like are refused.")
    if expected is not None and found.st_size != expected:
        raise ArtifactDamaged(
            f"{path} has {found.st_size:,} bytes, {MANIFEST} says {expected:,}. {REMEDY}"
        )


def check_format(body: Any, path: Path) -> None:
    """Refuse what another version wrote, and what has changed since it was written."""
    if not isinstance(body, dict) or "format" not in body:
        raise ArtifactDamaged(f"{path} was not written by Headwater: it names no format.")
    if body["format"] != FORMAT:
        raise ArtifactError(
            f"{path} has format {body['format']!r}; Headwater {__version__} reads format {FORMAT}. "
            "Read it with the version that wrote it, or make it again."
        )
    content = {key: value for key, value in body.items() if key != "blake2b"}
    try:
        whole = body.get("blake2b") == fingerprint_json(content)
    except TypeError:  # a NaN that `portable` did not write
        whole = False
    if not whole:
        raise ArtifactDamaged(f"{path} has changed since it was written. {REMEDY}")


def _has(entry: Any, **kinds: type) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items())
