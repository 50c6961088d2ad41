r"""Explicit influence: the matrix formed, damped and inverted, for models small enough.

Koh and Liang (2017), "Understanding Black-box Predictions via Influence Functions", arXiv:1703.04730, without any
approximation of the inverse: $\tau(q, n) = -\frac1N \nabla f_q^\top (H + \rho I)^{-1} \nabla \ell_n$ in float64.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.curvature import DenseCurvature, Preconditioned
from headwater.core.damping import Damping
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gauss_newton import GaussNewtonProduct, HessianProduct, template
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.trace.arnoldi import Matrix
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import inner_products, query_gradients


def damped_solve(
    matrix: Float[Tensor, "p p"], damping: float, v: Float[Tensor, "n p"]
) -> Float[Tensor, "n p"]:
    r"""$(H + \rho I)^{-1} v$ for each v, in float64."""
    damped = matrix.double() + damping * torch.eye(len(matrix)).to(matrix.device, torch.float64)
    return torch.linalg.solve(damped, v.double().mT).mT


@dataclass(frozen=True, kw_only=True)
class Explicit(Attributor):
    """Influence through the dense matrix: the reference for all approximations.

    Args:
        damping: A number (absolute), "0.1 relative" (to the mean eigenvalue), "weight_decay", or "auto".
        matrix: "gauss_newton", or "hessian".
        max_parameters: Refuse larger models.
    """

    paper: ClassVar[str] = "arXiv:1703.04730"

    damping: str | float | Damping = "auto"
    matrix: Matrix = "gauss_newton"
    max_parameters: int = 5000

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

        Raises:
            ValueError: The model has more than `max_parameters` followed parameters.
        """
        examples, n = as_examples(queries), len(fit.train)
        matrix = self.form(fit, progress=progress)
        curvature = DenseCurvature(matrix, float(n))
        damping = replace(fit, curvature=curvature).damping(self.damping)
        mean = float(matrix.diagonal().mean())
        rho = damping.absolute(mean)
        if self.matrix == "hessian":
            lowest = float(torch.linalg.eigvalsh(matrix)[0])
            if lowest + rho <= 0:
                warnings.warn(
                    f"The Hessian's smallest eigenvalue is {lowest:.3g}, below minus the damping {rho:.3g}: the model "
                    "is not at a minimum, and scores along such directions have the wrong sign. Raise the damping, or "
                    "use matrix='gauss_newton'.",
                    stacklevel=2,
                )
        gradients = query_gradients(fit, examples, measurement, weights, progress).dense()
        solved = damped_solve(matrix, rho, gradients.to_matrix())
        prepared = Preconditioned(gradients.from_matrix(solved))
        values = -inner_products(fit, prepared, fit.train, progress=progress).finish() / n
        facts = {
            "curvature": {"kind": self.matrix},
            "damping": vars(damping),
            "damping_ratio": rho / max(abs(mean), 1e-30),
        }
        return to_scores(
            self,
            fit,
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
            facts=facts,
        )

    def form(self, fit: Fit, *, progress: Progress | None = None) -> Float[Tensor, "p p"]:
        """The matrix over all followed parameters, float64, layers side by side."""
        p = sum(layer.numel for layer in fit.followed)
        if p > self.max_parameters:
            raise ValueError(
                f"The explicit matrix is for models of at most {self.max_parameters:,} followed parameters; this one "
                f"has {p:,}. Use Influence, with cg_steps if the exact matrix is wanted."
            )
        kind = HessianProduct if self.matrix == "hessian" else GaussNewtonProduct
        product = kind(fit.capture(), fit.train, fit.batches(fit.train))
        parameter = next(fit.model.parameters()).detach()
        wide = torch.promote_types(parameter.dtype, torch.float32)
        shape = template(list(fit.followed), parameter.to(wide))
        rows, eye = [], torch.eye(p).to(shape.to_matrix())
        for start in range(0, p, product.at_once):
            part = shape.from_matrix(eye[start : start + product.at_once])
            rows.append(product(part).to_matrix().double())
            if progress is not None:
                progress(min(start + product.at_once, p), p, "explicit matrix")
        matrix = torch.cat(rows)
        return (matrix + matrix.mT) / 2
