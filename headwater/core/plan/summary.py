"""What a fit and a trace will take, as stages of work and bytes of memory and disk."""

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal


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
            f"  memory {amount(self.peak_memory)} at the peak, "
            f"{amount(self.available_memory)} available beside what is held"
        )
        lines.append(f"  disk   {amount(sum(self.disk.values()))}")
        return "\n".join([*lines, *(f"  {x}" for x in (*self.problems, *self.notes))])


def _duration(seconds: float) -> str:
    if seconds == inf:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def amount(n: int | float) -> str:
    """So many bytes, in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} bytes"
