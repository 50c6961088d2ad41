"""Entries: what is in every table, how each method is given what it needs, and which knob of it is tuned."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from headwater.bench.built import Built
from headwater.bench.workload import Workload
from headwater.core.curvature import EKFAC, KFAC, CurvatureMethod, Diagonal, Dual, Identity
from headwater.core.index import LoGra, Whitened
from headwater.trace import (
    BM25,
    LESS,
    TRAK,
    Arnoldi,
    DataInf,
    EmbeddingSimilarity,
    Ensemble,
    GradientCosine,
    GradientDot,
    Influence,
    LiSSA,
    Newton,
    Random,
    RepresentationSimilarity,
    Source,
    TracIn,
    TrackStar,
    Unrolling,
)
from headwater.trace.base import Attributor

Needs = Literal["model", "checkpoints", "moments", "models", "trajectory", "trajectories"]

DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RELATIVE = tuple(f"{x} relative" for x in (0.001, 0.01, 0.1, 1.0, 10.0))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method with its place in the table.

    Attributes:
        name: Its name there.
        method: The method as it comes, with nothing chosen by looking at retrainings.
        curvature: What the fit holds.
        needs: What it reads: the model alone, checkpoints of its run, those with the optimizer's moments, models of
            several seeds, the whole recorded run, or those of several seeds.
        choices: The same method with other values of its knob; the best on one half of queries and subsets is
            reported on the other.
    """

    name: str
    method: Attributor
    curvature: CurvatureMethod = field(default_factory=Identity)
    needs: Needs = "model"
    choices: tuple[Attributor, ...] = ()


def _damped(
    method: Influence | Newton, dampings: Sequence[float] = DAMPINGS
) -> tuple[Attributor, ...]:
    return tuple(replace(method, damping=value) for value in dampings)


def _indexes(exact: EKFAC) -> list[Entry]:
    """The index in its kinds, each built for the question."""
    whitened = Built(kind=Whitened())
    found = [
        Entry(
            name="index, whitened",
            method=whitened,
            curvature=exact,
            choices=tuple(replace(whitened, kind=Whitened(damping=x)) for x in DAMPINGS),
        )
    ]
    for name, kind, curvature in (
        ("index, LoGra-PCA", LoGra(init="pca"), exact),
        ("index, LoGra random", LoGra(), Identity()),
    ):
        choices = tuple(Built(kind=replace(kind, damping=x)) for x in RELATIVE)
        found.append(
            Entry(name=name, method=Built(kind=kind), curvature=curvature, choices=choices)
        )
    return found


def entries(workload: Workload) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The entries of a workload's table, cheap ones first, and those left out with the reason."""
    plain, exact, dual = Influence(n_intervals=0), EKFAC(fisher="exact"), Dual(cut=workload.cut)
    rank = 8 if workload.text else 16  # of TRAK; language models have many layers
    found = [
        Entry(name="random", method=Random()),
        Entry(name="representation similarity", method=RepresentationSimilarity()),
    ]
    if workload.text:
        exact = EKFAC()  # all labels of every token would be a thousand passes
        found += [
            Entry(name="BM25", method=BM25(column="text")),
            Entry(name="embedding similarity", method=EmbeddingSimilarity()),
        ]
    else:
        signed = RepresentationSimilarity(signed=True)
        found.append(Entry(name="representation similarity, signed by label", method=signed))
    found += [
        Entry(name="gradient dot", method=GradientDot()),
        Entry(name="gradient cosine", method=GradientCosine()),
        Entry(name="TracIn", method=TracIn(), needs="checkpoints"),
        Entry(
            name="TrackStar",
            method=TrackStar(),
            choices=tuple(TrackStar(damping=x) for x in (1e-3, 1e-2, 1e-1, 1.0)),
        ),
        Entry(
            name="TRAK",
            method=TRAK(),
            choices=tuple(TRAK(ridge=x, rank=rank) for x in (0.1, 1.0, 10.0)),
        ),
        Entry(name="TRAK", method=TRAK(), needs="models"),
        Entry(
            name="DataInf",
            method=DataInf(),
            choices=tuple(DataInf(damping=x) for x in (0.1, 1.0, 10.0, 100.0)),
        ),
        Entry(name="diagonal", method=plain, curvature=Diagonal(), choices=_damped(plain)),
        Entry(name="K-FAC", method=plain, curvature=KFAC(), choices=_damped(plain)),
    ]
    if not workload.text:
        found.append(
            Entry(
                name="EK-FAC, drawn labels", method=plain, curvature=EKFAC(), choices=_damped(plain)
            )
        )
    found += [
        Entry(name="EK-FAC", method=plain, curvature=exact, choices=_damped(plain)),
        *_indexes(exact),
        Entry(name="EK-FAC", method=Ensemble(method=plain), curvature=exact, needs="models"),
        Entry(
            name="EK-FAC + CG",
            method=replace(plain, cg_steps=10, cg_tolerance=0.01),
            curvature=exact,
        ),
        Entry(name="LiSSA", method=LiSSA(), curvature=exact),
        Entry(name="Arnoldi", method=Arnoldi(rank=50, steps=100)),
    ]
    left_out = list(workload.slow)
    if workload.text:
        left_out.append(("dual", "its rows, one for each label of each position, do not fit"))
    else:
        found += [
            Entry(name="dual", method=plain, curvature=dual, choices=_damped(plain)),
            Entry(name="dual", method=Ensemble(method=plain), curvature=dual, needs="models"),
            Entry(
                name="Newton, leave-one-out",
                method=Newton(share=1.0),
                curvature=dual,
                choices=_damped(Newton(share=1.0)),
            ),
            Entry(
                name="Newton, halves",
                method=Newton(),
                curvature=dual,
                choices=_damped(Newton(), DAMPINGS[2:5])
                if workload.slow
                else (),  # the fast workloads stay fast
            ),
        ]
        if workload.slow:
            several = Ensemble(method=Newton())
            found.append(
                Entry(name="Newton, halves", method=several, curvature=dual, needs="models")
            )
    if workload.adaptive:
        found.append(Entry(name="LESS", method=LESS(rank=16), needs="moments"))
    else:
        left_out.append(("LESS", "it needs Adam's moments, and this recipe is plain descent"))
    found += [
        Entry(name="SOURCE", method=Source(), curvature=exact, needs="trajectory"),
        Entry(name="exact unrolling", method=Unrolling(), needs="trajectory"),
    ]
    if not workload.text:
        fast = Source(fast=True)
        dual = replace(dual, cut=max(dual.cut, 0.02))  # early in training every label is likely
        found.append(Entry(name="SOURCE, dual", method=fast, curvature=dual, needs="trajectory"))
        if not workload.slow:
            several = Ensemble(method=fast)
            found.append(
                Entry(name="SOURCE, dual", method=several, curvature=dual, needs="trajectories")
            )
    slow = {name for name, _ in left_out}
    return [entry for entry in found if entry.name not in slow], left_out


def chosen(every: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """Those whose name holds one of the given words; all without any.

    Raises:
        ValueError: A word is in no name.
    """
    for name in names:
        if not any(name.lower() in entry.name.lower() for entry in every):
            known = ", ".join(dict.fromkeys(entry.name for entry in every))
            raise ValueError(f"No method of this workload is called {name!r}; there are: {known}.")
    return [
        entry
        for entry in every
        if not names or any(name.lower() in entry.name.lower() for name in names)
    ]
