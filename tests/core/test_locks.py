import errno
import threading
from contextlib import suppress

import pytest

from headwater.core import locks
from headwater.core.files import FolderBusy
from headwater.core.locks import FolderLock
from tests.store_cases import hidden


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
    flock, path = locks._flock, tmp_path / ".lock"

    def last_holder_leaves(descriptor):
        monkeypatch.setattr(locks, "_flock", flock)
        path.unlink()
        flock(descriptor)

    monkeypatch.setattr(locks, "_flock", last_holder_leaves)
    with FolderLock(tmp_path), pytest.raises(FolderBusy), FolderLock(tmp_path):
        pass
    assert hidden(tmp_path) == []


def test_a_lock_on_a_full_disk_holds_without_a_name_and_is_let_go(tmp_path, monkeypatch):
    def full(descriptor, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "write", full)
    for _ in range(2):  # the second finds that the first has let go
        with (
            FolderLock(tmp_path),
            pytest.raises(FolderBusy, match="another process"),
            FolderLock(tmp_path),
        ):
            pass
    assert hidden(tmp_path) == []
