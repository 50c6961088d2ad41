"""The Gauss–Newton matrix itself, for models small enough to hold it: the oracle of all other forms."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import sweep
from headwater.core.curvature.base import Curvature, CurvatureMethod, FitContext, SpectralFunction
from headwater.core.gradients import CollectGradients, Gradients
from headwater.core.target import Fisher, fisher_target
from headwater.numerics import spectral


class DenseCurvature(Curvature):
    """A symmetric matrix over all followed parameters, layers side by side.

    Args:
        matrix: The mean Gauss–Newton matrix (parameter, parameter).
        n_examples: Examples it is a mean over.
    """

    kind: ClassVar[str] = "dense"

    def __init__(
        self, matrix: Float[Tensor, "p p"], n_examples: float, facts: dict[str, Any] | None = None
    ):
        self.matrix, self.n_examples, self.facts = matrix, n_examples, facts or {}
        self.values, self.vectors = spectral.eigh(matrix)

    def apply(self, gradients: Gradients, function: SpectralFunction) -> Gradients:
        x = gradients.to_matrix()
        vectors, values = self.vectors.to(x), self.values
        factor = function(values, float(values.mean())).to(x)
        return gradients.from_matrix((x @ vectors * factor) @ vectors.mT)

    def spectra(self) -> dict[str, Tensor]:
        return {"all layers": self.values}

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix, "n": torch.tensor(self.n_examples, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "DenseCurvature":
        return cls(tensors["matrix"], float(tensors["n"]), facts)


@dataclass(frozen=True, kw_only=True)
class Dense(CurvatureMethod):
    """The dense Gauss–Newton matrix, all labels enumerated.

    Args:
        fisher: "exact", "mc" or "empirical".
        draws: Draws an example for "mc".
        cut: Least probability of a label kept by "exact".
        block_diagonal: Zero the blocks between different layers.
        max_parameters: Refuse larger models.
        seed: Seed of the draws.

    Raises:
        ValueError: The model has more than `max_parameters` followed parameters.
    """

    kind: ClassVar[str] = "dense"

    fisher: Fisher = "exact"
    draws: int = 1
    cut: float = 0.0
    block_diagonal: bool = False
    max_parameters: int = 5000
    seed: int = 0

    def fit(self, context: FitContext) -> DenseCurvature:
        layers = list(context.capture.layers.values())
        n_parameters = sum(layer.numel for layer in layers)
        if n_parameters > self.max_parameters:
            raise ValueError(
                f"The dense curvature is for models of at most {self.max_parameters} followed parameters; this one "
                f"has {n_parameters:,}. Use EKFAC() or Dual()."
            )
        collect = CollectGradients(layers, factored=False)
        target = fisher_target(self.fisher, draws=self.draws, cut=self.cut, seed=self.seed)
        for capture in context.captures:
            sweep(capture, context.examples, [collect], target, batches=context.batches)
        rows = collect.finish()[0].to_matrix()
        n = float(len(context.examples) * len(context.captures))
        matrix = rows.mT @ rows / n
        if self.block_diagonal:
            sizes = [layer.numel for layer in layers]
            matrix = torch.block_diag(
                *[
                    matrix[start : start + size, start : start + size]
                    for start, size in zip(
                        [sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True
                    )
                ]
            )
        return DenseCurvature(matrix, n)
