"""Ranks that build an index together leave the bytes of one process, and stop and go on as one."""

import signal

import pytest

from headwater.core.index import GradientIndex
from headwater.core.locks import FolderLock
from tests import ranks
from tests.core.index.test_faults import content

pytestmark = pytest.mark.thorough


def succeeded(job: str, size: int, folder) -> None:
    for process in ranks.start(job, size, folder):
        assert process.returncode == 0, process.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    ranks.indexes(folder)
    return folder / "indexes-1"


@pytest.mark.parametrize(
    "size", [2, 3]
)  # 22 batches, and 2: uneven shares, and a third rank that has none
def test_any_number_of_ranks_leaves_the_same_bytes(size, alone, tmp_path):
    succeeded("indexes", size, tmp_path)  # of 22 batches, and of 2: the third rank has none
    expected, found = content(alone), content(tmp_path / f"indexes-{size}")
    assert found.keys() == expected.keys() and len(expected) >= 16
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("size", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_build_whose_rank_was_killed_goes_on_with_any_number_of_ranks(size, tmp_path):
    first, second = ranks.start("index_killed", 2, tmp_path, timeout=60)
    assert second.returncode == -signal.SIGKILL and first.returncode not in (0, -signal.SIGKILL)
    assert "A rank has ended without saying why" in (tmp_path / "failed-0").read_text()
    (tmp_path / "whole").mkdir()
    succeeded("index_resumed", 1, tmp_path / "whole")
    succeeded("index_resumed", size, tmp_path)
    assert content(tmp_path / "index") == content(tmp_path / "whole" / "index")
    read = [int((tmp_path / f"read-{rank}").read_text()) for rank in range(size)]
    whole = int((tmp_path / "whole" / "read-0").read_text())
    assert 0 < sum(read) < whole  # what was written was not made again


@pytest.mark.slow
def test_a_first_rank_that_cannot_write_stops_all(tmp_path):
    assert all(p.returncode for p in ranks.start("index_failing", 2, tmp_path, timeout=60))
    assert "OutOfDisk: Writing" in (tmp_path / "told-0").read_text()
    assert (tmp_path / "told-1").read_text().startswith("RankFailed: rank 0 failed: OutOfDisk")
    succeeded("index_resumed", 2, tmp_path)
    assert GradientIndex.verify(tmp_path / "index") == []


@pytest.mark.slow
def test_ranks_with_other_data_are_told(tmp_path):
    assert all(p.returncode for p in ranks.start("index_differing", 2, tmp_path, timeout=60))
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert any("another data than rank" in text for text in told)
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.mark.slow
def test_a_second_writer_stops_all_ranks(tmp_path):
    with FolderLock(tmp_path / "index"):
        found = ranks.start("index_resumed", 2, tmp_path, timeout=60)
    assert all(p.returncode for p in found)
    assert "wait until it has finished" in found[0].stdout and "FolderBusy" in found[1].stdout
