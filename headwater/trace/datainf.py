r"""DataInf: influence with the inverse taken of each example's outer product, in closed form.

Kwon, Wu, Wu and Zou (2024), "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models",
arXiv:2310.00902. The inverse of a mean is replaced by the mean of the inverses, which Sherman and Morrison give:

$$\Big(\frac1N \sum_i g_i g_i^\top + \rho I\Big)^{-1} v \approx
\frac1N \sum_i (g_i g_i^\top + \rho I)^{-1} v
= \frac{1}{N\rho} \sum_i \Big(v - \frac{g_i^\top v}{\rho + \lVert g_i \rVert^2}\, g_i\Big),$$

layer by layer, with ρ a tenth of the layer's mean squared gradient. The curvature is the empirical Fisher.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Accumulator, Progress, Rows, sweep
from headwater.core.curvature import Preconditioned
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gradients import Factored, Gradients, combined, dense, inner, squared_norms
from headwater.core.layers import Layer
from headwater.core.scores import Scores
from headwater.core.target import Loss
from headwater.core.task import Measurement
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import inner_products, query_gradients


def removed_shares(
    dots: Float[Tensor, "query train"], squares: Float[Tensor, " train"], damping: float
) -> Float[Tensor, "query train"]:
    r"""$\dfrac{g_i^\top v}{\rho + \lVert g_i \rVert^2}$: how much of its gradient an example's inverse takes out of v.

    Example:
        >>> removed_shares(torch.tensor([[6.0]]), torch.tensor([2.0]), 1.0).tolist()
        [[2.0]]
    """
    return dots / (damping + squares)


@dataclass(frozen=True, kw_only=True)
class DataInf(Attributor):
    """Influence through the mean of the examples' own damped inverses.

    Args:
        damping: ρ of each layer, in units of its mean squared gradient.
    """

    paper: ClassVar[str] = "arXiv:2310.00902"

    damping: float = 0.1

    def __post_init__(self):
        if not self.damping > 0:
            raise ValueError(f"damping must be positive; got {self.damping}.")

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example, after three passes over them.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).
        """
        examples, n = as_examples(queries), len(fit.train)
        gradients = query_gradients(fit, examples, measurement, weights, progress)

        def over_data(accumulator: Any, note: str) -> Any:
            options = {"batches": fit.batches(fit.train), "progress": progress, "note": note}
            sweep(fit.capture(), fit.train, [accumulator], Loss(), **options)
            return accumulator.finish()

        squares = over_data(_SquaredNorms(fit.followed), "squared gradients")
        damping = {
            layer.name: self.damping * squares[layer.name] / (n * layer.numel)
            for layer in fit.followed
        }
        removed = over_data(_Removed(gradients, damping), "DataInf")
        solved = {}
        for name, block in gradients.blocks.items():  # no gradient in the data, no influence
            v, rho = dense(block), damping[name]
            solved[name] = (v - removed[name].to(v) / n) / rho if rho > 0 else torch.zeros_like(v)
        prepared = Preconditioned(Gradients(solved))
        values = -inner_products(fit, prepared, fit.train, progress=progress).finish() / n
        return to_scores(
            self,
            fit,
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
        )


class _SquaredNorms(Accumulator):
    """Squared norms of the examples' gradients, summed, layer by layer."""

    def __init__(self, layers: Iterable[Layer]):
        self.sums = {layer.name: torch.zeros((), dtype=torch.float64) for layer in layers}

    def update(self, rows: Rows) -> None:
        self.sums[rows.layer.name] += squared_norms(Factored(rows.a, rows.g)).double().sum().cpu()

    def merge(self, other: "_SquaredNorms") -> None:
        for name, total in other.sums.items():
            self.sums[name] += total

    def finish(self) -> dict[str, float]:
        return {name: float(total) for name, total in self.sums.items()}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.sums = dict(tensors)


class _Removed(Accumulator):
    """What the examples' inverses take out of each query, summed: one gradient for each query and layer."""

    def __init__(self, queries: Gradients, damping: dict[str, float]):
        self.queries, self.damping = queries, damping
        self.sums = {n: torch.zeros_like(dense(block)) for n, block in queries.blocks.items()}

    def update(self, rows: Rows) -> None:
        name, block = rows.layer.name, Factored(rows.a, rows.g)
        if self.damping[name] > 0:
            dots = inner(self.queries.blocks[name], block)
            shares = removed_shares(dots, squared_norms(block).to(dots), self.damping[name])
            self.sums[name] += combined(block, shares).to(self.sums[name])

    def merge(self, other: "_Removed") -> None:
        for name, total in other.sums.items():
            self.sums[name] += total

    def finish(self) -> dict[str, Tensor]:
        return self.sums

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.sums = dict(tensors)
