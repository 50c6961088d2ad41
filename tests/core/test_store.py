import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core import store
from headwater.core.fingerprint import fingerprint_json
from headwater.core.store import (
    Artifact,
    ArtifactDamaged,
    ArtifactError,
    ArtifactMismatch,
    ArtifactMissing,
    ArtifactWriter,
    Checkpoint,
    FolderBusy,
    FolderLock,
    OutOfDisk,
    read_json,
    write_json,
)

MODEL, DATA = "3f2a" * 16, "91bc" * 16


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_disks():
    """Tests of what a dead process leaves behind need no disk to have caught up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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


# Round trips

dtypes = st.sampled_from(list(store._DTYPES))
names = st.text(min_size=1, max_size=20).filter(store._is_text).filter("__metadata__".__ne__)
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


# What a writer refuses


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


def test_what_others_put_in_a_folder_is_never_overwritten(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds other files \(notes.txt\)"):
        write(tmp_path / "a", 2.0)
    assert value_of(Artifact.open(tmp_path / "a")) == 1.0
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        write(tmp_path / "file")


def test_a_file_that_appears_while_writing_survives(tmp_path):
    write(tmp_path / "a")
    with pytest.warns(UserWarning, match="did not write"), ArtifactWriter(tmp_path / "a", "fit"):
        (tmp_path / "a" / "notes.txt").write_text("mine")
    (notes,) = tmp_path.glob(".a.aside-*/notes.txt")
    assert notes.read_text() == "mine"
    assert Artifact.open(tmp_path / "a").tensor_names == ()


def test_an_artifact_of_another_kind_is_not_replaced(tmp_path):
    write(tmp_path / "a")
    with (
        pytest.raises(ArtifactMismatch, match="holds a fit, which writing an index"),
        ArtifactWriter(tmp_path / "a", kind="index"),
    ):
        pass
    assert Artifact.open(tmp_path / "a").kind == "fit"


# All or nothing


def test_an_exception_leaves_everything_as_it_was(tmp_path):
    write(tmp_path / "a")
    with (
        pytest.raises(KeyboardInterrupt),
        ArtifactWriter(tmp_path / "a", kind="fit", shard_bytes=8) as writer,
    ):
        writer.tensor("x", torch.ones(100))
        raise KeyboardInterrupt
    assert value_of(Artifact.open(tmp_path / "a", verify=True)) == 1.0
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_artifact_replaces_the_old_one_and_leaves_nothing_behind(tmp_path):
    write(tmp_path / "a", 1.0, n_tensors=5)
    write(tmp_path / "a", 2.0)
    artifact = Artifact.open(tmp_path / "a", verify=True)
    assert value_of(artifact) == 2.0
    assert len(artifact.tensor_names) == 3
    assert os.listdir(tmp_path) == ["a"]


def test_an_artifact_reached_by_a_link_is_replaced_where_it_lies(tmp_path):
    write(tmp_path / "a", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    write(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert value_of(Artifact.open(tmp_path / "a")) == 2.0
    assert value_of(Artifact.open(tmp_path / "link")) == 2.0


def test_an_open_artifact_outlives_its_replacement(tmp_path):
    write(tmp_path / "a", 1.0)
    old = Artifact.open(tmp_path / "a")
    write(tmp_path / "a", 2.0)
    assert value_of(old) == 1.0
    assert old.table("layers").num_rows == 3
    with pytest.raises(ArtifactError, match="written anew"):
        old.verify()
    assert value_of(Artifact.open(tmp_path / "a")) == 2.0


def test_readers_beside_a_writer_see_whole_artifacts_only(tmp_path):
    write(tmp_path / "a", 0.0)
    done, seen, failures = threading.Event(), set(), []

    def read():
        try:
            while not done.is_set():
                seen.add(value_of(Artifact.open(tmp_path / "a", verify=True)))
        except Exception as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for value in range(1, 40):
        write(tmp_path / "a", float(value))
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert len(seen) > 1  # they did read while it was written


# Killed at any point: forks of one clean process, so that each kill costs milliseconds.

HARNESS = """
import json, os, random, signal, sys, time
import torch
from headwater.core import store
from headwater.core.store import Artifact, ArtifactWriter, Checkpoint, FolderBusy, FolderLock

torch.set_num_threads(1)
os.fsync = lambda descriptor: None
os.chdir(sys.argv[1])

def write(value):
    with ArtifactWriter("artifacts/a", kind="fit", shard_bytes=2000) as writer:
        for i in range(6):
            writer.tensor(str(i), torch.full((20, 20), value))
        writer.table("t", {"value": [value] * 3})
        writer.fact("value", value)

def written():
    artifact = Artifact.open("artifacts/a", verify=True)
    (value,) = {each for _, x in artifact.tensors() for each in x.flatten().tolist()}
    assert artifact.facts["value"] == value and len(artifact.tensor_names) == 6
    assert artifact.table("t").to_pydict() == {"value": [value] * 3}
    return value

def save(value):
    Checkpoint("c").save({"x": torch.full((20, 20), value)}, {"value": value})

def saved():
    tensors, facts = Checkpoint("c").load()
    assert (tensors["x"] == facts["value"]).all()
    return facts["value"]

def forked(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def dies_at_call(k, work):
    # Run `work` in a fork that is killed as it makes its k-th change to the disk.
    def dying():
        left = [k]
        def counted(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open", "close"):
            setattr(os, name, counted(getattr(os, name)))
        store._HashedFile.write = counted(store._HashedFile.write)
        work()
    _, status = os.waitpid(forked(dying), 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL

def every_step(act, seen, folder, n_left):
    act(-1.0), act(0.0)
    outcomes, k = [], 1
    while dies_at_call(k, lambda: act(float(k))):
        outcomes.append("new" if seen() == k else "old")
        if outcomes[-1] == "old":
            assert seen() == 0.0
        act(0.0)  # nothing stands in the way of the next writer, and nothing is left behind
        assert seen() == 0.0 and len(os.listdir(folder)) == n_left
        k += 1
    return outcomes

def random_moments(n_kills=20):
    started = time.perf_counter()
    write(0.0)
    span = 2 * (time.perf_counter() - started)
    random.seed(0)
    now, n_killed = 0.0, 0
    for trial in range(1, 1 + n_kills):
        pid = forked(lambda: write(float(trial)))
        time.sleep(random.uniform(0, span))
        os.kill(pid, signal.SIGKILL)
        n_killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert written() in (now, float(trial))
        now = written()
    return n_killed

def dead_holder():
    held, hold = os.pipe()
    def work():
        with FolderLock("run"):
            os.write(hold, b"!")
            time.sleep(60)
    pid = forked(work)
    os.read(held, 1)
    try:
        with FolderLock("run"):
            message = "two have it"
    except FolderBusy as error:
        message = str(error)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left = os.listdir("run")
    with FolderLock("run"):
        return pid, message, left

print(json.dumps({
    "artifact": every_step(write, written, "artifacts", 1),
    "checkpoint": every_step(save, saved, "c", 2),
    "random": random_moments(),
    "lock": dead_holder(),
}))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What each killed process left behind."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-c",
            HARNESS,
            str(tmp_path_factory.mktemp("killed")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_killed_at_every_single_step_the_old_or_the_new_artifact_is_whole(killed):
    outcomes = killed["artifact"]
    assert outcomes == sorted(outcomes, reverse=True)  # old up to a point, new from there on
    assert outcomes.count("old") > 20
    assert outcomes.count("new") > 3


def test_killed_at_random_moments_the_old_or_the_new_artifact_is_whole(killed):
    assert killed["random"] > 3  # so many were caught at work


def test_killed_at_every_single_step_a_checkpoint_is_whole(killed):
    outcomes = killed["checkpoint"]
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"old", "new"}


def test_a_lock_names_its_holder_and_ends_with_it(killed):
    holder, message, left = killed["lock"]
    assert f"is being written by process {holder} on " in message
    assert left == [".lock"]  # left by the dead process, and taken over by the next


def test_an_artifact_set_aside_is_read_even_where_nothing_can_be_written(tmp_path, monkeypatch):
    write(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / ".a.aside-00")

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(store._Lock, "acquire", refuse)
    assert value_of(Artifact.open(tmp_path / "a", verify=True)) == 1.0
    monkeypatch.undo()
    assert value_of(Artifact.open(tmp_path / "a")) == 1.0
    assert os.listdir(tmp_path) == ["a"]


def test_everything_is_on_disk_before_the_folders_change_places(tmp_path, monkeypatch):
    write(tmp_path / "a", 1.0)
    events, rename = [], os.rename

    def inode_of(descriptor):
        return os.fstat(descriptor).st_ino

    def synced(descriptor):
        events.append(inode_of(descriptor))

    def renamed(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    write(tmp_path / "a", 2.0)
    files = [tmp_path / "a", *(tmp_path / "a").iterdir()]
    last = len(events) - 1 - events[::-1].index("rename")
    assert {path.stat().st_ino for path in files} <= set(events[: events.index("rename")])
    assert tmp_path.stat().st_ino in events[last:]


# Damage


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


def test_a_shard_with_an_absurd_header_is_refused(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "a" / "tensors-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 1 << 60)
    path.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=r"tensors-00000\.safetensors cannot be read"):
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
    monkeypatch.setattr(store, "MAX_JSON_BYTES", 1000)
    write(tmp_path / "small", n_tensors=0)
    with pytest.raises(ArtifactError, match="keep long lists in a table"):
        write(tmp_path / "large", n_tensors=100)
    assert not (tmp_path / "large").exists()
    (tmp_path / "small" / "manifest.json").write_text(" " * 1001)
    with pytest.raises(ArtifactDamaged, match="larger than 1,000 bytes"):
        Artifact.open(tmp_path / "small")


# Refusals that name what is wrong


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


# Disks and locks


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


def test_two_writers_of_one_artifact_are_refused(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="fit"):
        with pytest.raises(FolderBusy, match=f"a is being written by process {os.getpid()} on "):
            write(tmp_path / "a")
        write(tmp_path / "b")  # another folder is free
    assert Artifact.open(tmp_path / "a").tensor_names == ()


def test_one_of_many_gets_a_lock_at_a_time(tmp_path):
    inside, most, refused = [], [], []

    def compete():
        for _ in range(200):
            with suppress(FolderBusy):
                with FolderLock(tmp_path / "run"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                continue
            refused.append(1)

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert refused  # they did meet


def test_a_lock_file_removed_by_its_last_holder_is_not_trusted(tmp_path, monkeypatch):
    flock, path = store._flock, tmp_path / ".lock"

    def last_holder_leaves(descriptor):
        monkeypatch.setattr(store, "_flock", flock)
        path.unlink()
        flock(descriptor)

    monkeypatch.setattr(store, "_flock", last_holder_leaves)
    with FolderLock(tmp_path), pytest.raises(FolderBusy), FolderLock(tmp_path):
        pass
    assert hidden(tmp_path) == []


# Checkpoints


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


# JSON files


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
