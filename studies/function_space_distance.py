"""How well summary statistics tell what a network has forgotten: function-space distances on handwritten digits.

Three questions of Dhawan, Huang, Bae and Grosse (2023, arXiv:2302.03519), of perceptrons on scikit-learn's digits:

- distance: a network that knows the digits 0 to 4 is moved along random directions, and fine-tuned on 5 to 9. How far
  do estimates of the distance of its outputs on the first task follow the true one?
- continual: it learns three tasks of three digits each. How much does it remember, by what is kept of earlier tasks?
  The weight of each penalty is chosen on other splits than those that are reported.
- mislabel: a tenth of the labels are wrong. How well do scores tell which?

    python studies/function_space_distance.py --folder runs/function-space --part distance
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import headwater
from headwater.adapt import Continual, Episode, OneHead, Regularizer, accuracy_of
from headwater.core.curvature import EKFAC, KFAC, Diagonal, Dual
from headwater.core.examples import TensorExamples
from headwater.core.function_space import (
    Distance,
    QuadraticDistance,
    StoredDistance,
    function_space_distance,
)
from headwater.core.task import Classification
from headwater.data.images import digits
from headwater.models.vision import mlp
from headwater.numerics.ranks import spearman
from headwater.numerics.resampling import Estimate, mean_interval
from headwater.trace import Influence, Proximal
from headwater.trace.measures import mislabel_auc
from headwater.trace.proximal import mislabel_scores
from headwater.training.optimizers import SGD, Adam

Figures = dict[str, dict[str, float]]  # by method, by quantity
FIRST, SECOND = tuple(range(5)), tuple(range(5, 10))
TASKS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
WEIGHTS = {
    "none": (0.0,),
    "function-space": (0.1, 1.0, 10.0, 100.0),
    "function-space, by class": (0.1, 1.0, 10.0),
    "ewc": (100.0, 1000.0, 10_000.0),
    "k-fac": (1.0, 10.0, 100.0),
    "stored": (1.0, 10.0),
    "replay": (1.0,),  # old and new examples count alike
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        folder: Where finished seeds are kept.
        part: Which question.
        heads: Whether the three tasks have outputs of their own, or share three.
        seeds: Seeds that are reported, each with its own split, initial weights and order.
        chosen_on: Seeds of the splits on which weights are chosen.
        hidden: Width of the two hidden layers.
        epochs: Passes over each task.
        batch_size: Examples a step.
    """

    folder: Path
    part: Literal["distance", "continual", "mislabel"]
    heads: Literal["own", "shared"] = "own"
    seeds: int = 5
    chosen_on: int = 2
    hidden: int = 128
    epochs: int = 30
    batch_size: int = 32


def split(classes: tuple[int, ...], seed: int) -> tuple[TensorExamples, TensorExamples]:
    """Some digits' images, 70 % to train on and the rest, in an order drawn from the seed; labels count from 0."""
    x, y = digits().tensors
    own = torch.isin(y, torch.tensor(classes)).nonzero().squeeze(1)
    y = y - min(classes)
    own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
    cut = round(0.7 * len(own))
    parts = [(x[i], y[i]) for i in (own[:cut], own[cut:])]
    train, test = (TensorExamples(*part, metadata={"label": part[1].tolist()}) for part in parts)
    return train, test


def learner(plan: Plan, **options: Any) -> Continual:
    """Training of one task after the other, with Adam."""
    rule = Adam(lr=1e-3, batch_size=plan.batch_size, epochs=plan.epochs, schedule="constant")
    return Continual(optimizer=rule, **options)


# How far outputs have moved


def estimates(model: nn.Module, train: TensorExamples, task: OneHead) -> dict[str, Distance]:
    """Everything that estimates the distance, by name."""

    def gated(**options: Any) -> Distance:
        return function_space_distance(model, train, task, **options)

    def quadratic(curvature: Any) -> Distance:
        return QuadraticDistance(headwater.fit(model, train, task, curvature=curvature))

    def stored(n: int) -> Distance:
        kept = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:n]
        return StoredDistance(model, task, train.subset(kept.tolist()))

    return {
        "LAFTR (BGLN-S)": gated(),
        "LAFTR, by class": gated(by="label"),
        "LAFTR, variances only": gated(diagonal=True),
        "LAFTR, by class, variances only": gated(by="label", diagonal=True),
        "linearized activations, drawn inputs": gated(method="linearized"),
        "exact network, drawn inputs": gated(method="exact"),
        "exact network, drawn inputs, by class": gated(method="exact", by="label"),
        "EWC (diagonal Fisher)": quadratic(Diagonal(fisher="exact")),
        "K-FAC": quadratic(KFAC(fisher="exact")),
        "EK-FAC": quadratic(EKFAC(fisher="exact")),
        "LAFTR, 40 stored inputs": gated(keep=40),
        "network linearized, 40 stored inputs": gated(method="tangent", keep=40),
        "activations linearized, 40 stored inputs": gated(method="linearized", keep=40),
        "exact, 40 stored inputs": stored(40),
        "exact, 200 stored inputs": stored(200),
    }


def trajectory(plan: Plan, model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    """Parameters on the way through fine-tuning on the second task."""
    train, _ = split(SECOND, seed)
    points: list[dict[str, Tensor]] = []
    rule = learner(replace(plan, epochs=1))
    episode = Episode(name="second", train=train, test=train, task=OneHead(outputs=SECOND))
    held = Regularizer()
    model = copy.deepcopy(model)
    for epoch in range(plan.epochs):
        rule.learn(model, episode, held, seed=1000 * seed + epoch)
        points.append({k: p.detach().clone() for k, p in model.named_parameters()})
    return points


def random_directions(model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    """Points along five random directions, from a hundredth to three tenths of each weight's size away."""
    generator, points = torch.Generator().manual_seed(seed), []
    for _ in range(5):
        way = {
            k: torch.randn(p.shape, generator=generator) * p.detach().norm() / p.numel() ** 0.5
            for k, p in model.named_parameters()
        }
        points += [
            {k: p.detach() + size * way[k] for k, p in model.named_parameters()}
            for size in torch.logspace(-2, -0.5, 8).tolist()
        ]
    return points


def distance_figures(plan: Plan, seed: int) -> Figures:
    """Pearson correlation and error of each estimate along directions and trajectory."""
    train, _ = split(FIRST, seed)
    task = OneHead(outputs=FIRST)
    model = mlp([64, plan.hidden, plan.hidden, 10], seed=seed)
    episode = Episode(name="first", train=train, test=train, task=task)
    learner(plan).learn(model, episode, Regularizer(), seed=seed)
    truth = StoredDistance(model, task, train)
    ways = {"random": random_directions(model, seed), "tuning": trajectory(plan, model, seed)}
    found: Figures = {}
    with torch.no_grad():
        exact = {k: torch.stack([truth(t) for t in points]) for k, points in ways.items()}
        for name, estimate in estimates(model, train, task).items():
            found[name] = {"numbers": float(estimate.n_numbers)}
            for way, points in ways.items():
                values = torch.stack([estimate(t) for t in points])
                both = torch.corrcoef(torch.stack([values, exact[way]]))
                error = (values - exact[way]).square().mean() / exact[way].square().mean()
                found[name][f"{way} pearson"] = float(both[0, 1])
                found[name][f"{way} error"] = float(error.sqrt())
                found[name][f"{way} bias"] = float((values / exact[way]).log().median().exp())
    found["true"] = {f"{way} largest": float(values.max()) for way, values in exact.items()}
    return found


# What is remembered


def continual_run(plan: Plan, name: str, weight: float, seed: int) -> tuple[float, float, int]:
    """Average accuracy after three tasks, forgetting, and numbers kept."""
    episodes = []
    for classes in TASKS:
        train, test = split(classes, seed)
        task = OneHead(outputs=classes) if plan.heads == "own" else Classification()
        episodes.append(Episode(name=str(classes), train=train, test=test, task=task))
    by = "label" if name.endswith("by class") else None
    memory: Any = name.partition(",")[0]
    rule = learner(plan, memory=memory, weight=weight, by=by, seed=seed)
    outputs = 9 if plan.heads == "own" else 3
    run = rule.adapt(mlp([64, plan.hidden, plan.hidden, outputs], seed=seed), episodes)
    return run.average, run.forgetting, run.n_numbers


def chosen_weights(plan: Plan, kept: "Kept") -> dict[str, float]:
    """The weight of each penalty with the best average accuracy on splits of other seeds."""
    chosen = {}
    for name, weights in WEIGHTS.items():
        means = {
            weight: sum(
                kept(f"choice {name} {weight} {seed}", continual_run, plan, name, weight, seed)[0]
                for seed in range(100, 100 + plan.chosen_on)
            )
            for weight in weights
        }
        chosen[name] = max(means, key=lambda weight: means[weight])
    return chosen


# Which labels are wrong


def mislabel_figures(plan: Plan, seed: int) -> Figures:
    """AUROC of each score, and how well influence without the data agrees with influence with them."""
    train, test = split(tuple(range(10)), seed)
    x, y = train.tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(y), generator=generator) < 0.1
    shift = torch.randint(1, 10, (len(y),), generator=generator)
    given = torch.where(wrong, (y + shift) % 10, y)
    data = TensorExamples(x, given, metadata={"label": given.tolist()})
    model, task = mlp([64, plan.hidden, plan.hidden, 10], seed=seed), Classification()
    rule = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=plan.epochs)
    episode = Episode(name="noisy", train=data, test=test, task=task)
    learner_of = Continual(optimizer=rule)
    learner_of.learn(model, episode, Regularizer(), seed=seed)
    options = {"weight_decay": 1e-3, "horizon": rule.horizon(len(data))}
    dual = headwater.fit(model, data, task, curvature=Dual(), **options)
    ekfac = headwater.fit(model, data, task, curvature=EKFAC(fisher="exact"), **options)
    with torch.no_grad():
        logits = model(x)
    distance = function_space_distance(dual)
    by_class = function_space_distance(dual, by="label")
    rates = {"damping": "weight_decay"}
    scores = {
        "loss of the given label": cross_entropy(logits, given, reduction="none"),
        "self-influence, data's curvature (dual)": Influence(**rates).self_influence(dual),
        "self-influence, data's curvature (EK-FAC)": Influence(**rates).self_influence(ekfac),
        "self-influence, LAFTR": mislabel_scores(dual, distance, **rates),
        "self-influence, LAFTR by class": mislabel_scores(dual, by_class, **rates),
    }
    found: Figures = {
        name: {"auroc": mislabel_auc(s, wrong, n_samples=2).value} for name, s in scores.items()
    }
    queries = TensorExamples(*(t[:40] for t in test.tensors))
    of_data = Influence(n_intervals=0, **rates).attribute(dual, queries)
    instead = Influence(n_intervals=0, **rates).attribute(distance.in_place_of_data(dual), queries)
    first_class = Influence(n_intervals=0, **rates).attribute(
        by_class.in_place_of_data(dual), queries
    )
    agree = {"one group": instead, "by class": first_class}
    for name, other in agree.items():
        rank = spearman(of_data.values.double(), other.values.double())
        found[f"influence, {name}"] = {"spearman": float(rank.nanmean())}
    some = torch.randperm(len(data), generator=generator)[:8].tolist()
    few = TensorExamples(*(t[:10] for t in test.tensors))
    response = Proximal(steps=40, tolerance=1e-2, **rates)
    exact = response.attribute(dual, few, among=some).values.double()
    free = response.attribute(dual, few, among=some, distance=distance).values.double()
    linear = of_data.values[:10][:, some].double()
    for name, values in (("LAFTR", free), ("linear, data's curvature", linear)):
        rank = spearman(exact, values)
        found[f"response, {name}"] = {"spearman": float(rank.nanmean())}
    found["model"] = {"test accuracy": accuracy_of(model, task, test)}
    return found


class Kept:
    """Results on disk, so that a killed study goes on where it stopped."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __call__(self, name: str, function: Callable, *args: Any) -> Any:
        place = self.folder / f"{name}.json"
        if not place.exists():
            place.write_text(json.dumps(function(*args)))
        return json.loads(place.read_text())


def interval(values: list[float], digits: int = 3) -> str:
    """Mean over seeds with its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    found: Estimate = mean_interval(torch.tensor(values, dtype=torch.float64))
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def figures_table(runs: list[Figures], columns: list[str]) -> str:
    """One row a method, means over seeds."""
    lines = [f"| method | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [run[name][column] for run in runs if column in run[name]]
            if column == "numbers":
                cells.append(f"{values[0]:,.0f}" if values else "")
            else:
                cells.append(interval(values) if values else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def continual_table(plan: Plan, kept: Kept) -> str:
    """One row a memory: chosen weight, average accuracy, forgetting, and how far above EWC."""
    weights = chosen_weights(plan, kept)
    runs = {
        name: [
            kept(f"run {name} {weight} {seed}", continual_run, plan, name, weight, seed)
            for seed in range(plan.seeds)
        ]
        for name, weight in weights.items()
    }
    lines = [
        "| memory | weight | numbers kept | average accuracy, % | forgetting, points | above EWC, points |",
        f"|{' --- |' * 6}",
    ]
    for name, found in runs.items():
        accuracy, forgetting, above = (
            [100 * r[0] for r in found],
            [100 * r[1] for r in found],
            [100 * (r[0] - e[0]) for r, e in zip(found, runs["ewc"], strict=True)],
        )
        cells = [name, f"{weights[name]:g}", f"{found[0][2]:,}"]
        cells += [interval(values, 2) for values in (accuracy, forgetting, above)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(plan: Plan, *, say: Callable[[str], None] = print) -> str:
    """The table of one part."""
    started = time.process_time()
    sizes = f"{plan.part} {plan.heads} {plan.hidden} {plan.epochs} {plan.batch_size}"
    kept = Kept(plan.folder / sizes)
    if plan.part == "continual":
        table = continual_table(plan, kept)
    else:
        measure = {"distance": distance_figures, "mislabel": mislabel_figures}[plan.part]
        runs = [kept(f"seed {seed}", measure, plan, seed) for seed in range(plan.seeds)]
        columns = {
            "distance": [
                "numbers",
                *(f"{way} {what}" for way in ("tuning", "random") for what in _SHOWN),
                "tuning largest",
                "random largest",
            ],
            "mislabel": ["auroc", "spearman", "test accuracy"],
        }[plan.part]
        table = figures_table(runs, columns)
    say(table)
    say(f"{time.process_time() - started:.0f} s of CPU time")
    return table


_SHOWN = ("pearson", "error", "bias")

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Plan, description=__doc__))
