r"""The proximal Bregman response function: what fine-tuning on one more example would do, near the trained model.

Bae, Ng, Lo, Ghassemi and Grosse (2022), "If Influence Functions are the Answer, Then What is the Question?",
arXiv:2209.05364; with a function-space distance in place of the data Dhawan, Huang, Bae and Grosse (2023),
arXiv:2302.03519.

The response to adding training example n once more is where

$$\theta_n = \arg\min_\theta\; D(\theta_0, \theta) + \frac\rho2 \lVert\theta - \theta_0\rVert^2
+ \frac1N \ell_n(\theta)$$

has its minimum, with D the mean Bregman divergence of outputs over the training data, or an estimate of it that needs
no data. To first order in $1/N$ the response is the influence under D's Gauss–Newton matrix,
$-\frac1N (C + \rho I)^{-1} \nabla\ell_n$.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwater.core.capture import Bound, Progress, evaluation_mode
from headwater.core.damping import Damping
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.fit import Fit
from headwater.core.function_space import Distance, FunctionSpaceDistance, StoredDistance
from headwater.core.scores import Scores
from headwater.core.task import Measurement, measurement_function
from headwater.trace.base import Attributor, asked, to_scores
from headwater.trace.influence import Influence

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Proximal(Attributor):
    """Responses to single examples, each by an optimization of its own: for a few examples, or to check a derivative.

    Args:
        damping: A number (absolute), "0.1 relative" (to the mean eigenvalue), "weight_decay", or "auto".
        steps: Most iterations of L-BFGS for each example.
        tolerance: Relative size of the gradient at which an example is done.
    """

    paper: ClassVar[str] = "arXiv:2209.05364"

    damping: str | float | Damping = "auto"
    steps: int = 100
    tolerance: float = 1e-4

    def __post_init__(self):
        if self.steps < 1 or not self.tolerance > 0:
            raise ValueError(
                f"Expected one step or more and a positive tolerance; got {self.steps} and {self.tolerance}."
            )

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        distance: Distance | None = None,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        among: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Change of each query's measurement were a training example counted once more.

        Args:
            fit: The fitted model, of which the followed parameters respond.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            distance: What holds the outputs; the exact one over the training data when left out, which takes a pass
                over them for each evaluation.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            among: Numbers of the training examples to respond to; all when left out.
            progress: Called with (done, total, note).
        """
        examples, chosen = as_examples(queries), _numbers(fit, among)
        question = asked(fit, measurement)
        values = torch.empty(len(examples), len(chosen), dtype=torch.float64)
        residuals = []
        distance = _distance(fit, distance)
        before = _measured(fit, examples, question, {})
        for column, number in enumerate(chosen):
            theta, residual = self.response(fit, number, distance=distance)
            residuals.append(residual)
            values[:, column] = _measured(fit, examples, question, theta) - before
            if progress is not None:
                progress(column + 1, len(chosen), "responses")
        some = fit.train.subset(chosen)
        if weights is not None:
            values = weights.to(values) @ values
        damping = fit.damping(self.damping)
        scores = to_scores(
            self,
            replace(fit, train=some),
            examples,
            values,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
            facts={
                "papers": [self.paper, *([FunctionSpaceDistance.paper] if _free(distance) else [])],
                "n_train": len(fit.train),
                "damping": vars(damping),
                "damping_ratio": fit.damping_ratio(damping),
                "distance": type(distance).__name__,
                "largest_residual": max(residuals),
            },
        )
        kept = None if among is None else chosen
        return replace(scores, kept=kept, n_train=len(fit.train))

    def self_influence(
        self,
        fit: Fit,
        *,
        distance: Distance | None = None,
        among: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Float[Tensor, " chosen"]:
        """By how much each example's own loss falls in the response to it; never negative at the minimum."""
        found, distance, chosen = [], _distance(fit, distance), _numbers(fit, among)
        for done, number in enumerate(chosen, start=1):
            theta, _ = self.response(fit, number, distance=distance)
            one = fit.train.subset([number])
            before, after = (_measured(fit, one, "loss", t) for t in ({}, theta))
            found.append(before - after)
            if progress is not None:
                progress(done, len(chosen), "responses")
        return torch.cat(found).float()

    def response(
        self, fit: Fit, number: int, *, distance: Distance | None = None
    ) -> tuple[Parameters, float]:
        """The followed parameters in the response to one training example, and the relative gradient left there."""
        distance, n = _distance(fit, distance), len(fit.train)
        rho = fit.damping(self.damping).absolute(fit.curvature.mean_eigenvalue)
        named = dict(fit.model.named_parameters(remove_duplicate=False))
        start = {name: named[name].detach() for layer in fit.followed for name in layer.parameters}
        theta = {name: value.clone().requires_grad_() for name, value in start.items()}
        batch = to_device(fit.train.batch([number]), next(iter(start.values())).device)
        loss, leaves = Bound(fit.model, fit.task.loss), list(theta.values())

        def objective() -> Tensor:
            moved = sum((theta[k] - start[k]).square().sum() for k in theta)
            near = n * (distance(theta) + 0.5 * rho * moved)
            return near + loss.at(theta, batch).sum()

        def closure() -> Tensor:
            value = objective()
            for leaf, g in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
                leaf.grad = g
            return value

        def largest() -> float:
            return max(float(leaf.grad.abs().max()) for leaf in leaves if leaf.grad is not None)

        with evaluation_mode(fit.model), torch.enable_grad():
            closure()
            first = largest()
            if first == 0:
                return start, 0.0
            optimizer = torch.optim.LBFGS(
                leaves,
                max_iter=self.steps,
                tolerance_grad=self.tolerance * first,
                tolerance_change=0,
                line_search_fn="strong_wolfe",
            )
            optimizer.step(closure)
            closure()
        return {name: value.detach() for name, value in theta.items()}, largest() / first


def _distance(fit: Fit, distance: Distance | None) -> Distance:
    if distance is not None:
        return distance
    sizes = fit.batch_size, fit.batch_tokens
    return StoredDistance(fit.model, fit.task, fit.train, *sizes)


def _free(distance: Distance) -> bool:
    return isinstance(distance, FunctionSpaceDistance)


def _numbers(fit: Fit, among: Sequence[int] | None) -> list[int]:
    chosen = list(range(len(fit.train))) if among is None else list(among)
    wrong = [i for i in chosen if not 0 <= i < len(fit.train)]
    if wrong or not chosen:
        what = f"there is no example {wrong[0]} among {len(fit.train):,}" if wrong else "got none"
        raise ValueError(f"Expected numbers of training examples to respond to; {what}.")
    return chosen


def _measured(
    fit: Fit, examples: Examples, measurement: Measurement, theta: Parameters
) -> Float[Tensor, " n"]:
    """A measurement of all examples with other parameters, float64."""

    def value(model: nn.Module, batch: Any) -> Tensor:
        if measurement == "loss":
            return fit.task.loss(model, batch)
        return measurement_function(measurement)(fit.task.predict(model, batch))

    valued = Bound(fit.model, value)
    device, found = next(fit.model.parameters()).device, torch.empty(len(examples)).double()
    with evaluation_mode(fit.model), torch.no_grad():
        for plan in fit.batches(examples):
            batch = to_device(examples.batch(plan.indices), device)
            found[list(plan.indices)] = valued.at(theta, batch).double().cpu()
    return found


def mislabel_scores(
    fit: Fit,
    distance: FunctionSpaceDistance,
    *,
    damping: str | float | Damping = "auto",
    progress: Progress | None = None,
) -> Float[Tensor, " train"]:
    r"""Self-influence with a function-space distance for the data's curvature: large where a label looks wrong.

    $\frac1N \nabla\ell_n^\top (C_D + \rho I)^{-1} \nabla\ell_n$, with $C_D$ the Gauss–Newton matrix of D at the anchor:
    how far an example lowers its own loss against what the summary statistics hold in place. The given label enters
    through $\nabla\ell_n$ alone. It takes one pass over the examples that are judged, and none over those the
    curvature is of.

    Args:
        fit: The fit of the model, whose training data are judged.
        distance: Anchored at the same model.
        damping: ρ; see `headwater.trace.Influence`.
        progress: Called with (done, total, note).
    """
    influence = Influence(damping=fit.damping(damping))
    return influence.self_influence(distance.in_place_of_data(fit), progress=progress)
