"""What our work costs beside the same work by the strongest peer, in units of one plain pass.

    python benchmarks/cost.py --workload mlp
    python benchmarks/cost.py --workload gpt --ours-only

A plain pass is one forward and backward pass over the same data with weight gradients. Every piece of work runs
in a process of its own, where plain passes stand before, between and after its repeats. The unit is CPU time
summed over threads, because wall time means little on a machine that others use; both are kept. Memory is the peak
of the resident set above what the process held with model and data loaded. Results go to runs/bench/.
"""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that wait do not burn the time that is measured

import ctypes
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from workloads import WORKLOADS, Workload

import headwater
from headwater.core.curvature import EKFAC, Dual, FitContext
from headwater.core.curvature.layerwise import eigenbases
from headwater.core.curvature.moments import EigenvalueSums
from headwater.core.fit import Fit
from headwater.numerics.ranks import spearman
from headwater.trace import GradientDot, Influence

RUNS = Path(__file__).parents[1] / "runs" / "bench"
THREADS = 2
BATCH_SIZE = (
    1_000  # the fastest of 250, 1,000 and 4,000 for the network; language models go by tokens
)
# What the peer fits too: one eigenbasis and one spectrum. The default adds a replicate for each of five folds.
SINGLE = EKFAC(own_bases=False)
GIVEN = {"mlp": 500, "gpt": 64}  # training examples of the comparison on given labels
TOLERANCE = {"mlp": 0.05, "gpt": 0.2}


class Ours:
    """Our stages: each method prepares what the work needs and returns the work itself.

    Args:
        workload: The model and its data.
        name: "mlp" or "gpt".
        folder: Where fits are kept.
    """

    def __init__(self, workload: Workload, name: str, folder: Path):
        self.w, self.folder, self.name = workload, folder, name
        self.damping = "0.1 relative" if workload.damping is None else workload.damping

    def _fit(self, method: Any, place: str) -> Fit:
        shutil.rmtree(self.folder / place, ignore_errors=True)  # or it would be read instead
        return headwater.fit(
            self.w.model, self.w.train, self.w.task, curvature=method, layers=list(self.w.layers),
            folder=self.folder / place, batch_size=BATCH_SIZE,
        )  # fmt: skip

    def _load(self, place: str = "fit") -> Fit:
        return headwater.load(self.folder / place, self.w.model, self.w.train, self.w.task)

    def _score(self, place: str, n_queries: int, **options: Any) -> Callable[[], Tensor]:
        fit, queries = self._load(place), self.w.queries.subset(range(n_queries))
        method = Influence(damping=self.damping, **{"n_intervals": 0} | options)
        # a peer's score is positive where the example lowers the query's loss
        return lambda: -method.attribute(fit, queries).values

    def _context(self) -> tuple[EKFAC, FitContext]:
        fit, method = self._load(), SINGLE
        plans = fit.batches(self.w.train, folds=method.folds)
        return method, FitContext(fit.capture(), self.w.train, plans)

    def fit(self) -> Callable:
        return lambda: self._fit(SINGLE, "fit").curvature.facts

    def replicates(self) -> Callable:
        return lambda: self._fit(EKFAC(), "replicates").curvature.facts

    def covariance(self) -> Callable:
        method, context = self._context()
        return lambda: method.moments(context) and None

    def eigen(self) -> Callable:
        method, context = self._context()
        moments, _ = method.moments(context)
        return lambda: eigenbases(moments, values=False) and None

    def eigenvalues(self) -> Callable:
        method, context = self._context()
        layers, bases = list(context.capture.layers.values()), self._load().curvature.bases

        def run() -> None:
            sums = EigenvalueSums(layers, bases, folds=method.folds)
            method.eigenvalues(context, sums)

        return run

    def stopped(self) -> Callable:
        method = replace(SINGLE, tolerance=TOLERANCE[self.name])
        return lambda: self._fit(method, "stopped").curvature.facts

    def stopped_scores(self) -> Callable:
        return self._score("stopped", 20)

    def scores20(self) -> Callable:
        return self._score("fit", 20)

    def scores200(self) -> Callable:
        return self._score("fit", 200)

    def intervals(self) -> Callable:
        return self._score("replicates", 20, n_intervals=10)

    def first20(self) -> Callable:
        return self._score("fit", 20, terms=8)

    def first200_4(self) -> Callable:
        return self._score("fit", 200, terms=4)

    def first200(self) -> Callable:
        return self._score("fit", 200, terms=8)

    def self_influence(self) -> Callable:
        fit = self._load()
        return lambda: Influence(damping=self.damping).self_influence(fit)

    def dot20(self) -> Callable:
        fit, queries = self._load(), self.w.queries.subset(range(20))
        return lambda: -GradientDot().attribute(fit, queries).values

    def dual_fit(self) -> Callable:
        return lambda: self._fit(Dual(), "dual").curvature.facts

    def dual200(self) -> Callable:
        return self._score("dual", 200)

    def redrawn(self) -> Callable:
        """Scores after a fit on other draws of the labels."""
        return lambda: (
            self._fit(replace(SINGLE, seed=7), "redrawn"),
            self._score("redrawn", 200)(),
        )[1]

    def given(self) -> Callable:
        """Scores with factors of the given labels, which leave nothing to chance."""
        few = Ours(self.w.first(GIVEN[self.name]), self.name, self.folder)
        method = replace(SINGLE, fisher="empirical")
        return lambda: (few._fit(method, "given"), few._score("given", 20)())[1]

    def plain(self) -> Callable:
        return self.w.plain_pass


class Theirs:
    """The peer's stages, likewise."""

    def __init__(self, workload: Workload, name: str, folder: Path):
        from peers import Kronfluence

        self.tool = Kronfluence(workload, name, str(folder / "peer"))
        self._few = lambda: Kronfluence(
            workload.first(GIVEN[name]), name, str(folder / "peer-given"), given=True
        )

    def covariance(self) -> Callable:
        return self.tool.covariance

    def eigen(self) -> Callable:
        return self.tool.eigen

    def eigenvalues(self) -> Callable:
        return self.tool.eigenvalues

    def scores20(self) -> Callable:
        return lambda: self.tool.scores(20)

    def scores200(self) -> Callable:
        return lambda: self.tool.scores(200)

    def self_influence(self) -> Callable:
        return self.tool.self_influence

    def given(self) -> Callable:
        few = self._few()
        return lambda: (few.covariance(), few.eigen(), few.eigenvalues(), few.scores(20))[-1]


TOOLS = {"ours": Ours, "peer": Theirs}


@dataclass(frozen=True)
class Row:
    """One row of the table: what is measured, and the most it may cost on each workload."""

    title: str
    ours: tuple[str, ...]
    peer: tuple[str, ...] = ()
    mlp: float | None = None
    gpt: float | None = None
    only: str = ""


FACTORS = ("covariance", "eigen", "eigenvalues")
ROWS = (
    Row("a plain pass", ("plain",)),
    Row("EK-FAC fit, all data, saved", ("fit",), FACTORS, mlp=5.0, gpt=3.0),
    Row("of it: covariances", ("covariance",), ("covariance",)),
    Row("of it: eigendecompositions", ("eigen",), ("eigen",)),
    Row("of it: corrected eigenvalues", ("eigenvalues",), ("eigenvalues",)),
    Row("EK-FAC fit with the stopping rule", ("stopped",), mlp=2.0, gpt=1.0),
    Row("exact scores, 20 queries", ("scores20",), ("scores20",), gpt=0.95),
    Row("exact scores, 200 queries", ("scores200",), ("scores200",), mlp=90.0, gpt=0.95),
    Row("EK-FAC fit with replicates for intervals", ("replicates",)),
    Row("exact scores with intervals, 20 queries", ("intervals",)),
    Row("first stage, 8 terms, 20 queries", ("first20",), mlp=4.0, only="mlp"),
    Row("first stage, 4 terms, 200 queries", ("first200_4",), mlp=4.0, only="mlp"),
    Row("first stage, 8 terms, 200 queries", ("first200",), mlp=4.0, only="mlp"),
    Row("self-influence of everything", ("self_influence",), ("self_influence",), mlp=2.5, gpt=1.2),
    Row("gradient inner products, 20 queries", ("dot20",)),
    Row("dual fit", ("dual_fit",), only="mlp"),
    Row("dual scores, 200 queries", ("dual200",), only="mlp"),
)
# Needed for comparisons only.
EXTRA = (("ours", "stopped_scores"), ("ours", "redrawn"), ("ours", "given"), ("peer", "given"))


def measure(name: str, tool: str, stage: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One stage in this process, with plain passes around every repeat."""
    torch.set_num_threads(THREADS)
    workload = WORKLOADS[name](RUNS)
    work = getattr(TOOLS[tool](workload, name, folder), stage)()
    workload.plain_part()  # warms up
    plain = [clock(workload.plain_part)[0] / workload.part]
    spent: list[tuple[float, float]] = []
    result, peak = None, 0
    for repeat in range(repeats):
        start = reset_peak()
        cpu, wall, result = clock(work, keep=True)
        peak = resident("VmHWM") - start if repeat == 0 else peak
        spent.append((cpu, wall))
        plain.append(clock(workload.plain_part)[0] / workload.part)
        if sum(c for c, _ in spent) > 30.0:
            break
    # a minimum shuts out what others do on the machine; a single long run is held against its neighbours
    unit = min(plain) if len(spent) > 1 else sum(plain) / len(plain)
    found = {
        "cpu": min(c for c, _ in spent),
        "wall": min(w for _, w in spent),
        "plain": unit,
        "memory": peak,
        "repeats": len(spent),
    }
    if isinstance(result, Tensor):
        save_file({"values": result.contiguous()}, folder / f"{tool}-{stage}.safetensors")
    elif isinstance(result, dict):
        found["facts"] = result
    return found


def clock(work: Callable, keep: bool = False) -> tuple:
    """CPU seconds of all threads, wall seconds, and the result if it is wanted."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    return (*spent, result) if keep else spent


def resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> int:
    """Give free memory back, forget the peak so far, and return what is still held."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def run(name: str, tool: str, stage: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One stage in a process of its own."""
    words = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "measure",
        name,
        tool,
        stage,
        str(folder),
        str(repeats),
    ]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {stage} on {name} failed; its messages are above.")
    return json.loads(done.stdout.splitlines()[-1])


def table(name: str, found: dict[str, dict[str, Any]]) -> str:
    """The measured costs in markdown."""
    lines = [
        "| work | ours, passes (wall, MB) | kronfluence, passes (wall, MB) | target | met |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.only not in ("", name):
            continue
        mine, other = (_total(found, t, s) for t, s in (("ours", row.ours), ("peer", row.peer)))
        target = getattr(row, name)
        met = "" if target is None or mine is None else "yes" if mine["passes"] <= target else "no"
        limit = "" if target is None else f"≤ {target:g}"
        lines.append(f"| {row.title} | {_cell(mine)} | {_cell(other)} | {limit} | {met} |")
    return "\n".join(lines)


def _total(
    found: dict[str, dict[str, Any]], tool: str, stages: tuple[str, ...]
) -> dict[str, float] | None:
    parts = [found[f"{tool}:{s}"] for s in stages if f"{tool}:{s}" in found]
    if not parts:
        return None
    return {
        "passes": sum(p["cpu"] / p["plain"] for p in parts),
        "wall": sum(p["wall"] for p in parts),
        "memory": max(p["memory"] for p in parts),
    }


def _cell(cost: dict[str, float] | None) -> str:
    if cost is None:
        return ""
    passes = f"{cost['passes']:.0f}" if cost["passes"] >= 100 else f"{cost['passes']:.2f}"
    return f"{passes} ({cost['wall']:.1f} s, {cost['memory'] / 1e6:.0f})"


def kept(a: Tensor, b: Tensor, k: int = 10) -> float:
    """Share of the k strongest of b, by size, that are among the k strongest of a."""
    first, second = (torch.zeros_like(x).scatter_(-1, x.abs().topk(k).indices, 1.0) for x in (a, b))
    return float((first * second).sum(-1).mean()) / k


def agreement(folder: Path) -> dict[str, tuple[float, float]]:
    """Ours with the peer's, and cheaper answers with exact ones: mean rank correlation, share of top tens."""
    pairs = {
        "both on given labels, 20 queries, ours and the peer's": ("ours-given", "peer-given"),
        "exact scores, 200 queries, ours and the peer's": ("ours-scores200", "peer-scores200"),
        "exact scores, 200 queries, ours and ours with other draws": (
            "ours-scores200",
            "ours-redrawn",
        ),
        "self-influence, ours and the peer's": ("ours-self_influence", "peer-self_influence"),
        "scores after the stopping rule and after all data": (
            "ours-stopped_scores",
            "ours-scores20",
        ),
        "first stage (4 terms) and exact scores, 200 queries": (
            "ours-first200_4",
            "ours-scores200",
        ),
        "first stage (8 terms) and exact scores, 200 queries": ("ours-first200", "ours-scores200"),
        "dual and EK-FAC scores, 200 queries": ("ours-dual200", "ours-scores200"),
    }
    found = {}
    for title, names in pairs.items():
        files = [folder / f"{n}.safetensors" for n in names]
        if all(f.exists() for f in files):
            a, b = (torch.atleast_2d(load_file(f)["values"]).double() for f in files)
            found[title] = float(spearman(a, b).mean()), kept(a, b)
    return found


@dataclass(frozen=True, kw_only=True)
class Options:
    """Costs beside the strongest peer.

    Args:
        workload: The network, the language model, or both.
        ours_only: Leave the peer out.
        repeats: Times each stage runs; stages of more than 30 CPU seconds run once. 0 chooses 5 for the network
            and 1 for the language model.
        only: Names of stages to run, such as fit or scores20; others keep what runs/bench holds.
        show: Run nothing and print what runs/bench holds.
    """

    workload: Literal["mlp", "gpt", "all"] = "all"
    ours_only: bool = False
    repeats: int = 0
    only: tuple[str, ...] = ()
    show: bool = False


def main(options: Options) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in ("mlp", "gpt") if options.workload == "all" else (options.workload,):
        workload = WORKLOADS[name](RUNS)
        repeats = options.repeats or (5 if name == "mlp" else 1)
        stages = [("ours", s) for row in ROWS if row.only in ("", name) for s in row.ours]
        stages += [("peer", s) for row in ROWS if row.only in ("", name) for s in row.peer]
        stages = [s for s in (*stages, *EXTRA) if s[0] == "ours" or not options.ours_only]
        file = RUNS / f"cost-{name}.json"
        old = (
            json.loads(file.read_text()) if (options.only or options.show) and file.exists() else {}
        )
        found: dict[str, dict[str, Any]] = old.get("stages", {})
        folder = RUNS / f"work-{name}"
        folder.mkdir(exist_ok=True)
        for tool, stage in dict.fromkeys(stages):
            if options.show or (options.only and stage not in options.only):
                continue
            print(f"{name}: {tool} {stage} ...", end=" ", file=sys.stderr, flush=True)
            found[f"{tool}:{stage}"] = one = run(name, tool, stage, folder, repeats)
            print(f"{one['cpu'] / one['plain']:.2f} passes", file=sys.stderr, flush=True)
            agreed = agreement(folder)
            file.write_text(json.dumps({"stages": found, "agreement": agreed}, indent=1))
        print(f"\n### {workload.title}\n\n{table(name, found)}\n")
        print("| answers | rank correlation | of each top ten |\n|---|---|---|")
        for title, (correlation, share) in agreement(folder).items():
            print(f"| {title} | {correlation:.3f} | {100 * share:.0f} % |")
        facts = found.get("ours:stopped", {}).get("facts", {})
        if facts:
            told = ", ".join(f"{k} {v:.3g}" for k, v in facts.items() if isinstance(v, float))
            print(f"\nStopping rule at tolerance {TOLERANCE[name]}: {told}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["measure"]:
        name, tool, stage, folder, repeats = sys.argv[2:]
        print(json.dumps(measure(name, tool, stage, Path(folder), int(repeats))))
    else:
        main(tyro.cli(Options))
