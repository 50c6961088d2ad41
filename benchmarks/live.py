"""What a live index costs the training that it watches, and what its warnings find.

    python benchmarks/live.py overhead outliers

Overhead is CPU time of a training step (forward, backward, AdamW) of the small GPT of benchmarks/cost.py with a live index
over that of the plain step beside it, of one process and one thread: plain and live steps alternate, and the median of
the ratios of neighbours is told with a bootstrap interval. Results go to runs/bench/live.json.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from workloads import wikipedia

import headwater
from headwater.core.curvature import EKFAC
from headwater.core.examples import to_device
from headwater.core.fit import Fit
from headwater.core.index import LiveIndex, LoGra, Outliers, Whitened

RUNS = Path(__file__).parents[1] / "runs" / "bench"


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def interval(ratios: Tensor, draws: int = 2_000) -> tuple[float, float, float]:
    """Median, and the 95 % interval of it by the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(ratios), (draws, len(ratios)), generator=generator)
    low, high = ratios[index].median(1).values.quantile(torch.tensor([0.025, 0.975]).to(ratios))
    return float(ratios.median()), float(low), float(high)


def overhead(
    fit: Fit, kinds: dict[str, Any], folder: Path, *, batch_size: int, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Live steps over plain steps, minus one: median and interval for each kind of row."""
    model, task, data = fit.model, fit.task, fit.train
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    batches = [b for b in order.split(batch_size) if len(b) == batch_size]
    device = next(model.parameters()).device

    def plain(index: Tensor) -> None:
        task.loss(model, to_device(data.batch(index.tolist()), device)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def watched(live: LiveIndex, index: Tensor) -> None:
        with live.step(index):
            task.loss(model, to_device(data.batch(index.tolist()), device)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found: dict[str, list[float]] = {name: [] for name in kinds}
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lives = {}
        for name, kind in kinds.items():
            place = folder / "live" / name.replace(" ", "-")
            shutil.rmtree(place, ignore_errors=True)
            lives[name] = stack.enter_context(LiveIndex(fit, place, kind=kind))
            watched(lives[name], batches[0])
        for k in range(repeats):
            index = batches[k % len(batches)]
            for name, live in lives.items():
                before = cpu(lambda: plain(index))
                with_rows = cpu(lambda: watched(live, index))
                after = cpu(lambda: plain(index))
                found[name].append(with_rows / ((before + after) / 2) - 1)
    shutil.rmtree(folder / "live", ignore_errors=True)
    return {name: interval(torch.tensor(each)) for name, each in found.items()}


def small_gpt(folder: Path, *, curvature: Any = "identity", n: int = 256) -> Fit:
    workload = wikipedia(folder)
    return headwater.fit(
        workload.model, workload.train.subset(range(n)), workload.task, curvature=curvature,
        layers=list(workload.layers),
    )  # fmt: skip
