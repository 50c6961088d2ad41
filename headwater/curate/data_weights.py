r"""Learning how much each source of data, or each example, should weigh in training.

The loss of an example from source $s$ is multiplied by a weight that depends on one number a source, its logit, and
the logits descend on the loss of trusted validation data after training. With a source for each example this is
data cleaning: Ren, Zeng, Yang and Urtasun (2018), "Learning to Reweight Examples for Robust Deep Learning",
arXiv:1803.09050; by any estimator of `headwater.curate.base`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
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

Form = Literal["share", "gate"]
Data = tuple[Tensor, Tensor]  # inputs and classes


def source_weights(logits: Float[Tensor, " source"], form: Form) -> Float[Tensor, " source"]:
    r"""Weights of the sources, 1 for all of them at equal (or zero) logits.

    A "share" is $S \cdot \mathrm{softmax}(\ell)_s$, for a mixture whose shares sum to one; a "gate"
    is $2 \cdot \mathrm{sigmoid}(\ell_s)$, which opens and closes each source by itself.

    Example:
        >>> import torch
        >>> source_weights(torch.zeros(4), "share").tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if form == "share":
        return len(logits) * logits.softmax(0)
    return 2 * logits.sigmoid()


def weighting_problem(
    make_model: Callable[[int], nn.Module],
    train: Data,
    source: Int[Tensor, " n"],
    validation: Data,
    *,
    form: Form = "share",
    lr: float = 0.1,
    steps: int = 200,
    batch_size: int = 100,
    l2: float = 0.0,
    objective: Literal["final", "mean"] = "final",
) -> InnerProblem:
    r"""Training on weighted examples, judged by validation data.

    The training loss of a batch is $\frac1B \sum_i w_{s_i} \ell_i + \frac{\lambda}{2} \|\theta\|^2$.

    Args:
        make_model: A seed to a classifier with fresh weights.
        train: Training inputs and classes.
        source: The source of each training example.
        validation: Trusted inputs and classes, none of them in `train`.
        form: How logits become weights (`source_weights`).
        lr: Learning rate of the training.
        steps: Steps of the training.
        batch_size: Training examples a step; all of them where there are fewer.
        l2: Penalty λ on all weights of the model.
        objective: Whether the validation loss counts at the end or as a mean over training.
    """
    (x, y), (x_val, y_val) = train, validation
    if not len(x) == len(y) == len(source):
        raise ValueError(
            f"Each training example needs an input, a class and a source; got {len(x)}, {len(y)} "
            f"and {len(source)}."
        )
    init, outputs = functional_model(make_model)
    whole = batch_size >= len(x)

    def batch(seed: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
        if whole:
            return x, y, source
        chosen = minibatch(len(x), batch_size, seed, t)
        return x[chosen], y[chosen], source[chosen]

    def inner(state: Tensors, meta: Tensors, data: Any, t: int) -> Tensor:
        inputs, classes, origin = data
        losses = cross_entropy(outputs(state, inputs), classes, reduction="none")
        weights = source_weights(meta["logits"], form)[origin]
        penalty = sum((w.square().sum() for w in state.values()), losses.new_zeros(()))
        return (weights * losses).mean() + l2 / 2 * penalty

    def outer(state: Tensors, meta: Tensors, data: Any, t: int) -> Tensor:
        return cross_entropy(outputs(state, x_val), y_val)

    return InnerProblem(
        init=init,
        step=gradient_step(inner, lr),
        outer=outer,
        horizon=steps,
        objective=objective,
        batch=batch,
        inner=inner,
    )


@dataclass(frozen=True, kw_only=True)
class DataWeights:
    """Learn weights of sources (or of examples) that make training do well on trusted data.

    Args:
        estimator: How the meta-gradient is estimated.
        form: "share" for a mixture of sources, "gate" for examples to keep or drop.
        outer_steps: Updates of the weights.
        outer_lr: Learning rate of these updates (Adam), in units of the logits.
        lr: Learning rate of the training.
        steps: Steps of the training.
        batch_size: Training examples a step.
        l2: Penalty on the weights of the model.
        objective: Whether the validation loss counts at the end or as a mean over training.
        seed: Seed of the initial weights, the order of the data and the perturbations.
    """

    paper: ClassVar[str] = "arXiv:1803.09050"

    estimator: HyperGradient = field(default_factory=lambda: ESSingle(n_particles=16, sigma=0.3))
    form: Form = "share"
    outer_steps: int = 200
    outer_lr: float = 0.05
    lr: float = 0.1
    steps: int = 200
    batch_size: int = 100
    l2: float = 0.0
    objective: Literal["final", "mean"] = "mean"
    seed: int = 0

    def learn(
        self,
        make_model: Callable[[int], nn.Module],
        train: Data,
        source: Int[Tensor, " n"],
        validation: Data,
    ) -> Learned:
        """Learn `meta["logits"]`, from which `source_weights` makes the weights."""
        problem = weighting_problem(
            make_model,
            train,
            source,
            validation,
            form=self.form,
            lr=self.lr,
            steps=self.steps,
            batch_size=self.batch_size,
            l2=self.l2,
            objective=self.objective,
        )
        meta = {"logits": validation[0].new_zeros(int(source.max()) + 1)}
        return descend(
            problem,
            meta,
            self.estimator,
            steps=self.outer_steps,
            lr=self.outer_lr,
            seed=self.seed,
            papers=[self.paper],
        )
