"""A dry run: what a fit and a trace will take, before they are spent.

The work itself is measured, on a few batches and for a few seconds, and extrapolated: by positions for passes over
the data, by the cube of the side for decompositions. Nothing is modelled that can be run.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf, prod
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.core.capture import (
    BatchInfo,
    BatchPlan,
    Capture,
    Rows,
    evaluation_mode,
    plan_batches,
    sweep,
)
from headwater.core.cost import (
    KeptMemory,
    available_memory_bytes,
    held_memory_bytes,
    plain_pass_seconds,
    positions,
    spread,
    synchronize,
)
from headwater.core.curvature import (
    EKFAC,
    KFAC,
    Curvature,
    CurvatureMethod,
    Dense,
    Dual,
    DualCurvature,
    FitContext,
    Identity,
    Layerwise,
    Preconditioned,
)
from headwater.core.curvature.folds import EigenvaluesByFold
from headwater.core.curvature.moments import Basis, EigenvalueSums, SecondMoments
from headwater.core.damping import Damping, Inverse, evidence
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.fingerprint import fingerprint_model
from headwater.core.follow import follow
from headwater.core.gradients import CollectGradients, Gradients
from headwater.core.prediction import Categorical, Gaussian
from headwater.core.scoring import PairScores, ReplicateScores
from headwater.core.store import ArtifactWriter
from headwater.core.target import Loss, Measured, fisher_target
from headwater.core.task import Task
from headwater.numerics import spectral

_EVIDENCE_STEPS = 40  # the fixed point's usual number of steps
_CUBE = 1e-9  # seconds of an eigendecomposition over the cube of its side, before one is measured
_WRITTEN = 1 << 24  # numbers written to see how fast the disk is
_SAVE_EVERY = 30.0  # seconds between two checkpoints of a sweep
_INTERVALS = 10  # examples on each side of a query that get an interval


@dataclass(frozen=True)
class Stage:
    """One stretch of work.

    Attributes:
        name: What is done.
        verb: "fit", or "trace" for what follows it.
        seconds: What it takes.
    """

    name: str
    verb: Literal["fit", "trace"]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a fit and a trace will take on this machine.

    Attributes:
        curvature: The kind of curvature, chosen where that was left to the plan.
        n_examples: Training examples.
        n_queries: Queries that are asked.
        pass_seconds: One plain forward and backward pass over the data, the unit of cost.
        stages: The work, in order; empty where it does not fit.
        memory: Bytes at the peak, by what holds them.
        available_memory: Bytes that this process may still take, beyond what it holds.
        disk: Bytes written, by what they hold.
        available_disk: Free bytes; None where no folder was named.
        batch_size: Most examples in a batch, made smaller where memory is short.
        batch_tokens: Most positions in a batch, likewise.
        problems: Why it cannot be done here, each with what to do; empty when it can.
        notes: What else is worth knowing.
        facts: Numbers behind the plan.
    """

    curvature: str
    n_examples: int
    n_queries: int
    pass_seconds: float
    stages: tuple[Stage, ...]
    memory: dict[str, int]
    available_memory: int
    disk: dict[str, int]
    available_disk: int | None
    batch_size: int
    batch_tokens: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether memory and disk suffice."""
        return not self.problems

    def seconds(self, verb: Literal["fit", "trace"] | None = None) -> float:
        """Seconds of all stages, or of one verb's."""
        return sum((s.seconds for s in self.stages if verb in (None, s.verb)), start=0.0)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory at the peak, with what is held already."""
        return sum(self.memory.values())

    def require(self) -> "Plan":
        """The plan itself.

        Raises:
            MemoryError: The work does not fit on this machine; the message says what to do.
        """
        if self.problems:
            raise MemoryError(" ".join(self.problems))
        return self

    def to_rows(self, of: Literal["time", "memory", "disk"] = "time") -> list[dict[str, Any]]:
        """Rows of a table: stages with their seconds and plain passes, or bytes of memory or of disk."""
        if of == "time":
            unit = max(self.pass_seconds, 1e-12)
            return [asdict(s) | {"passes": s.seconds / unit} for s in self.stages]
        parts = self.memory if of == "memory" else self.disk
        return [{"what": name, "bytes": n} for name, n in parts.items()]

    def to_json(self) -> dict[str, Any]:
        """Everything, made of what strict JSON has."""
        from headwater.core.evidence import plain

        sums = {
            "ok": self.ok,
            "fit_seconds": self.seconds("fit"),
            "trace_seconds": self.seconds("trace"),
            "peak_memory": self.peak_memory,
        }
        return plain(sums | asdict(self))

    def __repr__(self) -> str:
        unit = max(self.pass_seconds, 1e-12)
        lines = [
            f"Plan({self.curvature} curvature, {self.n_examples:,} training examples, "
            f"{self.n_queries} queries; one plain pass takes {_duration(self.pass_seconds)})"
        ]
        for verb in ("fit", "trace"):
            total = self.seconds(verb)
            if self.stages:
                lines.append(f"  {verb:5s} {_duration(total)} = {total / unit:.2g} passes")
            for stage in (s for s in self.stages if s.verb == verb):
                lines.append(f"        {stage.name}: {_duration(stage.seconds)}")
        lines.append(
            f"  memory {_amount(self.peak_memory)} at the peak, "
            f"{_amount(self.available_memory)} available beside what is held"
        )
        lines.append(f"  disk   {_amount(sum(self.disk.values()))}")
        return "\n".join([*lines, *(f"  {x}" for x in (*self.problems, *self.notes))])


def plan(
    model: nn.Module,
    train: Any,
    task: Task,
    *,
    curvature: CurvatureMethod | str = "auto",
    layers: str | Sequence[str] = "trainable",
    skip: Sequence[str] = (),
    n_queries: int = 10,
    batch_size: int = 256,
    batch_tokens: int = 4096,
    folds: int | None = None,
    folder: str | Path | None = None,
) -> Plan:
    """Measure this machine for a few seconds, and predict what a fit and its first trace will take.

    Args:
        model: The model.
        train: Its training data, as for `headwater.fit`.
        task: What it was trained for.
        curvature: The curvature, its name, or "auto".
        layers: Which parameters to follow.
        skip: Patterns of parameters or modules to leave out.
        n_queries: Queries that will be asked.
        batch_size: Most examples in a batch.
        batch_tokens: Most positions in a batch, for data with lengths.
        folds: Folds of the data that intervals come from; the curvature's own number when left out.
        folder: Where the fit will be saved: its disk is measured too.

    Returns:
        The plan. Where memory or disk do not suffice, `ok` is false and `problems` say what to do.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> data = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> from headwater.core.task import Classification
        >>> plan(model, data, Classification(), curvature="ekfac").ok
        True
    """
    from headwater.core.fit import _choose  # which itself asks this module for the dual form's rows

    started = time.perf_counter()
    examples = as_examples(train)
    device = next(model.parameters()).device
    probe = to_device(examples.batch(range(min(2, len(examples)))), device)
    capture = Capture(model, task, follow(model, task, probe, layers=layers, skip=skip))
    method = _choose(curvature, capture, examples)
    if folds is not None and hasattr(method, "folds"):
        method = replace(method, folds=folds)  # type: ignore[type-var]
    batches = plan_batches(
        examples, batch_size=batch_size, batch_tokens=batch_tokens, folds=method.folds
    )
    needs = _Needs(capture, examples, batches, method, n_queries)
    held, available = held_memory_bytes(device), available_memory_bytes(device)
    problems, notes, smaller = needs.problems(available)
    free = None if folder is None else disk_usage(_existing(Path(folder))).free
    if free is not None and sum(needs.disk().values()) > free:
        problems.append(
            f"The run folder needs {_amount(sum(needs.disk().values()))} of disk and {_amount(free)} are free: "
            "name a folder on another disk, lower `folds`, or follow fewer layers."
        )
    stages: list[Stage] = []
    pass_seconds = inf
    if not problems:
        clock = _Clock(capture, examples, batches)
        pass_seconds = clock.plain_pass()
        stages = _Work(clock, method, needs, n_queries, folder).stages()
    if getattr(method, "tolerance", None) is not None:
        notes.append(
            "With `tolerance` the passes may end early: these times are the most they take."
        )
    return Plan(
        curvature=method.kind,
        n_examples=len(examples),
        n_queries=n_queries,
        pass_seconds=pass_seconds,
        stages=tuple(stages),
        memory={"held already": held} | needs.peak(),
        available_memory=available,
        disk=needs.disk(),
        available_disk=free,
        batch_size=max(1, int(batch_size * smaller)),
        batch_tokens=max(1, int(batch_tokens * smaller)),
        problems=tuple(problems),
        notes=tuple(notes),
        facts={
            "n_parameters": needs.n_parameters,
            "n_batches": len(batches),
            "n_positions": sum(positions(examples, b) for b in batches),
            "rows": needs.n_rows,
            "planning_seconds": time.perf_counter() - started,
        },
    )


def dual_rows(capture: Capture, examples: Examples, *, cut: float, probe: int = 64) -> int | None:
    """Rows that the dual curvature would need, from a few examples; None where positions make it unsuitable.

    With several positions an example the true rank is far above the number of examples, and few sampled rows lose to
    the Kronecker form; so the dual form is for predictions at one position.
    """
    n = min(probe, len(examples))
    chosen = torch.linspace(0, len(examples) - 1, n).long().tolist()
    with evaluation_mode(capture.model), torch.no_grad():
        try:
            prediction = capture.task.predict(
                capture.model, to_device(examples.batch(chosen), capture.device)
            )
        except ValueError:  # a task that only knows its loss
            return None
    if not isinstance(prediction, Categorical | Gaussian) or prediction.mask.shape[1] > 1:
        return None
    return round(len(prediction.rows(cut).example) / n * len(examples))


class _Clock:
    """Times work on a few batches and extrapolates it to all."""

    def __init__(self, capture: Capture, examples: Examples, batches: list[BatchPlan]):
        self.batch_size = max(len(b.indices) for b in batches)
        self.batch_tokens = max(positions(examples, b) for b in batches)
        self.capture, self.examples, self.batches = capture, examples, batches
        width = sorted(batches, key=lambda b: positions(examples, b) / len(b.indices))
        self.order = [width[i] for i in spread(len(width))]
        self.n_positions = sum(positions(examples, b) for b in batches)
        self.limit = 0.7  # seconds a measurement, before it is known how long the whole will take

    def plain_pass(self) -> float:
        """Seconds of one plain pass over all the data."""
        model, task = self.capture.model, self.capture.task
        seconds = self.all_data(
            lambda some: plain_pass_seconds(model, task, self.examples, some, n=len(some))
        )
        self.limit = max(self.limit, 0.005 * seconds)
        return seconds

    def all_data(self, run: Callable[[list[BatchPlan]], Any]) -> float:
        """Seconds that `run` would take on all batches, from a few of them or from parts of one.

        What `run` returns, if it is a number, are the seconds it took.
        """
        middle = self.order[0]
        small = self._part(middle, max(1, len(middle.indices) // 8))
        self._time(run, [small])  # warms up
        first = self._time(run, [small])
        whole = first * self._size([middle]) / self._size([small])
        if whole <= self.limit:
            n = min(len(self.order), max(2, int(self.limit / max(whole, 1e-9))))
            some = self.order[:n]
            return self._time(run, some) * self.n_positions / self._size(some)
        n = int(self.limit / max(first, 1e-9) * len(small.indices))
        larger = self._part(middle, min(max(n, 2 * len(small.indices)), len(middle.indices)))
        if self._size([larger]) <= self._size([small]):
            return first * self.n_positions / self._size([small])
        second = self._time(run, [larger])
        slope = (second - first) / (self._size([larger]) - self._size([small]))
        slope = max(slope, 0.25 * second / self._size([larger]))
        each = max(0.0, second - slope * self._size([larger]))
        return each * len(self.batches) + slope * self.n_positions

    def _part(self, batch: BatchPlan, n: int) -> BatchPlan:
        return BatchPlan(batch.indices[:n], batch.fold)

    def _size(self, batches: list[BatchPlan]) -> int:
        return sum(positions(self.examples, b) for b in batches)

    def _time(self, run: Callable[[list[BatchPlan]], Any], batches: list[BatchPlan]) -> float:
        synchronize(self.capture.device)
        started = time.perf_counter()
        told = run(batches)
        synchronize(self.capture.device)
        return told if isinstance(told, float) else time.perf_counter() - started

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds of work that is done once: the better of two runs where they are short."""
        seconds = self._time(lambda _: (work(), None)[1], [])
        if seconds < self.limit:
            seconds = min(seconds, self._time(lambda _: (work(), None)[1], []))
        return seconds


class _Needs:
    """Bytes that the work takes, from shapes and from what one pass keeps."""

    def __init__(
        self,
        capture: Capture,
        examples: Examples,
        batches: list[BatchPlan],
        method: CurvatureMethod,
        n_queries: int,
    ):
        self.capture, self.examples, self.method = capture, examples, method
        self.n_queries, self.n = n_queries, len(examples)
        self.layers = list(capture.layers.values())
        self.n_parameters = sum(layer.numel for layer in self.layers)
        self.itemsize = next(capture.model.parameters()).element_size()
        self.largest = max(batches, key=lambda b: positions(examples, b))
        self.per_position, self.transient = self._measured()
        self.n_rows = self._rows()

    def _measured(self) -> tuple[float, float]:
        """Bytes that a pass keeps for each position, and what comes and goes beside them."""
        part = BatchPlan(self.largest.indices[: max(1, len(self.largest.indices) // 8)], 0)
        capture, examples = self.capture, self.examples
        data = to_device(examples.batch(part.indices), capture.device)
        kept, rows_bytes, wide = KeptMemory(capture.model), [0], [False]

        def emit(rows: Rows) -> None:
            kept.add(rows.a)
            rows_bytes.append(2 * (rows.a.nbytes + rows.g.nbytes))
            wide.append(rows.pos > 1)

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            for x in args:
                if isinstance(x, Tensor):
                    kept.add(x)

        modules = dict(capture.model.named_modules())
        used = {use.module for layer in self.layers for use in layer.uses}
        handles = [modules[name].register_forward_hook(keep) for name in used if name in modules]
        keys = examples.keys[list(part.indices)].to(capture.device)
        info = BatchInfo(torch.tensor(part.indices))
        try:
            with capture.hooks(), torch.no_grad(), kept.watching():
                capture.backward(data, Loss(), info, keys, emit)
        finally:
            for handle in handles:
                handle.remove()
        size = positions(examples, part)
        self.several = any(wide)
        return kept.total / size, (2 * kept.largest + max(rows_bytes)) / size

    def _rows(self) -> int:
        """Rows of the dual form; none for others."""
        if not isinstance(self.method, Dual):
            return 0
        found = None
        if self.method.fisher == "exact":
            found = dual_rows(self.capture, self.examples, cut=self.method.cut)
        draws = self.method.draws if self.method.fisher == "mc" else 1
        return self.n * draws if found is None else found

    @property
    def batch(self) -> int:
        """What one batch takes."""
        size = positions(self.examples, self.largest)
        chunk = 0
        if self.several:
            numel = max(layer.numel for layer in self.layers)
            chunk = 3 * self.itemsize * min(1 << 24, len(self.largest.indices) * numel)
        return int(size * (self.per_position + self.transient)) + chunk

    @property
    def factors(self) -> int:
        """Numbers in the second moments of all layers' sides."""
        if not isinstance(self.method, KFAC):
            return 0
        sides: dict[str, int] = {}
        for layer in self.layers:
            groups, out, in_ = layer.shape
            for name, d in ((f"A:{layer.input_group}", in_), (f"G:{layer.name}", out)):
                sides[name] = groups * (d * d if d <= self.method.max_factor else d)
        return sum(sides.values())

    @property
    def spectrum(self) -> int:
        """Numbers in the eigenvalues, all folds."""
        return (self.method.folds + self.own_bases) * self.n_parameters

    @property
    def own_bases(self) -> int:
        """Eigenbases beside that of all data, one a fold where intervals get their own."""
        method = self.method
        return (
            method.folds if isinstance(method, EKFAC) and method.has_own_bases(self.layers) else 0
        )

    @property
    def row_numel(self) -> int:
        """Numbers in the dual form's rows."""
        each = 0
        for layer in self.layers:
            sides = layer.shape[0] * (layer.shape[1] + layer.shape[2])
            each += min(layer.numel, sides) if not self.several else layer.numel
        return self.n_rows * each

    def _moments_of_work(self) -> list[dict[str, int]]:
        """What is held together at each stretch of the work."""
        b, p, q = self.itemsize, self.n_parameters, self.n_queries
        batch = {"one batch": self.batch}
        trace = batch | {
            "queries": 3 * b * q * p,
            "scores": 3 * 8 * q * self.n,
        }
        if isinstance(self.method, Dual):
            gram = 8 * self.n_rows**2
            rows = {"rows": b * self.row_numel}
            kept = self.method.folds if self.method.folds > 1 else 0
            copies = int(0.8 * b * self.row_numel + 0.64 * gram) * kept
            return [
                batch | {"rows": 2 * b * self.row_numel},
                rows | {"Gram matrix": 4 * gram},
                rows | {"Gram matrix": 3 * gram, "replicates": copies} | trace,
            ]
        if isinstance(self.method, Dense):
            rows = b * self.n * p
            return [
                batch | {"rows": 2 * rows, "matrix": 3 * 8 * p * p},
                {"matrix": 3 * 8 * p * p} | trace,
            ]
        spectrum = b * (self.spectrum + p)
        kept = self.method.folds if self.method.folds > 1 else 0
        copies = b * kept * (self.method.folds + 1) * p  # sums, eigenvalues, and f of them
        sets = 1 + self.own_bases
        return [
            batch | {"factors": (2 + sets) * b * self.factors},
            batch | {"factors": 2 * sets * b * self.factors, "eigenvalues": spectrum},
            {"factors": sets * b * self.factors, "eigenvalues": spectrum, "damping": 2 * 8 * p},
            {"factors": sets * b * self.factors, "eigenvalues": spectrum, "replicates": copies}
            | trace,
        ]

    def peak(self) -> dict[str, int]:
        """The parts at the stretch of work that takes the most."""
        return max(self._moments_of_work(), key=lambda parts: sum(parts.values()))

    def disk(self) -> dict[str, int]:
        """Bytes that the fit writes."""
        b = self.itemsize
        if isinstance(self.method, Dual):
            fit = b * self.row_numel + 8 * self.n_rows**2
            return {
                "fit": fit,
                "checkpoints": 2 * b * self.row_numel,
                "scores": 4 * self.n_queries * self.n,
            }
        if isinstance(self.method, Dense):
            return {"fit": 8 * self.n_parameters**2, "scores": 4 * self.n_queries * self.n}
        state = 0 if isinstance(self.method, Identity) else max(self.factors, self.spectrum)
        return {
            "fit": b * ((1 + self.own_bases) * self.factors + self.spectrum),
            "checkpoints": 2 * b * state,
            "scores": 4 * self.n_queries * self.n,
        }

    def problems(self, available: int) -> tuple[list[str], list[str], float]:
        """Why memory does not suffice, notes, and by how much batches should shrink."""
        if isinstance(self.method, Dual) and self.n_rows > self.method.max_rows:
            return (
                [
                    f"The dual curvature would have {self.n_rows:,} rows, more than max_rows="
                    f"{self.method.max_rows:,}: raise `cut`, or use curvature='ekfac'."
                ],
                [],
                1.0,
            )
        peak = self.peak()
        total, batch = sum(peak.values()), peak.get("one batch", 0)
        if total <= 0.9 * available:
            return [], [], 1.0
        worst = max(
            (p for p in self._moments_of_work() if "one batch" in p), key=lambda p: sum(p.values())
        )
        room = 0.9 * available - (sum(worst.values()) - self.batch)
        if batch and 0.02 * self.batch < room and total - batch <= 0.9 * available:
            smaller = room / self.batch
            note = (
                f"Memory is short: with batches {smaller:.2f} times as large it fits; use the batch_size and "
                "batch_tokens given here."
            )
            return [], [note], smaller
        hungry = max(peak, key=lambda name: peak[name])
        remedy = {
            "queries": "ask fewer queries at a time",
            "scores": "ask fewer queries at a time",
            "rows": "use curvature='ekfac'",
            "Gram matrix": "use curvature='ekfac'",
            "matrix": "use curvature='ekfac'",
        }.get(
            hungry,
            "follow fewer layers (layers=… or skip=…), lower `folds`, or use curvature='kfac'",
        )
        problem = (
            f"The work needs {_amount(total)} of memory and {_amount(available)} are available; most of it, "
            f"{_amount(peak[hungry])}, for the {hungry}: {remedy}."
        )
        return [problem], [], 1.0


class _Work:
    """The stages of a fit and a trace, each run on a part of the data."""

    def __init__(
        self,
        clock: _Clock,
        method: CurvatureMethod,
        needs: _Needs,
        n_queries: int,
        folder: str | Path | None,
    ):
        self.clock, self.needs, self.n_queries = clock, needs, n_queries
        self.capture, self.examples = clock.capture, clock.examples
        self.layers = list(self.capture.layers.values())
        whole = {"tolerance": None} if hasattr(method, "tolerance") else {}
        self.method = replace(method, **whole)  # type: ignore[type-var]
        self.write_rate = inf if folder is None else _write_rate(Path(folder))
        self.to_disk = folder is not None

    def stages(self) -> list[Stage]:
        method, found = self.method, [self._fingerprints()]
        if isinstance(method, Dual):
            stages, curvature = self._dual(method)
        elif isinstance(method, Dense):
            stages, curvature = self._dense(method)
        elif isinstance(method, KFAC):
            stages, curvature = self._kronecker(method)
        else:
            stages, curvature = self._swept(method)
        found += stages
        if self.to_disk:
            found.append(Stage("save", "fit", self.needs.disk()["fit"] / self.write_rate))
        return [*found, self._damping(curvature), *self._trace(curvature)]

    def _context(self, batches: list[BatchPlan]) -> FitContext:
        return FitContext(self.capture, self.examples, batches)

    def _fingerprints(self) -> Stage:
        def work() -> None:
            fingerprint_model(self.capture.model)
            self.examples.fingerprint()

        return Stage("fingerprints", "fit", self.clock.once(work))

    def _saved(self, seconds: float, state: int) -> float:
        """Seconds of a sweep with its checkpoints, of `state` bytes."""
        each = state / self.write_rate if self.to_disk else 0.0
        n_saves = seconds // _SAVE_EVERY + 1 if self.to_disk else 0
        return seconds + n_saves * each

    def _swept(self, method: CurvatureMethod) -> tuple[list[Stage], Curvature]:
        """Curvature that is one sweep, or nothing at all."""
        made: list[Curvature] = []
        seconds = 0.0
        if isinstance(method, Identity):
            made.append(method.fit(self._context([])))
        else:
            seconds = self.clock.all_data(lambda b: made.append(method.fit(self._context(b))))
            seconds = self._saved(seconds, self.needs.itemsize * self.needs.spectrum)
        return [Stage("second moments", "fit", seconds)], made[-1]

    def _kronecker(self, method: KFAC) -> tuple[list[Stage], Curvature]:
        kept: list[SecondMoments] = []
        seconds = self.clock.all_data(lambda b: kept.append(method.moments(self._context(b))[0]))
        seconds = self._saved(seconds, self.needs.itemsize * self.needs.factors)
        moments = kept[-1]
        stages = [
            Stage("second moments", "fit", seconds),
            Stage(
                "eigendecompositions",
                "fit",
                (1 + self.needs.own_bases) * self._decompositions(moments),
            ),
        ]
        bases = _stand_in(moments)
        folds = torch.full((method.folds,), len(self.examples) / method.folds)
        sums = {x.name: torch.rand(method.folds, *x.block) for x in self.layers}
        if isinstance(method, EKFAC):
            target = fisher_target(
                method.fisher, draws=method.draws, cut=method.cut, seed=method.seed + 1
            )
            swept: list[EigenvalueSums] = []
            each = [bases] * (1 + self.needs.own_bases)

            def run(batches: list[BatchPlan]) -> None:
                gathered = EigenvaluesByFold(self.layers, each, method.folds)
                swept.append(gathered.eigenvalues[0])
                sweep(self.capture, self.examples, [gathered], target, batches=batches)

            seconds = self.clock.all_data(run)
            seconds = self._saved(seconds, self.needs.itemsize * self.needs.spectrum)
            stages.append(Stage("eigenvalues", "fit", seconds))
            sums = swept[-1].finish()
        return stages, Layerwise(bases, sums, folds)

    def _decompositions(self, moments: SecondMoments) -> float:
        """Seconds of all eigendecompositions: small sides measured, large ones by the cube."""
        by_side: dict[int, list[Tensor]] = {}
        for name, moment in moments.finish().items():
            if moments.is_full(name):
                by_side.setdefault(moment.shape[-1], []).append(moment)
        total, left, rate = 0.0, 2 * self.clock.limit, _CUBE
        for n, (side, members) in enumerate(sorted(by_side.items())):
            each = rate * side**3
            if n == 0 or min(rate, 2 * _CUBE) * side**3 < left:
                one = members[0].reshape(-1, side, side)[0]
                if n == 0:
                    spectral.eigh(one)  # warms up
                each = self.clock.once(lambda x=one: spectral.eigh(x))
                left -= each
                if side >= 128:  # below, the cube is not what counts
                    rate = each / side**3
            total += each * sum(prod(m.shape[:-2]) for m in members)
        return total

    def _dual(self, method: Dual) -> tuple[list[Stage], Curvature]:
        collected: list[CollectGradients] = []
        target = fisher_target(method.fisher, draws=method.draws, cut=method.cut, seed=method.seed)

        def run(batches: list[BatchPlan]) -> None:
            collected.append(CollectGradients(self.layers))
            sweep(self.capture, self.examples, collected[-1:], target, batches=batches)

        seconds = self.clock.all_data(run)
        seconds = self._saved(seconds, self.needs.itemsize * self.needs.row_numel)
        rows, _, _ = collected[-1].finish()
        rows = rows[: min(len(rows), 1024)]
        folds = torch.arange(len(rows)) % method.folds
        sizes = torch.full((method.folds,), len(self.examples) / method.folds)
        made: list[DualCurvature] = []

        def gram() -> None:
            made.append(DualCurvature(rows, folds, sizes.double()))

        gram()  # warms up
        seconds_gram = self.clock.once(gram)
        more = self.needs.n_rows / len(rows)
        stages = [
            Stage("rows", "fit", seconds),
            Stage("Gram matrix", "fit", seconds_gram * more**2),
        ]
        return stages, made[-1]

    def _dense(self, method: Dense) -> tuple[list[Stage], Curvature]:
        context = self._context(self.clock.order[:1])
        made: list[Curvature] = []
        seconds = self.clock.once(lambda: made.append(method.fit(context)))
        return [Stage("matrix", "fit", seconds * len(self.clock.order))], made[-1]

    def _damping(self, curvature: Curvature) -> Stage:
        """The automatic damping; nothing where the training run recorded its own."""
        n = len(self.examples)
        more = self._larger(curvature) ** 3
        spectra: list[dict[str, Tensor]] = []
        decompose = self.clock.once(lambda: spectra.append(curvature.spectra()))
        few = self.clock.once(lambda: evidence(spectra[0].values(), n=n, distance=1.0, steps=4))
        return Stage("damping", "trace", decompose * more + few * _EVIDENCE_STEPS / 4)

    def _larger(self, curvature: Curvature) -> float:
        """How many times more rows the whole dual form has than the measured one."""
        if not isinstance(curvature, DualCurvature):
            return 1.0
        return self.needs.n_rows / max(len(curvature.rows), 1)

    def _trace(self, curvature: Curvature) -> list[Stage]:
        """Gradients of the queries, their preconditioning, a pass of scores, and the intervals."""
        examples, capture, clock = self.examples, self.capture, self.clock
        per_query = 4 * self.needs.itemsize * self.needs.n_parameters
        room = int(available_memory_bytes(capture.device) / 4 / max(per_query, 1))
        n_some = max(1, min(self.n_queries, room, len(examples)))
        asked = examples.subset(spread(len(examples))[:n_some])
        found: list[Gradients] = []

        def gradients() -> None:
            collect = CollectGradients(self.layers)
            sweep(capture, asked, [collect], Measured(), batches=self._batches(asked))
            found.append(collect.finish()[0])

        more_queries = self.n_queries / n_some
        seconds_queries = clock.once(gradients) * more_queries
        n_rows = sum(examples.lengths) if examples.lengths else len(examples)
        function = Inverse(Damping(1.0))
        prepared = [curvature.prepare(found[0], function, n_rows)]  # warms up, and factors once
        seconds_prepare = clock.once(
            lambda: prepared.append(curvature.prepare(found[0], function, n_rows))
        )
        larger = self._larger(curvature)
        seconds_prepare *= more_queries * larger

        def score(batches: list[BatchPlan]) -> None:
            pairs = PairScores(prepared[-1], len(examples))
            sweep(capture, examples, [pairs], Loss(), batches=batches)

        seconds_scores = clock.all_data(score)
        if more_queries > 1 or larger > 1:
            bare = clock.all_data(
                lambda b: sweep(capture, examples, [], Loss(), batches=b) and None
            )
            combined = type(prepared[-1]) is not Preconditioned  # left as a combination of rows
            growth = more_queries * (larger if combined else 1.0)
            seconds_scores = bare + max(0.0, seconds_scores - bare) * growth
        solve = self._solve(curvature)
        stages = [
            Stage("query gradients", "trace", seconds_queries + seconds_prepare + solve),
            Stage("scores", "trace", seconds_scores),
        ]
        if self.method.folds > 1:
            seconds = self._replicates(curvature, found[0], more_queries)
            stages.append(Stage("intervals", "trace", seconds + 0.5 * self.method.folds * solve))
        return stages

    def _replicates(self, curvature: Curvature, asked: Gradients, more_queries: float) -> float:
        """Seconds of scoring the strongest examples under the curvature of all folds but one, each in turn."""
        n, examples = len(self.examples), self.examples
        # queries that choose at random would name so many different examples
        n_chosen = max(1, round(n * (1 - (1 - min(1.0, 2 * _INTERVALS / n)) ** self.n_queries)))
        chosen = examples.subset(spread(n)[:n_chosen])
        function, prepared = Inverse(Damping(1.0)), []

        def prepare() -> None:
            replicates = curvature.replicates()
            if isinstance(curvature, Layerwise):
                spectra = [r.spectra() for r in replicates]
                factors = {
                    name: torch.stack([function(s[name], 1.0) for s in spectra])
                    for name in curvature.bases
                }
                prepared[:] = [ReplicateScores(asked, curvature.bases, factors, n_chosen)]
            else:
                made = [r.prepare(asked, function, n_chosen) for r in replicates]
                prepared[:] = [PairScores(m, n_chosen) for m in made]

        def score(batches: list[BatchPlan]) -> None:
            sweep(self.capture, chosen, prepared, Loss(), batches=batches)

        seconds = self.clock.once(prepare)
        clock = _Clock(self.capture, chosen, self._batches(chosen))
        clock.limit = self.clock.limit
        return (seconds + clock.all_data(score)) * more_queries * self._larger(curvature)

    def _batches(self, examples: Examples) -> list[BatchPlan]:
        size, tokens = self.clock.batch_size, self.clock.batch_tokens
        return plan_batches(examples, batch_size=size, batch_tokens=tokens)

    def _solve(self, curvature: Curvature) -> float:
        """Seconds of factoring the dual form's system."""
        if not isinstance(curvature, DualCurvature):
            return 0.0
        system = curvature.gram.clone()
        system.diagonal().add_(float(system.diagonal().mean()))
        torch.linalg.cholesky_ex(system)  # warms up
        seconds = self.clock.once(lambda: torch.linalg.cholesky_ex(system))
        return seconds * self._larger(curvature) ** 3


def _stand_in(moments: SecondMoments) -> dict[str, Basis]:
    """Bases of the right shapes, for the time that multiplying by them takes."""
    vectors: dict[str, Tensor | None] = {
        name: torch.randn_like(moment) / moment.shape[-1] ** 0.5 if moments.is_full(name) else None
        for name, moment in moments.finish().items()
    }
    return {
        name: (vectors[f"A:{layer.input_group}"], vectors[f"G:{name}"])
        for name, layer in moments.layers.items()
    }


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _write_rate(folder: Path) -> float:
    """Bytes a second that artifacts are written at, hashed and synced."""
    with tempfile.TemporaryDirectory(dir=_existing(folder), prefix=".headwater-plan-") as place:
        numbers = torch.rand(_WRITTEN)
        started = time.perf_counter()
        with ArtifactWriter(Path(place) / "speed", kind="speed") as writer:
            writer.tensor("numbers", numbers)
        return numbers.nbytes / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    if seconds == inf:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def _amount(n: int | float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} bytes"
