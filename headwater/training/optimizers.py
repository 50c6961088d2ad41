r"""Optimizers as pure functions, with the meaning that `torch.optim` gives to their names.

One step maps parameters θ, moments and gradients to new parameters and moments and changes nothing in place, so that
it can be differentiated, batched and repeated:

| optimizer | step at learning rate η, gradient $g$, weight decay ρ |
|---|---|
| SGD | $v \leftarrow \mu v + g + \rho\theta$, then $\theta \leftarrow \theta - \eta v$ |
| Adam | $g \leftarrow g + \rho\theta$; $\theta \leftarrow \theta - \eta \hat m / (\sqrt{\hat s + e_0} + e)$ |
| AdamW | $\theta \leftarrow (1 - \eta\rho)\,\theta$, then as Adam without decay |

where $\hat m$ and $\hat s$ are running means of $g$ and $g^2$ with their bias corrected. PyTorch has $e_0 = 0$;
a positive `eps_root` makes the step a smooth function of the gradient, and another training run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from headwater.core.fingerprint import fingerprint_tensors, portable

Parameters = dict[str, Tensor]
Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, steps: int, *, lr: float, schedule: str = "constant", warmup: int = 0
) -> float:
    """Learning rate of a step, counted from 0, in a run of so many steps.

    It rises over `warmup` steps and falls, from the first step on, to zero at the end of training.

    Example:
        >>> [learning_rate(k, 4, lr=1.0, schedule="linear", warmup=1) for k in range(4)]
        [0.5, 0.75, 0.5, 0.25]
    """
    falling = {
        "constant": 1.0,
        "linear": 1 - step / steps,
        "cosine": (1 + math.cos(math.pi * step / steps)) / 2,
    }
    if schedule not in falling:
        raise ValueError(f"schedule must be one of {', '.join(falling)}; got {schedule!r}.")
    return lr * min(1.0, (step + 1) / (warmup + 1)) * falling[schedule]


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer remembers.

    Attributes:
        count: Steps made.
        moments: By name ("velocity"; "mean" and "square"), one tensor for each parameter.
    """

    count: int = 0
    moments: dict[str, Parameters] = field(default_factory=dict)


def sgd_step(
    theta: Tensor, velocity: Tensor, gradient: Tensor, *, lr: Any, momentum: float, decay: float
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent with momentum: new θ and velocity."""
    if decay:
        gradient = gradient + decay * theta
    velocity = momentum * velocity + gradient
    return theta - lr * velocity, velocity


def adam_step(
    theta: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    *,
    count: int,
    lr: Any,
    betas: tuple[float, float],
    eps: float,
    eps_root: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Step number `count` (from 1) of Adam: new θ, running mean and running mean square.

    Where a parameter never had a gradient, the root's infinite slope at zero meets a zero. With
    $m = cg$ and $s = c'g^2$ the step $m / (\sqrt s + \epsilon)$ has at $g = 0$ the slope
    $c / \epsilon$, which is what remains when the root is held constant there.
    """
    beta1, beta2 = betas
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient * gradient
    inside = square / (1 - beta2**count) + eps_root
    root = torch.where(inside > 0, torch.where(inside > 0, inside, 1.0).sqrt(), 0.0)
    return theta - lr / (1 - beta1**count) * mean / (root + eps), mean, square


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """A rule for steps, and how long it runs.

    Args:
        lr: Greatest learning rate.
        weight_decay: Decay of all parameters, biases included; for SGD and Adam the coefficient ρ
            of (ρ/2)‖θ‖² in the objective.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        epochs: Passes over the examples, however many those are.
        schedule: How the learning rate falls: "constant", "linear" or "cosine", to zero at the end.
        warmup: Steps over which the learning rate rises.
    """

    MOMENTS: ClassVar[tuple[str, ...]]

    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 100
    epochs: int = 20
    schedule: Schedule = "linear"
    warmup: int = 0

    def init(self, parameters: Parameters) -> OptimizerState:
        """The state before the first step: moments of zero."""
        moments = {
            moment: {name: torch.zeros_like(value) for name, value in parameters.items()}
            for moment in self.MOMENTS
        }
        return OptimizerState(0, moments)

    def step(
        self, parameters: Parameters, state: OptimizerState, gradients: Parameters, lr: Any
    ) -> tuple[Parameters, OptimizerState]:
        """New parameters and state; `lr` is a number, or a tensor to be differentiated.

        Tensors may have any further axes in front, so that many models make a step at once.
        """
        stepped = {
            name: self._one(
                theta,
                tuple(state.moments[moment][name] for moment in self.MOMENTS),
                gradients[name],
                lr,
                state.count + 1,
            )
            for name, theta in parameters.items()
        }
        moments = {
            moment: {name: new[1 + i] for name, new in stepped.items()}
            for i, moment in enumerate(self.MOMENTS)
        }
        return (
            {name: new[0] for name, new in stepped.items()},
            OptimizerState(state.count + 1, moments),
        )

    @abstractmethod
    def _one(
        self, theta: Tensor, moments: tuple[Tensor, ...], gradient: Tensor, lr: Any, count: int
    ) -> tuple[Tensor, ...]:
        """New values of one parameter and its moments, at step number `count` (from 1)."""

    def steps(self, n_examples: int) -> int:
        """Steps of a whole training run on this many examples."""
        return self.epochs * -(-n_examples // self.batch_size)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, in a run of so many steps."""
        return learning_rate(step, steps, lr=self.lr, schedule=self.schedule, warmup=self.warmup)

    def horizon(self, n_examples: int) -> float:
        """Sum of all learning rates over 1 - momentum: how far a constant gradient moves θ."""
        steps = self.steps(n_examples)
        total = sum(self.lr_at(s, steps) for s in range(steps))
        return total / (1 - getattr(self, "momentum", 0.0))

    @property
    def facts(self) -> dict[str, Any]:
        """Name and hyperparameters, as JSON has them."""
        return {"name": type(self).__name__} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum, and how long it runs.

    Args:
        lr: Learning rate of the first step (or of the last of the warmup).
        momentum: Decay of the velocity; there is no dampening and no Nesterov step.
        weight_decay: The coefficient ρ of (ρ/2)‖θ‖² in the objective; biases included.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        epochs: Passes over the model's own examples, however many those are.
        schedule: "linear" and "cosine" let the learning rate fall to zero at the end of training.
        warmup: Steps over which the learning rate rises.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("velocity",)

    lr: float = 0.05
    momentum: float = 0.9

    def _one(self, theta, moments, gradient, lr, count):
        (velocity,) = moments
        return sgd_step(
            theta, velocity, gradient, lr=lr, momentum=self.momentum, decay=self.weight_decay
        )


@dataclass(frozen=True, kw_only=True)
class _Adam(Optimizer):
    MOMENTS: ClassVar[tuple[str, ...]] = ("mean", "square")
    decoupled: ClassVar[bool]

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0

    def _one(self, theta, moments, gradient, lr, count):
        if self.weight_decay and self.decoupled:
            theta = theta * (1 - lr * self.weight_decay)
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * theta
        mean, square = moments
        return adam_step(
            theta,
            mean,
            square,
            gradient,
            count=count,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            eps_root=self.eps_root,
        )


@dataclass(frozen=True, kw_only=True)
class Adam(_Adam):
    """Adam, its weight decay added to the gradient (see `Optimizer` for the other fields).

    Args:
        betas: Decay of the running means of gradients and of their squares.
        eps: Added to the root.
        eps_root: Added under the root; above 0 the step is smooth in the gradient.
    """

    decoupled: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class AdamW(_Adam):
    """Adam with decoupled weight decay (see `Optimizer` for the other fields).

    Args:
        weight_decay: Share of the parameters, times the learning rate, taken away at each step.
        betas: Decay of the running means of gradients and of their squares.
        eps: Added to the root.
        eps_root: Added under the root; above 0 the step is smooth in the gradient.
    """

    decoupled: ClassVar[bool] = True

    weight_decay: float = 0.01


OPTIMIZERS: dict[str, type[Optimizer]] = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One stretch of training: its optimizer, which starts afresh, on its part of the data.

    Args:
        optimizer: Optimizer, with batch size and epochs.
        examples: Numbers of the examples it sees; all when left out.
        name: What people call it, such as "pretrain".
    """

    optimizer: Optimizer
    examples: Int[Tensor, " n"] | None = None
    name: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What tells one stage from another, as JSON has it; its name does not."""
        seen = self.examples
        part = None if seen is None else fingerprint_tensors([("examples", seen)])
        return portable(self.optimizer.facts | {"examples": part})


def as_stages(optimizer: "Optimizer | Sequence[Stage]") -> list[Stage]:
    """Stages as they are; one optimizer makes one stage on all data.

    Raises:
        ValueError: There is no stage, or one without steps.
    """
    given = [Stage(optimizer=optimizer)] if isinstance(optimizer, Optimizer) else list(optimizer)
    if not given:
        raise ValueError("Training needs one stage or more; got none.")
    for stage in given:
        if stage.optimizer.epochs < 1 or stage.optimizer.batch_size < 1:
            raise ValueError(
                "epochs and batch_size must be positive; got "
                f"{stage.optimizer.epochs} and {stage.optimizer.batch_size}."
            )
    return given


@dataclass(frozen=True)
class PlannedStep:
    """One step of a run that is planned: where it stands, its learning rate, and its examples."""

    stage: int
    step: int  # within the stage
    steps: int  # of the stage
    lr: float
    examples: Int[Tensor, "model batch"]


def plan_steps(
    subsets: Int[Tensor, "model n"], *, seeds: Sequence[int], stages: Sequence[Stage]
) -> Iterator[PlannedStep]:
    """The steps of all stages; each model's examples come in an order drawn from its seed.

    Raises:
        ValueError: A stage leaves some models with more examples than others, or with none.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for number, stage in enumerate(stages):
        own = subsets if stage.examples is None else _within(subsets, stage.examples)
        optimizer, done = stage.optimizer, 0
        steps = optimizer.steps(own.shape[1])
        for _ in range(optimizer.epochs):
            order = [torch.randperm(own.shape[1], generator=g) for g in generators]
            for index in own.gather(1, torch.stack(order)).split(optimizer.batch_size, dim=1):
                yield PlannedStep(number, done, steps, optimizer.lr_at(done, steps), index)
                done += 1


def _within(subsets: Int[Tensor, "model n"], examples: Int[Tensor, " m"]) -> Int[Tensor, "model k"]:
    """The members of each subset that a stage sees."""
    found = [subset[torch.isin(subset, examples)] for subset in subsets]
    counts = sorted({len(each) for each in found})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(
            f"A stage must leave every model equally many examples, and some; got {counts}."
        )
    return torch.stack(found)
