"""Does damping chosen automatically do as well as damping tuned on a large bank of retrainings?

For a workload of `headwater bench`, damping is chosen by the recorded run's own numbers ("auto"), by the evidence, by
seven runs under random weights, and by a small bank of 30 runs without a few examples. Choices see one half of the
queries; the linear datamodeling score is that of the other half, over all subsets of the workload's two banks.

    headwater bench digits-mlp digits-logistic
    python studies/automatic_damping.py --workloads digits-mlp digits-logistic
"""

import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from headwater.bench import WORKLOADS, Plan
from headwater.bench.run import Bench
from headwater.core.curvature import EKFAC, CurvatureMethod, Dual
from headwater.core.damping import Damping
from headwater.core.fit import Fit
from headwater.numerics.resampling import bootstrap_lds
from headwater.trace import Influence
from headwater.trace.damping_choice import (
    choose_by_bank,
    choose_by_evidence,
    choose_by_reweighting,
)
from headwater.trace.unrolling import measure_of
from headwater.training.bank import RetrainingBank
from headwater.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Args:
        workloads: Names of workloads.
        folder: Folder of `headwater bench`, whose banks and models are used.
        runs: Retrainings of the small bank.
        plots: Folder for the curves; none are drawn when left out.
    """

    workloads: tuple[str, ...] = ("digits-mlp",)
    folder: Path = Path("runs/bench-quality")
    runs: int = 30
    plots: Path | None = None


def small_bank(bank: RetrainingBank, runs: int, queries: Tensor) -> RetrainingBank:
    """The first runs of a bank, asked about some queries only."""
    kept = {name: values[:runs][:, :, queries] for name, values in bank.measurements.items()}
    return RetrainingBank(masks=bank.masks[:runs], measurements=kept, meta=bank.meta)


def study(name: str, options: Study, kind: str, curvature: CurvatureMethod) -> None:
    bench = Bench(WORKLOADS[name], options.folder / name, Plan())
    (q, _), (q_report, _) = bench.halves["tune"], bench.halves["report"]
    fit, _ = bench.fit(curvature)
    asked, others = (
        bench.data.queries.subset(q.tolist()),
        bench.data.queries.subset(q_report.tolist()),
    )
    model, record = bench.models[0]
    run = Run(model=model, task=bench.workload.task, train=bench.data.train, trajectory=record)
    measure = measure_of(run, asked)

    def retrain(weights: Tensor, seed: int) -> Tensor:
        with torch.no_grad():
            return measure(run.repeat(weights).parameters).detach()

    fixed = small_bank(bench.banks["fixed"], options.runs, q)
    choices = {
        "auto": lambda: fit.damping("auto"),
        "evidence": lambda: choose_by_evidence(fit),
        "7 reweightings": lambda: choose_by_reweighting(fit, asked, retrain),
        f"{options.runs} runs without 5 %": lambda: choose_by_bank(fit, asked, fixed),
    }
    for how, choose in choices.items():
        started = time.process_time()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = choose()
        seconds = time.process_time() - started
        damping = found if isinstance(found, Damping) else found.chosen
        if options.plots is not None and not isinstance(found, Damping):
            options.plots.mkdir(parents=True, exist_ok=True)
            found.plot().savefig(options.plots / f"{name}-{kind}-{how}.png".replace(" ", "-"))
        cells = [name, kind, how, f"{damping.value:.2g} ({fit.damping_ratio(damping):.2g} × mean)"]
        cells += [scored(bench, fit, damping, others, q_report, p) for p in ("expected", "fixed")]
        print(f"| {' | '.join(cells)} | {seconds:.1f} |", flush=True)
        for warning in said:
            print(f"  warned: {warning.message}", flush=True)


def scored(bench: Bench, fit: Fit, damping: Damping, others, numbers: Tensor, protocol: str) -> str:
    bank = bench.banks[protocol]
    scores = replace(Influence(n_intervals=0), damping=damping).attribute(fit, others)
    outcomes = bank.outcomes(bench.measurement).double().mean(1)[:, numbers]
    found = bootstrap_lds(scores.values.double(), bank.masks, outcomes, n_samples=200)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main(options: Study) -> None:
    print(
        "| workload | curvature | chosen by | damping | expected effect, LDS | fixed run, LDS | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.workloads:
        study(name, options, "EK-FAC", EKFAC(fisher="exact"))
        study(name, options, "dual", Dual(cut=1e-3))


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
