"""A bank of retrainings: ground truth for every claim about what training data does.

Each cell of the bank is one training run on one subset of the examples with one seed; it keeps
measurements on the queries, never weights. A bank is filled round by round (each subset once, then
each subset again with another seed), written after every few runs, and continued where it stopped.

Models that stack train side by side (`build_bank`). Whatever else trains a model is a function of a
subset and a seed, run in a pool of processes (`build_bank_with`). Both make the same kind of bank.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import vmap

from headwater.core.files import read_json, write_json
from headwater.core.fingerprint import fingerprint_model, fingerprint_tensors, portable
from headwater.core.locks import FolderLock
from headwater.training.loop import (
    SGD,
    Loss,
    Optimizer,
    Parameters,
    Stage,
    correct_class_margin,
    example_losses,
    outputs,
    train,
)
from headwater.training.optimizers import as_stages
from headwater.training.trajectory import write_tensors

Cell = tuple[int, int]  # subset, repeat
Trainer = Callable[[Int[Tensor, " n"], int], Mapping[str, Tensor]]

MASKS, MEASUREMENTS, META = "masks.safetensors", "measurements.safetensors", "meta.json"


def random_masks(
    n_train: int, n_subsets: int, *, fraction: float = 0.5, seed: int = 0
) -> Bool[Tensor, "subset n_train"]:
    """Random subsets of one size: `fraction` of the examples, True where an example is in.

    Example:
        >>> random_masks(10, 3, fraction=0.5).sum(1).tolist()
        [5, 5, 5]
    """
    size = round(fraction * n_train)
    if not 0 < size < n_train:
        raise ValueError(
            f"fraction must leave some of {n_train} examples in and some out; got {fraction}."
        )
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n_subsets, n_train, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(n_train, generator=generator)[:size]] = True
    return masks


@dataclass(frozen=True, kw_only=True)
class RetrainingBank:
    """Measurements of models retrained on subsets.

    Args:
        masks: Which examples each subset holds.
        measurements: By name, one number for each subset, repeat and query; NaN where the run has
            not been done yet.
        meta: How the runs were made: optimizer, seeds, digest of the data.
    """

    masks: Bool[Tensor, "subset n_train"]
    measurements: dict[str, Float[Tensor, "subset repeat query"]]
    meta: dict

    @classmethod
    def load(cls, folder: str | Path) -> "RetrainingBank":
        """Read a bank, finished or not."""
        folder = Path(folder)
        return cls(
            masks=load_file(folder / MASKS)["masks"],
            measurements=load_file(path) if (path := folder / MEASUREMENTS).exists() else {},
            meta=_today(read_json(folder / META)),
        )

    @property
    def done(self) -> Bool[Tensor, "subset repeat"]:
        """Which runs have been made."""
        if not self.measurements:
            return torch.zeros(len(self.masks), 0, dtype=torch.bool)
        return ~next(iter(self.measurements.values())).isnan().all(-1)

    def outcomes(self, name: str = "margin") -> Float[Tensor, "subset repeat query"]:
        """One measurement in the repeats that every subset has been through."""
        if name not in self.measurements:
            raise ValueError(f"The bank holds {sorted(self.measurements)}; asked for {name!r}.")
        return self.measurements[name][:, self.done.all(0)]


def build_bank(
    folder: str | Path,
    make_model: Callable[[int], nn.Module],
    train_data: tuple[Tensor, Tensor],
    query_data: tuple[Tensor, Tensor],
    masks: Bool[Tensor, "subset n_train"],
    *,
    optimizer: Optimizer | Sequence[Stage],
    repeats: int = 1,
    first_seed: int = 1000,
    same_run: bool = False,
    n_parallel: int = 10,
    loss: Loss = example_losses,
    measurements: Mapping[str, Loss] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RetrainingBank:
    """Train a model on every subset `repeats` times, or go on where an earlier call stopped.

    Run (k, r) takes its initial weights and the order of its examples from its own seed,
    `first_seed + r * n_subsets + k`, so that the mean over repeats estimates the expected outcome
    of training on the subset. With `same_run` it takes both from `first_seed + r`, goes through all
    examples, and those left out weigh nothing: what leaving out does to one particular run.

    Args:
        folder: Where the bank is kept; created when missing.
        make_model: The initial model of a seed.
        train_data: Inputs and targets of all training examples.
        query_data: Inputs and targets of the queries.
        masks: Subsets to train on, True where an example is in.
        optimizer: Optimizer, or stages; epochs are passes over the subset, so half the data is half
            the steps.
        repeats: Runs wanted of each subset; more than the bank has adds rounds to it.
        first_seed: Start of the seeds of the runs.
        same_run: Keep initial weights and order, and set weights to zero (see above).
        n_parallel: Models trained side by side, and the runs lost at most when interrupted.
        loss: Training loss of each example, from outputs and targets.
        measurements: What to keep of each query, from outputs and targets; the margin of the
            correct class and the cross-entropy when left out.
        progress: Called with the runs done and the runs wanted.

    Returns:
        The bank with at least `repeats` repeats.

    Raises:
        ValueError: The folder holds a bank made from other data, subsets or settings.
        FolderBusy: Another process is filling the bank.
    """
    folder = Path(folder)
    measure = dict(measurements or {"margin": correct_class_margin, "loss": example_losses})
    (x, y), (x_query, y_query) = train_data, query_data
    if masks.shape[1] != len(x) or not masks.any(1).all():
        raise ValueError(
            f"Each mask must choose one or more of the {len(x)} examples; got masks of shape "
            f"{tuple(masks.shape)}, the smallest with {int(masks.sum(1).min())} examples."
        )

    names = list(measure)

    def retrain(runs: list[Cell]) -> Parameters:
        chosen = masks[[subset for subset, _ in runs]]
        seeds = [_seed(*run, masks, first_seed, same_run) for run in runs]
        return train(
            [make_model(seed) for seed in seeds],
            x,
            y,
            subsets=_members(torch.ones_like(chosen) if same_run else chosen),
            seeds=seeds,
            optimizer=optimizer,
            weights=_weights(chosen, x) if same_run else None,
            loss=loss,
        )

    def groups(todo: list[Cell]) -> Iterator[tuple[list[Cell], dict[str, Tensor]]]:
        sizes = _sizes(masks, [stage.examples for stage in stages])
        for runs in _groups(todo, [()] * len(masks) if same_run else sizes, n_parallel):
            predicted = outputs(model, retrain(runs), x_query)
            yield (
                runs,
                {
                    name: vmap(f, in_dims=(0, None))(predicted, y_query)
                    for name, f in measure.items()
                },
            )

    model, stages = make_model(first_seed), as_stages(optimizer)
    meta = {
        "optimizer": [stage.facts for stage in stages],
        "same_run": same_run,
        "first_seed": first_seed,
        "model": fingerprint_model(model),
        "masks": fingerprint_tensors([("masks", masks)]),
        "train_data": fingerprint_tensors([("x", x), ("y", y)]),
        "query_data": fingerprint_tensors([("x", x_query), ("y", y_query)]),
    }
    return _fill(folder, masks, names, repeats, meta, groups, progress)


def build_bank_with(
    folder: str | Path,
    trainer: Trainer,
    masks: Bool[Tensor, "subset n_train"],
    *,
    made_from: Mapping[str, Any],
    repeats: int = 1,
    first_seed: int = 1000,
    same_run: bool = False,
    n_processes: int = 2,
    n_threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> RetrainingBank:
    """Fill a bank with a trainer of your own, each run in one of a pool of processes.

    Seeds are those of `build_bank`; with `same_run` all subsets of a repeat get the same seed, and
    the trainer sees to it that those left out weigh nothing while the rest stays as it was.

    Args:
        folder: Where the bank is kept; created when missing.
        trainer: From the numbers of a subset's examples and a seed to measurements: by name, one
            number for each query. Other processes must be able to import it: a function at the top
            of a module, or an object of a class that is.
        masks: Subsets to train on, True where an example is in.
        made_from: What identifies trainer and data, such as their names and fingerprints: a bank
            made from something else is refused.
        repeats: Runs wanted of each subset; more than the bank has adds rounds to it.
        first_seed: Start of the seeds of the runs.
        same_run: One seed for all subsets of a repeat (see above).
        n_processes: Processes that train; 1 trains in this one.
        n_threads: Threads of PyTorch in each of them.
        progress: Called with the runs done and the runs wanted.

    Returns:
        The bank with at least `repeats` repeats.

    Raises:
        ValueError: The folder holds a bank made from something else.
        FolderBusy: Another process is filling the bank.
    """

    def job(run: Cell) -> tuple[Tensor, int]:
        return masks[run[0]].nonzero()[:, 0], _seed(*run, masks, first_seed, same_run)

    def alone(todo: list[Cell]) -> Iterator[tuple[list[Cell], dict[str, Tensor]]]:
        for run in todo:
            yield [run], {name: value[None] for name, value in trainer(*job(run)).items()}

    def pooled(todo: list[Cell]) -> Iterator[tuple[list[Cell], dict[str, Tensor]]]:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        options = (os.getpid(), n_threads)
        with ProcessPoolExecutor(n_processes, context, begin_worker, options) as pool:
            waiting, rest = dict[Future, Cell](), list(todo)
            try:
                while waiting or rest:
                    while rest and len(waiting) < 2 * n_processes:
                        subset, seed = job(rest[0])
                        future = pool.submit(_train_one, trainer, subset.tolist(), seed)
                        waiting[future] = rest.pop(0)
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        values = {k: torch.tensor([v]) for k, v in future.result().items()}
                        yield [waiting.pop(future)], values
            finally:
                for future in waiting:
                    future.cancel()

    meta = {
        "made_from": portable(made_from, "made_from"),
        "same_run": same_run,
        "first_seed": first_seed,
        "masks": fingerprint_tensors([("masks", masks)]),
    }
    runner = alone if n_processes == 1 else pooled
    return _fill(folder, masks, None, repeats, meta, runner, progress)


def begin_worker(parent: int, n_threads: int) -> None:
    """Set threads, and end with the process that asked for the work, however that ends."""
    torch.set_num_threads(n_threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train_one(trainer: Trainer, subset: list[int], seed: int) -> dict[str, list[float]]:
    """Measurements as plain numbers, which travel between processes without shared memory."""
    return {name: value.tolist() for name, value in trainer(torch.tensor(subset), seed).items()}


def _fill(
    folder: str | Path,
    masks: Bool[Tensor, "subset n_train"],
    names: list[str] | None,
    repeats: int,
    meta: dict[str, Any],
    runner: Callable[[list[Cell]], Iterator[tuple[list[Cell], dict[str, Tensor]]]],
    progress: Callable[[int, int], None] | None,
) -> RetrainingBank:
    """Make the runs that a bank lacks, written as they come."""
    folder = Path(folder)
    with FolderLock(folder):
        bank = _open(folder, masks, names, repeats, meta)
        todo = [
            (k, r)
            for r in range(repeats)
            for k in range(len(masks))
            if not bank.measurements or not bank.done[k, r]
        ]
        for runs, values in runner(todo):
            if not bank.measurements:
                for name, value in values.items():
                    empty = torch.full((len(masks), repeats, value.shape[1]), torch.nan)
                    bank.measurements[name] = empty
            for name, value in values.items():
                bank.measurements[name][tuple(zip(*runs, strict=True))] = value.float()
            write_tensors(folder / MEASUREMENTS, bank.measurements)
            if progress is not None:
                progress(int(bank.done[:, :repeats].sum()), repeats * len(masks))
    return bank


def _seed(subset: int, repeat: int, masks: Tensor, first_seed: int, same_run: bool) -> int:
    return first_seed + (repeat if same_run else repeat * len(masks) + subset)


def _weights(chosen: Bool[Tensor, "model n_train"], x: Tensor) -> Float[Tensor, "model n_train"]:
    """1 for the examples that are in and 0 for the others, in the inputs' precision."""
    return chosen.to(x.dtype if x.is_floating_point() else torch.float32)


def _sizes(
    masks: Bool[Tensor, "subset n_train"], parts: Sequence[Tensor | None]
) -> list[tuple[int, ...]]:
    """How many examples of each subset every stage sees."""
    return [
        tuple(int((mask if part is None else mask[part]).sum()) for part in parts) for mask in masks
    ]


def _today(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings of a bank from before there was a choice of optimizers, as they are written now."""
    if "sgd" not in meta:
        return meta
    now = [SGD(**meta["sgd"]).facts | {"examples": None}]
    return {"optimizer": now} | {k: v for k, v in meta.items() if k != "sgd"}


def _members(masks: Bool[Tensor, "model n_train"]) -> Int[Tensor, "model n"]:
    """Numbers of the examples in each of some subsets of one size."""
    return torch.stack([mask.nonzero()[:, 0] for mask in masks])


def _open(
    folder: Path, masks: Tensor, names: list[str] | None, repeats: int, meta: dict[str, Any]
) -> RetrainingBank:
    """The bank in a folder, with room for `repeats` repeats; a new one where there is none.

    What a new bank measures, and of how many queries, the first run tells.
    """
    if not (folder / META).exists():
        with suppress(FileNotFoundError):
            (folder / MEASUREMENTS).unlink()  # left by a bank that was removed
        write_tensors(folder / MASKS, {"masks": masks})
        write_json(folder / META, meta)
        return RetrainingBank(masks=masks, measurements={}, meta=meta)
    bank = RetrainingBank.load(folder)
    other = [key for key in meta if bank.meta.get(key) != meta[key]]
    if other or (names and bank.measurements and sorted(bank.measurements) != sorted(names)):
        raise ValueError(
            f"{folder} holds a bank made with another {', '.join(other) or 'set of measurements'}; "
            "choose another folder, or delete this one to start again."
        )
    for name, values in bank.measurements.items():
        if values.shape[1] < repeats:
            empty = torch.full((len(masks), repeats, values.shape[2]), torch.nan)
            bank.measurements[name] = torch.cat([values, empty[:, values.shape[1] :]], dim=1)
    return bank


def _groups(
    runs: list[Cell], sizes: list[tuple[int, ...]], n_parallel: int
) -> Iterator[list[Cell]]:
    """Runs that can train side by side, as their subsets have one size; in the given order."""
    while runs:
        alike = [run for run in runs if sizes[run[0]] == sizes[runs[0][0]]]
        yield (group := alike[:n_parallel])
        runs = [run for run in runs if run not in group]
