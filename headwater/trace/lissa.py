r"""LiSSA: influence with the inverse summed up as a Neumann series over small samples of the data.

Agarwal, Bullins and Hazan (2017), "Second-Order Stochastic Optimization for Machine Learning in Linear Time",
arXiv:1602.03943, as Koh and Liang (2017, arXiv:1703.04730) use it for influence. With the curvature $C_j$ of the j-th
sample and a scale s above its largest eigenvalue,

$$r_0 = v, \qquad r_{j+1} = v + \big(I - (C_j + \rho I) / s\big)\, r_j, \qquad
(C + \rho I)^{-1} v \approx r / s .$$
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.curvature import Preconditioned
from headwater.core.damping import Damping
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit
from headwater.core.gauss_newton import GaussNewtonProduct
from headwater.core.gradients import Gradients
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.numerics.linear_operator import Operator, lanczos, neumann_recursion
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import inner_products, query_gradients

_DOUBLINGS = 8


@dataclass(frozen=True, kw_only=True)
class LiSSA(Attributor):
    """Influence through a stochastic Neumann series of the Gauss–Newton matrix.

    Args:
        damping: A number (absolute), "0.1 relative" (to the mean eigenvalue of the fit's curvature), "weight_decay", or
            "auto".
        steps: Terms of the series. It needs several times s / ρ to converge.
        scale: s. None takes 1.1 times the largest eigenvalue, doubled until the series ends nearer to the solution than
            zero is: samples are stiffer than the whole.
        n_samples: Examples drawn for each term; None takes all.
        repeats: Series that are averaged.
        tolerance: Relative residual of the whole system above which a warning is given.
        seed: Seed of the draws.
    """

    paper: ClassVar[str] = "arXiv:1602.03943"

    damping: str | float | Damping = "auto"
    steps: int = 100
    scale: float | None = None
    n_samples: int | None = 64
    repeats: int = 1
    tolerance: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.repeats) < 1:
            raise ValueError(
                f"steps and repeats must be 1 or more; got {self.steps} and {self.repeats}."
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
            fit: The fitted model; its curvature serves the choice of damping only.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            FloatingPointError: The series diverges under the given scale.
        """
        examples, n = as_examples(queries), len(fit.train)
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        damping = fit.damping(self.damping, exact=True)
        solved, facts = self._solve(fit, gradients.dense(), damping, progress)
        values = -inner_products(fit, Preconditioned(solved), fit.train, progress=progress).finish()
        return to_scores(
            self,
            fit,
            examples,
            values / n,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
            facts={
                "papers": [self.paper, "arXiv:1703.04730"],
                "damping": vars(damping),
                "damping_ratio": fit.damping_ratio(damping),
            }
            | facts,
        )

    def _solve(
        self, fit: Fit, v: Gradients, damping: Damping, progress: Progress | None
    ) -> tuple[Gradients, dict[str, Any]]:
        rho, b = damping.absolute(fit.curvature.mean_eigenvalue), v.to_matrix()

        def damped(examples: Examples) -> Operator:
            product = GaussNewtonProduct(fit.capture(), examples, fit.batches(examples))
            return lambda x: product(v.from_matrix(x)).to_matrix() + rho * x

        whole = damped(fit.train)
        norms = b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
        scale = self.scale or 1.1 * _largest(whole, b, self.seed)
        for left in reversed(range(_DOUBLINGS if self.scale is None else 1)):
            found = [
                neumann_recursion(self._terms(fit, damped, whole, repeat, progress), b, scale=scale)
                for repeat in range(self.repeats)
            ]
            diverged = any(each.diverged for each in found)
            x = torch.stack([each.x for each in found]).mean(0)
            residual = float(((whole(x) - b).norm(dim=1) / norms).max())
            if not diverged and residual <= 1:  # zero has a residual of one
                break
            scale = scale * 2 if left else scale
        if diverged:
            raise FloatingPointError(
                f"LiSSA diverges under scale={scale:.3g}: it must lie above the largest eigenvalue of every sample's "
                "curvature. Raise it, or draw more samples; where nothing helps, look for a diverged model."
            )
        if residual > self.tolerance:
            warnings.warn(
                f"LiSSA stopped after {self.steps} terms with a relative residual of {residual:.2g} (asked: "
                f"{self.tolerance:.2g}). Allow more steps (several times scale / damping = {scale / rho:.3g}), draw "
                "more samples, or raise the damping; Influence(cg_steps=…) solves the same system sooner.",
                stacklevel=3,
            )
        return v.from_matrix(x), {"scale": scale, "residual": residual}

    def _terms(
        self, fit: Fit, damped: Any, whole: Operator, repeat: int, progress: Progress | None
    ) -> Iterator[Operator]:
        """The damped product of each term, over examples drawn without replacement."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + repeat)
        for step in range(self.steps):
            if self.n_samples is None or self.n_samples >= len(fit.train):
                yield whole
            else:
                drawn = torch.randperm(len(fit.train), generator=generator)[: self.n_samples]
                yield damped(fit.train.subset(drawn.tolist()))
            if progress is not None:
                progress(step + 1, self.steps, "LiSSA")


def _largest(product: Operator, like: Tensor, seed: int, steps: int = 10) -> float:
    """The largest eigenvalue, from a few products."""
    start = torch.randn(1, like.shape[1], generator=torch.Generator().manual_seed(seed))
    return float(lanczos(product, start.to(like), steps=steps)[0][0])
