"""`headwater bench`: every attribution method in one table, on real data, against retraining."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from headwater.cli.common import emit_json, progress_bar, say
from headwater.cli.flags import parse, require

if TYPE_CHECKING:
    from headwater.bench import Report, Workload


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure attribution methods against retraining: quality with intervals and ceilings, cost in passes, memory.

    Banks of retrainings, models and finished rows are kept in the folder; the same command goes on where a killed one
    stopped. For each workload the folder gets table.md, report.json and pareto.png.

    Example: headwater bench digits-mlp --method ek-fac dual

    Args:
        workloads: Names (see --list), or "all"; the fast one when left out.
        folder: Where everything is kept.
        method: Only methods with one of these words in their names.
        show_list: Print the workloads and what is missing, and stop.
        subsets: Random halves that are retrained; the workload's own number when left out.
        repeats: Retrainings of each half, likewise.
        seeds: Models of the ensembles, likewise.
        left_out: Share of the examples that the fixed run goes without.
        fashion_mnist: Folder with the files of Fashion-MNIST, which adds the workload fashion-mlp.
        threads: Threads of PyTorch, in each process.
        jobs: Workloads that run side by side, each in a process of its own: on two cores "--jobs 2 --threads 1" takes
            half the time. Passes are CPU time, so that they stay what they are.
        json: Print the reports as JSON.
    """

    workloads: tyro.conf.Positional[tuple[str, ...]] = ()
    folder: Path = Path("runs/bench-quality")
    method: tuple[str, ...] = ()
    show_list: Annotated[bool, tyro.conf.arg(name="list")] = False
    subsets: int | None = None
    repeats: int | None = None
    seeds: int | None = None
    left_out: float = 0.05
    fashion_mnist: Path | None = None
    threads: int = 2
    jobs: int = 1
    json: bool = False

    def check(self) -> None:
        """Refuse what no table can be made with."""
        for flag, value, least in (
            ("--subsets", self.subsets, 20),
            ("--repeats", self.repeats, 1),
            ("--seeds", self.seeds, 1),
            ("--threads", self.threads, 1),
            ("--jobs", self.jobs, 1),
        ):
            require(flag, value, f"at least {least}", value is None or value >= least)
        require("--left-out", self.left_out, "between 0 and 0.5", 0 < self.left_out <= 0.5)


def run(words: list[str]) -> int:
    command = parse(Bench, words, prog="bench")
    from headwater.bench import markdown

    known, missing = available(command)
    if command.show_list:
        if command.json:
            emit_json({"workloads": {k: w.title for k, w in known.items()}, "missing": missing})
        else:
            print("\n".join(f"{name:16} {w.title}" for name, w in known.items()))
            print("\n".join(f"{name:16} skipped: {why}" for name, why in missing.items()))
        return 0
    reports = bench(command, known, missing)
    if command.json:
        emit_json({"reports": [asdict(report) for report in reports], "skipped": missing})
    else:
        print("\n".join(markdown(report) for report in reports))
    return 0


def available(command: Bench) -> tuple[dict[str, "Workload"], dict[str, str]]:
    """The workloads that can be asked for, and those that cannot with the reason."""
    from headwater.bench import WORKLOADS, fashion_mnist_workload

    known, missing = dict(WORKLOADS), {}
    if command.fashion_mnist is None:
        missing["fashion-mlp"] = (
            "its data come with no Python package; pass --fashion-mnist FOLDER (on Debian the package "
            "dataset-fashion-mnist has it)"
        )
    else:
        workload = fashion_mnist_workload(command.fashion_mnist)
        known[workload.name] = workload
    return known, missing


def bench(command: Bench, known: dict[str, "Workload"], missing: dict[str, str]) -> list["Report"]:
    """Measure the workloads that were asked for."""
    import torch

    from headwater.bench import Plan, entries, run_workload
    from headwater.bench.entries import chosen
    from headwater.bench.workloads import FAST

    torch.set_num_threads(command.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names = tuple(known) if command.workloads == ("all",) else command.workloads or FAST
    for name in names:
        if name not in known:
            why = missing.get(name, f"there are: {', '.join(known)}, and all of them: all")
            raise ValueError(f"There is no workload {name!r} to run: {why}.")
    if names == tuple(known):
        for name, why in missing.items():
            say(f"  {name} is skipped: {why}")
    if command.jobs > 1:
        side_by_side(command, names)
    plan = Plan(
        subsets=command.subsets,
        repeats=command.repeats,
        seeds=command.seeds,
        left_out=command.left_out,
    )
    reports = []
    with progress_bar(quiet=command.json) as progress:
        for name in names:
            every, left_out = entries(known[name])
            try:
                report = run_workload(
                    known[name],
                    command.folder,
                    chosen(every, command.method),
                    left_out=left_out,
                    plan=plan,
                    progress=progress,
                )
            except ImportError as error:
                if command.workloads != ("all",):
                    raise
                missing[name] = " ".join(str(error).split())
                say(f"  {name} is skipped: {missing[name]}")
                continue
            write(report, command.folder / name)
            reports.append(report)
    return reports


def side_by_side(command: Bench, names: Sequence[str]) -> None:
    """Run each workload in a process of its own, the last listed first, as those take longest.

    What they finish is in the folder; what one of them fails at is met again, and told, when the tables are made.
    """
    plain = Bench()
    flags: list[str] = []
    for field in fields(Bench):
        value = getattr(command, field.name)
        if field.name not in ("workloads", "jobs", "json") and value != getattr(plain, field.name):
            words = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name.replace('_', '-')}", *map(str, words)]

    def run_one(name: str) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "headwater", "bench", name, *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                for line in process.stderr or ():
                    if not command.json:
                        print(line, end="", file=sys.stderr, flush=True)
            finally:
                process.terminate()  # nothing to a process that has ended

    with ThreadPoolExecutor(command.jobs) as pool:
        list(pool.map(run_one, reversed(names)))


def write(report: "Report", folder: Path) -> None:
    """The table and, where matplotlib is installed, the plot."""
    from headwater.bench import markdown, pareto_plot
    from headwater.extras import require as optional

    (folder / "table.md").write_text(markdown(report), encoding="utf-8")
    try:
        figure = pareto_plot(report)
        plots: Any = optional("matplotlib.pyplot", extra="plots")
    except ImportError as error:
        print(f"headwater: no plot: {error}", file=sys.stderr)
        return
    figure.savefig(folder / "pareto.png", dpi=150)
    plots.close(figure)
    say(f"  {folder / 'table.md'}, {folder / 'pareto.png'}")
