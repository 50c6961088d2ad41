"""A bank of retrainings: ground truth for every claim about what training data does.

Each cell of the bank is one training run on one subset of the examples with one seed; it keeps
measurements on the queries, never weights. A bank is filled round by round (each subset once, then
each subset again with another seed), written after every few runs, and continued where it stopped.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import vmap

from headwater.core.files import read_json, write_json
from headwater.core.fingerprint import fingerprint_model, fingerprint_tensors
from headwater.core.locks import FolderLock
from headwater.training.loop import (
    SGD,
    Loss,
    Parameters,
    correct_class_margin,
    example_losses,
    outputs,
    train,
)

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
            measurements=load_file(folder / MEASUREMENTS),
            meta=read_json(folder / META),
        )

    @property
    def done(self) -> Bool[Tensor, "subset repeat"]:
        """Which runs have been made."""
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
    sgd: SGD,
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
        sgd: Optimizer; its epochs are passes over the subset, so half the data is half the steps.
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

    def seed_of(subset: int, repeat: int) -> int:
        return first_seed + (repeat if same_run else repeat * len(masks) + subset)

    def retrain(runs: list[tuple[int, int]]) -> Parameters:
        chosen = masks[[subset for subset, _ in runs]]
        seeds = [seed_of(*run) for run in runs]
        return train(
            [make_model(seed) for seed in seeds],
            x,
            y,
            subsets=_members(torch.ones_like(chosen) if same_run else chosen),
            seeds=seeds,
            sgd=sgd,
            weights=chosen.to(x.dtype) if same_run else None,
            loss=loss,
        )

    model = make_model(first_seed)
    meta = {
        "sgd": asdict(sgd),
        "same_run": same_run,
        "first_seed": first_seed,
        "model": fingerprint_model(model),
        "masks": fingerprint_tensors([("masks", masks)]),
        "train_data": fingerprint_tensors([("x", x), ("y", y)]),
        "query_data": fingerprint_tensors([("x", x_query), ("y", y_query)]),
    }
    with FolderLock(folder):
        bank = _open(folder, masks, list(measure), repeats, len(x_query), meta)
        todo = [(k, r) for r in range(repeats) for k in range(len(masks)) if not bank.done[k, r]]
        sizes = [0] * len(masks) if same_run else masks.sum(1).tolist()
        for runs in _groups(todo, sizes, n_parallel):
            predicted = outputs(model, retrain(runs), x_query)
            for name, function in measure.items():
                values = vmap(function, in_dims=(0, None))(predicted, y_query)
                bank.measurements[name][tuple(zip(*runs, strict=True))] = values.float()
            _write_tensors(folder / MEASUREMENTS, bank.measurements)
            if progress is not None:
                progress(int(bank.done[:, :repeats].sum()), repeats * len(masks))
    return bank


def _members(masks: Bool[Tensor, "model n_train"]) -> Int[Tensor, "model n"]:
    """Numbers of the examples in each of some subsets of one size."""
    return torch.stack([mask.nonzero()[:, 0] for mask in masks])


def _open(
    folder: Path, masks: Tensor, names: list[str], repeats: int, n_queries: int, meta: dict
) -> RetrainingBank:
    """The bank in a folder, with room for `repeats` repeats; a new one where there is none."""
    empty = torch.full((len(masks), repeats, n_queries), torch.nan)
    if not (folder / META).exists():
        bank = RetrainingBank(
            masks=masks, measurements={name: empty.clone() for name in names}, meta=meta
        )
        _write_tensors(folder / MASKS, {"masks": masks})
        _write_tensors(folder / MEASUREMENTS, bank.measurements)
        write_json(folder / META, meta)
        return bank
    bank = RetrainingBank.load(folder)
    other = [key for key in meta if bank.meta.get(key) != meta[key]]
    if other or sorted(bank.measurements) != sorted(names):
        raise ValueError(
            f"{folder} holds a bank made with another {', '.join(other) or 'set of measurements'}; "
            "choose another folder, or delete this one to start again."
        )
    for name, values in bank.measurements.items():
        if values.shape[1] < repeats:
            bank.measurements[name] = torch.cat([values, empty[:, values.shape[1] :]], dim=1)
    return bank


def _groups(
    runs: list[tuple[int, int]], sizes: list[int], n_parallel: int
) -> Iterator[list[tuple[int, int]]]:
    """Runs that can train side by side, as their subsets have one size; in the given order."""
    while runs:
        alike = [run for run in runs if sizes[run[0]] == sizes[runs[0][0]]]
        yield (group := alike[:n_parallel])
        runs = [run for run in runs if run not in group]


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file under another name, then rename it: a reader sees the old one or the new."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
