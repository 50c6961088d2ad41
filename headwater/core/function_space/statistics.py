"""What is kept of the anchor's data: moments of the inputs and how often each gate is open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwater.core.capture import (
    Accumulator,
    BatchInfo,
    BatchPlan,
    Capture,
    Progress,
    Rows,
    evaluation_mode,
    first_tensor,
    sweep,
)
from headwater.core.curvature import DualCurvature
from headwater.core.examples import Examples, to_device
from headwater.core.fit import Fit
from headwater.core.function_space.gates import GateRecorder
from headwater.core.gradients import Factored
from headwater.core.target import Loss
from headwater.core.task import Task
from headwater.numerics import kronecker


@dataclass(frozen=True, eq=False)
class AnchorStatistics:
    """Summary statistics of a network's data, for each group of it (one in all, or one a class).

    Attributes:
        counts: Examples (group).
        mean: Means of the inputs (group, dim), flattened.
        covariance: Their covariances (group, dim, dim), or variances (group, dim).
        rates: How often each gate is open (group, unit...), by the activation's name; mean slopes where it is smooth.
        input_shape: Shape of one input.
        groups: What the groups are called.
        passes: Forward passes over the data that were made for it.
    """

    counts: Float[Tensor, " group"]
    mean: Float[Tensor, "group dim"]
    covariance: Float[Tensor, "group dim dim"] | Float[Tensor, "group dim"]
    rates: dict[str, Tensor]
    input_shape: tuple[int, ...]
    groups: tuple[str, ...] = ("all",)
    passes: float = 0.0

    @property
    def shares(self) -> Float[Tensor, " group"]:
        """Share of the examples in each group."""
        return self.counts / self.counts.sum()

    @property
    def is_diagonal(self) -> bool:
        """Whether variances alone are kept."""
        return self.covariance.ndim == 2

    @property
    def n_numbers(self) -> int:
        """Numbers that are kept; of a covariance one triangle."""
        groups, dim = self.mean.shape
        second = dim if self.is_diagonal else dim * (dim + 1) // 2
        return groups * (1 + dim + second) + sum(r.numel() for r in self.rates.values())

    def diagonal(self) -> "AnchorStatistics":
        """The same without covariances between inputs."""
        if self.is_diagonal:
            return self
        variances = self.covariance.diagonal(dim1=1, dim2=2).clone()
        return _replaced(self, covariance=variances)

    def pooled(self) -> "AnchorStatistics":
        """One group of all examples."""
        share = self.shares
        mean = share @ self.mean
        apart = self.mean - mean
        if self.is_diagonal:
            covariance = share @ (self.covariance + apart.square())
        else:
            within = torch.einsum("g,gij->ij", share, self.covariance)
            covariance = within + torch.einsum("g,gi,gj->ij", share, apart, apart)
        return _replaced(
            self,
            counts=self.counts.sum()[None],
            mean=mean[None],
            covariance=covariance[None],
            rates={n: torch.tensordot(share, r, dims=1)[None] for n, r in self.rates.items()},
            groups=("all",),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        state = {"counts": self.counts, "mean": self.mean, "covariance": self.covariance}
        return state | {f"rate:{name}": rate for name, rate in self.rates.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> "AnchorStatistics":
        """Restore `tensors()` and `facts`."""
        rates = {k.removeprefix("rate:"): v for k, v in tensors.items() if k.startswith("rate:")}
        return cls(
            tensors["counts"],
            tensors["mean"],
            tensors["covariance"],
            rates,
            tuple(facts["input_shape"]),
            tuple(facts["groups"]),
            float(facts["passes"]),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What `from_tensors` needs beside the tensors."""
        return {
            "input_shape": list(self.input_shape),
            "groups": list(self.groups),
            "passes": self.passes,
        }


def _replaced(statistics: AnchorStatistics, **changes: Any) -> AnchorStatistics:
    return AnchorStatistics(**(vars(statistics) | changes))


class GateStatistics(Accumulator):
    """Sums behind `AnchorStatistics`, from whatever forward passes a sweep makes.

    It may share the sweep with others: put it beside them while its recorder is watching.

    Args:
        recorder: The hooks on the model.
        groups: Group of each example, or None for one in all.
        diagonal: Keep variances of the inputs alone.
    """

    def __init__(
        self,
        recorder: GateRecorder,
        groups: Int[Tensor, " n"] | None = None,
        *,
        diagonal: bool = False,
    ):
        self.recorder, self.groups, self.diagonal = recorder, groups, diagonal
        self.n_groups = 1 if groups is None else int(groups.max()) + 1
        self.sums: dict[str, Tensor] = {}
        self.input_shape: tuple[int, ...] = ()
        self._pending: tuple[Tensor, dict[str, Tensor]] | None = None

    def update(self, rows: Rows) -> None:
        if self._pending is None:  # passes for single examples may come before the batch ends
            self._pending = self._seen()

    def _seen(self) -> tuple[Tensor, dict[str, Tensor]]:
        if self.recorder.inputs is None:
            raise ValueError(
                "No forward pass was seen; sweep inside of `with recorder.watching():`."
            )
        return self.recorder.inputs, self.recorder.slopes

    def end_batch(self, batch: BatchInfo) -> None:
        (x, slopes), self._pending = self._pending or self._seen(), None
        if len(x) != len(batch.indices):
            raise ValueError(
                f"The model read {len(x)} rows where the batch has {len(batch.indices)} examples; its first tensor "
                "must hold one row an example."
            )
        self.input_shape = tuple(x.shape[1:])
        group = torch.zeros_like(batch.indices) if self.groups is None else self.groups
        group = group[batch.indices].to(x.device) if self.groups is not None else group.to(x.device)
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
        weight = weight if batch.share is None else batch.share.to(weight)
        member = torch.nn.functional.one_hot(group, self.n_groups).double() * weight[:, None]
        flat = x.flatten(1).double()
        self._add("count", member.sum(0))
        self._add("mean", member.mT @ flat)
        if self.diagonal:
            self._add("second", member.mT @ flat.square())
        else:
            dim = flat.shape[1]
            if "second" not in self.sums:
                self._add("second", flat.new_zeros(self.n_groups, dim, dim))
            for k in group.unique().tolist():
                own = group == k
                part = kronecker.second_moment(flat[own], weight[own])
                self.sums["second"][k] += part.to(self.sums["second"])
        for name, slope in slopes.items():
            if len(slope) != len(x):
                raise ValueError(
                    f"Activation {name!r} reads {tuple(slope.shape)}, not one row for each of {len(x)} examples."
                )
            self._add(f"rate:{name}", torch.tensordot(member.mT, slope.double(), dims=1))

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] = self.sums[name].to(value.device) + value
        else:
            self.sums[name] = value.clone()

    def merge(self, other: "GateStatistics") -> None:
        for name, value in other.sums.items():
            self._add(name, value)
        self.input_shape = self.input_shape or other.input_shape

    def tensors(self) -> dict[str, Tensor]:
        return self.sums | {"shape": torch.tensor(self.input_shape, dtype=torch.int64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.sums = {k: v for k, v in tensors.items() if k != "shape"}
        self.input_shape = tuple(tensors["shape"].tolist())

    def finish(self, names: Sequence[str] = (), *, passes: float = 0.0) -> AnchorStatistics:
        """The statistics.

        Args:
            names: What the groups are called; their numbers when left out.
            passes: Forward passes that were made for it alone.

        Raises:
            ValueError: A group has no examples.
        """
        count = self.sums["count"].cpu()
        names = tuple(names) or (("all",) if self.groups is None else _numbered(self.n_groups))
        if bool((count <= 0).any()):
            empty = int((count <= 0).nonzero()[0])
            raise ValueError(f"Group {names[empty]!r} has no examples; number groups from 0.")
        sums = {name: value.cpu() for name, value in self.sums.items()}
        mean = sums["mean"] / count[:, None]
        if self.diagonal:
            covariance = (sums["second"] / count[:, None] - mean.square()).clamp(min=0)
        else:
            outer = mean[:, :, None] * mean[:, None, :]
            covariance = sums["second"] / count[:, None, None] - outer
        rates = {
            name.removeprefix("rate:"): value / count.view(-1, *[1] * (value.ndim - 1))
            for name, value in sums.items()
            if name.startswith("rate:")
        }
        return AnchorStatistics(count, mean, covariance, rates, self.input_shape, names, passes)


def _numbered(n: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(n))


def grouped(examples: Examples, by: str | Sequence[Any] | None) -> tuple[Tensor | None, list[str]]:
    """The group of each example and the groups' names, from a metadata column or one value an example.

    Raises:
        ValueError: There is no such column, or not one value an example.
    """
    if by is None:
        return None, ["all"]
    if isinstance(by, str):
        if by not in examples.metadata:
            raise ValueError(
                f"The examples have no metadata column {by!r}; they have {', '.join(examples.metadata) or 'none'}. "
                "Pass one value for each example instead."
            )
        by = examples.metadata[by]
    values = [v.item() if isinstance(v, Tensor) else v for v in by]
    if len(values) != len(examples):
        raise ValueError(
            f"Expected one group for each of {len(examples)} examples; got {len(values)}."
        )
    names = sorted(set(values))
    number = {value: k for k, value in enumerate(names)}
    return torch.tensor([number[v] for v in values]), [str(n) for n in names]


def collect_statistics(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    by: str | Sequence[Any] | None = None,
    diagonal: bool = False,
    smooth: bool = False,
    batches: Sequence[BatchPlan] | None = None,
    progress: Progress | None = None,
) -> AnchorStatistics:
    """Statistics of a model's data, by one sweep of forward passes without gradients.

    Args:
        model: The model at the anchor; it runs in evaluation mode.
        task: Its task.
        examples: The data.
        by: Groups to keep apart, such as classes: a metadata column, or one value an example.
        diagonal: Keep variances of the inputs alone.
        smooth: Take GELU, SiLU and the like for gates of their mean slope.
        batches: How the data are batched.
        progress: Called with (done, total, note).
    """
    groups, names = grouped(examples, by)
    recorder = GateRecorder(model, smooth=smooth)
    found = GateStatistics(recorder, groups, diagonal=diagonal)
    with recorder.watching():
        sweep(
            Capture(model, task, []),  # nothing is followed, so there is no backward pass
            examples,
            [found],
            Loss(),
            batches=batches,
            progress=progress,
            note="gate rates",
        )
    return found.finish(names, passes=1.0)


def statistics_of(
    fit: Fit,
    *,
    by: str | Sequence[Any] | None = None,
    diagonal: bool = False,
    smooth: bool = False,
    progress: Progress | None = None,
) -> AnchorStatistics:
    """Statistics of a fit's training data: what the fit holds already, else by one sweep of forward passes.

    The dual form keeps what every layer read for every example. Where the first layer read the inputs themselves, and
    each ReLU is read by a followed linear layer, all that is needed is there, and no pass is made.
    """
    batches = fit.batches(fit.train)
    recorder = GateRecorder(fit.model, smooth=smooth)
    reads = None if smooth else _read_by(fit, recorder)
    if reads is None:
        return collect_statistics(
            fit.model,
            fit.task,
            fit.train,
            by=by,
            diagonal=diagonal,
            smooth=smooth,
            batches=batches,
            progress=progress,
        )
    (first, shape), layers = reads
    groups, names = grouped(fit.train, by)
    found = GateStatistics(recorder, groups, diagonal=diagonal)
    recorder.inputs = _held(fit, first).unflatten(1, shape)
    recorder.slopes = {
        name: (_held(fit, layer) > 0).to(recorder.inputs).unflatten(1, units)
        for name, (layer, units) in layers.items()
    }
    inputs = recorder.inputs
    found.end_batch(BatchInfo(torch.arange(len(inputs))))
    return found.finish(names)


def _held(fit: Fit, layer: str) -> Float[Tensor, "n dim"]:
    """What a layer read for each example, from the rows of the dual curvature."""
    curvature = fit.curvature
    assert isinstance(curvature, DualCurvature) and curvature.owners is not None
    block = curvature.rows.blocks[layer]
    assert isinstance(block, Factored)
    owners = curvature.owners
    first = torch.ones_like(owners, dtype=torch.bool)
    first[1:] = owners[1:] != owners[:-1]  # rows are in the order of the examples
    a = block.a[first.nonzero().squeeze(1), 0]
    has_bias = {x.name: x.has_bias for x in fit.followed}[layer]
    return a[:, :-1] if has_bias else a


_Read = tuple[
    str, tuple[int, ...]
]  # a layer, and the shape of what it reads before it is flattened


def _read_by(fit: Fit, recorder: GateRecorder) -> tuple[_Read, dict[str, _Read]] | None:
    """The layer that reads the inputs, and those that read each ReLU, if the fit holds their rows.

    Found by running a few examples and comparing what modules read, so that no structure of the model is assumed.
    """
    curvature, n = fit.curvature, len(fit.train)
    if not isinstance(curvature, DualCurvature) or curvature.owners is None:
        return None
    if curvature.n_examples != n or len(curvature.owners.unique()) != n:
        return None
    candidates = {
        layer.name
        for layer in fit.followed
        if layer.kind == "linear" and len(layer.uses) == 1 and layer.shape[0] == 1
        if isinstance(block := curvature.rows.blocks[layer.name], Factored) and block.pos == 1
    }
    modules, read, made, calls = dict(fit.model.named_modules()), {}, {}, []
    inputs: list[Tensor] = []
    handles = [
        fit.model.register_forward_pre_hook(
            lambda m, args, kwargs: inputs.append(first_tensor(args, kwargs)), with_kwargs=True
        )
    ]
    for name in candidates:
        handles.append(
            modules[name].register_forward_pre_hook(
                lambda m, args, name=name: read.__setitem__(name, args[0].clone())
            )
        )
    for name in recorder.names:

        def keep(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            calls.append(name)
            made[name] = output.clone()

        handles.append(modules[name].register_forward_hook(keep))
    device = next(fit.model.parameters()).device
    probe = to_device(fit.train.batch(range(min(8, n))), device)
    try:
        with evaluation_mode(fit.model), torch.no_grad():
            fit.task.predict(fit.model, probe)
    finally:
        for handle in handles:
            handle.remove()

    def reader(x: Tensor) -> _Read | None:
        same = (k for k, seen in read.items() if torch.equal(seen.flatten(1), x.flatten(1)))
        return next(((k, tuple(x.shape[1:])) for k in same), None)

    first, found = reader(inputs[0]), {name: reader(x) for name, x in made.items()}
    known = {name: layer for name, layer in found.items() if layer is not None}
    if first is None or len(known) < len(recorder.names) or len(calls) != len(set(calls)):
        return None
    return first, known
