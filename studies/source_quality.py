"""SOURCE beside EK-FAC influence, where theory tells them apart: training stopped early, long, and in two stages.

The workloads are small, after those of Bae et al. (2024, arXiv:2405.12186): clothes (Fashion-MNIST; MNIST digits
where its files are not at hand) classified by a perceptron that is stopped early or trained long, and digits seen
upright in a first stage and turned by 90 degrees in a second. Ground truth are retrainings on random halves of the
data, half of each stage. SOURCE has no damping to tune. EK-FAC's are the field's default (0.1 times each layer's mean
eigenvalue), the run's weight decay, and that plus one over the horizon; the sweep tells what tuning on the test would
have given.

    python studies/source_quality.py --folder runs/source --fashion /usr/share/datasets/fashion-mnist
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

import headwater
from headwater.core.curvature import EKFAC, Dual
from headwater.core.examples import Examples, TensorExamples
from headwater.core.fit import Fit, fits_at
from headwater.core.scores import Scores
from headwater.data.images import digits, fashion_mnist, mnist5000
from headwater.models.vision import mlp
from headwater.numerics.resampling import (
    Estimate,
    bootstrap_lds,
    bootstrap_lds_difference,
    noise_ceiling,
)
from headwater.trace import GradientDot, Influence, Source, TracIn
from headwater.training.bank import build_bank, random_masks
from headwater.training.optimizers import SGD, AdamW, Optimizer, Stage, as_stages
from headwater.training.run import train_model
from headwater.training.trajectory import Trajectory

TASK = headwater.Classification(measurement_of="margin")
DESCENT = {"momentum": 0.9, "weight_decay": 1e-3, "batch_size": 50}
Method = Callable[[Fit, TensorExamples, Trajectory], Scores]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data, and how they are trained on.

    Attributes:
        train: The examples of all stages.
        queries: What is asked about.
        groups: Number of the group of each query: which stage it is like.
        masks: Halves of the examples.
        optimizer: Optimizer, or stages.
        sizes: Widths of the perceptron.
    """

    train: TensorExamples
    queries: TensorExamples
    groups: Tensor
    masks: Tensor
    optimizer: Optimizer | list[Stage]
    sizes: tuple[int, ...] = (784, 64, 32, 10)


def workloads(fashion: Path | None, *, n: int, n_query: int, n_subsets: int) -> dict[str, Workload]:
    """The workloads by name."""
    clothes = mnist5000() if fashion is None else fashion_mnist(fashion)
    x, y = _drawn(clothes, n + n_query)
    single = {
        "train": TensorExamples(x[:n], y[:n]),
        "queries": TensorExamples(x[n:], y[n:]),
        "groups": torch.zeros(n_query, dtype=torch.int64),
        "masks": random_masks(n, n_subsets),
    }
    early = SGD(lr=0.02, schedule="constant", epochs=4, **DESCENT)
    late = SGD(lr=0.05, schedule="linear", epochs=30, **DESCENT)
    adam = AdamW(lr=1e-3, weight_decay=0.0, batch_size=50, epochs=4, schedule="constant")
    x, y = _drawn(mnist5000(), n + n_query)
    small, labels = _drawn(digits(), n + n_query)
    tiny = single | {
        "train": TensorExamples(small[:n], labels[:n]),
        "queries": TensorExamples(small[n:], labels[n:]),
        "sizes": (64, 48, 10),
    }
    plain = replace(late, schedule="constant")
    turned = torch.arange(n + n_query) % 2 == 1
    x = torch.where(turned[:, None], x.unflatten(1, (28, 28)).rot90(1, (1, 2)).flatten(1), x)
    first, second = ((turned[:n] == stage).nonzero()[:, 0] for stage in (False, True))
    masks = torch.zeros(n_subsets, n, dtype=torch.bool)
    for seed, part in enumerate((first, second)):
        masks[:, part] = random_masks(len(part), n_subsets, seed=seed)
    rule = SGD(lr=0.02, schedule="constant", epochs=8, **DESCENT)
    stages = [Stage(optimizer=rule, examples=e, name=s) for e, s in ((first, "1"), (second, "2"))]
    return {
        "stopped early": Workload(optimizer=early, **single),
        "trained long": Workload(optimizer=late, **single),
        "Adam, stopped early": Workload(optimizer=adam, **single),
        "digits, 4 epochs": Workload(optimizer=replace(plain, epochs=4), **tiny),
        "digits, 30 epochs": Workload(optimizer=plain, **tiny),
        "two stages": Workload(
            train=TensorExamples(x[:n], y[:n]),
            queries=TensorExamples(x[n:], y[n:]),
            groups=turned[n:].long(),
            masks=masks,
            optimizer=stages,
        ),
    }


def _drawn(examples: TensorExamples, n: int) -> tuple[Tensor, Tensor]:
    x, y = examples.tensors
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]
    return x[index], y[index]


def influence(damping: str) -> Method:
    """EK-FAC influence at the end of the run."""
    method = Influence(damping=damping, n_intervals=0)
    return lambda fit, queries, run: method.attribute(fit, queries)


def source(**options) -> Method:
    """SOURCE on the run."""
    method = Source(**options)
    return lambda fit, queries, run: method.attribute(fit, queries, trajectory=run)


def dual(method: Source | Influence) -> Method:
    """With the exact Gauss-Newton matrix of two drawn labels an example."""

    def attribute(fit: Fit, queries: TensorExamples, run: Trajectory) -> Scores:
        exact = _fit(fit.model, fit.train, run, Dual(fisher="mc", draws=2, folds=1))
        if isinstance(method, Source):
            return method.attribute(exact, queries, trajectory=run)
        return method.attribute(exact, queries)

    return attribute


def tracin(fit: Fit, queries: TensorExamples, run: Trajectory) -> Scores:
    """Gradient products at all checkpoints alike."""
    n = range(1, len(run.checkpoints))
    return TracIn().attribute(fit, queries, fits=fits_at(fit, [run.load_checkpoint(i) for i in n]))


METHODS: dict[str, Method] = {
    "gradient dot": lambda fit, queries, run: GradientDot().attribute(fit, queries),
    "TracIn": tracin,
    "EK-FAC, 0.1 x mean": influence("0.1 relative"),
    "EK-FAC, weight decay": influence("weight_decay"),
    "EK-FAC, decay + 1/horizon": influence("horizon"),
    "sweep: EK-FAC, 1 x mean": influence("1 relative"),
    "sweep: EK-FAC, 10 x mean": influence("10 relative"),
    "sweep: EK-FAC, 100 x mean": influence("100 relative"),
    "SOURCE, L = 1": source(segments=1),
    "SOURCE, L = 2": source(segments=2),
    "SOURCE, L = 3": source(segments=3),
    "SOURCE, L = 6": source(segments=6),
    "FAST-SOURCE, L = 3": source(segments=3, fast=True),
    "dual, decay + 1/horizon": dual(Influence(damping="horizon", n_intervals=0)),
    "FAST-SOURCE on the dual, L = 3": dual(Source(segments=3, fast=True)),
}


def _fit(model, train: Examples, run: Trajectory, curvature) -> Fit:
    horizon = None if run.adaptive else run.horizon
    options = {"weight_decay": run.weight_decay or None, "adaptive": run.adaptive}
    return headwater.fit(
        model, train, TASK, curvature=curvature, horizon=horizon, batch_size=500, **options
    )


def scores_of(
    workload: Workload, folder: Path, seeds: int, chosen: list[str] | None = None
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Scores of every method for every seed's model, and seconds a model."""
    found: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    for seed in range(seeds):
        model = mlp(workload.sizes, seed=seed)
        run = train_model(
            model,
            workload.train,
            TASK,
            workload.optimizer,
            folder=folder / f"run{seed}",
            checkpoints=6,
            keep_optimizer=True,
            seed=seed,
        )
        assert run is not None
        fit = _fit(model, workload.train, run, EKFAC(folds=1))
        for name, method in METHODS.items():
            asks = "decay" in name
            short = name.endswith("L = 1") and len(run.stages) > 1  # a stage is a segment at least
            if (chosen and name not in chosen) or (run.adaptive and asks) or short:
                continue
            began = time.perf_counter()
            values = method(fit, workload.queries, run).values.double()
            found.setdefault(name, []).append(values)
            seconds[name] = seconds.get(name, 0.0) + (time.perf_counter() - began) / seeds
    return found, seconds


def outcomes_of(workload: Workload, folder: Path, repeats: int) -> Tensor:
    """Margins after the retrainings (subset, repeat, query)."""
    x, y = workload.train.tensors
    bank = build_bank(
        folder / "bank",
        lambda seed: mlp(workload.sizes, seed=seed),
        (x, y),
        tuple(workload.queries.tensors),  # type: ignore[arg-type]
        workload.masks,
        optimizer=workload.optimizer,
        repeats=repeats,
        n_parallel=20,
    )
    return bank.outcomes("margin").double()


def judge(
    workload: Workload, folder: Path, *, seeds: int, repeats: int, chosen: list[str] | None = None
) -> dict[str, tuple[Estimate, Estimate]]:
    """Scores of single models (mean over seeds) and of their ensemble, printed as rows of a table."""
    outcomes = outcomes_of(workload, folder, repeats)
    truth, masks = outcomes.mean(1), workload.masks
    found, seconds = scores_of(workload, folder, seeds, chosen)
    ceiling = noise_ceiling(outcomes)
    right = (truth > 0).double().mean()
    print(f"\nnoise ceiling {ceiling}; {right:.2f} of queries right after a half\n")
    parts = workload.groups.unique().tolist()
    heads = [f"queries like stage {p + 1}" for p in parts] if len(parts) > 1 else []
    print("| " + " | ".join(["method", "one model", "ensemble", *heads, "seconds"]) + " |")
    print("|" + "---|" * (4 + len(heads)))
    table: dict[str, tuple[Estimate, Estimate]] = {}
    for name, each in found.items():
        single, several = lds_of(each, masks, truth)
        table[name] = single, several
        by_group = []
        for part in parts if heads else []:
            own = workload.groups == part
            by_group.append(f"{lds_of([v[own] for v in each], masks, truth[:, own])[0].value:.3f}")
        cells = [name, _text(single), _text(several), *by_group, f"{seconds[name]:.1f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    rivals = [n for n in found if n.startswith("EK-FAC")]
    for name in (n for n in found if "SOURCE" in n and "dual" not in n):
        told = [f"{r} {_text(difference(found[name], found[r], masks, truth))}" for r in rivals]
        print(f"{name} above: " + "; ".join(told), flush=True)
    return table


def lds_of(each: list[Tensor], masks: Tensor, truth: Tensor) -> tuple[Estimate, Estimate]:
    """Of single models, mean over them, and of their mean scores."""
    alone = [bootstrap_lds(v, masks, truth, n_samples=300) for v in each]
    return mean_of(alone), bootstrap_lds(torch.stack(each).mean(0), masks, truth, n_samples=300)


def difference(ours: list[Tensor], others: list[Tensor], masks: Tensor, truth: Tensor) -> Estimate:
    """By how much one method is above another for the same models, mean over them."""
    pairs = zip(ours, others, strict=True)
    return mean_of([bootstrap_lds_difference(a, b, masks, truth, n_samples=300) for a, b in pairs])


def mean_of(each: list[Estimate]) -> Estimate:
    """Mean over models; the ends too, as the models share queries and subsets."""
    value, low, high = (
        sum(getattr(e, k) for e in each) / len(each) for k in ("value", "low", "high")
    )
    return Estimate(value, low, high, each[0].n)


def _text(e: Estimate) -> str:
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the study is.

    Args:
        folder: Where runs and banks are kept.
        fashion: Folder of Fashion-MNIST's files; MNIST digits when left out.
        examples: Training examples.
        queries: Queries.
        subsets: Random halves.
        repeats: Retrainings of each half.
        seeds: Models that are attributed.
        only: Names of workloads; all when left out.
        threads: Threads of PyTorch.
    """

    folder: Path
    fashion: Path | None = None
    examples: int = 1000
    queries: int = 100
    subsets: int = 60
    repeats: int = 4
    seeds: int = 3
    only: tuple[str, ...] = ()
    threads: int = 1


def main(plan: Plan) -> None:
    torch.set_num_threads(plan.threads)
    sizes = {"n": plan.examples, "n_query": plan.queries, "n_subsets": plan.subsets}
    for name, workload in workloads(plan.fashion, **sizes).items():
        if plan.only and name not in plan.only:
            continue
        began, folder = time.perf_counter(), plan.folder / name.replace(", ", "-").replace(" ", "-")
        rules = [s.optimizer for s in as_stages(workload.optimizer)]
        print(f"\n## {name}: {', then '.join(map(str, rules))}", flush=True)
        judge(workload, folder, seeds=plan.seeds, repeats=plan.repeats)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Plan, description=__doc__))
