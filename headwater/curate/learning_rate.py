r"""Learning a learning-rate schedule while training with it.

The schedule is $\alpha_t = \theta_0 / (1 + t/Q)^{\theta_1}$, learned in the coordinates $\log \theta_0$ and
$\log \theta_1$, as in Vicol, Metz and Sohl-Dickstein (2021), arXiv:2112.13835, and Vicol, Kolter and Swersky (2023),
arXiv:2304.11153.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headwater.curate.base import (
    HyperGradient,
    InnerProblem,
    Learned,
    Tensors,
    descend,
    functional_model,
    gradient_step,
    minibatch,
)
from headwater.curate.evolution import ESSingle

Data = tuple[Tensor, Tensor]  # inputs and classes


def inverse_time_rate(meta: Tensors, t: int, *, decay_steps: float) -> Float[Tensor, ""]:
    r"""$\alpha_t = e^{\mathtt{log\_lr}} / (1 + t/Q)^{e^{\mathtt{log\_decay}}}$.

    Example:
        >>> meta = {"log_lr": torch.tensor(0.0), "log_decay": torch.tensor(0.0)}
        >>> inverse_time_rate(meta, 3, decay_steps=1.0).item()
        0.25
    """
    base = torch.log1p(meta["log_lr"].new_tensor(t / decay_steps))
    return (meta["log_lr"] - meta["log_decay"].exp() * base).exp()


def schedule_problem(
    make_model: Callable[[int], nn.Module],
    train: Data,
    *,
    validation: Data | None = None,
    steps: int = 300,
    batch_size: int = 100,
    decay_steps: float = 300.0,
    objective: Literal["final", "mean"] = "mean",
) -> InnerProblem:
    """Training under a schedule, judged by its own training loss or by validation data.

    Args:
        make_model: A seed to a classifier with fresh weights.
        train: Training inputs and classes.
        validation: Data that judges; left out, it is the training batch of the next step, which the
            weights have not seen in this epoch.
        steps: Steps of the training.
        batch_size: Examples a step.
        decay_steps: The scale Q of the schedule, in steps; the papers take that of the training.
        objective: Whether the loss counts at the end or as a mean over training.
    """
    (x, y), (init, outputs) = train, functional_model(make_model)

    def batch(seed: int, t: int) -> tuple[Data, Data]:
        now, following = (minibatch(len(x), batch_size, seed, s) for s in (t, t + 1))
        judge = (x[following], y[following]) if validation is None else validation
        return (x[now], y[now]), judge

    def inner(state: Tensors, meta: Tensors, data: Any, t: int) -> Tensor:
        return cross_entropy(outputs(state, data[0][0]), data[0][1])

    def outer(state: Tensors, meta: Tensors, data: Any, t: int) -> Tensor:
        return cross_entropy(outputs(state, data[1][0]), data[1][1])

    def rate(meta: Tensors, t: int) -> Tensor:
        return inverse_time_rate(meta, t, decay_steps=decay_steps)

    return InnerProblem(
        init=init,
        step=gradient_step(inner, rate),
        outer=outer,
        horizon=steps,
        objective=objective,
        batch=batch,
    )


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learn a learning rate and its decay.

    Args:
        estimator: How the meta-gradient is estimated.
        outer_steps: Updates of the schedule.
        outer_lr: Learning rate of these updates (Adam), in units of the logarithms.
        clip: Largest norm of a meta-gradient; those at the edge of divergence are far longer.
        lr: Learning rate to begin with.
        decay: Decay exponent to begin with.
        steps: Steps of the training.
        batch_size: Examples a step.
        decay_steps: The scale Q of the schedule, in steps; the papers take that of the training.
        objective: Whether the loss counts at the end or as a mean over training.
        seed: Seed of the initial weights, the order of the data and the perturbations.
    """

    paper: ClassVar[str] = "arXiv:2304.11153"

    estimator: HyperGradient = field(default_factory=lambda: ESSingle(n_particles=8, sigma=0.1))
    outer_steps: int = 80
    outer_lr: float = 0.1
    clip: float | None = 1.0
    lr: float = 0.01
    decay: float = 0.1
    steps: int = 300
    batch_size: int = 100
    decay_steps: float = 300.0
    objective: Literal["final", "mean"] = "mean"
    seed: int = 0

    def learn(
        self,
        make_model: Callable[[int], nn.Module],
        train: Data,
        *,
        validation: Data | None = None,
    ) -> Learned:
        """Learn `meta["log_lr"]` and `meta["log_decay"]` (see `inverse_time_rate`)."""
        problem = schedule_problem(
            make_model,
            train,
            validation=validation,
            steps=self.steps,
            batch_size=self.batch_size,
            decay_steps=self.decay_steps,
            objective=self.objective,
        )
        start = train[0].new_tensor([self.lr, self.decay]).log()
        return descend(
            problem,
            {"log_lr": start[0], "log_decay": start[1]},
            self.estimator,
            steps=self.outer_steps,
            lr=self.outer_lr,
            clip=self.clip,
            seed=self.seed,
            papers=[self.paper],
        )
