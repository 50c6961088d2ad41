"""What a sweep differentiates: the loss, a measurement, or the loss on labels drawn from the model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.core.prediction import LabelRows
from headwater.core.task import Measurement, Task, measurement_function
from headwater.numerics import noise

Fisher = Literal["mc", "empirical", "exact"]


@dataclass(frozen=True)
class Part:
    """One pass that a batch needs.

    Attributes:
        target: What it differentiates.
        index: Which examples of the batch its rows are (row), or None for each once.
        weights: Weight of each row in second moments of gradients (row), or None for ones.
        share: How much each row counts as an example (row), one in all for each example; None for ones.
    """

    target: "Target"
    index: Tensor | None = None
    weights: Tensor | None = None
    share: Tensor | None = None


class Target(ABC):
    """One number an example, to be differentiated in the activations."""

    @abstractmethod
    def __call__(
        self, model: nn.Module, task: Task, batch: Any, keys: Tensor, fixed: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The values (row), and what was drawn at random to get them, to be given again as `fixed`."""

    def parts(self, model: nn.Module, task: Task, batch: Any, keys: Tensor) -> Iterator[Part]:
        """The passes that a batch needs."""
        yield Part(self)


@dataclass(frozen=True)
class Loss(Target):
    """The training loss on the given labels."""

    def __call__(self, model, task, batch, keys, fixed=None):
        return task.loss(model, batch), None


@dataclass(frozen=True)
class Measured(Target):
    """What queries ask about: the task's measurement, or another one."""

    measurement: Measurement | None = None

    def __call__(self, model, task, batch, keys, fixed=None):
        if self.measurement is None:
            return task.measurement(model, batch), None
        return measurement_function(self.measurement)(task.predict(model, batch)), None


@dataclass(frozen=True)
class Drawn(Target):
    """The loss on labels drawn from the model's own predictions: its gradients are the true Fisher's."""

    seed: int = 0

    def __call__(self, model, task, batch, keys, fixed=None):
        prediction = task.predict(model, batch)
        labels = prediction.sample(keys, self.seed).target if fixed is None else fixed
        return prediction.with_target(labels).loss(), labels


@dataclass(frozen=True)
class DrawnSeveral(Target):
    """Several draws an example, each weighted by one over their number."""

    draws: int = 1
    seed: int = 0

    def __call__(self, model, task, batch, keys, fixed=None):
        return Drawn(self.seed)(model, task, batch, keys, fixed)

    def parts(self, model, task, batch, keys):
        each = None
        if self.draws > 1:
            size, device = (len(keys),), keys.device
            each = torch.full(size, 1 / self.draws, dtype=torch.float64, device=device)
        for draw in range(self.draws):
            yield Part(Drawn(self.seed * self.draws + draw), None, each, each)


@dataclass(frozen=True)
class _OneRow(Target):
    """One row of the Fisher's square root for each row of the batch."""

    rows: LabelRows

    def __call__(self, model, task, batch, keys, fixed=None):
        if fixed is None:
            fixed = torch.stack([self.rows.position, self.rows.label], dim=1)
        return task.predict(model, batch).row_value(*fixed.unbind(1)), fixed


@dataclass(frozen=True)
class Enumerated(Target):
    """Every label of probability at least `cut`, weighted by its probability: no sampling noise.

    Attributes:
        cut: Labels less probable than this are dropped.
        lost: Gathers for each batch the share of the Fisher's trace (in the outputs) that the cut dropped, and
            that trace.
    """

    cut: float = 1e-4
    lost: list[tuple[float, float]] = field(default_factory=list, compare=False)

    def __call__(self, model, task, batch, keys, fixed=None):
        raise AssertionError("enumerated labels run in parts")

    def parts(self, model, task, batch, keys):
        with torch.no_grad():
            rows = task.predict(model, batch).rows(self.cut)
        self.lost.append((rows.lost, rows.trace))
        n_rows = torch.bincount(rows.example, minlength=len(keys))
        # An example without a label to enumerate still counts as one: it gets a row of weight zero.
        empty = (n_rows == 0).nonzero().squeeze(1)
        example = torch.cat([rows.example, empty])
        position, label, weight = (
            torch.cat([x, x.new_zeros(len(empty))])
            for x in (rows.position, rows.label, rows.weight)
        )
        share = 1 / n_rows.clamp(min=1).double()[example]
        for start in range(0, len(example), len(keys)):
            part = slice(start, start + len(keys))
            some = LabelRows(example[part], position[part], label[part], weight[part])
            yield Part(_OneRow(some), some.example, some.weight, share[part])


@dataclass(frozen=True)
class _Combination(Target):
    """One combination of the outputs an example: output `number`, or under random signs."""

    number: int | None
    seed: int = 0

    def __call__(self, model, task, batch, keys, fixed=None):
        prediction = task.predict(model, batch)
        outputs = prediction.outputs * prediction.mask[..., None]
        if self.number is not None:
            return outputs.flatten(1)[:, self.number], None
        if fixed is None:
            counter = torch.arange(outputs[0].numel(), device=keys.device)
            key, counter = keys[:, None].expand(-1, len(counter)), counter.expand(len(keys), -1)
            fixed = (noise.uniform(key, counter, self.seed) < 0.5).to(outputs) * 2 - 1
        return (outputs.flatten(1) * fixed).sum(1), fixed


@dataclass(frozen=True)
class Outputs(Target):
    """The outputs themselves: second moments of the rows' gradients sum over all outputs of an example.

    Attributes:
        draws: Random combinations of the outputs (signs), each weighted by one over their number; None takes every
            output, in as many passes.
        seed: Seed of the signs.
    """

    draws: int | None = None
    seed: int = 0

    def __call__(self, model, task, batch, keys, fixed=None):
        raise AssertionError("outputs run in parts")

    def parts(self, model, task, batch, keys):
        device, number = keys.device, self.draws
        if number is None:
            with torch.no_grad():
                number = task.predict(model, batch).outputs[0].numel()
        share = torch.full((len(keys),), 1 / number, dtype=torch.float64, device=device)
        for n in range(number):
            if self.draws is None:
                yield Part(_Combination(n), None, None, share)
            else:
                yield Part(_Combination(None, self.seed * number + n), None, share, share)


def fisher_target(fisher: Fisher, *, draws: int = 1, cut: float = 1e-4, seed: int = 0) -> Target:
    """The target whose gradients' second moment is the Fisher information.

    Args:
        fisher: "mc" (labels drawn from the model), "exact" (all labels, weighted) or "empirical" (given labels).
        draws: Draws an example for "mc".
        cut: Least probability of a label that is kept for "exact".
        seed: Seed of the draws.
    """
    if fisher == "mc":
        return DrawnSeveral(draws, seed)
    if fisher == "exact":
        return Enumerated(cut)
    if fisher == "empirical":
        return Loss()
    raise ValueError(f"Expected fisher 'mc', 'exact' or 'empirical'; got {fisher!r}.")
