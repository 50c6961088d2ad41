r"""Plain stochastic gradient descent on many models at once.

Models of one shape train side by side with a leading axis "model" on every parameter; each has its
own initial weights, its own examples and its own order of them. One model is the case of one.

Every model minimises the mean over its examples plus weight decay on all parameters,

$$F(\theta) = \frac{1}{n} \sum_{i=1}^{n} w_i L_i(\theta) + \frac{\rho}{2} \|\theta\|^2,$$

where $L_i$ is the loss of an example and $w_i = 1$ unless weights are given. The step is that of
`torch.optim.SGD`: $v \leftarrow \mu v + \nabla F_B$, then $\theta \leftarrow \theta - \eta v$.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

Parameters = dict[str, Tensor]  # each with the leading axis "model"
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs, targets -> one loss an example


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum, and how long it runs.

    Args:
        lr: Learning rate of the first step.
        momentum: Decay of the velocity.
        weight_decay: The coefficient ρ of (ρ/2)‖θ‖² in the objective; biases included.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        epochs: Passes over the model's own examples, however many those are.
        schedule: "linear" lets the learning rate fall to zero at the end of training.
    """

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 100
    epochs: int = 20
    schedule: Literal["linear", "constant"] = "linear"

    def steps(self, n_examples: int) -> int:
        """Steps of a whole training run on this many examples."""
        return self.epochs * -(-n_examples // self.batch_size)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, in a run of so many steps."""
        return self.lr * (1 - step / steps) if self.schedule == "linear" else self.lr

    def horizon(self, n_examples: int) -> float:
        """Sum of all learning rates over 1 - momentum: how far a constant gradient moves θ."""
        steps = self.steps(n_examples)
        return sum(self.lr_at(s, steps) for s in range(steps)) / (1 - self.momentum)


def example_losses(outputs: Float[Tensor, "batch class"], targets: Int[Tensor, " batch"]) -> Tensor:
    """Cross-entropy of each example, in nats."""
    return cross_entropy(outputs, targets, reduction="none")


def correct_class_margin(
    outputs: Float[Tensor, "batch class"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    r"""The log-odds of the correct class, $z_y - \log \sum_{c \ne y} e^{z_c}$."""
    others = outputs.scatter(-1, targets[..., None], -torch.inf)
    return outputs.gather(-1, targets[..., None])[..., 0] - others.logsumexp(-1)


def stack(models: Sequence[nn.Module]) -> Parameters:
    """Parameters of models of one shape, stacked along a new first axis."""
    for name, module in models[0].named_modules():
        if next(module.buffers(recurse=False), None) is not None:
            raise ValueError(
                f"Models trained side by side keep parameters only; module {name!r} "
                f"({type(module).__name__}) has buffers. Use one without running statistics."
            )
    named = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([p[name].detach() for p in named]) for name in named[0]}


def unstack(parameters: Parameters, index: int) -> Parameters:
    """Parameters of one of the stacked models, as a state dict."""
    return {name: value[index].clone() for name, value in parameters.items()}


def sgd_step(
    parameters: Parameters,
    velocity: Parameters,
    gradients: Parameters,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of `torch.optim.SGD`, in place, on any number of models at once."""
    for name, theta in parameters.items():
        velocity[name].mul_(momentum).add_(gradients[name]).add_(theta, alpha=weight_decay)
        theta.sub_(velocity[name], alpha=lr)


def batches(
    subsets: Int[Tensor, "model n"], *, seeds: Sequence[int], sgd: SGD
) -> Iterator[Int[Tensor, "model batch"]]:
    """The batches of all epochs: example numbers, each model's in an order drawn from its seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(sgd.epochs):
        order = [torch.randperm(subsets.shape[1], generator=g) for g in generators]
        yield from subsets.gather(1, torch.stack(order)).split(sgd.batch_size, dim=1)


def train(
    models: Sequence[nn.Module],
    x: Float[Tensor, "n_train ..."],
    y: Tensor,
    *,
    subsets: Int[Tensor, "model n"],
    seeds: Sequence[int],
    sgd: SGD,
    weights: Float[Tensor, "model n_train"] | None = None,
    loss: Loss = example_losses,
    after_step: Callable[[int, Parameters], None] | None = None,
) -> Parameters:
    """Train models of one shape side by side, each on its own examples.

    Args:
        models: Initial models of one architecture, without buffers or dropout. Not changed.
        x: Inputs of all examples.
        y: Targets of all examples.
        subsets: For each model the numbers of its examples; subsets of one size.
        seeds: For each model the seed of the order of its examples.
        sgd: Optimizer and length of training.
        weights: Weight of each example in each model's loss; a mean still divides by the batch
            size, so that a weight of 0 leaves the rest of the run as it was.
        loss: One loss for each example, from outputs and targets.
        after_step: Called with the number of steps done and the live parameters.

    Returns:
        The trained parameters, each with the leading axis "model".

    Raises:
        FloatingPointError: Training of some model did not stay finite.
    """
    if not len(models) == len(subsets) == len(seeds):
        raise ValueError(
            f"Expected a model, a subset and a seed for each run; got {len(models)} models, "
            f"{len(subsets)} subsets and {len(seeds)} seeds."
        )
    model, parameters = models[0], stack(models)
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    steps = sgd.steps(subsets.shape[1])

    def objective(theta: Parameters, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return (weight * loss(functional_call(model, theta, (inputs,)), targets)).mean()

    gradient = vmap(grad(objective))
    for step, index in enumerate(batches(subsets, seeds=seeds, sgd=sgd)):
        weight = index.new_ones(index.shape, dtype=x.dtype)
        if weights is not None:
            weight = weights.gather(1, index)
        sgd_step(
            parameters,
            velocity,
            gradient(parameters, x[index], y[index], weight),
            lr=sgd.lr_at(step, steps),
            momentum=sgd.momentum,
            weight_decay=sgd.weight_decay,
        )
        if after_step is not None:
            after_step(step + 1, parameters)
    finite = torch.stack([v.flatten(1).isfinite().all(1) for v in parameters.values()]).all(0)
    if not finite.all():
        lost = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"Training of models {lost} of {len(models)} diverged; lower lr (now {sgd.lr})."
        )
    return parameters


@torch.no_grad()
def outputs(
    model: nn.Module, parameters: Parameters, x: Float[Tensor, "query ..."]
) -> Float[Tensor, "model query ..."]:
    """Outputs of every stacked model on the same inputs."""
    return vmap(lambda theta: functional_call(model, theta, (x,)))(parameters)
