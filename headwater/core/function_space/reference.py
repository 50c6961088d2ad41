"""Distances to compare with: on examples that are kept, and quadratic ones from a fit's curvature."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from headwater.core.capture import BatchPlan, evaluation_mode, plan_batches
from headwater.core.curvature import DualCurvature, Layerwise
from headwater.core.examples import as_examples, to_device
from headwater.core.fit import Fit
from headwater.core.function_space.base import Distance, Theta, check_names, named_tensors
from headwater.core.gradients import Factored, Gradients, dense
from headwater.core.prediction import Categorical, Prediction
from headwater.core.task import Task


def divergence(before: Prediction, after: Prediction) -> Float[Tensor, " batch"]:
    """Bregman divergence of the loss between two predictions, summed over positions (nats).

    KL(before ‖ after) for classes, half the squared distance of means for real numbers.
    """
    if isinstance(before, Categorical):
        logs = [x.outputs.log_softmax(-1) for x in (before, after)]
        each = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    else:
        each = 0.5 * (after.outputs - before.outputs).square().sum(-1)
    return (each * before.mask).sum(1)


class _Predicted(nn.Module):
    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Prediction:
        return self.task.predict(self.model, batch)


@dataclass(frozen=True, eq=False)
class StoredDistance(Distance):
    """The exact function-space distance over examples that are kept, for any model.

    With all of the training data it is the proximal term of the proximal Bregman response function (Bae et al. 2022,
    arXiv:2209.05364).

    Args:
        model: The network at the anchor, which is copied.
        task: Its task.
        examples: Examples, a tuple of tensors, or a dataset.
        batch_size: Most examples in a batch.
        batch_tokens: Most positions in a batch, for data with lengths.
    """

    model: nn.Module
    task: Task
    examples: Any
    batch_size: int = 256
    batch_tokens: int = 4096
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "examples", as_examples(self.examples))

    @property
    def anchor(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @property
    def n_numbers(self) -> int:
        one = self.examples.batch([0])
        values = one.values() if isinstance(one, dict) else one
        numel = sum(v.numel() for v in values if isinstance(v, Tensor))
        return numel * len(self.examples)

    @cached_property
    def _batches(self) -> list[BatchPlan]:
        limits = {"batch_size": self.batch_size, "batch_tokens": self.batch_tokens}
        return plan_batches(self.examples, **limits)

    def __call__(self, theta: Theta, *, draw: int = 0) -> Float[Tensor, ""]:
        given = named_tensors(theta)
        check_names(given, self.anchor)
        given = {f"model.{name}": value for name, value in given.items()}
        predicted, device = _Predicted(self.model, self.task), next(self.model.parameters()).device
        total = torch.zeros((), device=device)
        with evaluation_mode(self.model):
            for plan in self._batches:
                batch = to_device(self.examples.batch(plan.indices), device)
                with torch.no_grad():
                    before = predicted(batch)
                after = functional_call(predicted, given, (batch,))
                total = total + divergence(before, after).sum()
        return total / len(self.examples)


@dataclass(frozen=True, eq=False)
class QuadraticDistance(Distance):
    r"""$\frac12 (\theta - \theta_0)^\top C (\theta - \theta_0)$ with a fit's curvature C of the mean loss.

    With a diagonal curvature it is the penalty of elastic weight consolidation (Kirkpatrick et al. 2017,
    arXiv:1612.00796). Parameters that the fit does not follow count nothing.

    Args:
        fit: The fit at the anchor.
    """

    fit: Fit
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        named = dict(self.fit.model.named_parameters(remove_duplicate=False))
        followed = [name for layer in self.fit.followed for name in layer.parameters]
        anchor = {name: named[name].detach().clone() for name in followed}
        object.__setattr__(self, "_anchor", anchor)

    @property
    def anchor(self) -> dict[str, Tensor]:
        return self._anchor  # type: ignore[attr-defined]

    @property
    def n_numbers(self) -> int:
        curvature = self.fit.curvature
        if isinstance(
            curvature, Layerwise
        ):  # of an eigenbasis one triangle, as of the factor that it came from
            sides = {
                id(q): q.shape[-1] * (q.shape[-1] + 1) // 2 * (q.numel() // q.shape[-1] ** 2)
                for pair in curvature.bases.values()
                for q in pair
                if q is not None
            }
            kind = self.fit.facts["options"]["curvature"]["kind"]
            values = 0 if kind == "kfac" else sum(e.numel() for e in curvature.eigenvalues.values())
            return sum(sides.values()) + values
        if isinstance(curvature, DualCurvature):
            blocks = curvature.rows.blocks.values()
            return sum(
                b.a.numel() + b.g.numel() if isinstance(b, Factored) else b.numel() for b in blocks
            )
        return sum(t.numel() for t in curvature.tensors().values())

    def __call__(self, theta: Theta, *, draw: int = 0) -> Float[Tensor, ""]:
        given = {k: v for k, v in named_tensors(theta).items() if k in self.anchor}
        check_names(given, self.anchor)
        moved = {name: (given.get(name, x) - x)[None] for name, x in self.anchor.items()}
        gradients = Gradients(
            {layer.name: layer.from_parameters(moved) for layer in self.fit.followed}
        )
        applied = self.fit.curvature.apply(gradients, lambda eigenvalues, mean: eigenvalues)
        parts = [
            (dense(block) * dense(applied.blocks[name])).sum()
            for name, block in gradients.blocks.items()
        ]
        return 0.5 * torch.stack([p.to(parts[0]) for p in parts]).sum()
