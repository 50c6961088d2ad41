r"""How sure is a classifier of digits, where the digits are not like those it learned from?

Perceptrons on 1,000 of scikit-learn's digits, by two recipes: stopped early, and trained five times as long with little
decay, which makes them overconfident. 300 further digits serve for validation, on which everything is chosen; the rest
is the test, as it is and rotated, noisy or blurred at five levels each. Then: inputs that are no digits of the known
classes, labels that were changed, and the truth by refitting that the complexities stand for.

    python studies/calibration_shift.py --folder runs/calibration

A run that was stopped goes on where it was; finished seeds are read.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

import headwater
from headwater.bench.image_workloads import rotated
from headwater.calibrate import (
    Calibrator,
    IFComp,
    LastLayerLaplace,
    LastLayerPNML,
    ScaledPredictor,
    TemperatureScaling,
    complexity,
    genie_probabilities,
)
from headwater.calibrate.pnml import regret
from headwater.core.curvature import EKFAC
from headwater.core.examples import TensorExamples
from headwater.core.files import read_json, write_json
from headwater.core.fit import Fit
from headwater.core.task import Classification
from headwater.core.tempering import fit_at_temperature
from headwater.data.images import digits
from headwater.models.vision import mlp
from headwater.numerics.calibration import log_losses
from headwater.numerics.detection import auroc
from headwater.numerics.ranks import spearman
from headwater.numerics.resampling import Estimate, mean_interval
from headwater.training.loop import train, unstack
from headwater.training.optimizers import SGD

EARLY = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=50, epochs=20)
LATE = replace(EARLY, weight_decay=1e-4, epochs=100)
RECIPES = {"early": EARLY, "late": LATE}
N_TRAIN, N_VALIDATION = 1000, 300

Levels = dict[str, list[Tensor]]
Results = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured.

    Args:
        folder: Where finished seeds are kept.
        seeds: Seeds of splits, weights and noise. Temperature, damping and the prudent rule were chosen on seeds 0, 1,
            100 and 101.
        parts: Which tables.
    """

    folder: Path = Path("runs/calibration")
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    parts: tuple[str, ...] = ("shift", "ood", "mislabel", "truth")


def trained(x: Tensor, y: Tensor, sizes: tuple[int, ...], seed: int, rule: SGD) -> Fit:
    """A perceptron, as a fit whose curvature is still to be made."""
    model = mlp(sizes, seed=seed)
    every = torch.arange(len(x))[None]
    found = train([model], x, y, subsets=every, seeds=[seed], optimizer=rule)
    model.load_state_dict(unstack(found, 0))
    return headwater.fit(model, (x, y), Classification(), curvature="identity")


def split(seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Training, validation and test digits."""
    x, y = digits().tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([N_TRAIN, N_VALIDATION, len(x) - N_TRAIN - N_VALIDATION])
    return tuple((x[part], y[part]) for part in parts)


def blurred(x: Tensor, width: float) -> Tensor:
    """Images of 8 × 8 pixels under a Gaussian kernel."""
    kernel = torch.exp(-torch.arange(-3, 4).square() / (2 * width**2))
    kernel = kernel / kernel.sum()
    image = F.pad(x.view(-1, 1, 8, 8), (3, 3, 3, 3))
    image = F.conv2d(F.conv2d(image, kernel.view(1, 1, 1, 7)), kernel.view(1, 1, 7, 1))
    return image.flatten(1)


def shifted(x: Tensor, seed: int) -> Levels:
    """The test digits, and what becomes of them at each level."""
    noise = torch.Generator().manual_seed(seed)
    return {
        "none": [x],
        "rotation": [rotated(x, degrees) for degrees in (10.0, 20.0, 30.0, 45.0, 60.0)],
        "noise": [
            x + size * torch.randn(x.shape, generator=noise) for size in (0.1, 0.2, 0.3, 0.4, 0.6)
        ],
        "blur": [blurred(x, width) for width in (0.4, 0.6, 0.8, 1.0, 1.3)],
    }


METHODS: dict[str, Calibrator | None] = {
    "softmax": None,
    "temperature scaling": TemperatureScaling(),
    "last-layer Laplace": LastLayerLaplace(),
    "last-layer pNML": LastLayerPNML(),
    "IF-COMP": IFComp(),
    "IF-COMP, probability space": IFComp(space="probability"),
    "IF-COMP, least loss": IFComp(prudent=False),
    "IF-COMP at τ = 1": IFComp(temperature=1.0),
    "IF-COMP at τ = 10": IFComp(temperature=10.0),
    "IF-COMP at τ = 1000": IFComp(temperature=1000.0),
}


def shift(seed: int, recipe: str) -> Results:
    """Calibration error and log loss of every method, by kind and level of shift."""
    (x, y), validation, (x_test, y_test) = split(seed)
    fit = trained(x, y, (64, 64, 32, 10), seed, RECIPES[recipe])
    sets, found = shifted(x_test, seed), {}
    for name, method in METHODS.items():
        started = time.process_time()
        predictor = method.calibrate(fit, validation) if method else ScaledPredictor(fit)
        row = {"seconds": time.process_time() - started}
        for kind, levels in sets.items():
            for level, inputs in enumerate(levels, start=1):
                predictions = predictor.predict((inputs, y_test))
                measures = predictions.measures()
                row |= {f"{kind} {level} {m}": measures[m] for m in ("ece", "nll", "accuracy")}
                row["passes"] = predictions.facts.get("passes_beyond_fit", 0)
        found[name] = row
    return found


def ood(seed: int, recipe: str) -> Results:
    """AUROC of inputs that are no digits of the known classes, of which there are eight."""
    (x, y), _, (x_test, y_test) = split(seed)
    known, inside = y < 8, y_test < 8
    fit = trained(x[known], y[known], (64, 64, 32, 8), seed, RECIPES[recipe])
    draw = torch.Generator().manual_seed(seed)
    n = int(inside.sum())
    orders = torch.rand(n, 64, generator=draw).argsort(1)
    others = {
        "held-out classes": x_test[~inside],
        "permuted pixels": x_test[inside].gather(1, orders),
        "blank": torch.rand(n, 1, generator=draw).expand(n, 64).contiguous(),
        "uniform noise": torch.rand(n, 64, generator=draw),
    }
    soft = fit_at_temperature(fit, 3.0, curvature=EKFAC(folds=1))
    single = fit_at_temperature(fit, 1.0, curvature=EKFAC(folds=1))
    last = LastLayerPNML().calibrate(fit)

    def scores(inputs: Tensor) -> dict[str, Tensor]:
        """High for what is unlike the training data."""
        data = TensorExamples(inputs, torch.zeros(len(inputs), dtype=torch.int64))
        found, plain = complexity(soft, data), complexity(single, data)
        logits = found.logits
        p = logits.softmax(1)
        return {
            "max softmax": -p.amax(1),
            "entropy": -(p * logits.log_softmax(1)).sum(1),
            "energy": -logits.logsumexp(1),
            "last-layer pNML": regret(last.genies(data)),
            "IF-COMP": -found.confidence(),
            "IF-COMP, complexity alone": -found.confidence("complexity"),
            "IF-COMP, entropy-like": -found.confidence("entropy"),
            "IF-COMP at τ = 1": -plain.confidence(),
        }

    inner = scores(x_test[inside])
    outer = {kind: scores(inputs) for kind, inputs in others.items()}
    return {
        name: {kind: area(outer[kind][name], values) for kind in others}
        for name, values in inner.items()
    }


def area(positive: Tensor, negative: Tensor) -> float:
    """AUROC of two samples."""
    which = torch.arange(len(positive) + len(negative)) < len(positive)
    return float(auroc(torch.cat([positive, negative]), which))


def mislabel(seed: int, recipe: str) -> Results:
    """AUROC of a tenth of the training labels that were changed into another."""
    (x, y), *_ = split(seed)
    draw = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(N_TRAIN, dtype=torch.bool)
    wrong[torch.randperm(N_TRAIN, generator=draw)[: N_TRAIN // 10]] = True
    other = (y + torch.randint(1, 10, y.shape, generator=draw)) % 10
    fit = trained(x, torch.where(wrong, other, y), (64, 64, 32, 10), seed, RECIPES[recipe])
    soft = fit_at_temperature(fit, 3.0, curvature=EKFAC(folds=1))
    found = complexity(soft, fit.train)
    plain = complexity(fit_at_temperature(fit, 1.0, curvature=EKFAC(folds=1)), fit.train)
    scores = {
        "loss": log_losses(found.logits.softmax(1), found.labels),
        "IF-COMP": found.labelled(),
        "IF-COMP, first order": found.labelled(first_order=True),
        "IF-COMP, complexity alone": found.unlabelled,
        "IF-COMP at τ = 1": plain.labelled(),
    }
    return {name: {"auroc": float(auroc(v, wrong))} for name, v in scores.items()}


def truth(seed: int, recipe: str) -> Results:
    """Rank correlation with the regret of models trained on with each label of 100 points, 50 steps each."""
    x, y = digits().tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    some, asked = order[:500], order[500:600]
    rule = replace(RECIPES[recipe], weight_decay=1e-3, epochs=100)
    fit = trained(x[some], y[some], (64, 32, 10), seed, rule)
    further = replace(rule, lr=0.1, batch_size=501, epochs=50, schedule="constant")
    genies = genie_probabilities(fit.model, x[some], y[some], x[asked], 10, further)
    actual, queries = regret(genies), (x[asked], y[asked])
    logits = complexity(fit_at_temperature(fit, 1.0), queries).logits
    p = logits.softmax(1)
    scores = {
        "entropy": -(p * logits.log_softmax(1)).sum(1),
        "last-layer pNML": regret(LastLayerPNML().calibrate(fit).genies(queries)),
    }
    for tau in (1.0, 3.0, 10.0, 1000.0):
        soft = fit_at_temperature(fit, tau, curvature=EKFAC(folds=1))
        scores[f"IF-COMP at τ = {tau:g}"] = complexity(soft, queries).unlabelled
    return {name: {"spearman": float(spearman(v, actual))} for name, v in scores.items()}


PARTS: dict[str, Callable[[int, str], Results]] = {
    "shift": shift,
    "ood": ood,
    "mislabel": mislabel,
    "truth": truth,
}


def measured(options: Study, part: str, recipe: str) -> list[Results]:
    """What each seed gave, made where it is not yet known."""
    found = []
    for seed in options.seeds:
        place = options.folder / f"{part}-{recipe}-{seed}.json"
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, PARTS[part](seed, recipe))
        found.append(read_json(place))
    return found


def cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def over(results: list[Results], name: str, value: Callable[[dict[str, float]], float]) -> str:
    """A mean over seeds with its interval."""
    return cell(mean_interval(torch.tensor([value(found[name]) for found in results])))


def mean_of(kinds: tuple[str, ...], measure: str) -> Callable[[dict[str, float]], float]:
    """Mean of a measure over all levels of some kinds of shift."""

    def value(row: dict[str, float]) -> float:
        chosen = [v for k, v in row.items() if k.startswith(kinds) and k.endswith(f" {measure}")]
        return sum(chosen) / len(chosen)

    return value


SHIFTS = ("rotation", "noise", "blur")


def show_shift(results: list[Results]) -> None:
    columns = {"ECE, none": (("none",), "ece")}
    columns |= {f"ECE, {kind}": ((kind,), "ece") for kind in SHIFTS}
    columns |= {"ECE, all shifts": (SHIFTS, "ece"), "NLL, none": (("none",), "nll")}
    columns |= {"NLL, all shifts": (SHIFTS, "nll")}
    print(f"| method | {' | '.join(columns)} | passes | CPU s to calibrate |")
    print("|---|" + "---|" * (len(columns) + 2))
    for name in results[0]:
        cells = [over(results, name, mean_of(*column)) for column in columns.values()]
        seconds = sum(found[name]["seconds"] for found in results) / len(results)
        passes = results[0][name]["passes"]
        print(f"| {name} | {' | '.join(cells)} | {passes:.0f} | {seconds:.2f} |")
    print(
        "\n| level | accuracy | " + " | ".join(f"ECE, {name}" for name in list(METHODS)[:5]) + " |"
    )
    print("|---|---|" + "---|" * 5)
    for kind in SHIFTS:
        for level in range(1, 6):
            key = f"{kind} {level}"
            cells = [
                over(results, name, lambda row, k=f"{key} ece": row[k])
                for name in list(METHODS)[:5]
            ]
            accuracy = sum(found["softmax"][f"{key} accuracy"] for found in results) / len(results)
            print(f"| {key} | {accuracy:.3f} | {' | '.join(cells)} |")


def show(results: list[Results]) -> None:
    columns = list(next(iter(results[0].values())))
    print(f"| score | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for name in results[0]:
        cells = [over(results, name, lambda row, c=column: row[c]) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def main(options: Study) -> None:
    for part in options.parts:
        for recipe in RECIPES if part != "truth" else ("early",):
            print(f"\n{part}, {recipe}: mean over {len(options.seeds)} seeds [95 % interval]\n")
            results = measured(options, part, recipe)
            (show_shift if part == "shift" else show)(results)


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
