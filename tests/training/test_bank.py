import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from headwater.core.files import FolderBusy
from headwater.core.locks import FolderLock
from headwater.models.vision import mlp
from headwater.training.bank import RetrainingBank, build_bank, build_bank_with, random_masks
from headwater.training.loop import (
    SGD,
    Adam,
    AdamW,
    Stage,
    correct_class_margin,
    example_losses,
    train,
)

pytestmark = pytest.mark.thorough

RECIPE = SGD(lr=0.1, weight_decay=1e-2, batch_size=4, epochs=2)


def make_model(seed):
    return mlp([6, 5, 3], seed=seed).double()


@pytest.fixture
def data():
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    return (x[:20], y[:20]), (x[20:], y[20:])


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after(n_groups):
    calls = []

    def progress(done, wanted):
        calls.append(done)
        if len(calls) == n_groups:
            raise Killed

    return progress


def test_random_masks_are_subsets_of_one_size_drawn_from_the_seed():
    masks = random_masks(50, 40, fraction=0.3, seed=1)
    assert masks.sum(1).tolist() == [15] * 40
    assert torch.equal(masks, random_masks(50, 40, fraction=0.3, seed=1))
    assert not torch.equal(masks, random_masks(50, 40, fraction=0.3, seed=2))
    # Each example is in 12 of 40 subsets in the mean, with standard deviation 2.9.
    assert (masks.sum(0) - 12).abs().max() < 4 * 2.9


def test_masks_must_leave_something_in_and_something_out():
    with pytest.raises(ValueError, match=r"some of 10 examples in and some out; got 1\.0"):
        random_masks(10, 3, fraction=1.0)


def test_each_outcome_is_that_of_training_on_its_subset_alone(tmp_path, data):
    masks = random_masks(20, 3, fraction=0.5)
    masks[1, :] = torch.arange(20) < 7  # subsets of several sizes
    bank = build_bank(
        tmp_path, make_model, *data, masks, optimizer=RECIPE, repeats=2, first_seed=50, n_parallel=4
    )
    for k in range(3):
        for r in range(2):
            seed, subset = 50 + r * 3 + k, masks[k].nonzero()[:, 0]
            alone = make_model(seed)
            trained = train([alone], *data[0], subsets=subset[None], seeds=[seed], optimizer=RECIPE)
            alone.load_state_dict({name: value[0] for name, value in trained.items()})
            with torch.no_grad():
                logits = alone(data[1][0])
            # Stored in float32.
            for name, function in (("margin", correct_class_margin), ("loss", example_losses)):
                expected = function(logits, data[1][1]).float()
                torch.testing.assert_close(bank.measurements[name][k, r], expected)


def test_a_same_run_bank_keeps_weights_and_order_and_sets_examples_to_zero(tmp_path, data):
    masks = random_masks(20, 4, fraction=0.9)
    masks[0] = True
    bank = build_bank(
        tmp_path, make_model, *data, masks, optimizer=RECIPE, repeats=2, first_seed=7, same_run=True
    )
    everything = torch.arange(20)[None]
    full = make_model(8)
    trained = train([full], *data[0], subsets=everything, seeds=[8], optimizer=RECIPE)
    full.load_state_dict({name: value[0] for name, value in trained.items()})
    with torch.no_grad():
        expected = correct_class_margin(full(data[1][0]), data[1][1]).float()
    torch.testing.assert_close(bank.measurements["margin"][0, 1], expected)
    assert not torch.equal(bank.measurements["margin"][1, 1], expected)


def test_an_interrupted_bank_goes_on_where_it_stopped(tmp_path, data):
    masks = random_masks(20, 5)
    options = {"optimizer": RECIPE, "repeats": 2, "n_parallel": 2}
    whole = build_bank(tmp_path / "whole", make_model, *data, masks, **options)
    with pytest.raises(Killed):
        build_bank(tmp_path / "cut", make_model, *data, masks, **options, progress=killed_after(3))
    cut = RetrainingBank.load(tmp_path / "cut")
    assert cut.done.sum() == 6
    assert cut.outcomes().shape == (5, 1, 10)  # the first round is complete, the second is not

    made = []

    def counting(seed):
        made.append(seed)
        return make_model(seed)

    again = build_bank(tmp_path / "cut", counting, *data, masks, **options)
    assert made == [1000, 1006, 1007, 1008, 1009]  # one for the shapes, then the runs missing
    saved = RetrainingBank.load(tmp_path / "cut")
    for name, values in whole.measurements.items():
        # The remaining runs stood side by side in other groups: float64 sums in another order.
        torch.testing.assert_close(again.measurements[name], values)
        assert torch.equal(saved.measurements[name], again.measurements[name])
    assert torch.equal(saved.masks, masks)


def test_more_repeats_are_added_to_a_bank_and_fewer_take_nothing_away(tmp_path, data):
    masks = random_masks(20, 3)
    first = build_bank(tmp_path, make_model, *data, masks, optimizer=RECIPE)
    more = build_bank(tmp_path, make_model, *data, masks, optimizer=RECIPE, repeats=3)
    assert torch.equal(more.outcomes()[:, :1], first.outcomes())
    assert more.outcomes().shape == (3, 3, 10)
    fewer = build_bank(tmp_path, make_model, *data, masks, optimizer=RECIPE, repeats=2)
    assert torch.equal(fewer.outcomes(), more.outcomes())


def test_repeats_of_a_subset_differ(tmp_path, data):
    bank = build_bank(tmp_path, make_model, *data, random_masks(20, 2), optimizer=RECIPE, repeats=2)
    assert not torch.equal(bank.outcomes()[:, 0], bank.outcomes()[:, 1])


def test_a_bank_of_other_data_masks_or_settings_is_refused(tmp_path, data):
    (x, y), queries = data
    masks = random_masks(20, 3)
    build_bank(tmp_path, make_model, (x, y), queries, masks, optimizer=RECIPE)
    with pytest.raises(ValueError, match="made with another train_data"):
        build_bank(tmp_path, make_model, (x + 1, y), queries, masks, optimizer=RECIPE)
    with pytest.raises(ValueError, match="made with another masks"):
        build_bank(tmp_path, make_model, (x, y), queries, ~masks, optimizer=RECIPE)
    with pytest.raises(ValueError, match="made with another optimizer"):
        other = replace(RECIPE, lr=0.2)
        build_bank(tmp_path, make_model, (x, y), queries, masks, optimizer=other)
    with pytest.raises(ValueError, match="set of measurements"):
        build_bank(
            tmp_path,
            make_model,
            (x, y),
            queries,
            masks,
            optimizer=RECIPE,
            measurements={"loss": example_losses},
        )


def test_regression_models_can_be_banked(tmp_path):
    x = torch.randn(20, 6, dtype=torch.float64)
    y = x[:, 0]

    def squared_error(predicted, target):
        return mse_loss(predicted[:, 0], target, reduction="none")

    bank = build_bank(
        tmp_path,
        lambda seed: mlp([6, 1], seed=seed).double(),
        (x, y),
        (x[:4], y[:4]),
        random_masks(20, 2),
        optimizer=SGD(lr=0.1, batch_size=10, epochs=500, schedule="constant"),
        loss=squared_error,
        measurements={"error": squared_error},
    )
    # The target is linear and free of noise, and ten examples fix seven coefficients.
    assert bank.outcomes("error").max() < 1e-3


def test_masks_must_fit_the_training_data(tmp_path, data):
    empty = torch.zeros(2, 20, dtype=torch.bool)
    for masks in (random_masks(19, 2), empty):
        with pytest.raises(ValueError, match="one or more of the 20 examples"):
            build_bank(tmp_path, make_model, *data, masks, optimizer=RECIPE)


def test_an_unknown_measurement_names_those_there_are(tmp_path, data):
    bank = build_bank(tmp_path, make_model, *data, random_masks(20, 2), optimizer=RECIPE)
    with pytest.raises(ValueError, match=r"\['loss', 'margin'\]; asked for 'logit'"):
        bank.outcomes("logit")


def test_the_settings_are_written_for_people_to_read(tmp_path, data):
    build_bank(tmp_path, make_model, *data, random_masks(20, 2), optimizer=RECIPE)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["optimizer"][0]["lr"] == 0.1
    assert (meta["first_seed"], meta["same_run"]) == (1000, False)


def test_two_processes_do_not_fill_one_bank(tmp_path, data):
    with FolderLock(tmp_path), pytest.raises(FolderBusy, match="is being written by process"):
        build_bank(tmp_path, make_model, *data, random_masks(20, 2), optimizer=RECIPE)


class Echo:
    """A trainer whose outcome is known: sums over the subset, and the seed."""

    def __call__(self, subset, seed):
        values = torch.arange(3.0)
        return {"sum": subset.sum() + values, "seed": torch.full((3,), float(seed))}


def echoed(masks, seeds):
    sums = torch.stack([mask.nonzero().sum() + torch.arange(3.0) for mask in masks])
    return {
        "sum": sums[:, None].expand(-1, seeds.shape[1], -1),
        "seed": seeds[..., None].expand(-1, -1, 3),
    }


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_trainer_of_ones_own_fills_a_bank(tmp_path, n_processes):
    masks = random_masks(20, 4)
    bank = build_bank_with(
        tmp_path,
        Echo(),
        masks,
        made_from={"trainer": "echo"},
        repeats=2,
        first_seed=10,
        n_processes=n_processes,
    )
    seeds = torch.tensor([[10, 14], [11, 15], [12, 16], [13, 17]]).float()
    for name, value in echoed(masks, seeds).items():
        assert torch.equal(bank.measurements[name], value)
        assert torch.equal(RetrainingBank.load(tmp_path).outcomes(name), value)


def test_same_run_trainers_get_one_seed_a_repeat(tmp_path):
    bank = build_bank_with(
        tmp_path,
        Echo(),
        random_masks(20, 3),
        made_from={},
        repeats=2,
        first_seed=10,
        same_run=True,
        n_processes=1,
    )
    assert bank.measurements["seed"][..., 0].tolist() == [[10, 11]] * 3


def test_a_bank_with_a_trainer_goes_on_where_it_stopped(tmp_path):
    masks, made = random_masks(20, 4), []

    class Counting(Echo):
        def __call__(self, subset, seed):
            made.append(seed)
            return super().__call__(subset, seed)

    options = {"made_from": {"trainer": "echo"}, "n_processes": 1, "first_seed": 0}
    with pytest.raises(Killed):
        build_bank_with(tmp_path, Counting(), masks, **options, progress=killed_after(3))
    build_bank_with(tmp_path, Counting(), masks, **options, repeats=2)
    assert made == [0, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="made with another made_from"):
        build_bank_with(tmp_path, Echo(), masks, **options | {"made_from": {"trainer": "b"}})


FILLING = """
import time, torch
from headwater.training.bank import build_bank_with, random_masks
from tests.training.test_bank import Echo

class Slow(Echo):
    def __call__(self, subset, seed):
        if seed >= 3:
            time.sleep(600)
        return super().__call__(subset, seed)

if __name__ == "__main__":
    masks = random_masks(20, 6)
    build_bank_with({folder!r}, Slow(), masks, made_from={{"trainer": "echo"}}, first_seed=0)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the process table")
def test_a_pool_that_is_killed_leaves_no_workers_and_loses_only_the_runs_at_hand(tmp_path):
    script = tmp_path / "fill.py"
    script.write_text(FILLING.format(folder=str(tmp_path / "bank")))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if RetrainingBank.load(tmp_path / "bank").done.sum() == 3:
                    break
            time.sleep(0.1)
        workers = _children(process.pid)
    finally:
        process.kill()
        process.wait()
    assert RetrainingBank.load(tmp_path / "bank").done[:3].all()
    assert len(workers) >= 2
    while time.monotonic() < deadline and any(map(_runs, workers)):
        time.sleep(0.1)
    assert not any(map(_runs, workers))
    masks = random_masks(20, 6)
    bank = build_bank_with(
        tmp_path / "bank", Echo(), masks, made_from={"trainer": "echo"}, first_seed=0, n_processes=1
    )
    assert bank.measurements["seed"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def _children(parent: int) -> list[int]:
    task = f"/proc/{parent}/task/{parent}/children"
    return [int(pid) for pid in Path(task).read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_any_optimizer_and_several_stages_fill_a_bank(tmp_path, data):
    masks = random_masks(20, 3)
    stages = [
        Stage(optimizer=Adam(lr=0.01, batch_size=4, epochs=1), examples=torch.arange(20)),
        Stage(optimizer=AdamW(lr=0.01, batch_size=4, epochs=2)),
    ]
    bank = build_bank(tmp_path, make_model, *data, masks, optimizer=stages, first_seed=5)
    trained = train(
        [make_model(5)],
        *data[0],
        subsets=masks[0].nonzero()[:, 0][None],
        seeds=[5],
        optimizer=stages,
    )
    model = make_model(5)
    model.load_state_dict({name: value[0] for name, value in trained.items()})
    with torch.no_grad():
        expected = correct_class_margin(model(data[1][0]), data[1][1]).float()
    torch.testing.assert_close(bank.measurements["margin"][0, 0], expected)
    with pytest.raises(ValueError, match="made with another optimizer"):
        build_bank(tmp_path, make_model, *data, masks, optimizer=stages[1:], first_seed=5)


def test_a_bank_from_before_there_was_a_choice_of_optimizers_is_gone_on_with(tmp_path, data):
    masks = random_masks(20, 3)
    first = build_bank(tmp_path, make_model, *data, masks, optimizer=RECIPE)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    (facts,) = meta.pop("optimizer")
    old = ("lr", "momentum", "weight_decay", "batch_size", "epochs", "schedule")
    path.write_text(json.dumps({"sgd": {name: facts[name] for name in old}} | meta))
    again = build_bank(tmp_path, make_model, *data, masks, optimizer=RECIPE, repeats=2)
    assert torch.equal(again.outcomes()[:, :1], first.outcomes())
