r"""Arnoldi influence: the inverse restricted to the curvature's leading eigenvectors.

Schioppa, Zablotskaia, Vilar and Sokolov (2022), "Scaling Up Influence Functions", arXiv:2112.03052. Arnoldi's iteration
from a random vector finds leading eigenpairs $(\lambda_i, e_i)$, and gradients are compared by their few coordinates:

$$\tau(q, n) = -\frac1N \sum_{i \le p} \frac{(e_i^\top \nabla f_q)\,(e_i^\top \nabla \ell_n)}{\lambda_i} .$$
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.curvature import Preconditioned
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gauss_newton import GaussNewtonProduct, HessianProduct, template
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.numerics.linear_operator import lanczos
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import inner_products, query_gradients

Matrix = Literal["gauss_newton", "hessian"]


def subspace_influence(
    query: Float[Tensor, "query p"],
    train: Float[Tensor, "p train"],
    eigenvalues: Float[Tensor, " p"],
) -> Float[Tensor, "query train"]:
    r"""$-\frac1N \sum_i q_i n_i / \lambda_i$ from coordinates in the eigenvectors."""
    return -(query / eigenvalues) @ train / train.shape[1]


@dataclass(frozen=True, kw_only=True)
class Arnoldi(Attributor):
    """Influence within the leading eigenvectors of the curvature, undamped.

    Args:
        rank: Eigenvectors kept.
        steps: Products with the matrix, each a pass over the data.
        matrix: "gauss_newton", or "hessian" as in the paper, whose eigenvalues may be negative.
        least: Drop eigenvalues smaller than this share of the largest.
        n_examples: Examples, drawn once, over which the matrix is taken; None takes all.
        seed: Seed of the first vector and of that draw.
    """

    paper: ClassVar[str] = "arXiv:2112.03052"

    rank: int = 50
    steps: int = 200
    matrix: Matrix = "gauss_newton"
    least: float = 1e-6
    n_examples: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not (1 <= self.rank <= self.steps and self.least > 0):
            raise ValueError(
                f"Expected a rank from 1 to the number of steps and a positive least; got rank {self.rank}, "
                f"{self.steps} steps and {self.least}."
            )

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
        """Scores of every training example.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).
        """
        examples = as_examples(queries)
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        values, vectors = self.eigenpairs(fit, progress=progress)
        parameter = next(fit.model.parameters())
        wide = torch.promote_types(parameter.dtype, torch.float32)
        basis = template(list(fit.followed), parameter.detach().to(wide)).from_matrix(vectors)
        train = inner_products(fit, Preconditioned(basis), fit.train, progress=progress).finish()
        scores = subspace_influence(
            gradients.inner(basis).double().cpu(), train, values.double().cpu()
        )
        return to_scores(
            self,
            fit,
            examples,
            scores,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
            facts={"eigenvalues": [float(values[0]), float(values[-1])], "kept": len(values)},
        )

    def eigenpairs(
        self, fit: Fit, *, progress: Progress | None = None
    ) -> tuple[Float[Tensor, " value"], Float[Tensor, "value parameter"]]:
        """The leading eigenvalues, and eigenvectors as rows over all followed parameters."""
        generator = torch.Generator().manual_seed(self.seed)
        data = fit.train
        if self.n_examples is not None and self.n_examples < len(data):
            drawn = torch.randperm(len(data), generator=generator)[: self.n_examples]
            data = data.subset(drawn.tolist())
        kind = HessianProduct if self.matrix == "hessian" else GaussNewtonProduct
        multiply = kind(fit.capture(), data, fit.batches(data))
        parameter = next(fit.model.parameters()).detach()
        wide = torch.promote_types(parameter.dtype, torch.float32)
        shape, done = template(list(fit.followed), parameter.to(wide)), 0

        def product(x: Tensor) -> Tensor:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, self.steps, "Arnoldi")
            return multiply(shape.from_matrix(x)).to_matrix()

        like = shape.to_matrix()
        start = torch.randn(like.shape, generator=generator).to(like)
        values, vectors = lanczos(product, start, steps=self.steps)
        kept = int((values.abs() > self.least * values.abs().max()).sum())
        if not kept:
            raise ValueError("The curvature is zero: the model no longer learns from these data.")
        kept = min(self.rank, kept)
        return values[:kept], vectors[:kept]
