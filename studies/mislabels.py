"""Which labels are wrong? All measures of the mislabel audit on digits and MNIST-5000 with planted errors.

For each kind of noise, share of wrong labels and seed a small perceptron is trained on the noisy labels by the bench's
own recipe, its run recorded at ten checkpoints and its curvature fitted; five more models give out-of-fold
probabilities. Every measure then ranks all training examples. Printed are AUROC and average precision of finding the
wrong labels, means over seeds with 95 % intervals, and what each measure costs beyond the fit. Nothing is chosen by
looking at these numbers: measures have the defaults of the library, and the combined ranking's members were named
before.

Symmetric noise replaces a label by one of the nine others at random; class-dependent noise by the next class.

The second part simulates error control: of each ranking a random sample is "verified" (the planted truth is told), the
rest is claimed with at most 10 % false claims at 95 % confidence, and the share of draws in which more were false is
printed beside the 5 % that was promised.

    python studies/mislabels.py --folder runs/mislabels --data digits
    python studies/mislabels.py --folder runs/mislabels --data mnist --seeds 5
    python studies/mislabels.py --folder runs/mislabels --data digits --no-train      # tables alone
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor

import headwater
from headwater.audit import MEASURES, Passes, Subject, measure_all, out_of_fold
from headwater.audit.mislabel import COMBINED, combined_suspicion
from headwater.core.examples import TensorExamples
from headwater.core.files import read_json, write_json
from headwater.core.fit import Fit
from headwater.data.images import digits, mnist5000
from headwater.models.vision import mlp
from headwater.numerics.detection import auroc, average_precision
from headwater.numerics.resampling import Estimate, mean_interval
from headwater.training.optimizers import SGD
from headwater.training.run import train_model
from headwater.training.trajectory import Trajectory

Kind = Literal["symmetric", "class-dependent"]
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set with the bench's model and recipe for it."""

    load: Callable[[], TensorExamples]
    sizes: tuple[int, ...]
    rule: SGD


SETTINGS = {
    "digits": Setting(
        load=digits,
        sizes=(64, 64, 32, 10),
        rule=SGD(lr=0.05, weight_decay=1e-3, batch_size=50, epochs=20),
    ),
    "mnist": Setting(
        load=mnist5000,
        sizes=(784, 128, 10),
        rule=SGD(lr=0.05, weight_decay=1e-3, batch_size=100, epochs=20),
    ),
}


def noisy(
    labels: Int[Tensor, " n"], rate: float, kind: Kind, *, seed: int, classes: int = 10
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Labels of which a share is replaced, and which those are; in each class as many, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(classes):
        members = (labels == c).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        wrong[members[order[: round(rate * len(members))]]] = True
    step = torch.randint(1, classes, labels.shape, generator=generator)
    step = step if kind == "symmetric" else torch.ones_like(step)
    return torch.where(wrong, (labels + step) % classes, labels), wrong


def run_of(
    setting: Setting, kind: Kind, rate: float, seed: int, folder: Path
) -> tuple[Fit, Trajectory, Bool[Tensor, " n"], Int[Tensor, " n"], dict[str, float]]:
    """Fit and record of a model trained on noisy labels, which labels are wrong, the true ones, and CPU seconds."""
    x, truth = setting.load().tensors
    labels, wrong = noisy(truth, rate, kind, seed=seed)
    model, task = mlp(setting.sizes, seed=seed), headwater.Classification()
    started = time.process_time()
    record = train_model(
        model, (x, labels), task, setting.rule, folder=folder, checkpoints=10, seed=seed
    )
    assert record is not None
    clock = {"training": time.process_time() - started}
    started = time.process_time()
    known = {"weight_decay": record.weight_decay, "horizon": record.horizon}
    fit = headwater.fit(model, (x, labels), task, curvature="ekfac", **known)
    clock["fit"] = time.process_time() - started
    return fit, record, wrong, truth, clock


def measured(
    setting: Setting, kind: Kind, rate: float, seed: int, folder: Path, before: dict
) -> dict:
    """Suspicions of all measures for one noise and seed, with their costs; those there were before are kept."""
    rows = before.get("rows", {})
    todo = [m for m in MEASURES if m.name not in rows and m.name != "perplexity"]
    if not todo:
        return before
    fit, record, wrong, truth, clock = run_of(setting, kind, rate, seed, folder)
    x, labels = fit.train.tensors  # type: ignore[attr-defined]
    probabilities = None
    if "confident_learning" not in rows:
        started = time.process_time()
        probabilities = out_of_fold(
            lambda s: mlp(setting.sizes, seed=1000 * (seed + 1) + s),
            x,
            labels,
            optimizer=setting.rule,
            folds=FOLDS,
            seed=seed,
        )
        clock["out of fold"] = time.process_time() - started
    subject = Subject(
        fit,
        trajectories=[record],
        probabilities=probabilities,
        probabilities_cost=Passes(trainings=FOLDS),
    )
    found, _ = measure_all(subject, todo)
    for name, each in found.items():
        suspicion = each.suspicion if each.measure.suspicious else each.values
        rows[name] = {
            "suspicion": suspicion.tolist(),
            "cost": str(each.passes),
            "seconds": each.seconds,
        }
    accuracy = (subject.final.logits.argmax(1) == truth).double()
    return {
        "wrong": wrong.tolist(),
        "rows": rows,
        "seconds": before.get("seconds", clock),
        "accuracy of the true labels": float(accuracy.mean()),
        "accuracy of the given labels": float(subject.final.correct.mean()),
    }


def combined(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows with rankings that average the ranks of several measures, and without those that rank nothing."""
    able = {m.name for m in MEASURES if m.suspicious and m.name in rows}
    suspicions = {n: torch.tensor(rows[n]["suspicion"], dtype=torch.float64) for n in able}
    kinds = [next(n for n in kind if n in rows) for kind in COMBINED]
    without = [n for n in kinds if n != "confident_learning"]
    named = {
        "combined": kinds,
        "combined, without trainings": without,
        "combined, all measures": sorted(able),
    }
    made = {
        name: {
            "suspicion": combined_suspicion([suspicions[n] for n in members]).tolist(),
            "cost": "those of its members",
        }
        for name, members in named.items()
    }
    return {m.name: rows[m.name] for m in MEASURES if m.name in rows and m.suspicious} | made


def cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {min(estimate.high, 1.0):.3f}]"


def over_seeds(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return cell(mean_interval(torch.tensor(values)))


def table(results: dict[tuple[Kind, float], list[dict]]) -> list[str]:
    """Rows of a Markdown table: AUROC and average precision of every measure and noise."""
    noises = list(results)
    heads = [f"{kind} {100 * rate:.0f} %" for kind, rate in noises]
    lines = [
        "| measure | " + " | ".join(f"AUROC, {h}" for h in heads) + " | passes beyond the fit |",
        "|---" * (len(heads) + 2) + "|",
    ]
    again = [
        "| measure | " + " | ".join(f"AP, {h}" for h in heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    every = [set(run["rows"]) for runs in results.values() for run in runs]
    names = [n for n in next(iter(results.values()))[0]["rows"] if all(n in e for e in every)]
    for name in names:
        areas, precisions, cost = [], [], ""
        for noise in noises:
            pairs = [
                (
                    torch.tensor(run["rows"][name]["suspicion"], dtype=torch.float64),
                    torch.tensor(run["wrong"]),
                )
                for run in results[noise]
            ]
            areas.append(over_seeds([float(auroc(s, w)) for s, w in pairs]))
            precisions.append(over_seeds([float(average_precision(s, w)) for s, w in pairs]))
            cost = results[noise][0]["rows"][name]["cost"]
        lines.append(f"| {name} | {' | '.join(areas)} | {cost} |")
        again.append(f"| {name} | {' | '.join(precisions)} |")
    return [*lines, "", *again]


def claims(
    suspicion: Float[Tensor, " n"],
    wrong: Bool[Tensor, " n"],
    *,
    verified: int,
    share: float,
    alpha: float,
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Draws of a sample: how often the promise was broken, and what was claimed."""
    from headwater.calibrate import draw_sample, select

    broken = claimed = found = some = 0.0
    for k in range(draws):
        sample = draw_sample(len(wrong), verified, seed=seed * draws + k)
        got = select(suspicion, sample, wrong[sample], share=share, alpha=alpha)
        n, false = len(got), int((got.selected & ~wrong).sum())
        broken += n > 0 and false > share * n
        some += n > 0
        claimed += n
        rest = wrong.clone()
        rest[sample] = False
        found += float((got.selected & wrong).sum()) / max(1, int(rest.sum()))
    return {
        "broken": broken / draws,
        "claimed": claimed / draws,
        "found": found / draws,
        "some": some / draws,
        "draws": draws,
    }


def control(
    results: dict[tuple[Kind, float], list[dict]],
    *,
    measures: Sequence[str],
    verified: Sequence[int],
    share: float,
    alpha: float,
    draws: int,
) -> list[str]:
    """Rows of a Markdown table: how often the share of false claims was passed."""
    lines = [
        "| noise | ranking | verified | draws | more false claims than promised | claims | wrong labels found |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, rate), runs in results.items():
        for name in measures:
            for n in verified:
                each = [
                    claims(
                        torch.tensor(run["rows"][name]["suspicion"], dtype=torch.float64),
                        torch.tensor(run["wrong"]),
                        verified=n,
                        share=share,
                        alpha=alpha,
                        draws=draws,
                        seed=seed,
                    )
                    for seed, run in enumerate(runs)
                ]
                total = sum(int(e["draws"]) for e in each)
                mean = {k: sum(e[k] for e in each) / len(each) for k in each[0]}
                lines.append(
                    f"| {kind} {100 * rate:.0f} % | {name} | {n} | {total} | {100 * mean['broken']:.1f} % "
                    f"| {mean['claimed']:.0f} | {100 * mean['found']:.0f} % |"
                )
    return lines


def main(
    folder: Path = Path("runs/mislabels"),
    data: Literal["digits", "mnist"] = "digits",
    seeds: int = 5,
    rates: tuple[float, ...] = (0.1, 0.2),
    kinds: tuple[Kind, ...] = ("symmetric", "class-dependent"),
    train: bool = True,
    verified: tuple[int, ...] = (200, 400),
    share: float = 0.1,
    alpha: float = 0.05,
    draws: int = 60,
) -> None:
    """Measure and print; what is in the folder is not made again."""
    results: dict[tuple[Kind, float], list[dict]] = {}
    for seed in range(seeds):
        for kind in kinds:
            for rate in rates:
                name = f"{data}-{kind}-{rate}-{seed}"
                place = folder / f"{name}.json"
                run = read_json(place) if place.is_file() else {}
                if train:
                    made = measured(SETTINGS[data], kind, rate, seed, folder / "runs" / name, run)
                    if made is not run:
                        print(f"{name} …", flush=True)
                        write_json(place, made)
                        run = made
                if run:
                    run["rows"] = combined(run["rows"])
                    results.setdefault((kind, rate), []).append(run)
    n = {noise: len(runs) for noise, runs in results.items()}
    print(f"runs: {n}")
    seconds = [run["seconds"] for runs in results.values() for run in runs]
    for name in seconds[0]:
        each = [s[name] for s in seconds if name in s]
        print(f"  {name}: {sum(each) / len(each):.2f} CPU s")
    for key in ("accuracy of the true labels", "accuracy of the given labels"):
        told = {noise: sum(r[key] for r in runs) / len(runs) for noise, runs in results.items()}
        print(f"  {key}: {told}")
    print("\n".join(table(results)))
    if draws:
        options = {"verified": verified, "share": share, "alpha": alpha, "draws": draws}
        print("\n".join(["", *control(results, measures=("combined",), **options)]))


if __name__ == "__main__":
    tyro.cli(main)
