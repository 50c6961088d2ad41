"""Several ranks end with the same bits as one, and fail as one."""

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater.core.capture import BatchPlan, units_of
from headwater.core.distributed import World, current, spread_out, started
from tests import ranks

pytestmark = pytest.mark.thorough


def differing(folder: Path, job: str, size: int, expected: dict) -> list[str]:
    """Names of numbers that are not the same bits on some rank."""
    found = []
    for rank in range(size):
        mine = torch.load(folder / f"{job}-{size}-{rank}.pt", weights_only=True)
        assert mine.keys() == expected.keys()
        found += [
            f"{rank} {method} {name}"
            for method, numbers in expected.items()
            for name, number in numbers.items()
            if not torch.equal(mine[method][name], number)
        ]
    return found


def succeeded(job: str, size: int, folder: Path) -> None:
    for process in ranks.start(job, size, folder):
        assert process.returncode == 0, process.stdout


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process finds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return ranks.every()


@pytest.mark.parametrize("size", [2, 3])  # uneven shares, and a third rank that may have no batch
def test_ranks_have_the_same_bits_as_one_process(size, tmp_path, alone):
    succeeded("same", size, tmp_path)
    assert alone["ekfac"]["scores"].abs().min() > 0
    assert not differing(tmp_path, "same", size, alone)


def test_a_model_whose_weights_are_spread_over_ranks_has_the_same_fit(tmp_path):
    succeeded("sharded", 2, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"sharded-2-{rank}.pt", weights_only=True)
        for method in ("ekfac", "diagonal"):
            plain, sharded = found[f"plain {method}"], found[f"sharded {method}"]
            assert plain.keys() == sharded.keys() and float(plain["covered"]) == 1
            assert all(torch.equal(sharded[k], v) for k, v in plain.items())


def test_a_failing_rank_stops_all_with_its_error(tmp_path):
    first, second = ranks.start("failing", 2, tmp_path, timeout=60)
    assert first.returncode != 0 and second.returncode != 0
    message, seconds = (tmp_path / "failed-0").read_text().splitlines()
    assert message == "RankFailed: rank 1 failed: OSError: the disk of this rank is broken"
    assert float(seconds) < 20  # although rank 1 still lived
    assert (tmp_path / "failed-1").read_text().startswith("OSError: the disk of this rank")


def test_a_fit_whose_rank_was_killed_goes_on_with_any_number_of_ranks(tmp_path, alone):
    first, second = ranks.start("killed", 2, tmp_path, timeout=60)
    assert second.returncode == -signal.SIGKILL and first.returncode not in (0, -signal.SIGKILL)
    assert "A rank has ended without saying why" in (tmp_path / "failed-0").read_text()
    assert not (tmp_path / "fit").exists()
    assert len(list((tmp_path / ".fit.unfinished").glob("*/*/generation-*"))) > 2
    succeeded("resumed", 3, tmp_path)
    for rank in range(3):
        mine = torch.load(tmp_path / f"resumed-3-{rank}.pt", weights_only=True)
        assert all(torch.equal(mine[k], v) for k, v in alone["ekfac"].items())
    ran = (tmp_path / "ran-3").read_text().splitlines()
    fitted = [line for line in ran if line.startswith(("moments", "eigenvalues"))]
    assert fitted and not any(line.startswith("moments") for line in fitted)  # that was done
    assert int(fitted[0].split()[1]) > 3
    assert not (tmp_path / ".fit.unfinished").exists()


def test_units_are_runs_of_batches_of_one_fold():
    plans = [BatchPlan((i,), int(i > 6)) for i in range(11)]
    units = units_of(plans, most=4)
    assert [[p.indices[0] for p in unit] for unit in units] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
        [7, 8, 9],
        [10],
    ]
    assert len(units_of(plans)) == 11 and units_of([]) == []


def test_work_goes_to_the_rank_with_the_least():
    owner = spread_out([1.0, 8.0, 27.0, 8.0, 8.0], 2)
    assert owner == [1, 1, 0, 1, 1]
    assert spread_out([], 3) == [] and spread_out([1.0], 3) == [0]


def test_one_process_is_a_world_of_its_own():
    world = current()
    assert world == World(0, 1) and world.is_first
    assert world.exchange({"a": 1}) == [{"a": 1}]
    assert world.agreed(lambda: 3) == 3 and world.first(lambda: "x") == "x"
    mine: dict[str, Tensor] = {"x": torch.ones(2)}
    assert list(world.each(mine)) == [mine] and list(world.each(None)) == [None]


def test_an_environment_without_a_place_to_meet_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR"), started():
        pass
