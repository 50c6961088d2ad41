r"""Continual learning with what was learnt before held in function space.

Dhawan, Huang, Bae and Grosse (2023), "Efficient Parametric Approximations of Neural Network Function Space Distance",
arXiv:2302.03519. While task t is trained, the loss is

$$\ell_t(\theta) + \lambda \,\frac1{t-1} \sum_{k<t} D_k(\theta_k, \theta),$$

with $\theta_k$ the parameters at the end of task k and $D_k$ a distance over its data, of which little is kept.
Penalties to compare with: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796), a quadratic from
K-FAC, the exact distance over stored examples, and replay of them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from headwater.core.capture import Progress, plan_batches
from headwater.core.curvature import KFAC, Diagonal
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.fit import fit
from headwater.core.forward import evaluate
from headwater.core.function_space import (
    Distance,
    QuadraticDistance,
    StoredDistance,
    function_space_distance,
)
from headwater.core.function_space.base import Theta, named_tensors
from headwater.core.prediction import Categorical
from headwater.core.task import Classification, Task, check_labels
from headwater.training.optimizers import Adam, Optimizer, Stage, plan_steps

Penalty = Callable[..., Tensor]  # (theta, draw=) to one number
Memory = Literal["none", "function-space", "ewc", "k-fac", "stored", "replay"]


@dataclass(frozen=True, kw_only=True)
class OneHead(Classification):
    """Classification by some of a model's outputs, for several heads that are slices of one layer.

    Args:
        outputs: The outputs; label k stands for the k-th of them.
    """

    outputs: tuple[int, ...] = ()

    def predict(self, model: nn.Module, batch: Any) -> Categorical:
        whole = super().predict(model, batch)
        check_labels(whole.labels.reshape(-1), len(self.outputs))
        return replace(whole, logits=whole.logits[..., list(self.outputs)])


@dataclass(frozen=True, eq=False)
class Replay:
    """The mean loss on stored examples, as a penalty.

    Args:
        model: A model of the same architecture.
        task: The task.
        examples: The examples.
    """

    model: nn.Module
    task: Task
    examples: Examples

    def __call__(self, theta: Theta, *, draw: int = 0) -> Float[Tensor, ""]:
        batch = self.examples.batch(range(len(self.examples)))
        values = {f"model.{k}": v for k, v in named_tensors(theta).items()}
        return functional_call(_Lossy(self.model, self.task), values, (batch,)).mean()

    @property
    def n_numbers(self) -> int:
        """Numbers that are kept."""
        batch = self.examples.batch([0])
        return len(self.examples) * sum(t.numel() for t in batch)


class _Lossy(nn.Module):
    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch)


@dataclass(frozen=True, eq=False)
class Regularizer:
    """λ times the mean, or the sum, of distances: a term to add to the loss of any training loop.

    Args:
        penalties: Distances of earlier tasks, each anchored where its task ended.
        weight: λ.
        reduction: "mean" over the tasks, as in the paper, or their "sum".

    Example:
        >>> from headwater.core.task import Classification
        >>> net, data = nn.Linear(3, 2), (torch.randn(9, 3), torch.arange(9) % 2)
        >>> held = Regularizer(weight=0.5).with_task(function_space_distance(net, data, Classification()))
        >>> loss = torch.zeros(()) + held(net)  # of a step
        >>> loss.backward()
    """

    penalties: tuple[Penalty, ...] = ()
    weight: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self):
        if not self.weight >= 0 or self.reduction not in ("mean", "sum"):
            raise ValueError(
                "Expected a weight of 0 or more and reduction 'mean' or 'sum'; got "
                f"{self.weight} and {self.reduction!r}."
            )

    def with_task(self, penalty: Penalty) -> "Regularizer":
        """The same with one more task."""
        return replace(self, penalties=(*self.penalties, penalty))

    def __call__(self, theta: Theta, *, draw: int = 0) -> Float[Tensor, ""]:
        """The term at a model or parameters; give the step's number as `draw` for fresh draws in each step."""
        if not self.penalties:
            return torch.zeros(())
        parts = torch.stack([penalty(theta, draw=draw) for penalty in self.penalties])
        return self.weight * (parts.mean() if self.reduction == "mean" else parts.sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class Episode:
    """One task of a sequence.

    Attributes:
        name: What it is called.
        train: Its training data.
        test: What its accuracy is measured on.
        task: Its task.
    """

    name: str
    train: Examples
    test: Examples
    task: Task


@dataclass(frozen=True, eq=False)
class ContinualRun:
    """A model after several tasks.

    Attributes:
        model: The model.
        names: What the tasks are called.
        accuracy: Share of right answers (after, on): on each task after each; NaN on those that were still to come.
        n_numbers: Numbers kept of the earlier tasks, all together.
        regularizer: The penalties, for further tasks.
    """

    model: nn.Module
    names: list[str]
    accuracy: Float[Tensor, "after on"]
    n_numbers: int
    regularizer: Regularizer

    @property
    def average(self) -> float:
        """Mean accuracy over all tasks at the end."""
        return float(self.accuracy[-1].mean())

    @property
    def forgetting(self) -> float:
        """Mean loss of accuracy since each task was learnt, over all but the last."""
        learnt, last = self.accuracy.diagonal()[:-1], self.accuracy[-1, :-1]
        return float((learnt - last).mean()) if len(learnt) else 0.0

    def table(self) -> dict[str, list[Any]]:
        """One row a task: its accuracy when it was learnt, and at the end."""
        return {
            "task": self.names,
            "learnt": self.accuracy.diagonal().tolist(),
            "end": self.accuracy[-1].tolist(),
        }

    def __repr__(self) -> str:
        return (
            f"ContinualRun({len(self.names)} tasks, average accuracy {self.average:.1%}, forgetting "
            f"{self.forgetting:.1%}, {self.n_numbers:,} numbers kept)"
        )


@dataclass(frozen=True, kw_only=True)
class Continual:
    """Trains a model on tasks one after the other.

    Args:
        memory: What is kept of earlier tasks: "none"; "function-space" keeps the summary statistics of LAFTR; "ewc"
            and "k-fac" keep a curvature; "stored" and "replay" keep examples, and hold outputs or learn the labels.
        weight: λ.
        reduction: "mean" over earlier tasks, or their "sum".
        optimizer: Optimizer and length of each task's training, afresh for each.
        n_samples: Inputs drawn in each step, for "function-space".
        by: Metadata column of groups with statistics of their own, for "function-space".
        n_stored: Examples kept of each task, for "stored" and "replay".
        seed: Seed of the order of examples, of the draws, and of which examples are kept.
    """

    papers: ClassVar[dict[str, str]] = {
        "function-space": "arXiv:2302.03519",
        "ewc": "arXiv:1612.00796",
        "k-fac": "arXiv:1503.05671",
    }

    memory: Memory = "function-space"
    weight: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    optimizer: Optimizer = field(
        default_factory=lambda: Adam(lr=1e-3, batch_size=32, epochs=15, schedule="constant")
    )
    n_samples: int = 40
    by: str | None = None
    n_stored: int = 200
    seed: int = 0

    def __post_init__(self):
        if self.memory not in get_args(Memory):
            raise ValueError(
                f"Expected a memory among {', '.join(get_args(Memory))}; got {self.memory!r}."
            )
        if self.n_samples < 1 or self.n_stored < 1:
            raise ValueError(
                f"n_samples and n_stored must be 1 or more; got {self.n_samples} and {self.n_stored}."
            )

    def adapt(
        self, model: nn.Module, tasks: Sequence[Episode], *, progress: Progress | None = None
    ) -> ContinualRun:
        """Train a copy of the model on each task in turn.

        Args:
            model: The model before the first task.
            tasks: The tasks, in their order.
            progress: Called with (tasks done, tasks in all, note).

        Raises:
            ValueError: There is no task.
            FloatingPointError: Training did not stay finite.
        """
        if not tasks:
            raise ValueError("Expected one task or more; got none.")
        model = copy.deepcopy(model)
        held = Regularizer(weight=self.weight, reduction=self.reduction)
        accuracy = torch.full((len(tasks), len(tasks)), float("nan"))
        for number, episode in enumerate(tasks):
            if progress is not None:
                progress(number, len(tasks), episode.name)
            self.learn(model, episode, held, seed=self.seed + number)
            for other, earlier in enumerate(tasks[: number + 1]):
                accuracy[number, other] = accuracy_of(model, earlier.task, earlier.test)
            if self.memory != "none" and number + 1 < len(tasks):
                held = held.with_task(self.remember(model, episode))
        numbers = sum(int(p.n_numbers) for p in held.penalties)  # type: ignore[attr-defined]
        return ContinualRun(model, [t.name for t in tasks], accuracy, numbers, held)

    def learn(
        self, model: nn.Module, episode: Episode, held: Regularizer, *, seed: int = 0
    ) -> None:
        """Train a model on one task, in place, with penalties for what it has learnt before."""
        train, rule = as_examples(episode.train), self.optimizer
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        parameters = {name: model.get_parameter(name) for name in names}
        device = next(iter(parameters.values())).device
        state = rule.init({name: p.detach() for name, p in parameters.items()})
        members = torch.arange(len(train))[None]
        model.train()
        for number, planned in enumerate(
            plan_steps(members, seeds=[seed], stages=[Stage(optimizer=rule)])
        ):
            batch = to_device(train.batch(planned.examples[0].tolist()), device)
            with torch.enable_grad():
                loss = episode.task.loss(model, batch).mean() + held(model, draw=number)
                gradients = torch.autograd.grad(loss, list(parameters.values()))
            if not bool(loss.isfinite()):
                raise FloatingPointError(
                    f"Training on {episode.name!r} diverged at step {number}; lower lr (now {rule.lr}) or the weight "
                    f"of the penalty (now {self.weight})."
                )
            with torch.no_grad():
                now = {name: p.detach() for name, p in parameters.items()}
                found = dict(zip(names, gradients, strict=True))
                now, state = rule.step(now, state, found, planned.lr)
                for name, p in parameters.items():
                    p.copy_(now[name])
        model.eval()

    def remember(self, model: nn.Module, episode: Episode) -> Distance | Replay:
        """What is kept of a task that was learnt."""
        train = as_examples(episode.train)
        if self.memory == "function-space":
            options = {"by": self.by, "n_samples": self.n_samples, "seed": self.seed}
            return function_space_distance(model, train, episode.task, **options)
        if self.memory in ("ewc", "k-fac"):
            curvature = Diagonal(fisher="exact") if self.memory == "ewc" else KFAC(fisher="exact")
            at = copy.deepcopy(model)
            return QuadraticDistance(fit(at, train, episode.task, curvature=curvature))
        generator = torch.Generator().manual_seed(self.seed)
        kept = train.subset(
            torch.randperm(len(train), generator=generator)[: self.n_stored].tolist()
        )
        if self.memory == "stored":
            return StoredDistance(model, episode.task, kept)
        return Replay(model, episode.task, kept)


def accuracy_of(model: nn.Module, task: Task, examples: Any) -> float:
    """Share of examples whose most probable class is the right one."""
    examples = as_examples(examples)

    def right(model: nn.Module, batch: Any) -> Tensor:
        prediction = task.predict(model, batch)
        if not isinstance(prediction, Categorical):
            raise ValueError("Accuracy needs classes; this task predicts real numbers.")
        return (prediction.logits.argmax(-1) == prediction.labels).all(1).float()

    return float(evaluate(model, examples, right, batches=plan_batches(examples)).mean())
