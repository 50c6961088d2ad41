"""Retraining: each run once, kept, side by side, and never a number that is none."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from headwater.core.scores import Scores
from headwater.models.vision import mlp
from headwater.trace.measures import query_loss_difference, removal
from headwater.training.loop import SGD, AdamW, Stage, example_losses, outputs, train
from headwater.training.retraining import (
    AS_IT_WAS,
    Change,
    PooledRetrain,
    StackedRetrain,
    retrain_all,
)
from headwater.training.verify import changes, verify

pytestmark = pytest.mark.thorough

N, Q = 30, 4
RULE = SGD(lr=0.1, weight_decay=1e-2, batch_size=8, epochs=3)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + Q, 6, generator=generator, dtype=dtype)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return (x[:N], y[:N]), (x[N:], y[N:])


def stacked(dtype=torch.float64, **options):
    train_data, query_data = data(dtype)
    return StackedRetrain(
        make_model=lambda seed: mlp([6, 5, 3], seed=seed).to(dtype),
        train_data=train_data,
        query_data=query_data,
        **{"optimizer": RULE} | options,
    )


def one_by_one(dtype=torch.float64):
    """The same runs by a plain function that knows nothing of others."""
    (x, y), (x_query, y_query) = data(dtype)

    def retrain(weights, seed):
        model = mlp([6, 5, 3], seed=seed).to(dtype)
        trained = train(
            [model],
            x,
            y,
            subsets=torch.arange(N)[None],
            seeds=[seed],
            optimizer=RULE,
            weights=weights[None],
        )
        margin_of = -torch.log(
            torch.expm1(example_losses(outputs(model, trained, x_query)[0], y_query))
        )
        return margin_of

    return retrain


def table(seed=3, **more):
    values = torch.randn(Q, N, generator=torch.Generator().manual_seed(seed)).double()
    values = more.pop("values", values)
    ids = [f"e{i}" for i in range(N)]
    return Scores(
        values=values, query_ids=list("abcd"), train_ids=ids, **{"measurement": "margin", **more}
    )


class Counted:
    """A retrain that notes its runs, one by one."""

    def __init__(self, retrain):
        self.retrain, self.runs = retrain, []

    def __call__(self, weights, seed):
        self.runs.append((tuple(weights.tolist()), seed))
        return self.retrain(weights, seed)


class CountedMany(Counted):
    n_parallel = 5

    def many(self, weights, seeds):
        self.runs += [(tuple(w.tolist()), s) for w, s in zip(weights, seeds, strict=True)]
        return self.retrain.many(weights, seeds)


def additive(weights, seed):
    return table().values @ (weights.double() - 1) + 9 + seed


ALWAYS = {"right": lambda margin: margin > -torch.inf}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_side_by_side_equals_one_by_one_in_every_measure(dtype, tolerance):
    both = stacked(dtype), one_by_one(dtype)
    close = {"rtol": tolerance, "atol": tolerance}
    a, b = (removal(r, table(), [1, 4], seeds=(0, 1), **ALWAYS) for r in both)
    torch.testing.assert_close(a.change, b.change, **close)
    torch.testing.assert_close(a.control_change, b.control_change, **close)
    a, b = (query_loss_difference(r, table(), share=0.1, seeds=(0, 1)) for r in both)
    torch.testing.assert_close(a.per_query, b.per_query, **close)
    a, b = (verify(r, table(), changes(table(), k=2), seeds=(0, 1)) for r in both)
    assert [o.actual for o in a.outcomes] == pytest.approx(
        [o.actual for o in b.outcomes], abs=tolerance, rel=tolerance
    )


def test_each_run_keeps_the_weights_and_order_of_its_seed():
    retrain = stacked()
    ones = torch.ones(2, N)
    first = retrain.many(ones, [4, 5])
    torch.testing.assert_close(retrain(ones[0], 4), first[0])
    assert not torch.allclose(first[0], first[1])
    ones[1, 3] = 0
    same = retrain.many(ones, [4, 4])
    assert not torch.equal(same[0], same[1])
    torch.testing.assert_close(same[0], first[0])


def test_several_stages_and_another_measure_are_retrained_side_by_side():
    stages = [
        Stage(optimizer=RULE, examples=torch.arange(10)),
        Stage(optimizer=AdamW(lr=0.01, batch_size=8, epochs=2), examples=torch.arange(5, N)),
    ]
    margin = stacked(optimizer=stages)
    loss = stacked(optimizer=stages, measure=example_losses)
    weights = torch.ones(3, N).index_fill(1, torch.tensor([7]), 0.0)
    seeds = [0, 1, 2]
    torch.testing.assert_close(softplus(-margin.many(weights, seeds)), loss.many(weights, seeds))


def test_equal_runs_are_made_once_whatever_they_are_called():
    runs = [
        (AS_IT_WAS, 0),
        (Change(name="without 3", weights={3: 0.0, 5: 1.0}), 0),
        (Change(name="another name", weights={3: 0.0}), 0),
        (Change(name="another seed", weights={3: 0.0}), 1),
        (Change(name="nothing", weights={2: 1.0}), 0),
    ]
    for kind, plain in ((Counted, additive), (CountedMany, stacked())):
        retrain = kind(plain)
        found = retrain_all(retrain, runs, n_train=N, queries="abcd")
        assert len(retrain.runs) == 3
        assert torch.equal(found[1], found[2]) and torch.equal(found[0], found[4])
        assert not torch.equal(found[1], found[3])


def test_scores_with_the_same_top_share_their_runs(tmp_path):
    retrain = Counted(additive)
    first = removal(retrain, table(), [1, 3], cache=tmp_path, **ALWAYS)
    made = len(retrain.runs)
    assert made == 1 + 2 * 2 * Q
    twice = table(values=2 * table().values)
    assert torch.equal(
        removal(retrain, twice, [1, 3], cache=tmp_path, **ALWAYS).change, first.change
    )
    assert len(retrain.runs) == made  # the same tops, and controls of the same seed
    removal(retrain, table(), [1, 3], cache=tmp_path, seed=1, **ALWAYS)
    assert made < len(retrain.runs) <= made + 2 * Q  # other controls, the same tops


def test_runs_of_another_recipe_are_not_taken_from_the_cache(tmp_path):
    weights = [(AS_IT_WAS, 0)]
    options = {"n_train": N, "queries": "abcd", "cache": tmp_path}
    kinds = [
        stacked(),
        stacked(measure=example_losses),
        stacked(optimizer=SGD(lr=0.2, batch_size=8, epochs=3)),
        stacked(torch.float32),
    ]
    found = [retrain_all(kind, weights, **options) for kind in kinds]
    assert len({tuple(f.flatten().tolist()) for f in found}) == 4
    again = CountedMany(stacked())
    again.made_from = again.retrain.made_from
    assert torch.equal(retrain_all(again, weights, **options), found[0]) and not again.runs


def test_progress_counts_the_runs_and_names_them():
    steps = []
    removal(
        CountedMany(stacked()),
        table(),
        [2],
        progress=lambda *step: steps.append(step),
        **ALWAYS,
    )
    assert steps[0] == (0, 1, "retraining: as it was")
    assert steps[2] == (0, 2 * Q, "retraining: without the top 2 of a and 4 more")
    assert steps[-2] == (5, 2 * Q, "retraining: without 2 like the top of c and 2 more")
    assert steps[-1] == (2 * Q, 2 * Q, "retraining: done")


class Lost:
    """Some of the runs diverge."""

    n_parallel = 3

    def many(self, weights, seeds):
        values = torch.stack([additive(w, s) for w, s in zip(weights, seeds, strict=True)])
        values[weights[:, 2] == 0, 1] = torch.nan
        return values


def test_a_run_that_diverged_is_named_and_not_kept(tmp_path):
    runs = [(Change(name=f"without {i}", weights={i: 0.0}), 7) for i in range(6)]
    options = {"n_train": N, "queries": "abcd", "cache": tmp_path}
    with pytest.raises(
        FloatingPointError, match=r"'without 2' with seed 7 the measurement of 'b' is nan"
    ):
        retrain_all(Lost(), runs, **options)
    kept = sorted(json.loads(f.read_text())["change"] for f in tmp_path.rglob("*.json"))
    assert kept == ["without 0", "without 1"]  # what trained beside it is whole
    retrain = Counted(additive)
    retrain_all(retrain, runs, **options)
    assert len(retrain.runs) == 4


def test_a_number_that_is_none_in_the_cache_is_measured_again(tmp_path):
    options = {"n_train": N, "queries": "abcd", "cache": tmp_path}
    first = retrain_all(additive, [(AS_IT_WAS, 0)], **options)
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    for broken in ([{"$float": "nan"}] * Q, [1.0]):
        file.write_text(json.dumps(content | {"measurements": broken}))
        retrain = Counted(additive)
        assert torch.equal(retrain_all(retrain, [(AS_IT_WAS, 0)], **options), first)
        assert len(retrain.runs) == 1


def test_measurements_of_another_shape_are_refused():
    options = {"n_train": N, "queries": "abcd"}
    with pytest.raises(ValueError, match=r"each of 4 queries; got shape \(2,\)"):
        retrain_all(lambda w, s: torch.zeros(2), [(AS_IT_WAS, 0)], **options)

    class Short:
        def many(self, weights, seeds):
            return torch.zeros(1, Q)

    runs = [(AS_IT_WAS, 0), (AS_IT_WAS, 1)]
    with pytest.raises(ValueError, match=r"got shape \(1, 4\)"):
        retrain_all(Short(), runs, **options)


class Killed(BaseException):
    """Stands for whatever ends a process at once."""


@pytest.mark.parametrize("measure", [removal, query_loss_difference])
def test_a_killed_measurement_goes_on(measure, tmp_path):
    options = {"ks": [1, 2], **ALWAYS} if measure is removal else {"share": 0.1}
    whole = Counted(additive)
    expected = measure(whole, table(), **options)

    class Dies(Counted):
        def __call__(self, weights, seed):
            if len(self.runs) == 5:
                raise Killed
            return super().__call__(weights, seed)

    dies = Dies(additive)
    with pytest.raises(Killed):
        measure(dies, table(), cache=tmp_path, **options)
    rest = Counted(additive)
    found = measure(rest, table(), cache=tmp_path, **options)
    assert len(dies.runs) + len(rest.runs) == len(whole.runs)
    name = "change" if measure is removal else "per_query"
    assert torch.equal(getattr(found, name), getattr(expected, name))


SCRIPT = """
import os, signal, sys
from tests.training.test_retraining import ALWAYS, CountedMany, removal, stacked, table
retrain = CountedMany(stacked())
def progress(done, total, note):
    if len(retrain.runs) > 10:
        os.kill(os.getpid(), signal.SIGKILL)
removal(retrain, table(), [1, 2, 3], cache=sys.argv[1], progress=progress, **ALWAYS)
"""


def test_a_process_that_is_killed_loses_one_group(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    rest = CountedMany(stacked())
    found = removal(rest, table(), [1, 2, 3], cache=tmp_path, **ALWAYS)
    assert len(rest.runs) == 1 + 6 * Q - 11
    whole = removal(stacked(), table(), [1, 2, 3], **ALWAYS)
    torch.testing.assert_close(found.change, whole.change)  # groups of another size sum otherwise


def squares(weights, seed):
    """A run that another process can import."""
    return (weights.double() ** 2).sum() + torch.arange(Q) + seed


def test_a_pool_of_processes_makes_the_same_runs():
    runs = [(Change(name=str(i), weights={i: 3.0 + i}), i) for i in range(3)]
    options = {"n_train": N, "queries": "abcd"}
    pooled = retrain_all(PooledRetrain(retrain=squares), runs, **options)
    torch.testing.assert_close(pooled, retrain_all(squares, runs, **options), rtol=0, atol=0)


def test_models_with_running_statistics_do_not_stack():
    retrain = stacked()
    broken = StackedRetrain(
        make_model=lambda seed: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double(),
        train_data=retrain.train_data,
        query_data=retrain.query_data,
        optimizer=RULE,
    )
    with pytest.raises(ValueError, match="has buffers"):
        broken(torch.ones(N), 0)
