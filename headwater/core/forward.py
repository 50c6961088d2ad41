"""What a model says of a dataset without any gradient: one number, or one vector, an example."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, Progress, evaluation_mode, first_tensor
from headwater.core.examples import Examples, to_device
from headwater.core.layers import module_kind
from headwater.core.prediction import Categorical
from headwater.core.task import Task
from headwater.numerics import kronecker

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


class _Enough(Exception):
    """All that was asked for has been read."""


class InputMoments:
    """Sums of outer products of what some linear modules read; modules that read the same tensor share one.

    Args:
        model: The model, whose modules may be replaced from one batch to the next.
        modules: Their names.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]):
        self.model, self.modules = model, list(modules)
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.modules, 0)
        self._read: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}

    @contextmanager
    def listening(self, *, stop: bool = False) -> Iterator[None]:
        """What modules read is remembered inside; with `stop` the forward pass ends once all have."""
        with ExitStack() as stack:
            for name in self.modules:

                def hook(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                    self._read[name] = first_tensor(args, kwargs)
                    if stop and len(self._read) == len(self.modules):
                        raise _Enough

                module = self.model.get_submodule(name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def add(self, mask: Bool[Tensor, "batch pos"] | None) -> None:
        """Add what was read in a batch, at its real positions."""
        if missing := [name for name in self.modules if name not in self._read]:
            raise ValueError(f"Module {missing[0]!r} did not run; leave it out.")
        if not self._leader:
            first = {id(self._read[name]): name for name in reversed(self.modules)}
            self._leader = {name: first[id(self._read[name])] for name in self.modules}
        for name in dict.fromkeys(self._leader.values()):
            x = self._read[name]
            x = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x
            x = x.reshape(-1, x.shape[-1])
            moment = kronecker.second_moment(x.to(kronecker.sum_dtype(x))).double()
            self.sums[name] = self.sums[name].add_(moment) if name in self.sums else moment
            self.counts[name] += len(x)
        self._read.clear()

    def finish(self) -> dict[str, Float64[Tensor, "in in"]]:
        """Means over positions, by module."""
        means = {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}
        return {name: means[leader] for name, leader in self._leader.items()}


def input_moments(
    model: nn.Module,
    task: Task,
    examples: Examples,
    modules: Sequence[str],
    *,
    batches: Sequence[BatchPlan],
    progress: Progress | None = None,
) -> dict[str, Float64[Tensor, "in in"]]:
    """Mean outer products of what linear modules read, over the real positions of all examples: one forward pass.

    It is the activation covariance A that K-FAC has too, without the one of a bias. The pass ends where the last of
    the modules has been reached.

    Args:
        model: The model.
        task: Its task.
        examples: The data.
        modules: Names of the modules.
        batches: How they are batched.
        progress: Called with (done, total, note).
    """
    moments, device = InputMoments(model, modules), next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad(), moments.listening(stop=True):
        for done, plan in enumerate(batches, start=1):
            batch = to_device(examples.batch(plan.indices), device)
            with suppress(_Enough):
                task.predict(model, batch)
            mask = task.masks(batch).get("")
            moments.add(None if mask is None or bool(mask.all()) else mask)
            if progress is not None:
                progress(done, len(batches), "inputs")
    return moments.finish()
