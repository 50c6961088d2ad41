"""Implicit bias in bilevel optimization, after Vicol, Lorraine, Pedregosa, Duvenaud and Grosse, arXiv:2212.14032.

Three questions on one thread: what one distilled point teaches weights that grow up beside it and weights that do not;
the same for distilled images of digits; and how well mislabelled examples are found by each hypergradient.

    python studies/bilevel_bias.py          # all three tables
    python studies/bilevel_bias.py clean --seeds 3
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from headwater.curate import (
    DataWeights,
    Distillation,
    HyperGradient,
    Implicit,
    InnerProblem,
    Unrolled,
    descend,
    distillation_problem,
    functional_model,
    source_weights,
    weighting_problem,
)
from headwater.curate.base import gradient_step
from headwater.curate.distillation import representatives
from headwater.data.images import digits
from headwater.models.vision import logistic_regression, mlp
from headwater.numerics.implicit_bias import project_onto_example
from headwater.numerics.ranks import average_ranks
from headwater.numerics.resampling import Estimate, mean_interval

SEEDS = range(5)  # --seeds


def interval(values: list[float]) -> Estimate:
    """The mean over seeds with Student's 95 % interval."""
    return mean_interval(torch.tensor(values, dtype=torch.float64))


def accuracy(make: Callable[[int], nn.Module], weights: dict, data: tuple) -> float:
    _, outputs = functional_model(make)
    return float((outputs(weights, data[0]).argmax(-1) == data[1]).double().mean())


def one_point(seed: int, kind: str, *, converged: bool = False) -> tuple[InnerProblem, dict]:
    """20 points of a linear function of features, taught by one distilled point (x, y).

    "curve": a smooth random curve in 24 Fourier features, x is a number. "plane": 25 features, x is all of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    k = torch.arange(1, 13).double()

    def fourier(x: Tensor) -> Tensor:
        angle = x[..., None] * k
        return torch.cat([angle.sin(), angle.cos()], -1) / 12**0.5

    if kind == "curve":
        features, X = fourier, fourier(torch.linspace(-3, 3, 20).double())
        truth, x = drawn(24) / k.repeat(2) ** 1.5, torch.tensor(1.0).double()
    else:
        features, X = torch.clone, drawn(20, 25) / 5
        truth, x = drawn(25), drawn(25)
        x = x / x.norm()
    y = X @ truth

    def project(w: dict, u: dict, batch: object, t: int) -> dict:
        return {"w": project_onto_example(w["w"], features(u["x"]), u["y"])}

    def inner(w: dict, u: dict, batch: object, t: int) -> Tensor:
        return (features(u["x"]) @ w["w"] - u["y"]).square() / 2

    problem = InnerProblem(
        init=lambda seed: {"w": torch.zeros_like(truth)},
        step=project if converged else gradient_step(inner, 0.5 if kind == "curve" else 0.1),
        outer=lambda w, u, b, t: (X @ w["w"] - y).square().mean() / 2,
        horizon=1 if converged else 200,
    )
    return problem, {"x": x, "y": torch.tensor(0.0).double()}


def point() -> None:
    """One distilled point; the loss on 20 points, relative to no training.

    Outer steps are plain descent at a high rate, with gradients clipped to steps of a fixed length.
    """
    rates = {"curve": (1e5, 1e-6), "plane": (100.0, 3e-3)}  # rate and clip, from seeds 100 to 105
    print("| | | weights at hand, by seed | mean [95 %] | fresh weights, last point [95 %] |")
    print("|---|---|---|---|---|")
    for kind, (lr, clip) in rates.items():
        rows: dict[str, list[tuple[float, float]]] = {
            "warm start, one inner step": [],
            "warm start, to convergence": [],
            "cold start, to convergence": [],
        }
        best = []
        for seed in SEEDS:
            for name, values in rows.items():
                converged = "convergence" in name
                problem, u = one_point(seed, kind, converged=converged)
                start = "warm" if "warm" in name else "cold"
                method = Unrolled(start=start, inner_steps=1)
                sgd = {"lr": lr, "clip": clip, "optimizer": torch.optim.SGD, "steps": 3000}
                settings = sgd if start == "warm" else {"lr": 0.1, "steps": 1500}
                found = descend(problem, u, method, **settings)
                before = float(problem.outer(problem.init(0), u, None, 0))
                values.append((found.coadapted / before, found.retrained[0] / before))
                if kind == "curve" and start == "cold":
                    grid = torch.cartesian_prod(
                        torch.linspace(-3.2, 3.2, 129).double(), torch.linspace(-4, 4, 33).double()
                    )
                    best.append(min(problem.retrain({"x": x, "y": y})[1] for x, y in grid) / before)
        for name, values in rows.items():
            kept, fresh = zip(*values, strict=True)
            told = ", ".join(f"{v:.3f}" for v in kept)
            print(f"| {kind} | {name} | {told} | {interval(list(kept))} ", end="")
            print(f"| {interval(list(fresh))} |", flush=True)
            if name == "warm start, one inner step":
                gain = interval([f - k for k, f in values])
        print(f"| {kind} | the first row's gain over fresh weights | | {gain} | |")
        if best:
            print(f"| {kind} | best single point on a grid | | | {interval(best)} |", flush=True)


def network(seed: int) -> nn.Module:
    return mlp([64, 64, 10], seed=seed)


def split(seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    x, y = digits().tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([*sizes, len(x) - sum(sizes)])
    return [(x[p], y[p]) for p in parts]


def distil() -> None:
    """Test accuracy of a 64-64-10 network on digits, taught by distilled images alone."""
    estimators: dict[str, tuple[HyperGradient, int]] = {
        "cold, 30 steps": (Unrolled(sample_init=True), 150),
        "warm, 3 steps": (Unrolled(start="warm", inner_steps=3), 1000),
    }
    print("| images | method | weights at hand [95 %] | fresh weights [95 %] |")
    print("|---|---|---|---|")
    for per_class in (1, 5):
        kept: dict[str, list[float]] = {name: [] for name in estimators}
        fresh: dict[str, list[float]] = {name: [] for name in estimators} | {"random images": []}
        for seed in SEEDS:
            real, test = split(seed, 1200)
            for name, (estimator, outer_steps) in estimators.items():
                method = Distillation(
                    estimator=estimator,
                    per_class=per_class,
                    outer_steps=outer_steps,
                    lr=0.3,
                    steps=30,
                    seed=seed,
                )
                found = method.learn(network, real)
                kept[name].append(accuracy(network, found.state.state, test))
                fresh[name].append(_taught(found.meta, real, test, seed))
            chosen = representatives(real[1], per_class, seed=seed)
            fresh["random images"].append(_taught({"images": real[0][chosen]}, real, test, seed))
        for name, values in fresh.items():
            at_hand = interval(kept[name]) if name in kept else ""
            print(f"| {10 * per_class} | {name} | {at_hand} | {interval(values)} |", flush=True)


def _taught(meta: dict[str, Tensor], real: tuple, test: tuple, seed: int, n: int = 3) -> float:
    """Mean test accuracy of networks that have seen the distilled images and nothing else."""
    problem = distillation_problem(network, real, n_classes=10, lr=0.3, steps=30)
    seeds = [10_000 + n * seed + i for i in range(n)]
    return sum(accuracy(network, problem.retrain(meta, seed=s)[0], test) for s in seeds) / n


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive example scores above a negative one."""
    ranks, n = average_ranks(scores), int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def clean() -> None:
    """600 digits, 30 % of their labels replaced by a wrong one, and 200 clean ones to judge by."""
    n, share = 600, 0.3
    linear = lambda seed: logistic_regression(64, 10, seed=seed)  # noqa: E731
    common = {"form": "gate", "batch_size": n, "l2": 3e-3, "objective": "final", "lr": 1.0}
    rows: dict[str, tuple[Callable[[int], nn.Module], DataWeights]] = {}

    def add(name: str, make: Callable[[int], nn.Module], estimator: HyperGradient, **other: object):
        settings = {**common, "outer_steps": 40, "outer_lr": 0.3, "steps": 100, **other}
        rows[name] = (make, DataWeights(estimator=estimator, **settings))

    warm = {"start": "warm", "inner_steps": 20}
    add("logistic: implicit, CG, warm", linear, Implicit(**warm, steps=20, tolerance=1e-3))
    add("logistic: implicit, Neumann 20, warm", linear, Implicit(**warm, solver="neumann"))
    add(
        "logistic: T1-T2 (Neumann 0), warm",
        linear,
        Implicit(**warm, solver="neumann", terms=0, lr=1.0),
    )
    add("logistic: unrolled, cold", linear, Unrolled())
    small = {"lr": 0.3, "l2": 1e-3}
    add("64-64-10: unrolled, cold", network, Unrolled(), **small)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    for seed in SEEDS:
        (x, y), validation, test = split(seed, n, 200)
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.rand(n, generator=generator) < share
        shift = torch.randint(1, 10, (n,), generator=generator)
        noisy = torch.where(wrong, (y + shift) % 10, y)
        for name, (make, method) in rows.items():
            learned = method.learn(make, (x, noisy), torch.arange(n), validation)
            problem = weighting_problem(
                make,
                (x, noisy),
                torch.arange(n),
                validation,
                form="gate",
                lr=method.lr,
                steps=method.steps,
                batch_size=n,
                l2=method.l2,
            )
            weights = source_weights(learned.meta["logits"], "gate")
            accuracies = [
                accuracy(make, problem.retrain({"logits": logits}, seed=77)[0], test)
                for logits in (learned.meta["logits"], torch.zeros(n))
            ]
            found[name].append((auroc(-weights, wrong), *accuracies))
    print(
        "| model and hypergradient | AUROC of wrong labels [95 %] | accuracy, weighted [95 %] |",
        end="",
    )
    print(" unweighted [95 %] |\n|---|---|---|---|")
    for name, values in found.items():
        cells = " | ".join(str(interval(list(column))) for column in zip(*values, strict=True))
        print(f"| {name} | {cells} |", flush=True)


TABLES = {"point": point, "distil": distil, "clean": clean}


def main(names: list[str]) -> None:
    global SEEDS
    if "--seeds" in names:
        at = names.index("--seeds")
        SEEDS, names = range(int(names[at + 1])), names[:at] + names[at + 2 :]
    torch.set_num_threads(1)
    for name in names or TABLES:
        started = time.perf_counter()
        print(f"\n## {name}: {TABLES[name].__doc__}\n", flush=True)
        TABLES[name]()
        print(f"\n{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
