"""How many nodes, and how many edges, of a basis a model needs to keep its accuracy.

Nodes: in one node layer all but the first k directions are set to zero, f → f C_k C_k⁺. Edges: each direction of the
next node layer is computed from its own masked input, in which all but the k strongest edges of the section are cut.
The constant and its edges stay. The least k that keeps the accuracy is found by bisection, which takes the curve to
rise; the curve itself shows whether it does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.audit.structure.basis import InteractionBasis, sections_of
from headwater.core.capture import Progress
from headwater.core.examples import as_examples, take
from headwater.core.fit import Fit
from headwater.core.prediction import Categorical, Prediction
from headwater.core.sections import Activations, Sections, Step
from headwater.extras import require

Kind = Literal["nodes", "edges"]
Metric = Literal["accuracy", "loss"]
_AT_ONCE = 1 << 22  # numbers of masked inputs held at a time


@dataclass(frozen=True)
class Curve:
    """What is kept of the model when only the first k nodes, or edges, are.

    Attributes:
        name: The node layer; of edges the one that they start at.
        n: How many there are.
        k: Numbers kept, ascending.
        values: The metric with each.
        needed: The least k within the tolerance; None where even all are not.
        floor: The smallest edge, or direction's weight, among those needed; None where none is.
    """

    name: str
    n: int
    k: tuple[int, ...]
    values: tuple[float, ...]
    needed: int | None
    floor: float | None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Curves of all node layers, or sections.

    Attributes:
        kind: "nodes" or "edges".
        basis: The basis they are of.
        metric: "accuracy" (share of rightly answered positions) or "loss" (nats a position).
        base: The metric of the whole model.
        tolerance: How far the metric may be from it.
        curves: One for each.
        facts: Costs.
    """

    kind: Kind
    basis: str
    metric: Metric
    base: float
    tolerance: float
    curves: tuple[Curve, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def needed(self) -> list[int | None]:
        """The least number needed in each node layer, or section."""
        return [curve.needed for curve in self.curves]

    @property
    def floors(self) -> list[float | None]:
        """The smallest needed edge of each section."""
        return [curve.floor for curve in self.curves]

    def table(self) -> dict[str, list]:
        """A row for each curve."""
        return {
            "node_layer": [c.name for c in self.curves],
            self.kind: [c.n for c in self.curves],
            "needed": self.needed,
        }

    def plot(self, *others: "Ablation"):
        """The curves, a panel each, with those of other bases beside; needs the extra `plots`."""
        pyplot = require("matplotlib.pyplot", extra="plots")
        n = len(self.curves)
        figure, axes = pyplot.subplots(
            1, n, figsize=(2.8 * n, 2.8), sharey=True, squeeze=False, layout="constrained"
        )
        for panel, name in zip(axes[0], (c.name for c in self.curves), strict=True):
            for number, one in enumerate((self, *others)):
                for curve in (c for c in one.curves if c.name == name):
                    colour = f"C{number}"
                    panel.plot(
                        curve.k, curve.values, ".-", ms=4, lw=1.2, color=colour, label=one.basis
                    )
                    if curve.needed is not None:
                        panel.axvline(curve.needed, ls=":", lw=1, color=colour)
            panel.set_title(f"node layer {name}", fontsize=9)
            panel.set_xlabel(f"{self.kind} kept")
            panel.set_xscale("symlog", linthresh=1)
            panel.set_xlim(left=0)
        allowed = -self.tolerance if self.metric == "accuracy" else self.tolerance
        for panel in axes[0]:
            panel.axhline(self.base + allowed, lw=0.8, color="0.6")
        axes[0][0].set_ylabel(self.metric)
        axes[0][-1].legend(frameon=False, fontsize=8)
        return figure

    def __repr__(self) -> str:
        each = ", ".join(
            f"{c.name}: {'more than ' if c.needed is None else ''}{c.n if c.needed is None else c.needed} of {c.n}"
            for c in self.curves
        )
        return (
            f"Ablation({self.kind} of {self.basis} needed for {self.metric} within {self.tolerance:g} of "
            f"{self.base:.4g}: {each})"
        )


def bisect(is_enough: Callable[[int], bool], n: int) -> int | None:
    """The least number from 0 to n that is enough, if what is enough stays so with more.

    Example:
        >>> bisect(lambda k: k * k >= 50, 100)
        8
    """
    if not is_enough(n):
        return None
    low, high = -1, n  # low is not enough, high is
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


def ablate(
    fit: Fit,
    basis: InteractionBasis,
    kind: Kind = "nodes",
    *,
    data: Any = None,
    tolerance: float = 0.005,
    metric: Metric | None = None,
    steps: Sequence[Step] | None = None,
    points: int = 12,
    progress: Progress | None = None,
) -> Ablation:
    """The number of nodes, or edges, that a model needs in a basis, one node layer or section at a time.

    Args:
        fit: The fitted model.
        basis: Its basis.
        kind: "nodes" (of each node layer but the outputs) or "edges" (of each section).
        data: Examples to measure on, best ones that the basis was not found on; the training data when left out.
        tolerance: How far the metric may fall below (the accuracy) or rise above (the loss) that of the whole model.
        metric: "accuracy" where there are classes, else "loss".
        steps: The model's steps, where it was cut by them.
        points: Points of each curve, besides those of the bisection.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The basis has no edges, is of another model, or an option is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"Expected kind among {get_args(Kind)}; got {kind!r}.")
    if kind == "edges" and basis.edges is None:
        raise ValueError("The basis was found without edges; pass edges='jacobian'.")
    if basis.facts["made_from"]["model"] != fit.made_from["model"]:
        raise ValueError("The basis is of another model, or of other weights; find it again.")
    examples = fit.train if data is None else as_examples(data)
    sections = sections_of(fit, basis.names[:-1], steps)
    measure = _Measure(fit, sections, basis, examples, metric)
    base = measure.whole()
    curves = []
    for number in range(len(sections)):
        place = measure.nodes(number) if kind == "nodes" else measure.edges(number)
        known: dict[int, float] = {}

        def value(k: int, place=place, known=known) -> float:
            if k not in known:
                known[k] = place.value(k)
            return known[k]

        def is_enough(k: int, value=value) -> bool:
            below = base - value(k) if measure.metric == "accuracy" else value(k) - base
            return below <= tolerance + 1e-9

        needed = bisect(is_enough, place.n)
        for k in _spaced(place.n, points):
            value(k)
        k = tuple(sorted(known))
        floor = None if not needed else float(place.weights[needed - 1])
        curves.append(
            Curve(sections.names[number], place.n, k, tuple(known[i] for i in k), needed, floor)
        )
        if progress is not None:
            progress(number + 1, len(sections), f"{kind} needed")
    return Ablation(
        kind=kind,
        basis=basis.basis,
        metric=measure.metric,
        base=base,
        tolerance=tolerance,
        curves=tuple(curves),
        facts={
            "papers": ["arXiv:2405.10928"],
            "sweeps": measure.sweeps,
            "n_examples": len(examples),
        },
    )


def _spaced(n: int, points: int) -> Iterable[int]:
    """Numbers from 0 to n, denser at the beginning."""
    if points < 2 or n < 1:
        return sorted({0, n})
    return sorted({0, n, *(round(n ** (i / (points - 1))) for i in range(points))})


@dataclass(frozen=True)
class _Place:
    """One node layer, or section: how many there are to keep, what they weigh, and what keeping k of them does."""

    n: int
    weights: Tensor
    value: Callable[[int], float]


class _Measure:
    """Runs the model with parts of it cut out.

    Args:
        fit: The fitted model.
        sections: It, cut.
        basis: The basis.
        examples: The data.
        metric: "accuracy", "loss", or what the task has.
    """

    def __init__(
        self,
        fit: Fit,
        sections: Sections,
        basis: InteractionBasis,
        examples: Any,
        metric: Metric | None,
    ):
        self.sections, self.basis, self.examples = sections, basis, examples
        self.batches, self.sweeps = fit.batches(examples), 0
        prediction = fit.task.predict(fit.model, next(self._batches())[0])
        classes = isinstance(prediction, Categorical)
        if metric not in (None, *get_args(Metric)) or (metric == "accuracy" and not classes):
            raise ValueError(
                f"Expected metric 'loss', or 'accuracy' where there are classes; got {metric!r}."
            )
        default: Metric = "accuracy" if classes else "loss"
        self.metric: Metric = default if metric is None else metric

    def _batches(self):
        with self.sections.hooks(), torch.no_grad():
            for _, data, found in self.sections.over(self.examples, self.batches):
                yield data, found

    def _mean(self, outputs: Callable[[Any, list[Activations]], Tensor]) -> float:
        """The metric, when the model's outputs are these."""
        self.sweeps += 1
        total = count = 0.0
        for data, found in self._batches():
            prediction = self.sections.prediction(outputs(data, found), data)
            value, n = _scored(prediction, self.metric)
            total, count = total + value, count + n
        return total / max(count, 1)

    def whole(self) -> float:
        """The metric of the model as it is."""
        return self._mean(lambda data, found: found[-1].f[..., :-1])

    def nodes(self, number: int) -> _Place:
        """Keeping the first k directions of a node layer."""
        layer = self.basis.layers[number].directions
        first = int(layer.constant)

        def value(k: int) -> float:
            keep = layer.C[:, : first + k] @ layer.C_pinv[: first + k]

            def outputs(data: Any, found: list[Activations]) -> Tensor:
                f = found[number].f
                return self.sections.rest(number, f @ keep.to(f), found, data)

            return self._mean(outputs)

        return _Place(layer.n_nodes, layer.weight[first:], value)

    def edges(self, number: int) -> _Place:
        """Keeping the k strongest edges of a section."""
        assert self.basis.edges is not None
        here, there = (layer.directions for layer in self.basis.layers[number : number + 2])
        strength = self.basis.edges[number][int(there.constant) :, int(here.constant) :]
        order = strength.flatten().argsort(descending=True, stable=True)

        def value(k: int) -> float:
            keep = torch.zeros(strength.numel(), dtype=torch.bool)
            keep[order[:k]] = True
            mask = torch.ones(there.C.shape[1], here.C.shape[1], dtype=torch.bool)
            mask[int(there.constant) :, int(here.constant) :] = keep.view(strength.shape)

            def outputs(data: Any, found: list[Activations]) -> Tensor:
                f = self._masked(number, mask, found, data)
                return self.sections.rest(number + 1, f, found, data)

            return self._mean(outputs)

        return _Place(strength.numel(), strength.flatten()[order], value)

    def _masked(
        self,
        number: int,
        mask: Bool[Tensor, "node_out node_in"],
        found: list[Activations],
        data: Any,
    ) -> Float[Tensor, "batch pos dim"]:
        """A section's output, each of its directions from its own masked input."""
        here, there = (layer.directions for layer in self.basis.layers[number : number + 2])
        like, after = found[number], found[number + 1]
        C, C_pinv, C_next, C_back = (
            m.to(like.f) for m in (here.C, here.C_pinv, there.C, there.C_pinv)
        )
        hat = like.f @ C
        rows, which = mask.unique(dim=0, return_inverse=True)  # nodes with the same edges run once
        result = after.f.new_zeros(*after.f.shape[:2], len(mask))
        n = len(hat)
        step = max(1, _AT_ONCE // max(hat.numel(), after.f.numel()))
        for start in range(0, len(rows), step):
            some = rows[start : start + step].to(hat)
            kept = (hat[None] * some[:, None, None]).flatten(0, 1) @ C_pinv
            again = take(data, torch.arange(n).repeat(len(some)))
            out = self.sections.run(number, kept, like, again).unflatten(0, (len(some), n))
            for i in range(len(some)):
                nodes = (which == start + i).nonzero().squeeze(1).to(hat.device)
                result[..., nodes] = out[i] @ C_next[:, nodes]
        return result @ C_back


def _scored(prediction: Prediction, metric: Metric) -> tuple[float, float]:
    """The sum of the metric over scored positions, and their number."""
    n = float(prediction.mask.sum())
    if metric == "loss":
        return float(prediction.token_loss().double().sum()), n
    right = prediction.outputs.argmax(-1) == prediction.target
    return float((right & prediction.mask).sum()), n
