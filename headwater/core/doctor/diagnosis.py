"""What the checks found, and the words it is told in."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from headwater.core.follow import LeftOut

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: What was looked at.
        status: "ok", "warn" (the numbers hold, but look) or "fail" (they would be wrong).
        detail: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class LayerCheck:
    """Per-example gradients of one followed layer against autograd's.

    Attributes:
        name: The layer.
        kind: How its gradients are made.
        parameters: How many parameters it covers.
        share: Their share of the model's parameters.
        relative_error: Norm of the difference over the norm of autograd's gradients, the worse of
            one example at a time and all in one batch.
        status: "fail" where that is beyond rounding.
    """

    name: str
    kind: str
    parameters: int
    share: float
    relative_error: float
    status: Status


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found.

    Attributes:
        checks: All checks, in the order in which they were made.
        layers: The followed layers, empty where the loss itself is broken.
        coverage: Share of the model's parameters that is followed.
        left_out: Parameters that are not followed, and why.
        tied: Groups of modules that share one parameter.
        reused: Modules that run several times in a forward pass, with how often.
        facts: Numbers behind the checks.
    """

    checks: tuple[Check, ...]
    layers: tuple[LayerCheck, ...] = ()
    coverage: float = 0.0
    left_out: tuple[LeftOut, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    reused: tuple[tuple[str, int], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r} was not checked; there are {[c.name for c in self.checks]}.")

    def to_rows(self, of: Literal["checks", "layers"] = "checks") -> list[dict[str, Any]]:
        """The checks, or the layers, as rows of a table."""
        return [asdict(row) for row in (self.checks if of == "checks" else self.layers)]

    def to_json(self) -> dict[str, Any]:
        """Everything, made of what strict JSON has."""
        from headwater.core.evidence import plain

        return plain({"ok": self.ok} | asdict(self))

    def __repr__(self) -> str:
        counts = Counter(check.status for check in self.checks)
        head = ", ".join(f"{counts[s]} {s}" for s in ("ok", "warn", "fail") if counts[s])
        lines = [f"Diagnosis({head}; {len(self.layers)} layers, {percent(self.coverage)} covered)"]
        for check in self.checks:
            if check.status != "ok":
                lines.append(
                    f"  {check.status}  {check.name}: {check.detail} {check.remedy}".rstrip()
                )
        return "\n".join(lines)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.3g} %"


def name_some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def name_errors(errors: dict[str, float], most: int = 5) -> str:
    """The first of many names, with their errors."""
    return name_some([f"{name} ({percent(error)})" for name, error in errors.items()], most)
