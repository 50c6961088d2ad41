r"""One workload's table: banks of retrainings, trained models, and every entry measured, row by row.

Two protocols stand side by side. *Expected effect*: random halves of the data, every retraining with a seed of its
own; what leaving data out does on average. *Fixed run*: the first model's own run, same initial weights and order,
with a few per cent of the examples weighted zero; what it would have done to that run.

Queries and subsets are split in halves: knobs are tuned on one half of both and every row, tuned or not, is reported on
the other.
"""

import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import headwater.core.fit as core
from headwater.bench.entries import Entry
from headwater.bench.workload import Data, Workload
from headwater.core.capture import evaluation_mode, plan_batches
from headwater.core.cost import weight_gradients
from headwater.core.curvature import CurvatureMethod, Identity
from headwater.core.examples import to_device
from headwater.core.files import read_json, write_json
from headwater.core.fingerprint import fingerprint_json
from headwater.core.fit import Fit, fits_at
from headwater.core.forward import evaluate
from headwater.core.locks import FolderLock
from headwater.core.scores import Scores
from headwater.numerics.ranks import lds
from headwater.numerics.resampling import Estimate, noise_ceiling
from headwater.trace import Ensemble, Influence
from headwater.trace.base import Attributor
from headwater.trace.measures import (
    additive_ceiling,
    linear_datamodeling_score,
    mislabel_auc,
    warn_low_ceiling,
)
from headwater.trace.unrolling import metasmoothness
from headwater.training.bank import RetrainingBank, build_bank
from headwater.training.run import Run, train_model
from headwater.training.trajectory import Trajectory

Progress = Callable[[int, int, str], None]
T = TypeVar("T")

VERSION = 1  # rows of another version are made again
SEVERAL = ("models", "trajectories")  # what ensembles need
RECORDS = ("trajectory", "trajectories")  # what measures the curvature itself, along the run
BANK_SEED = 1000  # seeds of the retrainings begin above those of the models


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Args:
        subsets: Random halves; the workload's own number when left out.
        repeats: Retrainings of each, likewise.
        seeds: Models of the ensembles, likewise.
        left_out: Share of the examples that the fixed run goes without.
        n_samples: Bootstrap draws.
    """

    subsets: int | None = None
    repeats: int | None = None
    seeds: int | None = None
    left_out: float = 0.05
    n_samples: int = 400


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of a workload so far.

    Attributes:
        name: The workload.
        title: Heading of its table.
        facts: Protocol, ceilings, accuracy.
        rows: One for each entry, untuned and tuned.
        left_out: Names and reasons of what is not in the table.
    """

    name: str
    title: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """CPU seconds of all threads, in units of a plain pass, and memory above what was held before."""

    passes: float
    memory: int


class Bench:
    """A workload with its models and banks, made when they are asked for and kept in a folder.

    Args:
        workload: The workload.
        folder: Its folder.
        plan: How much is measured.
        progress: Called with (done, total, note).
    """

    def __init__(
        self, workload: Workload, folder: Path, plan: Plan, progress: Progress | None = None
    ):
        self.workload, self.folder, self.plan, self.progress = workload, folder, plan, progress
        self.n_subsets = plan.subsets or workload.subsets
        self.n_repeats = plan.repeats or workload.repeats
        self.n_seeds = plan.seeds or workload.seeds
        self._fits: dict[tuple[str, int], tuple[Fit, float]] = {}

    @cached_property
    def data(self) -> Data:
        """Training examples and queries."""
        return self.workload.load()

    @cached_property
    def halves(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Numbers of the queries and of the subsets to tune on, and to report on."""
        q, k = torch.arange(len(self.data.queries)), torch.arange(self.n_subsets)
        return {"tune": (q[0::2], k[0::2]), "report": (q[1::2], k[1::2])}

    def bank(self, *, fixed: bool = False) -> RetrainingBank:
        """The retrainings: of random halves, or of the first model's run without a few examples."""
        w, data = self.workload, self.data
        fraction = 1 - self.plan.left_out if fixed else 0.5
        kind = f"fixed-{self.plan.left_out:g}" if fixed else "expected"
        name = f"{kind}-{self.n_subsets}"
        measurement = self.measurement

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(done, total, f"{w.name} {name}: retraining")

        return build_bank(
            self.folder / name,
            w.model,
            (data.train.tensors[0], data.train.tensors[1]),
            (data.queries.tensors[0], data.queries.tensors[1]),
            data.masks(self.n_subsets, fraction=fraction, seed=int(fixed)),
            optimizer=w.stages(data),
            repeats=1 if fixed else self.n_repeats,
            first_seed=0 if fixed else BANK_SEED,
            same_run=fixed,
            n_parallel=w.parallel,
            loss=w.loss,
            measurements={measurement: w.measure},
            progress=report,
        )

    @cached_property
    def banks(self) -> dict[str, RetrainingBank]:
        """Both of them."""
        return {"expected": self.bank(), "fixed": self.bank(fixed=True)}

    @property
    def measurement(self) -> str:
        """What queries ask about."""
        return str(self.workload.task.measurement_of)

    def trained(self, seed: int) -> tuple[nn.Module, Trajectory]:
        """A model trained on everything, and the record of its run."""
        w = self.workload
        recipe = [stage.facts for stage in w.stages(self.data)]
        made_from = [recipe, self.data.train.fingerprint(), w.checkpoints, w.adaptive]
        model = w.model(seed)
        record = train_model(
            model,
            self.data.train,
            w.task,
            w.stages(self.data),
            folder=self.folder / f"models-{fingerprint_json(made_from)[:8]}" / str(seed),
            checkpoints=w.checkpoints,
            keep_optimizer=w.adaptive,
            seed=seed,
            progress=self.progress,
        )
        assert record is not None
        return model, record

    @cached_property
    def models(self) -> list[tuple[nn.Module, Trajectory]]:
        """Those of all seeds; methods see the first."""
        return [self.trained(seed) for seed in range(self.n_seeds)]

    def fit(self, curvature: CurvatureMethod, seed: int = 0) -> tuple[Fit, float]:
        """The fit of a seed's model, and its CPU seconds; that of the last curvature is kept."""
        key = (repr(curvature), seed)
        if key not in self._fits:
            self._fits = {k: v for k, v in self._fits.items() if k[0] == key[0]}
            model, record = self.models[seed]
            started = time.process_time()
            fit = core.fit(
                model,
                self.data.train,
                self.workload.task,
                curvature=curvature,
                weight_decay=record.weight_decay,
                adaptive=record.adaptive,
                distance=record.distance,
                horizon=None if record.adaptive else record.horizon,
            )
            self._fits[key] = (fit, time.process_time() - started)
        return self._fits[key]

    def options(self, entry: Entry) -> dict[str, Any]:
        """What an entry's method is given beside the fit and the queries."""
        _, record = self.models[0]
        if entry.needs == "trajectory":
            return {"trajectory": record}
        if entry.needs == "trajectories":
            own = [{"trajectory": record} for _, record in self.models]
            return {"fits": self._all_fits(entry), "own": own}
        if entry.needs == "models":
            if isinstance(entry.curvature, Identity):
                fit, states = self.fit(entry.curvature)[0], self.models
                return {"fits": fits_at(fit, [model.state_dict() for model, _ in states])}
            return {"fits": self._all_fits(entry)}
        if entry.needs in ("checkpoints", "moments"):
            segments = record.segments(len(record.checkpoints) - 1)
            numbers = [segment.checkpoints[-1] for segment in segments]
            states = [record.load_checkpoint(i) for i in numbers]
            more: dict[str, Any] = {"fits": fits_at(self.fit(entry.curvature)[0], states)}
            if entry.needs == "moments":
                more["moments"] = [record.load_optimizer(i) for i in numbers]
                return more | {"rates": [s.lr_sum / s.steps for s in segments]}
            parts = self.data.parts or (torch.arange(len(self.data.train)),)
            rates = torch.zeros(len(segments), len(self.data.train), dtype=torch.float64)
            for row, segment in zip(rates, segments, strict=True):
                part = parts[segment.stage]
                row[part] = segment.horizon / len(part)
            return more | {"rates": rates}
        return {}

    def _all_fits(self, entry: Entry) -> list[Fit]:
        return [self.fit(entry.curvature, seed)[0] for seed in range(self.n_seeds)]

    def plain_seconds(self, repeats: int = 5) -> float:
        """CPU seconds of a forward and backward pass over the training data, the best of a few."""
        model, examples, best = self.models[0][0], self.data.train, float("inf")
        batches = plan_batches(examples)
        with evaluation_mode(model), weight_gradients(model) as parameters, torch.enable_grad():
            for _ in range(repeats):
                started = time.process_time()
                for batch in batches:
                    data = to_device(examples.batch(batch.indices), parameters[0].device)
                    loss = self.workload.task.loss(model, data).sum()
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                best = min(best, time.process_time() - started)
        return best

    def measured(self, work: Callable[[], T]) -> tuple[T, Cost]:
        """What work returns, and what it cost: plain passes stand before and after it."""
        before, held = self.plain_seconds(), reset_peak()
        started = time.process_time()
        result = work()
        spent = time.process_time() - started
        memory = peak_bytes() - held
        return result, Cost(spent / min(before, self.plain_seconds()), memory)

    # Facts of the whole workload

    def facts(self) -> dict[str, Any]:
        """Protocol, noise ceiling, additive ceiling, and how good the models are; read where known."""
        return self._kept("facts.json", self._made_from(), self._facts)

    def _kept(self, name: str, made_from: dict[str, Any], make: Callable[[], Any]) -> Any:
        """A value from its file, made and written where there is none made from the same things."""
        place, key = self.folder / name, fingerprint_json(made_from)
        if place.is_file() and (found := read_json(place)).get("key") == key:
            return found["value"]
        value = make()
        write_json(place, {"key": key, "value": value})
        return value

    def _made_from(self) -> dict[str, Any]:
        w = self.workload
        return {
            "version": VERSION,
            "workload": [w.name, [o.facts for o in w.recipe], self.data.train.fingerprint()],
            "plan": asdict(self.plan) | {"n": [self.n_subsets, self.n_repeats, self.n_seeds]},
        }

    def _facts(self) -> dict[str, Any]:
        bank, (queries, subsets) = self.banks["expected"], self.halves["report"]
        outcomes = bank.outcomes(self.measurement).double()
        reported = outcomes[subsets][:, :, queries]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ceiling = noise_ceiling(reported) if reported.shape[1] > 1 else None
            if ceiling is not None:
                warn_low_ceiling(ceiling)
            halves_right = None if self.workload.text else float((outcomes > 0).double().mean())
            if halves_right is not None and halves_right < 0.25:
                warnings.warn(
                    f"Models of random halves answer only {100 * halves_right:.0f} % of the queries rightly: they have "
                    "hardly learned, and the table is about the beginning of training. Train longer.",
                    stacklevel=2,
                )
        additive = None
        if len(bank.masks) >= 20:
            additive = additive_ceiling(bank.masks, outcomes.mean(1)[:, queries]).estimate
        known = {"subsets": self.n_subsets, "repeats": outcomes.shape[1], "alpha": 0.5}
        return known | {
            "left_out": self.plan.left_out,
            "measurement": self.measurement,
            "queries": len(self.data.queries),
            "train": len(self.data.train),
            "seeds": self.n_seeds,
            "parameters": sum(p.numel() for p in self.models[0][0].parameters()),
            "steps": self.models[0][1].steps,
            "ceiling": _plain(ceiling),
            "additive": _plain(additive),
            "metasmoothness": self._metasmoothness(),
            "right": self._accuracy(),
            "halves_right": halves_right,
            "loss_auc": self._loss_auc(),
            "plain_seconds": self.plain_seconds(),
            "warnings": [str(w.message) for w in said],
        }

    def _metasmoothness(self) -> float:
        """How straight the first model's run is along a random reweighting of its examples."""
        model, record = self.models[0]
        run = Run(model=model, task=self.workload.task, train=self.data.train, trajectory=record)
        return metasmoothness(run)

    def _losses(self, which: str) -> Tensor:
        examples = getattr(self.data, which)
        model, task = self.models[0][0], self.workload.task
        return evaluate(model, examples, task.loss, batches=plan_batches(examples))

    def _accuracy(self) -> float | None:
        """Share of the queries whose right answer has most of the first model's probability; None for text."""
        if self.workload.text:
            return None
        task, queries = self.workload.task, self.data.queries
        margins = evaluate(
            self.models[0][0], queries, task.measurement, batches=plan_batches(queries)
        )
        return float((margins > 0).double().mean())

    def _loss_auc(self) -> dict[str, Any] | None:
        """How well an example's own loss tells wrong labels: the simplest detector."""
        wrong = self.data.wrong
        return None if wrong is None else _plain(mislabel_auc(self._losses("train"), wrong))

    # Rows

    def rows(self, entry: Entry) -> list[dict[str, Any]]:
        """The entry measured as it comes, and with its knob tuned; read where that was done before."""
        name = label(entry, self.n_seeds)
        what = [repr(entry.method), repr(entry.curvature), entry.needs, repr(entry.choices)]

        def make() -> list[dict[str, Any]]:
            try:
                return self._measure(entry)
            except (ValueError, FloatingPointError, MemoryError, ImportError) as error:
                return [{"name": name, "error": " ".join(str(error).split())}]

        return self._kept(f"rows/{slug(name)}.json", self._made_from() | {"entry": what}, make)

    def _measure(self, entry: Entry) -> list[dict[str, Any]]:
        fit, seconds = self.fit(entry.curvature)
        options = self.options(entry)
        n_fits = self.n_seeds if entry.needs in SEVERAL else 1
        unused = isinstance(entry.curvature, Identity) or entry.needs in RECORDS
        fitting = 0.0 if unused else n_fits * seconds
        base = {
            "name": label(entry, self.n_seeds),
            "fit_passes": fitting / self.plain_seconds(),
            "needs": entry.needs,
        }
        found = [self._row(entry.method, fit, options) | base | {"tuned": False}]
        if entry.choices:
            tuned = self._tuned(entry, fit, options)
            chosen = {"tuned": True, "choices": tuned["choices"]}
            found.append(self._row(tuned["method"], fit, options) | base | chosen)
        return found

    def _scores(self, method: Attributor, fit: Fit, options: dict[str, Any]) -> Scores:
        return method.attribute(fit, self.data.queries, **options)  # type: ignore[call-arg]

    def _tuned(self, entry: Entry, fit: Fit, options: dict[str, Any]) -> dict[str, Any]:
        """The choice with the best score on the half that is not reported."""
        queries, subsets = self.halves["tune"]
        bank = self.banks["expected"]
        outcomes = bank.outcomes(self.measurement).double().mean(1)[subsets][:, queries]
        tried = []
        for method in entry.choices:
            values = self._scores(method, fit, options).values[queries].double()
            score = float(lds(values, bank.masks[subsets], outcomes).nanmean())
            tried.append((score, method))
        tried = [t for t in tried if t[0] == t[0]]
        if not tried:
            raise ValueError("No choice of the knob has a defined score on the tuning half.")
        best = max(tried, key=lambda t: t[0])
        return {
            "method": best[1],
            "choices": [[knob(method), score] for score, method in tried],
        }

    def _row(self, method: Attributor, fit: Fit, options: dict[str, Any]) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scores, cost = self.measured(lambda: self._scores(method, fit, options))
        queries, subsets = self.halves["report"]
        row: dict[str, Any] = {
            "method": repr(method),
            "knob": knob(method),
            "passes": cost.passes,
            "memory": cost.memory,
            "damping": scores.facts.get("damping"),
            "damping_ratio": scores.facts.get("damping_ratio"),
            "notes": sorted(
                {" ".join(str(w.message).split()) for w in said if w.category is UserWarning}
            ),
        }
        for protocol, bank in self.banks.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the ceiling: it is in the facts
                found = linear_datamodeling_score(
                    scores, bank, queries=queries, subsets=subsets, n_samples=self.plan.n_samples
                ).lds
            row[protocol] = asdict(found.estimate) | {"left_out": found.left_out}
        if self.data.wrong is not None:
            row |= self._mislabels(method, fit, scores)
        return row

    def _mislabels(self, method: Attributor, fit: Fit, scores: Scores) -> dict[str, Any]:
        """AUC of finding wrong labels by what clean queries say, and by self-influence."""
        wrong = self.data.wrong
        assert wrong is not None
        values = scores.values[~scores.values.isnan().any(1)].double()
        found = {"auc_queries": _plain(mislabel_auc(-values.sum(0), wrong))}
        inner = method.method if isinstance(method, Ensemble) else method
        if isinstance(inner, Influence) and not inner.cg_steps:
            found["auc_self"] = _plain(mislabel_auc(inner.self_influence(fit), wrong))
        return found


def run_workload(
    workload: Workload,
    folder: str | Path,
    every: Sequence[Entry],
    *,
    left_out: Sequence[tuple[str, str]] = (),
    plan: Plan | None = None,
    progress: Progress | None = None,
    after_row: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Measure a workload's entries; what an earlier call measured in the folder is read.

    Args:
        workload: The workload.
        folder: Folder of all workloads.
        every: Its entries.
        left_out: Entries that are not measured, with the reason.
        plan: How much is measured.
        progress: Called with (done, total, note).
        after_row: Called with every row.

    Raises:
        FolderBusy: Another process is measuring this workload in this folder.
        ImportError: The package that holds the data is not installed.
    """
    place = Path(folder) / workload.name
    bench = Bench(workload, place, plan or Plan(), progress)
    with FolderLock(place / "run"):
        bench.data  # noqa: B018 - what is missing is told before anything is trained
        bench.banks  # noqa: B018
        rows = []
        for number, entry in enumerate(grouped(every)):
            if progress is not None:
                name = label(entry, bench.n_seeds)
                progress(number, len(every), f"{workload.name} methods: {name}")
            for row in bench.rows(entry):
                rows.append(row)
                if after_row is not None:
                    after_row(row)
        facts = bench.facts()
        report = Report(
            name=workload.name,
            title=workload.title,
            facts=facts,
            rows=rows,
            left_out=[(a, b) for a, b in left_out],
        )
        write_json(place / "report.json", asdict(report))
    return report


def grouped(every: Sequence[Entry]) -> Iterator[Entry]:
    """Entries of one curvature after each other, so that it is fitted once."""
    kinds = list(dict.fromkeys(repr(entry.curvature) for entry in every))
    yield from sorted(every, key=lambda entry: kinds.index(repr(entry.curvature)))


def label(entry: Entry, n_seeds: int) -> str:
    """The entry's name, with the number of models where it takes several."""
    return f"{entry.name}, {n_seeds} models" if entry.needs in SEVERAL else entry.name


def slug(name: str) -> str:
    """A name as a file has it.

    Example:
        >>> slug("EK-FAC + CG, 5 models")
        'ek-fac-cg-5-models'
    """
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)


def knob(method: Attributor) -> str:
    """What was chosen, in words: the damping or the ridge."""
    inner = method.method if isinstance(method, Ensemble) else method
    for name in ("damping", "ridge"):
        if hasattr(inner, name):
            return f"{name} {getattr(inner, name)}"
    return ""


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def reset_peak() -> int:
    """Give free memory back, forget the peak so far, and return what is still held (Linux; else 0)."""
    if not sys.platform.startswith("linux"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # a container may forbid it; then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most memory held since `reset_peak` (Linux; else 0)."""
    return _status("VmHWM") if sys.platform.startswith("linux") else 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
