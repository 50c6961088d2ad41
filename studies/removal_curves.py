"""What taking each query's top examples away does: removal curves and the query loss difference, method by method.

Trains the perceptron of the bench's digits-mlp once, scores 1,000 training images for 40 queries with six methods, and
retrains without the k examples that support a query most, for several k, and without as many of the same classes at
random. Retrainings have seeds of their own, not the scored model's, and their mean is what is reported: the expected
effect. Printed are the share of queries whose answer becomes wrong, the mean change of the margin, and the difference
that the top 1 % makes to the loss beside a random 1 % (QLD).

    python studies/removal_curves.py --folder runs/removal --plot-file removal.png
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn.functional import softplus

from headwater.bench.entries import entries
from headwater.bench.run import Bench, Plan, grouped
from headwater.bench.workloads import WORKLOADS
from headwater.core.scores import Scores
from headwater.extras import require
from headwater.numerics.resampling import Estimate
from headwater.trace.measures import OverQueries, Removal, query_loss_difference, removal
from headwater.training.retraining import Change, StackedRetrain, retrain_all

METHODS = (
    "random",
    "representation similarity, signed by label",
    "gradient dot",
    "TRAK",
    "EK-FAC",
    "dual",
)


@dataclass(frozen=True)
class Losses:
    """Losses out of kept margins: the cross-entropy of a margin m is log(1 + exp(-m))."""

    margins: StackedRetrain
    queries: list[str]
    cache: Path

    @property
    def n_parallel(self) -> int:
        return self.margins.n_parallel

    def many(self, weights: Tensor, seeds: Sequence[int]) -> Tensor:
        left_out = [row.nonzero()[:, 0].tolist() for row in weights == 0]
        changes = [Change(name="", weights=dict.fromkeys(numbers, 0.0)) for numbers in left_out]
        runs = list(zip(changes, seeds, strict=True))
        n = weights.shape[1]
        kept = {"n_train": n, "queries": self.queries, "cache": self.cache}
        return softplus(-retrain_all(self.margins, runs, **kept))


def scored(bench: Bench, names: Sequence[str]) -> dict[str, Scores]:
    """Scores of the first model, by methods as they come."""
    every, _ = entries(bench.workload)
    chosen = [e for e in every if e.name in names and e.needs == "model"]
    return {
        e.name: e.method.attribute(bench.fit(e.curvature)[0], bench.data.queries)  # type: ignore[call-arg]
        for e in grouped(chosen)
    }


def judge(
    bench: Bench,
    names: Sequence[str],
    *,
    ks: Sequence[int],
    n_queries: int,
    seeds: Sequence[int],
) -> dict[str, tuple[Removal, OverQueries]]:
    """Removal curves and query loss difference of every method."""
    w, data = bench.workload, bench.data
    margins = StackedRetrain(
        make_model=w.model,
        train_data=(data.train.tensors[0], data.train.tensors[1]),
        query_data=(data.queries.tensors[0], data.queries.tensors[1]),
        optimizer=w.stages(data),
        measure=w.measure,
        loss=w.loss,
        n_parallel=300,
    )
    cache = bench.folder / "retrained"
    losses = Losses(margins, data.queries.ids, cache)
    found = {}
    for name, scores in scored(bench, names).items():
        options = {"seeds": seeds, "queries": range(n_queries), "progress": bench.progress}
        labels = data.train.tensors[1]
        curves = removal(margins, scores, ks, labels=labels, cache=cache, **options)
        found[name] = (curves, query_loss_difference(losses, scores, **options))
    return found


def interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def rows(found: dict[str, tuple[Removal, OverQueries]]) -> list[str]:
    """Two Markdown tables: answers that became wrong, and margins with the loss difference."""
    ks = next(iter(found.values()))[0].ks
    head = [f"| method | {' | '.join(f'k = {k}' for k in ks)} |", "|---" * (len(ks) + 1) + "|"]
    flips, moves = list(head), [head[0] + " QLD, nats |", head[1] + "---|"]
    for name, (curves, difference) in found.items():
        pairs = zip(curves.flipped_share(), curves.flipped_share(control=True), strict=True)
        cells = [f"{100 * a.value:.0f} % · {100 * b.value:.0f} %" for a, b in pairs]
        flips.append(f"| {name} | {' | '.join(cells)} |")
        pairs = zip(curves.mean_change(), curves.mean_change(control=True), strict=True)
        cells = [f"{interval(a)} · {b.value:.2f}" for a, b in pairs]
        moves.append(f"| {name} | {' | '.join(cells)} | {interval(difference.estimate)} |")
    return [*flips, "", *moves]


def plot(found: dict[str, tuple[Removal, OverQueries]], path: Path) -> None:
    """The curves, with the mean of all random removals."""
    pyplot = require("matplotlib.pyplot", extra="plots")
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    ks = next(iter(found.values()))[0].ks
    colors = ["0.6", "tab:green", "tab:orange", "tab:purple", "tab:blue", "tab:red"]
    for name, color in zip(found, colors, strict=False):
        curves = found[name][0]
        shares = [100 * e.value for e in curves.flipped_share()]
        panels[0].plot(ks, shares, "o-", ms=3, color=color, label=name)
        panels[1].plot(ks, [e.value for e in curves.mean_change()], "o-", ms=3, color=color)
    others = [curves for curves, _ in found.values()]
    shares = torch.stack([c.control_flipped.double().mean(1) for c in others]).mean(0)
    moved = torch.stack([c.control_change.mean((1, 2)) for c in others]).mean(0)
    panels[0].plot(ks, 100 * shares, "k--", lw=1, label="as many of the same classes")
    panels[1].plot(ks, moved, "k--", lw=1)
    panels[0].set_ylabel("answers that became wrong (%)")
    panels[1].set_ylabel("change of the margin (nats)")
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xticks(ks, [str(k) for k in ks])
        panel.minorticks_off()
        panel.set_xlabel("training examples taken away")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main(
    folder: Path = Path("runs/removal"),
    workload: str = "digits-mlp",
    methods: tuple[str, ...] = METHODS,
    ks: tuple[int, ...] = (10, 20, 40, 80),
    queries: int = 40,
    seeds: int = 3,
    plot_file: Path | None = None,
) -> None:
    """Measure and print; what is kept in the folder is not trained again."""
    started = time.process_time()

    def say(done: int, total: int, note: str) -> None:
        if note.startswith("retraining"):
            print(f"  {done}/{total} {note}", flush=True)

    bench = Bench(WORKLOADS[workload], folder / workload, Plan(seeds=1), say)
    found = judge(bench, methods, ks=ks, n_queries=queries, seeds=range(1000, 1000 + seeds))
    curves = next(iter(found.values()))[0]
    print(
        f"{len(curves.queries)} queries answered rightly with every seed, {curves.left_out} others"
    )
    print("\n".join(rows(found)))
    if plot_file is not None:
        plot(found, plot_file)
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    tyro.cli(main)
