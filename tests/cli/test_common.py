"""What commands share: the record of a run, which several may write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.cli.common import trace_name, update_record
from headwater.cli.question import record_answer
from headwater.core.files import FolderBusy, read_json, sibling, write_json
from headwater.core.locks import LockFile

# Notes many answers under names of its own, once it is told to begin.
NOTES = """
import sys
from pathlib import Path
from headwater.cli.question import record_answer
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    record_answer(Path(sys.argv[1]), "traces", f"{sys.argv[2]}-{i}", {"top": i})
"""


def test_two_processes_that_note_answers_at_once_lose_none(tmp_path):
    write_json(tmp_path / "run.json", {"fit": {"model": "m"}, "traces": {"first": {}}})
    command = [sys.executable, "-c", NOTES, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    writers = [
        subprocess.Popen([*command, who], env={**os.environ, **root}, **pipes) for who in "ab"
    ]
    assert [w.stdout.readline() for w in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    record = read_json(tmp_path / "run.json")
    expected = {f"{who}-{i}": {"top": i} for who in "ab" for i in range(40)}
    assert record == {"fit": {"model": "m"}, "traces": {"first": {}, **expected}}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_record_that_stays_locked_is_told_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.cli.common.RECORD_SECONDS", 0.05)
    write_json(tmp_path / "run.json", {"traces": {}})
    other = LockFile(sibling(tmp_path / "run.json", "lock"))
    other.acquire(tmp_path)
    with pytest.raises(FolderBusy, match=f"run.json is being written by process {os.getpid()}"):
        record_answer(tmp_path, "traces", "new", {})
    other.release()
    assert read_json(tmp_path / "run.json") == {"traces": {}}
    update_record(tmp_path, lambda record: record | {"cost": {}})
    assert read_json(tmp_path / "run.json") == {"traces": {}, "cost": {}}


def test_a_trace_is_found_by_its_name_and_by_the_id_that_pages_show(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for name in ("la\u202eva", "lava"):
        (tmp_path / "traces" / name).mkdir(parents=True)
    assert trace_name(tmp_path, "la\u202eva") == "la\u202eva"
    assert trace_name(tmp_path, "la%E2%80%AEva") == "la\u202eva"
    with pytest.raises(ValueError, match="there are: lava, la%E2%80%AEva"):
        trace_name(tmp_path, "other")
