"""What a model says of a dataset without any gradient: one number, or one vector, an example."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, Progress, evaluation_mode, first_tensor
from headwater.core.examples import Examples, to_device
from headwater.core.layers import module_kind
from headwater.core.prediction import Categorical
from headwater.core.task import Task

Pool = Literal["mean", "last"]


def evaluate(
    model: nn.Module,
    examples: Examples,
    function: Callable[[nn.Module, Any], Tensor],
    *,
    batches: Sequence[BatchPlan],
    progress: Progress | None = None,
    note: str = "forward",
) -> Shaped[Tensor, "n ..."]:
    """A function of (model, batch), first axis the example, over all examples, in their order."""
    device = next(model.parameters()).device
    found: Tensor | None = None
    with evaluation_mode(model), torch.no_grad():
        for done, plan in enumerate(batches, start=1):
            part = function(model, to_device(examples.batch(plan.indices), device)).cpu()
            if found is None:
                found = part.new_zeros(len(examples), *part.shape[1:])
            found[torch.tensor(plan.indices)] = part
            if progress is not None:
                progress(done, len(batches), note)
    if found is None:
        raise ValueError("There are no examples to run the model on.")
    return found


def class_logits(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    batches: Sequence[BatchPlan],
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "n class"], Int64[Tensor, " n"]]:
    """Logits of a classifier, in float64, and the labels that the examples have.

    Raises:
        ValueError: The model does not choose one of several classes for each example.
        FloatingPointError: A logit is not finite; the message names the example.
    """

    def found(model: nn.Module, batch: Any) -> Tensor:
        prediction = task.predict(model, batch)
        if not isinstance(prediction, Categorical) or prediction.logits.shape[1] != 1:
            what = type(prediction).__name__ + str(tuple(prediction.outputs.shape))
            raise ValueError(
                f"Expected a classifier with one label an example; {task.name} predicts {what}. Tokens and real "
                "numbers have no classes to choose among."
            )
        both = prediction.logits[:, 0].double(), prediction.labels.double()
        return torch.cat(both, dim=1)

    values = evaluate(model, examples, found, batches=batches, progress=progress, note="logits")
    logits, labels = values[:, :-1], values[:, -1].long()
    if logits.shape[1] < 2:
        raise ValueError(
            f"Expected two or more classes; the model has {logits.shape[1]} output. Give it an output for every class."
        )
    broken = (~logits.isfinite()).any(1).nonzero()
    if len(broken):
        raise FloatingPointError(
            f"The logits of example {examples.ids[int(broken[0])]!r} are not finite; look at this example, or at the "
            "model's weights."
        )
    return logits, labels


def last_module(model: nn.Module, task: Task, batch: Any) -> str:
    """Name of the linear or convolutional module that runs last: what it reads is the model's representation."""
    names: list[str] = []
    with ExitStack() as stack, evaluation_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            if module_kind(module) in ("linear", "conv1d", "conv"):
                hook = module.register_forward_hook(lambda *_, name=name: names.append(name))
                stack.callback(hook.remove)
        task.predict(model, batch)
    if not names:
        raise ValueError(
            "The model runs no linear or convolutional module; name the one whose input is the representation."
        )
    return names[-1]


def representations(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    batches: Sequence[BatchPlan],
    module: str | None = None,
    pool: Pool = "mean",
    progress: Progress | None = None,
) -> Float[Tensor, "n dim"]:
    """What a module reads, pooled over each example's real positions.

    Args:
        model: The model.
        task: Its task, which knows which positions are padding.
        examples: The data.
        batches: How they are batched.
        module: Whose input; the model's last linear or convolutional module when left out.
        pool: "mean" over positions, or the "last" of them.
        progress: Called with (done, total, note).
    """
    if module is None:
        probe = to_device(examples.batch([0]), next(model.parameters()).device)
        module = last_module(model, task, probe)
    modules = dict(model.named_modules(remove_duplicate=False))
    if module not in modules:
        raise ValueError(f"The model has no module {module!r}; name one of its named_modules().")
    seen: list[Tensor] = []

    def pooled(model: nn.Module, batch: Any) -> Tensor:
        seen.clear()
        task.predict(model, batch)
        if not seen:
            raise ValueError(f"Module {module!r} did not run; name one that does.")
        x = seen[-1]
        if module_kind(modules[module]) == "conv":  # channels come second
            x = x.flatten(2).mT
        return _pooled(x, task.masks(batch).get(""), pool)

    hook = modules[module].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(first_tensor(args, kwargs)), with_kwargs=True
    )
    try:
        options = {"batches": batches, "progress": progress, "note": "representations"}
        return evaluate(model, examples, pooled, **options)
    finally:
        hook.remove()


def _pooled(x: Tensor, mask: Tensor | None, pool: Pool) -> Float[Tensor, "batch dim"]:
    if x.ndim == 2:
        return x
    x = x.flatten(1, -2)
    if mask is None or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if pool == "last":
        number = torch.arange(x.shape[1], device=x.device)
        last = (mask * number).amax(1)
        return x[torch.arange(len(x), device=x.device), last]
    weight = mask[..., None].to(x)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


@dataclass(frozen=True)
class LastLayer:
    """The linear layer that makes a classifier's logits.

    Attributes:
        module: Its name.
        n_classes: Its outputs.
        n_features: What it reads, and a one where it has a bias.
        has_bias: Whether it has.
    """

    module: str
    n_classes: int
    n_features: int
    has_bias: bool

    def features(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        *,
        batches: Sequence[BatchPlan],
        progress: Progress | None = None,
    ) -> Float[Tensor, "n feature"]:
        """What the layer reads of each example, in float64, a one appended for the bias."""
        found = representations(
            model, task, examples, batches=batches, module=self.module, progress=progress
        ).double()
        return torch.cat([found, found.new_ones(len(found), 1)], 1) if self.has_bias else found

    def weights(self, model: nn.Module) -> Float[Tensor, "class feature"]:
        """Its weights, the bias as last column."""
        layer: Any = model.get_submodule(self.module)
        parts = [layer.weight, *([layer.bias[:, None]] if self.has_bias else [])]
        return torch.cat([p.detach().double().cpu() for p in parts], dim=1)


def last_layer(model: nn.Module, task: Task, examples: Examples) -> LastLayer:
    """The linear layer that makes a classifier's logits.

    Raises:
        ValueError: The logits are not what a linear layer returns.
    """
    probe = to_device(examples.batch([0]), next(model.parameters()).device)
    name = last_module(model, task, probe)
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        has_bias = module.bias is not None
        found = LastLayer(name, module.out_features, module.in_features + has_bias, has_bias)
        batches = [BatchPlan(tuple(range(min(2, len(examples)))), 0)]
        some = examples.subset(batches[0].indices)
        logits, _ = class_logits(model, task, some, batches=batches)
        features = found.features(model, task, some, batches=batches)
        same = features.shape[1] == found.n_features and logits.shape[1] == found.n_classes
        if same and torch.allclose(
            features @ found.weights(model).mT, logits, rtol=1e-3, atol=1e-4
        ):
            return found
    raise ValueError(
        f"Expected a model whose logits are what a linear layer returns; the last module to run is {name!r} "
        f"({type(module).__name__}), and its outputs are not the logits."
    )
