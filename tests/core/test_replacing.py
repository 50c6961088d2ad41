import errno
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError

from headwater.core.files import ArtifactError, ArtifactMismatch, FolderBusy, OutOfDisk
from headwater.core.locks import LockFile
from headwater.core.replacing import whole_folder
from headwater.core.store import Artifact, ArtifactWriter
from tests.store_cases import hidden, value_of, write

pytestmark = pytest.mark.thorough


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
from headwater.core.checkpoint import Checkpoint
from headwater.core.files import FolderBusy, HashedFile
from headwater.core.locks import FolderLock
from headwater.core.store import Artifact, ArtifactWriter

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
        HashedFile.write = counted(HashedFile.write)
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

    monkeypatch.setattr(LockFile, "acquire", refuse)
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


def test_two_writers_of_one_artifact_are_refused(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="fit"):
        with pytest.raises(FolderBusy, match=f"a is being written by process {os.getpid()} on "):
            write(tmp_path / "a")
        write(tmp_path / "b")  # another folder is free
    assert Artifact.open(tmp_path / "a").tensor_names == ()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "half").write_text("of a run that was killed")
    with whole_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("all")
        assert not (tmp_path / "model").exists()
        with pytest.raises(FolderBusy), whole_folder(tmp_path / "model"):
            pass
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["weights"]
    with pytest.raises(KeyError), whole_folder(tmp_path / "other") as partial:
        (partial / "weights").write_text("half")
        raise KeyError
    assert hidden(tmp_path) == [] and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
)
def test_a_full_disk_is_explained_whoever_met_it(tmp_path, error):
    with pytest.raises(OutOfDisk, match="Make room there"), whole_folder(tmp_path / "model"):
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SafetensorError, match="bad"), whole_folder(tmp_path / "model"):
        raise SafetensorError("bad header")


def test_a_folder_that_is_replaced_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    place = tmp_path / "model"
    with whole_folder(place) as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(KeyError), whole_folder(place, replace=True) as partial:
        raise KeyError
    assert (place / "weights").read_text() == "old"
    rename, moved = os.rename, []

    def killed(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt), whole_folder(place, replace=True) as partial:
        (partial / "weights").write_text("new")
    monkeypatch.setattr(os, "rename", rename)
    assert not place.exists()  # between the two names
    with pytest.raises(KeyError), whole_folder(place, replace=True) as partial:
        raise KeyError
    assert (place / "weights").read_text() == "old"  # put back
    with whole_folder(place, replace=True) as partial:
        (partial / "weights").write_text("new")
    assert (place / "weights").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
