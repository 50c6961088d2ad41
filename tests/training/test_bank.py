import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss

from headwater.core.files import FolderBusy
from headwater.core.locks import FolderLock
from headwater.models.vision import mlp
from headwater.training.bank import RetrainingBank, build_bank, random_masks
from headwater.training.loop import SGD, correct_class_margin, example_losses, train

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
        tmp_path, make_model, *data, masks, sgd=RECIPE, repeats=2, first_seed=50, n_parallel=4
    )
    for k in range(3):
        for r in range(2):
            seed, subset = 50 + r * 3 + k, masks[k].nonzero()[:, 0]
            alone = make_model(seed)
            trained = train([alone], *data[0], subsets=subset[None], seeds=[seed], sgd=RECIPE)
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
        tmp_path, make_model, *data, masks, sgd=RECIPE, repeats=2, first_seed=7, same_run=True
    )
    everything = torch.arange(20)[None]
    full = make_model(8)
    trained = train([full], *data[0], subsets=everything, seeds=[8], sgd=RECIPE)
    full.load_state_dict({name: value[0] for name, value in trained.items()})
    with torch.no_grad():
        expected = correct_class_margin(full(data[1][0]), data[1][1]).float()
    torch.testing.assert_close(bank.measurements["margin"][0, 1], expected)
    assert not torch.equal(bank.measurements["margin"][1, 1], expected)


def test_an_interrupted_bank_goes_on_where_it_stopped(tmp_path, data):
    masks = random_masks(20, 5)
    options = {"sgd": RECIPE, "repeats": 2, "n_parallel": 2}
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
    first = build_bank(tmp_path, make_model, *data, masks, sgd=RECIPE)
    more = build_bank(tmp_path, make_model, *data, masks, sgd=RECIPE, repeats=3)
    assert torch.equal(more.outcomes()[:, :1], first.outcomes())
    assert more.outcomes().shape == (3, 3, 10)
    fewer = build_bank(tmp_path, make_model, *data, masks, sgd=RECIPE, repeats=2)
    assert torch.equal(fewer.outcomes(), more.outcomes())


def test_repeats_of_a_subset_differ(tmp_path, data):
    bank = build_bank(tmp_path, make_model, *data, random_masks(20, 2), sgd=RECIPE, repeats=2)
    assert not torch.equal(bank.outcomes()[:, 0], bank.outcomes()[:, 1])


def test_a_bank_of_other_data_masks_or_settings_is_refused(tmp_path, data):
    (x, y), queries = data
    masks = random_masks(20, 3)
    build_bank(tmp_path, make_model, (x, y), queries, masks, sgd=RECIPE)
    with pytest.raises(ValueError, match="made with another train_data"):
        build_bank(tmp_path, make_model, (x + 1, y), queries, masks, sgd=RECIPE)
    with pytest.raises(ValueError, match="made with another masks"):
        build_bank(tmp_path, make_model, (x, y), queries, ~masks, sgd=RECIPE)
    with pytest.raises(ValueError, match="made with another sgd"):
        other = replace(RECIPE, lr=0.2)
        build_bank(tmp_path, make_model, (x, y), queries, masks, sgd=other)
    with pytest.raises(ValueError, match="set of measurements"):
        build_bank(
            tmp_path,
            make_model,
            (x, y),
            queries,
            masks,
            sgd=RECIPE,
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
        sgd=SGD(lr=0.1, batch_size=10, epochs=500, schedule="constant"),
        loss=squared_error,
        measurements={"error": squared_error},
    )
    # The target is linear and free of noise, and ten examples fix seven coefficients.
    assert bank.outcomes("error").max() < 1e-3


def test_masks_must_fit_the_training_data(tmp_path, data):
    empty = torch.zeros(2, 20, dtype=torch.bool)
    for masks in (random_masks(19, 2), empty):
        with pytest.raises(ValueError, match="one or more of the 20 examples"):
            build_bank(tmp_path, make_model, *data, masks, sgd=RECIPE)


def test_an_unknown_measurement_names_those_there_are(tmp_path, data):
    bank = build_bank(tmp_path, make_model, *data, random_masks(20, 2), sgd=RECIPE)
    with pytest.raises(ValueError, match=r"\['loss', 'margin'\]; asked for 'logit'"):
        bank.outcomes("logit")


def test_the_settings_are_written_for_people_to_read(tmp_path, data):
    build_bank(tmp_path, make_model, *data, random_masks(20, 2), sgd=RECIPE)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["sgd"]["lr"] == 0.1
    assert (meta["first_seed"], meta["same_run"]) == (1000, False)


def test_two_processes_do_not_fill_one_bank(tmp_path, data):
    with FolderLock(tmp_path), pytest.raises(FolderBusy, match="is being written by process"):
        build_bank(tmp_path, make_model, *data, random_masks(20, 2), sgd=RECIPE)
