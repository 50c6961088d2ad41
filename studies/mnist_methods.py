"""Linear datamodeling scores of the methods beside influence on an MNIST MLP, none of them tuned.

The models, the bank and the measure are those of `mnist_quality.py`. TracIn reads the checkpoints of one more run of the
same recipe; ensembles and TRAK with several models read the bank's base models of other seeds.

    python studies/mnist_ground_truth.py --folder runs/bank --repeats 3
    python studies/mnist_methods.py runs/bank
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mnist_quality import WEIGHT_DECAY, Study
from safetensors.torch import load_file
from torch import Tensor, nn

from headwater.core.curvature import EKFAC, Identity
from headwater.core.fit import Fit, fits_at
from headwater.core.scores import Scores
from headwater.models.vision import mlp
from headwater.numerics.resampling import bootstrap_lds, noise_ceiling
from headwater.trace import (
    TRAK,
    Arnoldi,
    DataInf,
    EmbeddingSimilarity,
    Ensemble,
    GradientCosine,
    GradientDot,
    Influence,
    LiSSA,
    Random,
    RepresentationSimilarity,
    TracIn,
    TrackStar,
)

EPOCHS, LR, BATCH = 20, 0.05, 100
KEPT = (1, 4, 8, 12, 16, 20)  # epochs after which TracIn looks
FEW = 48  # queries for the methods whose cost grows with them


def checkpoints(study: Study) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Weights of a run of the bank's recipe, and for each the sum of learning rate / batch size since the last."""
    torch.manual_seed(0)
    model, (x, y) = mlp((784, 512, 256, 10)), study.train
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * len(x) // BATCH
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    states, rates, since = [], [], 0.0
    for epoch in range(1, EPOCHS + 1):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            since += decay.get_last_lr()[0] / (len(x) / BATCH) / BATCH / (1 - 0.9)
            decay.step()
        if epoch in KEPT:
            states.append({k: v.clone() for k, v in model.state_dict().items()})
            rates.append(since)
            since = 0.0
    return states, rates


def main(folder: Path) -> None:
    torch.manual_seed(0)
    study = Study(folder)
    plain, ceiling = study.plain_seconds(), noise_ceiling(study.outcomes.double())
    print(f"noise ceiling {ceiling}; a plain pass {plain:.3f} s\n")
    print("| method | queries | LDS [95 %] | passes |\n|---|---|---|---|")

    def row(name: str, score: Callable[[tuple], Scores], n_queries: int = 200) -> None:
        started = time.perf_counter()
        scores = score(tuple(t[:n_queries] for t in study.queries))
        passes = (time.perf_counter() - started) / plain
        outcomes = study.outcomes.mean(1).double()[:, :n_queries]
        found = bootstrap_lds(scores.values.double(), study.masks, outcomes)
        print(
            f"| {name} | {n_queries} | {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] | {passes:.0f} |",
            flush=True,
        )

    none, _ = study.fit(Identity())
    seeds = [load_file(folder / f"base_seed{seed}.safetensors") for seed in range(3)]
    several = fits_at(none, seeds)
    states, rates = checkpoints(study)
    run = fits_at(none, states)

    row("random", lambda q: Random().attribute(none, q))
    row("representation cosine", lambda q: RepresentationSimilarity().attribute(none, q))
    row("signed by label", lambda q: RepresentationSimilarity(signed=True).attribute(none, q))
    row("embedding, centred", lambda q: EmbeddingSimilarity().attribute(none, q))
    row("gradient dot", lambda q: GradientDot().attribute(none, q))
    row("gradient cosine", lambda q: GradientCosine().attribute(none, q))
    row("gradient cosine, 3 seeds", lambda q: ensemble(GradientCosine(), none, several, q))
    row("TracIn, 6 checkpoints", lambda q: TracIn().attribute(none, q, fits=run, rates=rates))
    row("TRAK", lambda q: TRAK().attribute(none, q))
    row("TRAK, 3 models", lambda q: TRAK().attribute(none, q, fits=several))
    row("TRAK, ridge 1e-3", lambda q: TRAK(ridge=1e-3).attribute(none, q))
    row("TRAK, Newton's weights, ridge 1e-3", lambda q: newton(none, q))
    row("TrackStar", lambda q: TrackStar().attribute(none, q))
    row("DataInf", lambda q: DataInf().attribute(none, q))
    ekfac, _ = study.fit(EKFAC())
    influence = Influence(n_intervals=0, damping="weight_decay")
    row("EK-FAC", lambda q: influence.attribute(ekfac, q))
    row("EK-FAC, 3 seeds", lambda q: ensemble(influence, ekfac, refitted(study, seeds), q))
    row("Arnoldi, 100 steps, 50 kept", lambda q: Arnoldi(steps=100).attribute(none, q))
    row("EK-FAC", lambda q: influence.attribute(ekfac, q), FEW)
    series = LiSSA(damping="weight_decay", steps=100)
    row("LiSSA, 100 steps of 64", lambda q: series.attribute(ekfac, q), FEW)
    row("TRAK, one matrix to 512", lambda q: TRAK(dim=512, ridge=1e-3).attribute(none, q), FEW)


def newton(fit: Fit, queries: tuple) -> Scores:
    return TRAK(ridge=1e-3, reweight=True).attribute(fit, queries)


def ensemble(method, fit: Fit, fits, queries: tuple) -> Scores:
    return Ensemble(method=method).attribute(fit, queries, fits=fits)


def refitted(study: Study, states: list[dict[str, Tensor]]) -> list[Fit]:
    """EK-FAC fits of other seeds' models."""
    found = []
    for state in states:
        study.model = mlp((784, 512, 256, 10))
        study.model.load_state_dict(state)
        found.append(study.fit(EKFAC())[0])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bank"))
