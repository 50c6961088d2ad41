"""Distilling a data set into a few synthetic examples.

Wang, Zhu, Torralba and Efros (2018), "Dataset Distillation", arXiv:1811.10959: images, and here soft labels too, are
learned so that a network trained on them alone does well on the real data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

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
from headwater.curate.bilevel import Unrolled

Data = tuple[Tensor, Tensor]  # inputs and classes


def soft_cross_entropy(
    logits: Float[Tensor, "batch class"], targets: Float[Tensor, "batch class"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy to target distributions, in nats."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def representatives(
    y: Int[Tensor, " n"], per_class: int, *, seed: int = 0
) -> Int[Tensor, " chosen"]:
    """Numbers of so many random examples of every class, class by class.

    Example:
        >>> y = torch.tensor([0, 1, 0, 1])
        >>> y[representatives(y, 2)].tolist()
        [0, 0, 1, 1]
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = [order[y[order] == c][:per_class] for c in y.unique()]
    if any(len(c) < per_class for c in chosen):
        raise ValueError(f"Some class has fewer than the {per_class} examples asked for.")
    return torch.cat(chosen)


def targets_of(meta: Tensors, n_classes: int) -> Float[Tensor, "distilled class"]:
    """Label distributions of distilled examples: learned ones, or as many of each class."""
    if "labels" in meta:
        return meta["labels"].softmax(-1)
    images = meta["images"]
    classes = torch.arange(n_classes, device=images.device)
    return one_hot(classes.repeat_interleave(len(images) // n_classes), n_classes).to(images)


def distillation_problem(
    make_model: Callable[[int], nn.Module],
    real: Data,
    *,
    n_classes: int,
    lr: float = 0.1,
    steps: int = 30,
    batch_size: int = 500,
    l2: float = 0.0,
) -> InnerProblem:
    """Training on distilled examples alone, all in each step, judged by real ones.

    Meta-parameters are "images" (distilled, dim), class by class, and "labels" (distilled, class),
    the logarithms of label distributions, where those are learned.

    Args:
        make_model: A seed to a classifier with fresh weights.
        real: The inputs and classes that the network should do well on.
        n_classes: Number of classes.
        lr: Learning rate of the training.
        steps: Steps of the training.
        batch_size: Real examples that judge, drawn anew for each inner step.
        l2: Penalty on all weights of the model.
    """
    (x, y), (init, outputs) = real, functional_model(make_model)

    def batch(seed: int, t: int) -> Data:
        chosen = minibatch(len(x), batch_size, seed, t)
        return x[chosen], y[chosen]

    def inner(state: Tensors, meta: Tensors, data: Any, t: int) -> Tensor:
        loss = soft_cross_entropy(outputs(state, meta["images"]), targets_of(meta, n_classes))
        return loss + l2 / 2 * sum((w.square().sum() for w in state.values()), loss.new_zeros(()))

    def outer(state: Tensors, meta: Tensors, data: Any, t: int) -> Tensor:
        return cross_entropy(outputs(state, data[0]), data[1])

    return InnerProblem(
        init=init,
        step=gradient_step(inner, lr),
        outer=outer,
        horizon=steps,
        batch=batch,
        inner=inner,
    )


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Learn a few synthetic examples, from random real ones of each class.

    Args:
        estimator: How the meta-gradient is estimated; cold starts with new initial weights each
            make images that teach any network of the kind, warm ones do not.
        per_class: Distilled examples a class.
        learn_labels: Learn label distributions too.
        outer_steps: Updates of the images.
        outer_lr: Learning rate of these updates (Adam), in units of a pixel.
        lr: Learning rate of the training.
        steps: Steps of the training.
        batch_size: Real examples that judge in each outer step.
        l2: Penalty on the weights of the model.
        seed: Seed of the initial weights and of the real examples to start from.
    """

    paper: ClassVar[str] = "arXiv:1811.10959"

    estimator: HyperGradient = field(default_factory=lambda: Unrolled(sample_init=True))
    per_class: int = 1
    learn_labels: bool = False
    outer_steps: int = 200
    outer_lr: float = 0.02
    lr: float = 0.1
    steps: int = 30
    batch_size: int = 500
    l2: float = 0.0
    seed: int = 0

    def learn(self, make_model: Callable[[int], nn.Module], real: Data) -> Learned:
        """Learn `meta["images"]`, and `meta["labels"]` where asked to.

        The result holds the loss of the co-adapted weights, and of three fresh networks trained on
        the distilled examples alone.
        """
        x, y = real
        n_classes = int(y.max()) + 1
        problem = distillation_problem(
            make_model,
            real,
            n_classes=n_classes,
            lr=self.lr,
            steps=self.steps,
            batch_size=self.batch_size,
            l2=self.l2,
        )
        chosen = representatives(y, self.per_class, seed=self.seed)
        meta = {"images": x[chosen].clone()}
        if self.learn_labels:
            meta["labels"] = 4 * one_hot(y[chosen], n_classes).to(x)
        return descend(
            problem,
            meta,
            self.estimator,
            steps=self.outer_steps,
            lr=self.outer_lr,
            seed=self.seed,
            papers=[self.paper],
            fresh_seeds=[10_000 + self.seed * 3 + i for i in range(3)],
        )
