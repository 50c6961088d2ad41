r"""Retraining under changed weights of the examples: each run made once, kept, and many of them side by side.

Whatever asks what training data does (`headwater.training.verify`, removal and the query loss difference of
`headwater.trace.measures`) plans changes of the data and has them retrained by `retrain_all`. How a run is made is up
to the caller: a function of the weights and a seed, or an object that makes several runs at once, such as
`StackedRetrain` for models that stack and `PooledRetrain` for any function.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from headwater.core.files import read_json, write_json
from headwater.core.fingerprint import fingerprint_json, fingerprint_model, fingerprint_tensors
from headwater.core.scores import Scores
from headwater.training.bank import begin_worker
from headwater.training.loop import (
    Loss,
    Optimizer,
    Stage,
    correct_class_margin,
    example_losses,
    outputs,
    train,
)
from headwater.training.optimizers import as_stages

Progress = Callable[[int, int, str], None]
RetrainOne = Callable[[Float[Tensor, " train"], int], Float[Tensor, " query"]]


@runtime_checkable
class RetrainMany(Protocol):
    """Makes several runs at once.

    An attribute `n_parallel` says how many (32 without): those are lost at most when a process is killed.
    """

    def many(
        self, weights: Float[Tensor, "model train"], seeds: Sequence[int]
    ) -> Float[Tensor, "model query"]:
        """The measurement of every query after each of the runs."""
        ...


# Weights of all training examples, and the seed of the run -> the measurement of every query; for one run or several.
Retrain = RetrainOne | RetrainMany


@runtime_checkable
class Relabels(Protocol):
    """Can retrain with other labels as well."""

    def with_labels(self, labels: dict[int, int]) -> Retrain:
        """The same training, with new labels by number of the training example."""
        ...


def with_labels(retrain: Retrain, labels: dict[int, int], name: str) -> Retrain:
    """A training with new labels.

    Raises:
        ValueError: It cannot change labels.
    """
    if not isinstance(retrain, Relabels):
        raise ValueError(
            f"{name!r} changes labels, which this training cannot; give it a method with_labels(labels) that returns "
            "the training with new labels by number of the example, or only remove examples."
        )
    return retrain.with_labels(labels)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the training data: the weight of each example that no longer counts once.

    Args:
        name: What it is, in words.
        weights: New weights by number of the training example: 0 leaves it out, 2 counts it twice.
        control: Whether it was chosen at random, for comparison.
        labels: New labels by number of the training example.
    """

    name: str
    weights: dict[int, float]
    control: bool = False
    labels: dict[int, int] = field(default_factory=dict)

    def vector(self, n_train: int) -> Float[Tensor, " train"]:
        """Weights of all examples."""
        weights = torch.ones(n_train)
        for number, weight in self.weights.items():
            weights[number] = weight
        return weights

    def predicted(
        self, scores: Scores, relabelled: Scores | None = None
    ) -> Float[Tensor, " query"]:
        """What the scores say it does to each query's measurement.

        Args:
            scores: Scores of the examples as they are.
            relabelled: Scores of the examples under their new labels, by id; for changes of labels.
        """
        weights = self.weights | dict.fromkeys(self.labels, 0.0)  # the old label goes
        numbers = scores.kept or range(len(scores.train_ids))
        column = {number: i for i, number in enumerate(numbers)}
        missing = [n for n in weights if n not in column]
        if missing:
            raise ValueError(
                f"Training example {missing[0]} has no score; score with keep=None to verify {self.name!r}."
            )
        chosen = [column[n] for n in weights]
        moved = torch.tensor(list(weights.values()), dtype=torch.float64) - 1
        found = scores.values[:, chosen].double() @ moved
        if not self.labels:
            return found
        new = {} if relabelled is None else {i: k for k, i in enumerate(relabelled.train_ids)}
        names = [scores.train_ids[column[n]] for n in self.labels]
        if relabelled is None or any(name not in new for name in names):
            raise ValueError(
                f"{self.name!r} gives {len(self.labels)} examples other labels; pass their scores under these labels, "
                "relabelled=…, to predict what that does."
            )
        return found + relabelled.values[:, [new[name] for name in names]].double().sum(1)


AS_IT_WAS = Change(name="as it was", weights={})


def retrain_all(
    retrain: Retrain,
    runs: Sequence[tuple[Change, int]],
    *,
    n_train: int,
    queries: Sequence[str],
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "run query"]:
    """Measurements after each run; equal runs are made once, and those that were kept are read.

    Args:
        retrain: Makes the runs.
        runs: Changes of the data, each with the seed of its run.
        n_train: Number of all training examples.
        queries: Names of the queries that `retrain` measures.
        cache: Folder in which every finished run's measurements are kept, so that a killed job goes on. Choose one for
            each `retrain`, unless it tells what it is made from, as `StackedRetrain` does.
        progress: Called with (runs done, runs in all, note), before every group of runs and at the end.

    Raises:
        ValueError: `retrain` returns other than one number a query.
        FloatingPointError: A run's measurements are not finite; the message names the change. They are not kept.
    """
    made_from = getattr(retrain, "made_from", None)
    keys = [_key(change, seed, n_train, queries, made_from) for change, seed in runs]
    found = {
        key: values for key in set(keys) if (values := _read(cache, key, len(queries))) is not None
    }
    todo = {key: run for key, run in zip(keys, runs, strict=True) if key not in found}
    waiting, total = list(todo.items()), len(set(keys))
    size = getattr(retrain, "n_parallel", 32) if isinstance(retrain, RetrainMany) else 1
    while waiting:
        labels = waiting[0][1][0].labels  # runs on other labels are made apart
        alike = [run for run in waiting if run[1][0].labels == labels]
        group, rest = alike[:size], alike[size:]
        waiting = rest + [run for run in waiting if run[1][0].labels != labels]
        changes, seeds = [change for _, (change, _) in group], [seed for _, (_, seed) in group]
        trainer = with_labels(retrain, labels, changes[0].name) if labels else retrain
        if progress is not None:
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            progress(len(found), total, f"retraining: {changes[0].name}{more}")
        weights = torch.stack([change.vector(n_train) for change in changes])
        if isinstance(trainer, RetrainMany):
            values = trainer.many(weights, seeds)
        else:
            values = trainer(weights[0], seeds[0])[None]
        values = values.detach().double().cpu()
        if values.shape != (len(group), len(queries)):
            shape = tuple(values.shape if isinstance(retrain, RetrainMany) else values.shape[1:])
            raise ValueError(
                f"retrain must return one number for each of {len(queries)} queries; got shape {shape}."
            )
        whole = values.isfinite().all(1)
        for (key, (change, seed)), value in zip(group, values, strict=True):
            if value.isfinite().all():
                found[key] = value
                _keep(cache, key, value, change, seed)
        if not whole.all():
            lost = int((~whole).nonzero()[0])
            broken = int((~values[lost].isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"After retraining {changes[lost].name!r} with seed {seeds[lost]} the measurement of "
                f"{queries[broken]!r} is {float(values[lost, broken])}, which says nothing; it was not kept. Lower the "
                "learning rate, or change less."
            )
    if progress is not None:
        progress(total, total, "retraining: done")
    if not keys:
        return torch.empty(0, len(queries), dtype=torch.float64)
    return torch.stack([found[key] for key in keys])


def _key(
    change: Change, seed: int, n_train: int, queries: Sequence[str], made_from: str | None
) -> str:
    moved = [[n, float(w)] for n, w in sorted(change.weights.items()) if w != 1]
    labels = [sorted(change.labels.items())] if change.labels else []
    return fingerprint_json([n_train, moved, seed, list(queries), made_from, *labels])[:24]


def _place(cache: str | Path, key: str) -> Path:
    return Path(cache) / key[:2] / f"{key}.json"


def _read(cache: str | Path | None, key: str, n_queries: int) -> Tensor | None:
    """A run that was kept, if its numbers are whole."""
    if cache is None or not (place := _place(cache, key)).is_file():
        return None
    values = torch.tensor(read_json(place)["measurements"], dtype=torch.float64)
    return values if values.shape == (n_queries,) and values.isfinite().all() else None


def _keep(cache: str | Path | None, key: str, values: Tensor, change: Change, seed: int) -> None:
    if cache is not None:
        kept = {"measurements": values.tolist(), "change": change.name, "seed": seed}
        write_json(_place(cache, key), kept)


@dataclass(frozen=True, eq=False, kw_only=True)
class StackedRetrain:
    """Retrains models that stack, side by side; each run differs from that of its seed in the weights alone.

    Initial weights and the order of the examples come from the seed, and examples with weight 0 keep their place in
    it: what leaving out does to that particular run. The mean over seeds estimates the expected outcome.

    Args:
        make_model: The initial model of a seed.
        train_data: Inputs and targets of all training examples.
        query_data: Inputs and targets of the queries.
        optimizer: Optimizer and length of training; or several stages.
        measure: What is measured of each query, from outputs and targets; the margin of the correct class when left
            out.
        loss: Training loss of each example, from outputs and targets.
        n_parallel: Models trained side by side.

    Example:
        >>> from headwater.training.optimizers import SGD
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 2
        >>> retrain = StackedRetrain(make_model=lambda seed: nn.Linear(2, 2), train_data=(x, y), query_data=(x, y),
        ...                          optimizer=SGD(lr=0.1, epochs=1))
        >>> retrain.many(torch.ones(3, 8), [0, 1, 2]).shape
        torch.Size([3, 8])
    """

    make_model: Callable[[int], nn.Module]
    train_data: tuple[Tensor, Tensor]
    query_data: tuple[Tensor, Tensor]
    optimizer: Optimizer | Sequence[Stage]
    measure: Loss = correct_class_margin
    loss: Loss = example_losses
    n_parallel: int = 50

    @cached_property
    def made_from(self) -> str:
        """Fingerprint of initial model, data and recipe; measure and loss count by their names."""
        named = (("train", self.train_data), ("query", self.query_data))
        tensors = [(f"{name}.{i}", t) for name, pair in named for i, t in enumerate(pair)]
        functions = [f"{f.__module__}.{f.__qualname__}" for f in (self.measure, self.loss)]
        return fingerprint_json(
            [
                fingerprint_model(self.make_model(0)),
                fingerprint_tensors(tensors),
                [stage.facts for stage in as_stages(self.optimizer)],
                functions,
            ]
        )

    def with_labels(self, labels: dict[int, int]) -> "StackedRetrain":
        """The same training, with new labels by number of the training example."""
        x, y = self.train_data
        y = y.clone()
        y[list(labels)] = torch.tensor(list(labels.values()), dtype=y.dtype)
        return replace(self, train_data=(x, y))

    def many(
        self, weights: Float[Tensor, "model train"], seeds: Sequence[int]
    ) -> Float[Tensor, "model query"]:
        """The measurement of every query after each of the runs."""
        models = [self.make_model(seed) for seed in seeds]
        trained = train(
            models,
            *self.train_data,
            subsets=torch.arange(weights.shape[1]).expand(len(seeds), -1),
            seeds=seeds,
            optimizer=self.optimizer,
            weights=weights,
            loss=self.loss,
        )
        x, y = self.query_data
        return vmap(self.measure, in_dims=(0, None))(outputs(models[0], trained, x), y)

    def __call__(self, weights: Float[Tensor, " train"], seed: int) -> Float[Tensor, " query"]:
        return self.many(weights[None], [seed])[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class PooledRetrain:
    """Retrains with a function of your own, each run in one of a pool of processes.

    Args:
        retrain: From weights and a seed to measurements. Other processes must be able to import it: a function at the
            top of a module, or an object of a class that is.
        n_processes: Processes that train.
        n_threads: Threads of PyTorch in each of them.
        n_parallel: Runs that a pool is started for, which takes a few seconds.
    """

    retrain: RetrainOne
    n_processes: int = 2
    n_threads: int = 1
    n_parallel: int = 32

    def many(
        self, weights: Float[Tensor, "model train"], seeds: Sequence[int]
    ) -> Float[Tensor, "model query"]:
        """The measurement of every query after each of the runs."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        options = (os.getpid(), self.n_threads)
        with ProcessPoolExecutor(self.n_processes, context, begin_worker, options) as pool:
            rows = pool.map(_measurements, repeat(self.retrain), weights.tolist(), seeds)
            return torch.tensor(list(rows), dtype=torch.float64)


def _measurements(retrain: RetrainOne, weights: list[float], seed: int) -> list[float]:
    """Plain numbers, which travel between processes without shared memory."""
    return retrain(torch.tensor(weights), seed).tolist()
