"""What every curvature offers: one operation, a function of its eigenvalues applied to gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import BatchPlan, Capture, Progress
from headwater.core.checkpoint import Checkpoint
from headwater.core.examples import Examples
from headwater.core.gradients import Block, Gradients, inner

SpectralFunction = Callable[[Tensor, float], Tensor]


class Preconditioned:
    """Preconditioned queries, ready for inner products with training gradients.

    Args:
        queries: The preconditioned gradients.
    """

    layers_add_up: ClassVar[bool] = True  # whether `layer` gives a layer's whole part

    def __init__(self, queries: Gradients):
        self.queries = queries
        self.n = len(queries)

    def layer(self, name: str, block: Block) -> Tensor:
        """One layer's part of the inner products with a batch (query, batch)."""
        return inner(self.queries.blocks[name], block)

    def finish_batch(self) -> Tensor | None:
        """What is left to add to the inner products once all layers of a batch were seen."""
        return None

    def dense(self) -> Gradients:
        """The preconditioned gradients themselves."""
        return self.queries


class Curvature(ABC):
    """A fitted curvature of the mean training loss.

    Attributes:
        n_examples: Examples it was fitted on.
        facts: Numbers worth telling: measured errors, lost trace, condition.
    """

    kind: ClassVar[str]
    n_examples: float
    facts: dict[str, Any]

    @abstractmethod
    def apply(self, gradients: Gradients, function: SpectralFunction) -> Gradients:
        r"""$f(C)\,g$ for each gradient, with `function(eigenvalues, mean eigenvalue)` taken elementwise."""

    def prepare(
        self,
        queries: Gradients,
        function: SpectralFunction,
        n_rows: int,
        *,
        terms: int | None = None,
    ) -> Preconditioned:
        """Preconditioned queries in the form that is cheapest to score a dataset with.

        Args:
            queries: The queries' gradients.
            function: What to apply.
            n_rows: Positions of the dataset, all examples together.
            terms: Where the curvature is layerwise: terms of a separable approximation of `function`, a cheap first
                stage; None is exact.
        """
        return Preconditioned(self.apply(queries, function))

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all followed parameters: the unit of relative damping for the whole."""
        spectra = list(self.spectra().values())
        return sum(float(s.double().sum()) for s in spectra) / sum(s.numel() for s in spectra)

    def quadratic(self, gradients: Gradients, function: SpectralFunction) -> Float[Tensor, " n"]:
        r"""$g^\top f(C)\,g$ for each gradient."""
        parts = []
        for start in range(0, len(gradients), 64):  # `apply` forms whole matrices
            part = gradients[start : start + 64].dense()
            applied = self.apply(part, function)
            parts.append((part.to_matrix() * applied.to_matrix()).double().sum(1))
        return torch.cat(parts)

    @abstractmethod
    def spectra(self) -> dict[str, Tensor]:
        """Eigenvalues of each independent part, by layer or as one whole."""

    @property
    def n_replicates(self) -> int:
        """How many `replicates` there are."""
        return 0

    def replicates(self) -> Sequence["Curvature"]:
        """The same curvature with one fold of the data left out each time; empty when folds are not kept."""
        return ()

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` needs to restore it."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Curvature":
        """Restore a saved curvature."""


@dataclass(frozen=True)
class FitContext:
    """What a curvature needs to be fitted.

    Attributes:
        capture: The model with its followed layers.
        examples: The training data.
        batches: How it is batched.
        progress: Called with (done, total, note).
        folder: Where unfinished work is kept, so that a killed fit goes on; None to keep none.
        others: The same model with other weights, such as checkpoints of a run; the curvature is the mean over all.
    """

    capture: Capture
    examples: Examples
    batches: Sequence[BatchPlan]
    progress: Progress | None = None
    folder: Path | None = None
    others: Sequence[Capture] = ()

    @property
    def captures(self) -> list[Capture]:
        """The model with each of its weights."""
        return [self.capture, *self.others]

    def checkpoint(self, stage: str, number: int) -> Checkpoint | None:
        """Where the sweep of a stage with the weights of a number keeps its state."""
        if self.folder is None:
            return None
        return Checkpoint(self.folder / (f"{stage} {number}" if number else stage))


class CurvatureMethod(ABC):
    """A recipe for a curvature; its fields are the hyperparameters."""

    kind: ClassVar[str]
    folds: int = 1

    @abstractmethod
    def fit(self, context: FitContext) -> Curvature:
        """Fit over the training data."""
