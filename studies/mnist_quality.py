"""Linear datamodeling scores of every method here on an MNIST MLP, beside the noise ceiling of the ground truth.

A 784-512-256-10 network is trained once on 4,000 images; which training images matter for 200 others is asked by
retraining on 100 random halves of the data, three times each (`mnist_ground_truth.py` builds that bank). Nothing is
tuned on the bank: damping is the training run's own weight decay, the evidence procedure, or the run's weight decay
plus one over its horizon. The sweep that follows shows what tuning on the test would have given.

    python studies/mnist_ground_truth.py --folder runs/bank --repeats 3
    python studies/mnist_quality.py runs/bank
"""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import headwater
from headwater.core.curvature import EKFAC, KFAC, CurvatureMethod, Diagonal, Dual, Identity
from headwater.models.vision import mlp
from headwater.numerics.resampling import Estimate, bootstrap_lds, noise_ceiling
from headwater.trace import GradientCosine, GradientDot, Influence
from headwater.trace.base import Attributor
from headwater.training.bank import RetrainingBank

WEIGHT_DECAY = 1e-3
# The run's learning rate falls from 0.05 to zero over 20 epochs of 40 steps, with momentum 0.9.
FEW = 48  # queries for conjugate gradients
HORIZON = 0.05 / 2 * 20 * 40 / (1 - 0.9)


class Study:
    """The trained model, the data, and the retrained outcomes."""

    def __init__(self, folder: Path):
        data = load_file(folder / "data.safetensors")
        self.train = (data["x_train"].flatten(1), data["y_train"])
        self.queries = (data["x_query"].flatten(1), data["y_query"])
        self.model = mlp((784, 512, 256, 10))
        self.model.load_state_dict(load_file(folder / "base_seed0.safetensors"))
        bank = RetrainingBank.load(folder)
        self.masks, self.outcomes = bank.masks, bank.outcomes("margin")
        self.task = headwater.Classification(measurement_of="margin")

    def plain_seconds(self) -> float:
        """An ordinary forward and backward pass over the training data."""
        x, y = self.train
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for start in range(0, len(x), 1000):
                logits = self.model(x[start : start + 1000])
                nn.functional.cross_entropy(
                    logits, y[start : start + 1000], reduction="sum"
                ).backward()
            best = min(best, time.perf_counter() - started)
        self.model.zero_grad()
        return best

    def fit(self, curvature: CurvatureMethod) -> tuple[headwater.core.fit.Fit, float]:
        """The fit and its seconds."""
        started = time.perf_counter()
        fitted = headwater.fit(
            self.model,
            self.train,
            self.task,
            curvature=curvature,
            weight_decay=WEIGHT_DECAY,
            horizon=HORIZON,
            batch_size=1000,
        )
        return fitted, time.perf_counter() - started

    def score(
        self, fitted: headwater.core.fit.Fit, method: Attributor, n_queries: int = 200
    ) -> tuple[Estimate, float, dict]:
        """The linear datamodeling score with its interval, the seconds, and the facts."""
        started = time.perf_counter()
        scores = method.attribute(fitted, tuple(t[:n_queries] for t in self.queries))
        seconds = time.perf_counter() - started
        outcomes = self.outcomes.mean(1).double()[:, :n_queries]
        found = bootstrap_lds(scores.values.double(), self.masks, outcomes)
        return found, seconds, scores.facts


def show(
    name: str, found: Estimate, fit: float, score: float, damping: float | None, ratio: float | None
) -> None:
    """One row of the table."""
    told = "" if damping is None else f"{damping:.2g} ({ratio:.3g})"
    print(
        f"| {name} | {told} | {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] | {fit:.1f} | {score:.1f} |",
        flush=True,
    )


def main(folder: Path, *, sweep: bool = True, cg: int = 0) -> dict[str, Estimate]:
    """Print the tables; returns the estimates by the name of their row."""
    torch.manual_seed(0)
    study = Study(folder)
    plain = study.plain_seconds()
    k, r = study.outcomes.shape[:2]
    ceiling = noise_ceiling(study.outcomes.double())
    print(
        f"{k} half-subsets x {r} retrainings; noise ceiling {ceiling}; a plain pass {plain:.3f} s\n"
    )
    print(
        "| method | damping (times mean eigenvalue) | LDS [95 %] | fit, passes | 200 x 4,000 scores, passes |"
    )
    print("|---|---|---|---|---|")
    rows: dict[str, Estimate] = {}

    def row(name: str, fitted: headwater.core.fit.Fit, seconds: float, method: Attributor) -> None:
        rows[name], taken, facts = study.score(fitted, method)
        damping = facts.get("damping", {}).get("value")
        show(name, rows[name], seconds / plain, taken / plain, damping, facts.get("damping_ratio"))

    def compare_refined(name: str, fitted: headwater.core.fit.Fit, choice: str, cg: int) -> None:
        """The same queries with and without conjugate gradients; a few, since each step is many passes."""
        for steps in dict.fromkeys((0, cg)):
            method = Influence(n_intervals=0, damping=choice, cg_steps=steps, cg_tolerance=1e-2)
            found, taken, facts = study.score(fitted, method, n_queries=FEW)
            label = f"{FEW} queries: {name}" + (
                f" + {facts['cg_steps']} steps of CG" if steps else ""
            )
            rows[f"{label}; {choice}"] = found
            value, ratio = facts["damping"]["value"], facts["damping_ratio"]
            show(f"{label}; {choice}", found, 0.0, taken / plain, value, ratio)

    none, seconds = study.fit(Identity())
    row("gradient dot", none, 0.0, GradientDot())
    row("gradient cosine", none, 0.0, GradientCosine())
    fits = {
        "diagonal": Diagonal(),
        "K-FAC": KFAC(),
        "EK-FAC, drawn labels": EKFAC(),
        "EK-FAC, all labels": EKFAC(fisher="exact"),
        "dual, cut 1e-3": Dual(cut=1e-3),
    }
    for name, curvature in fits.items():
        fitted, seconds = study.fit(curvature)
        layerwise = not isinstance(curvature, Dual)
        row(
            f"{name}; weight decay",
            fitted,
            seconds,
            Influence(n_intervals=0, damping="weight_decay"),
        )
        if isinstance(curvature, EKFAC):
            row(
                f"{name}; 8 terms",
                fitted,
                seconds,
                Influence(n_intervals=0, damping="weight_decay", terms=8),
            )
        if layerwise:
            row(f"{name}; evidence", fitted, seconds, Influence(n_intervals=0, damping="evidence"))
        row(
            f"{name}; decay + 1/horizon",
            fitted,
            seconds,
            Influence(n_intervals=0, damping="horizon"),
        )
        if cg and name in ("EK-FAC, all labels", "dual, cut 1e-3"):
            for choice in ("weight_decay", "horizon"):
                compare_refined(name, fitted, choice, 0 if isinstance(curvature, Dual) else cg)
        if sweep and name in ("EK-FAC, all labels", "dual, cut 1e-3"):
            for value in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2"):
                row(
                    f"sweep: {name}; {value}",
                    fitted,
                    seconds,
                    Influence(n_intervals=0, damping=value),
                )
            for value in ("0.1", "1", "10", "100") if layerwise else ():
                row(
                    f"sweep: {name}; {value} x",
                    fitted,
                    seconds,
                    Influence(n_intervals=0, damping=f"{value} relative"),
                )
    print(f"\nnoise ceiling {ceiling}")
    return rows


if __name__ == "__main__":
    arguments = sys.argv[1:]
    steps = int(arguments[arguments.index("--cg") + 1]) if "--cg" in arguments else 0
    main(
        Path(arguments[0] if arguments else "runs/bank"),
        sweep="--no-sweep" not in arguments,
        cg=steps,
    )
