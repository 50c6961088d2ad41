r"""Training of many small models at once, with any optimizer, in one stage or several.

Models of one shape train side by side with a leading axis "model" on every parameter; each has its
own initial weights, its own examples and its own order of them. One model is the case of one.

Every model minimises the mean over its examples plus, with SGD and Adam, weight decay on all parameters,

$$F(\theta) = \frac{1}{n} \sum_{i=1}^{n} w_i L_i(\theta) + \frac{\rho}{2} \|\theta\|^2,$$

where $L_i$ is the loss of an example and $w_i = 1$ unless weights are given. The steps are those of
`headwater.training.optimizers`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from headwater.training.optimizers import (
    SGD,
    Adam,
    AdamW,
    Optimizer,
    Parameters,
    Stage,
    as_stages,
    plan_steps,
)

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Loss",
    "Optimizer",
    "Parameters",
    "Stage",
    "batches",
    "correct_class_margin",
    "example_losses",
    "outputs",
    "stack",
    "train",
    "unstack",
]

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs, targets -> one loss an example


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
    """Trained parameters of models of one shape, stacked along a new first axis; frozen ones are shared."""
    for name, module in models[0].named_modules():
        constant = module._non_persistent_buffers_set  # not saved, hence not learned
        if any(key not in constant for key, _ in module.named_buffers(recurse=False)):
            raise ValueError(
                f"Models trained side by side keep parameters only; module {name!r} "
                f"({type(module).__name__}) has buffers. Use one without running statistics."
            )
    named = [dict(model.named_parameters()) for model in models]
    trained = [name for name, p in named[0].items() if p.requires_grad]
    if not trained:
        raise ValueError(
            "No parameter of the model requires gradients, so there is nothing to train."
        )
    return {name: torch.stack([p[name].detach() for p in named]) for name in trained}


def unstack(parameters: Parameters, index: int) -> Parameters:
    """Parameters of one of the stacked models, as a state dict."""
    return {name: value[index].clone() for name, value in parameters.items()}


def batches(
    subsets: Int[Tensor, "model n"],
    *,
    seeds: Sequence[int],
    optimizer: Optimizer | Sequence[Stage],
) -> Iterator[Int[Tensor, "model batch"]]:
    """The batches of all epochs: example numbers, each model's in an order drawn from its seed."""
    for planned in plan_steps(subsets, seeds=seeds, stages=as_stages(optimizer)):
        yield planned.examples


def train(
    models: Sequence[nn.Module],
    x: Shaped[Tensor, "n_train ..."],
    y: Tensor,
    *,
    subsets: Int[Tensor, "model n"],
    seeds: Sequence[int],
    optimizer: Optimizer | Sequence[Stage],
    weights: Float[Tensor, "model n_train"] | None = None,
    loss: Loss = example_losses,
    after_step: Callable[[int, Parameters], None] | None = None,
) -> Parameters:
    """Train models of one shape side by side, each on its own examples.

    Args:
        models: Initial models of one architecture, without running statistics or dropout. Not changed. Frozen
            parameters are those of the first.
        x: Inputs of all examples.
        y: Targets of all examples.
        subsets: For each model the numbers of its examples; subsets of one size.
        seeds: For each model the seed of the order of its examples.
        optimizer: Optimizer and length of training; or several stages one after the other, each
            with its optimizer on its part of the data.
        weights: Weight of each example in each model's loss; a mean still divides by the batch
            size, so that a weight of 0 leaves the rest of the run as it was.
        loss: One loss for each example, from outputs and targets.
        after_step: Called with the number of steps done and the parameters after them.

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
    model, parameters, stages = models[0], stack(models), as_stages(optimizer)
    like = next(iter(parameters.values()))

    def objective(theta: Parameters, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return (weight * loss(functional_call(model, theta, (inputs,)), targets)).mean()

    gradient, state = vmap(grad(objective)), None
    for done, planned in enumerate(plan_steps(subsets, seeds=seeds, stages=stages), start=1):
        index, rule = planned.examples, stages[planned.stage].optimizer
        weight = torch.ones(index.shape) if weights is None else weights.gather(1, index)
        if state is None or planned.step == 0:
            state = rule.init(parameters)
        gradients = gradient(parameters, x[index], y[index], weight.to(like))
        parameters, state = rule.step(parameters, state, gradients, planned.lr)
        if after_step is not None:
            after_step(done, parameters)
    finite = torch.stack([v.flatten(1).isfinite().all(1) for v in parameters.values()]).all(0)
    if not finite.all():
        lost = (~finite).nonzero().flatten().tolist()
        rates = ", ".join(str(stage.optimizer.lr) for stage in stages)
        raise FloatingPointError(
            f"Training of models {lost} of {len(models)} diverged; lower lr (now {rates})."
        )
    return parameters


@torch.no_grad()
def outputs(
    model: nn.Module, parameters: Parameters, x: Shaped[Tensor, "query ..."]
) -> Float[Tensor, "model query ..."]:
    """Outputs of every stacked model on the same inputs."""
    return vmap(lambda theta: functional_call(model, theta, (x,)))(parameters)
