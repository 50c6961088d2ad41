r"""Examples whose gradient is far outside what recent rows show, told while a model trains.

Norms of gradients spread over orders of magnitude and fall as training goes on, so what is watched is the logarithm of
each row's length beside those of a window of recent rows. Middle and spread are taken from the window's median and the
median distance of the upper half from it, which a few outliers do not move: with $m$ the median of $x = \log \lVert p
\rVert$ and $s = \operatorname{median}(x - m \mid x > m) / \Phi^{-1}(3/4)$, a row is warned of where

$$\frac{x - m}{s} > \Phi^{-1}(1 - \alpha) ,$$

which a normal upper half does at the rate $\alpha$. Only the upper half counts: rows of well-learned examples reach far
down, and that says nothing about large ones.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How outliers are found among the rows of a run.

    Args:
        rate: Share of clean rows that are warned of, where the logarithms' upper half is normal.
        window: Recent rows that a row is compared with.
        least: Rows that must have been seen before any is warned of.
        most: Warnings in all; further outliers are only listed.
    """

    rate: float = 1e-3
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
    """An example whose row is far longer than recent ones.

    Attributes:
        id: The example.
        step: The step that saw it.
        norm: Length of its row.
        typical: Median length of recent rows.
        deviations: How far above the median its logarithm lies, in spreads of the upper half.
    """

    id: str
    step: int
    norm: float
    typical: float
    deviations: float

    def __str__(self) -> str:
        return (
            f"Example {self.id!r} at step {self.step} has a gradient {self.norm / self.typical:.3g} times as long as the "
            f"median of recent ones ({self.deviations:.1f} deviations of their logarithms); look at it."
        )


def deviations(
    values: Float[Tensor, " n"], window: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " n"], float]:
    """Distances of values above a window's median in spreads of its upper half, and the median.

    Example:
        >>> found, middle = deviations(torch.tensor([3.0]), torch.arange(-2.0, 3.0))
        >>> round(found.item(), 3), middle
        (1.349, 0.0)
    """
    middle = window.median()
    spread = (window[window > middle] - middle).median() / NormalDist().inv_cdf(0.75)
    spread = spread.nan_to_num(0).clamp(min=torch.finfo(window.dtype).eps)
    return (values - middle) / spread, middle.item()


class Watch:
    """Looks at rows as they appear.

    Args:
        options: How outliers are found.

    Attributes:
        found: Outliers so far, each example once.
        seen: Rows that were judged.
    """

    def __init__(self, options: Outliers):
        self.options, self.seen = options, 0
        self.found: list[Outlier] = []
        self._limit = NormalDist().inv_cdf(1 - options.rate)
        self._recent: deque[float] = deque(maxlen=options.window)
        self._told: set[str] = set()

    def update(self, ids: Sequence[str], step: int, rows: Float[Tensor, "n dim"]) -> None:
        """Judge the rows of a batch by those before it."""
        logs = rows.square().sum(1).clamp(min=1e-38).log().mul(0.5).double()
        if len(self._recent) >= self.options.least:
            window = torch.tensor(self._recent, dtype=torch.float64)
            far, middle = deviations(logs, window)
            self.seen += len(ids)
            for i in (far > self._limit).nonzero().flatten().tolist():
                if ids[i] not in self._told:
                    self._tell(
                        Outlier(
                            id=ids[i],
                            step=step,
                            norm=float(logs[i].exp()),
                            typical=exp(middle),
                            deviations=float(far[i]),
                        )
                    )
        self._recent.extend(logs.tolist())

    def _tell(self, outlier: Outlier) -> None:
        self._told.add(outlier.id)
        self.found.append(outlier)
        if len(self.found) <= self.options.most:
            last = len(self.found) == self.options.most
            more = " No more such warnings; `outliers` lists all." if last else ""
            warnings.warn(f"{outlier}{more}", stacklevel=6)
