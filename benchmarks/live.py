"""What a live index costs the training that it watches, and what its warnings find.

    python benchmarks/live.py overhead outliers

Overhead is CPU time of a training step (forward, backward, AdamW) of the small GPT of benchmarks/cost.py with a live
index over that of the plain steps beside it, in one process with one thread: plain and live steps alternate, and the
median of the ratios of neighbours is told with a bootstrap interval. Results go to runs/bench/live.json.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from workloads import VOCABULARY, _text_examples, _tokens, wikipedia

import headwater
from headwater.core.curvature import EKFAC
from headwater.core.examples import to_device
from headwater.core.fit import Fit
from headwater.core.index import LiveIndex, LoGra, Outliers, Whitened
from headwater.core.task import CausalLM, Classification
from headwater.data.images import mnist5000
from headwater.models.vision import mlp

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
        index, before = batches[0], cpu(partial(plain, batches[0]))
        for k in range(repeats):
            for name, live in lives.items():
                with_rows = cpu(partial(watched, live, index))
                after = cpu(partial(plain, index))
                found[name].append(2 * with_rows / (before + after) - 1)
                before = after
            index = batches[k % len(batches)]
    shutil.rmtree(folder / "live", ignore_errors=True)
    return {name: interval(torch.tensor(each)) for name, each in found.items()}


def small_gpt(folder: Path) -> Fit:
    """The small language model with its EK-FAC fit, as in benchmarks/index.py."""
    workload = wikipedia(folder)
    return headwater.fit(
        workload.model, workload.train, workload.task, curvature=EKFAC(own_bases=False),
        layers=list(workload.layers), folder=folder / "work-gpt" / "fit", batch_size=1_000,
    )  # fmt: skip


KINDS = {
    "LoGra, random 16 x 16": LoGra(),
    "LoGra, random 8 x 8": LoGra(rank=8),
    "LoGra, random 32 x 32": LoGra(rank=32),
    "whitened, random 16 x 16": Whitened(sides="random"),
    "whitened, leading 16² on average": Whitened(sides="leading"),
}


def small_digits(share: float, seed: int = 0) -> tuple[Fit, set[str]]:
    """A network on MNIST digits of which a share is labelled wrongly, and the ids of those."""
    x, y = mnist5000().tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    y = y.index_put((wrong,), (y[wrong] + shift) % 10)
    fit = headwater.fit(mlp([784, 128, 10]), (x, y), Classification(), curvature="identity")
    return fit, {str(i) for i in wrong.tolist()}


def small_text(folder: Path, share: float, seed: int = 0) -> tuple[Fit, set[str]]:
    """A language model on Wikipedia sequences of which a share has its tokens shuffled, and the ids of those."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = _tokens(folder / "tokens.safetensors")[:1_500, :64].clone()
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))].tolist()
    for i in wrong:
        rows[i] = rows[i][torch.randperm(rows.shape[1], generator=generator)]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    fit = headwater.fit(
        LlamaForCausalLM(config), _text_examples(rows), CausalLM(), curvature="identity",
        layers=["model.layers.*"],
    )  # fmt: skip
    return fit, {str(i) for i in wrong}


def watched_run(
    fit: Fit, place: Path, *, epochs: int, batch_size: int, told: bool, rate: float, lr: float
) -> LiveIndex:
    """A run with Adam whose outliers are looked for, by the losses if they are told, else by the rows."""
    model, data = fit.model.train(), fit.train
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    options = Outliers(rate=rate)
    shutil.rmtree(place, ignore_errors=True)
    with LiveIndex(fit, place, kind=LoGra(), optimizer=optimizer, outliers=options) as live:
        for _ in range(epochs):
            for some in torch.randperm(len(data)).split(batch_size):
                with live.step(some) as step:
                    losses = fit.task.loss(model, data.batch(some.tolist()))
                    if told:
                        step.follow(losses)
                    losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    shutil.rmtree(place)
    return live


def found_outliers(folder: Path, rate: float = 0.01) -> dict[str, dict[str, float]]:
    """What is warned of on clean data, and with 3 % of planted errors."""
    found = {}
    makers = {
        "MNIST digits, 6 epochs": (lambda s: small_digits(s), 6, 32, 1e-3),
        "Wikipedia sequences, 3 epochs": (lambda s: small_text(folder, s), 3, 16, 2e-3),
    }
    for name, (make, epochs, batch_size, lr) in makers.items():
        for told in (True, False):
            result: dict[str, float] = {"stated rate": rate}
            for share in (0.0, 0.03):
                torch.manual_seed(0)
                fit, wrong = make(share)
                live = watched_run(
                    fit, folder / "live", epochs=epochs, batch_size=batch_size, told=told,
                    rate=rate, lr=lr,
                )  # fmt: skip
                warned = {each.id for each in live.outliers}
                if not wrong:
                    result["rate on clean data"] = live.flagged
                else:
                    right = len(warned & wrong)
                    result |= {
                        "planted": len(wrong), "warned of": len(warned),
                        "precision": right / max(len(warned), 1), "recall": right / len(wrong),
                    }  # fmt: skip
            found[f"{name}, by {'loss' if told else 'self-influence'}"] = result
    return found


def main(what: tyro.conf.Positional[list[str]], *, repeats: int = 15, threads: int = 1) -> None:
    """Measure what is named and keep the results.

    Args:
        what: Of overhead, outliers.
        repeats: Live steps of each kind.
        threads: Threads of matrix products.
    """
    torch.set_num_threads(threads)
    file = RUNS / "live.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    warnings.simplefilter("ignore")
    for name in what:
        if name == "overhead":
            results[name] = overhead(small_gpt(RUNS), KINDS, RUNS, batch_size=16, repeats=repeats)
        else:
            results[name] = found_outliers(RUNS)
        print(name, json.dumps(results[name], indent=2))
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
