"""Which scores foretell retraining where models of half the data have learned nothing yet?

The CNN on digits of `headwater bench`, at a learning rate of its own: how much models of random halves and models of
everything have learned, and the linear datamodeling score (LDS) of each model's scores and of their mean, on the half
of queries and subsets that the benchmark reports.

    python studies/half_trained.py --lr 0.02
    python studies/half_trained.py --lr 0.1     # the recipe of the benchmark
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from headwater.bench import WORKLOADS, Plan
from headwater.bench.run import Bench
from headwater.core.capture import plan_batches
from headwater.core.curvature import EKFAC, CurvatureMethod, Dual, Identity
from headwater.core.forward import evaluate
from headwater.numerics.ranks import lds
from headwater.trace import GradientDot, Influence
from headwater.trace.base import Attributor


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained.

    Args:
        lr: Learning rate.
        workload: A workload of images with one stage.
        folder: Where the bank and the models are kept.
    """

    lr: float = 0.02
    workload: str = "digits-cnn"
    folder: Path = Path("runs/half-trained")


def main(options: Study) -> None:
    torch.set_num_threads(1)
    workload = WORKLOADS[options.workload]
    workload = replace(workload, recipe=(replace(workload.recipe[0], lr=options.lr),))
    bench = Bench(workload, options.folder / f"{workload.name}-{options.lr:g}", Plan())
    (queries, subsets), bank = bench.halves["report"], bench.bank()
    outcomes = bank.outcomes(bench.measurement).double()
    right = 100 * float((outcomes > 0).double().mean())
    print(
        f"models of halves: {right:.1f} % of the answers right, highest margin {outcomes.max():.2f}"
    )
    methods: dict[str, tuple[Attributor, CurvatureMethod]] = {
        "gradient dot": (GradientDot(), Identity()),
        "EK-FAC": (Influence(n_intervals=0), EKFAC(fisher="exact")),
        "dual": (Influence(n_intervals=0), Dual(cut=workload.cut)),
    }

    def quality(scores: Tensor) -> float:
        mean = outcomes.mean(1)[subsets][:, queries]
        return float(lds(scores, bank.masks[subsets], mean).nanmean())

    for seed, (model, _) in enumerate(bench.models):
        losses = evaluate(
            model, bench.data.train, workload.task.loss, batches=plan_batches(bench.data.train)
        )
        print(f"model {seed}: training loss {losses.mean():.2f}")
    for name, (method, curvature) in methods.items():
        found = []
        for seed in range(bench.n_seeds):
            fit, _ = bench.fit(curvature, seed)
            found.append(method.attribute(fit, bench.data.queries).values[queries].double())
        whole = torch.stack(found)
        alike = whole / whole.norm(dim=2, keepdim=True)
        each = ", ".join(f"{quality(scores):.3f}" for scores in found)
        means = (
            f"mean {quality(whole.mean(0)):.3f}, of rows of length one {quality(alike.mean(0)):.3f}"
        )
        print(f"{name}: {each}; {means}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Study))
