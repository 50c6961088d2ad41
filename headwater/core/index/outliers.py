r"""Examples that stand out from what recent rows show, told while a model trains.

What is watched is each example's loss a token where the training loop tells it, else the row's self-influence
$p^\top F^{-1} p$ in the running second moment $F$ of rows: plain lengths of gradients say far less (measured in
docs/benchmarks/gradient-index.md). Both spread over orders of magnitude and fall as training goes on, so their
logarithm $x$ is compared with a window of recent ones, in two ways. With $m$ the window's median and $s$ the median
distance of its upper half from it over $\Phi^{-1}(3/4)$, which a few outliers do not move, and $\alpha$ the rate:

- $(x - m) / s > \Phi^{-1}(1 - \alpha / 2)$, which a normal upper half does at the rate $\alpha / 2$;
- $x$ is among the largest $\alpha / 2$ of the window, which exchangeable rows are at that rate whatever they look like.

Where the bulk is narrow the first finds every outlier at once; where it is wide, as in classification, the second finds
as many as the rate allows.
"""

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_NUMBERS = 256  # of each layer that self-influence is taken in
_DAMPING = 0.1  # of the mean eigenvalue
_AGAIN = 8  # times a window that the second moment is inverted anew


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How outliers are found among the rows of a run.

    Args:
        rate: Share of clean rows that are warned of, about.
        window: Recent rows that a row is compared with; the second of the two tests needs 2 / rate.
        least: Rows that must have been seen before any is warned of.
        most: Warnings in all; further outliers are only listed.
    """

    rate: float = 2e-3
    window: int = 1_000
    least: int = 200
    most: int = 20

    def __post_init__(self):
        if not 0 < self.rate < 0.5:
            raise ValueError(f"rate must lie between 0 and 0.5; got {self.rate}.")
        if not 2 <= self.least <= self.window:
            raise ValueError(
                f"least must lie between 2 and the window, {self.window}; got {self.least}."
            )


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An example that stands out.

    Attributes:
        id: The example.
        step: The step that saw it.
        measure: What stands out: "loss" or "self-influence".
        times: How many times the median of recent rows it is.
    """

    id: str
    step: int
    measure: str
    times: float

    def __str__(self) -> str:
        return (
            f"Example {self.id!r} stands out at step {self.step}: its {self.measure} is {self.times:.3g} times the "
            "median of recent examples; look at it."
        )


def far_out(
    values: Float[Tensor, " n"], window: Float[Tensor, " m"], rate: float
) -> Bool[Tensor, " n"]:
    """Which values are far above a window of others, by either test at half the rate.

    Example:
        >>> far_out(torch.tensor([2.9, 3.3]), torch.linspace(-2, 2, 101), 0.05).tolist()
        [True, True]
        >>> far_out(torch.tensor([1.5, 1.9]), torch.linspace(-2, 2, 101), 0.05).tolist()
        [False, False]
    """
    middle = window.median()
    spread = (window[window > middle] - middle).median() / NormalDist().inv_cdf(0.75)
    spread = spread.nan_to_num(0).clamp(min=torch.finfo(window.dtype).eps)
    normal = (values - middle) / spread > NormalDist().inv_cdf(1 - rate / 2)
    rank = 1 + (window >= values[:, None]).sum(1)
    return normal | (rank <= rate / 2 * (len(window) + 1))


class SelfInfluence:
    r"""$p^\top (F + 0.1 \bar\lambda I)^{-1} p$ over all layers, in a second moment of recent rows.

    Args:
        layers: Numbers of each layer in a row; None where the plain length is the self-influence already.
        window: Rows after which a row's weight in the second moment has fallen to a third.
    """

    def __init__(self, layers: Mapping[str, int] | None, window: int):
        self.layers, self.window = layers, window
        self._moments: list[Tensor] = []
        self._inverses: list[Tensor] = []
        self._since = 0

    def __call__(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Self-influences by the rows before these, which then count too."""
        if self.layers is None:
            return rows.square().sum(1)
        parts = [p[:, :_NUMBERS] for p in rows.split(list(self.layers.values()), 1)]
        if not self._moments:
            self._moments = [p.mT @ p / len(p) for p in parts]
            self._invert()
        found = sum((p @ M * p).sum(1) for p, M in zip(parts, self._inverses, strict=True))
        new = min(1.0, len(rows) / self.window)
        for moment, p in zip(self._moments, parts, strict=True):
            moment.mul_(1 - new).addmm_(p.mT, p, alpha=new / len(p))
        self._since += len(rows)
        if self._since >= self.window / _AGAIN:
            self._invert()
        return torch.as_tensor(found)

    def _invert(self) -> None:
        self._since, self._inverses = 0, []
        for moment in self._moments:
            damped = moment.clone()
            damping = _DAMPING * float(moment.diagonal().mean())
            damped.diagonal().add_(max(damping, torch.finfo(moment.dtype).tiny))
            self._inverses.append(torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0]))


class Watch:
    """Looks at examples as they appear.

    Args:
        options: How outliers are found.

    Attributes:
        found: Outliers so far, each example once.
        judged: Rows that were compared with others.
        flagged: How many of them were far out.
    """

    def __init__(self, options: Outliers):
        self.options, self.judged, self.flagged = options, 0, 0
        self.found: list[Outlier] = []
        self._recent: dict[str, deque[float]] = {}
        self._told: set[str] = set()

    def update(self, ids: list[str], step: int, measure: str, values: Float[Tensor, " n"]) -> None:
        """Judge a batch by those before it; values are positive."""
        logs = values.detach().cpu().double().clamp(min=1e-38).log()
        recent = self._recent.setdefault(measure, deque(maxlen=self.options.window))
        if len(recent) >= self.options.least:
            window = torch.tensor(recent, dtype=torch.float64)
            far = far_out(logs, window, self.options.rate).nonzero().flatten().tolist()
            self.judged, self.flagged = self.judged + len(ids), self.flagged + len(far)
            for i in far:
                if ids[i] not in self._told:
                    times = exp(min(float(logs[i] - window.median()), 80.0))
                    self._tell(Outlier(id=ids[i], step=step, measure=measure, times=times))
        recent.extend(logs.tolist())

    def _tell(self, outlier: Outlier) -> None:
        self._told.add(outlier.id)
        self.found.append(outlier)
        if len(self.found) <= self.options.most:
            last = len(self.found) == self.options.most
            more = " No more of these warnings; `outliers` lists all." if last else ""
            warnings.warn(f"{outlier}{more}", stacklevel=6)
