r"""Trajectory: what a training run did, step by step, in a file that people can read.

Attribution asks of it how far a constant gradient would have moved the parameters. With learning
rates $\eta_k$ and momentum $\mu$ that is the horizon $\sum_k \eta_k / (1 - \mu)$. Beside the record
lie checkpoints: the trained parameters after some of the steps, each in a safetensors file.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from headwater.core.files import (
    ArtifactDamaged,
    ArtifactMissing,
    read_json,
    sync_folder,
    write_json,
)
from headwater.training.optimizers import OPTIMIZERS, Optimizer

FILE = "trajectory.json"


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of a run: the steps from `start` to before `stop`, with one optimizer.

    Attributes:
        name: What people call it.
        start: Number of its first step, from 0.
        stop: Number of the step after its last.
        optimizer: Its name, such as "AdamW".
        weight_decay: Decay of the parameters, in units of the optimizer.
        momentum: Decay of the velocity; 0 where gradients are averaged (`betas`) instead.
        betas: Decay of the running means of gradients and of their squares; empty without any.
        eps: What Adam adds to the root.
        eps_root: What Adam adds under the root.
        other: Further settings under which steps are not those of `headwater.training.optimizers`,
            such as {"nesterov": True} or {"max_grad_norm": 1.0}.
    """

    name: str = ""
    start: int = 0
    stop: int = 0
    optimizer: str = "SGD"
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: list[float] = field(default_factory=list)
    eps: float = 1e-8
    eps_root: float = 0.0
    other: dict[str, Any] = field(default_factory=dict)

    def rule(self) -> Optimizer:
        """The optimizer as a pure function.

        Raises:
            ValueError: There is none for these settings.
        """
        if self.optimizer not in OPTIMIZERS or self.other:
            raise ValueError(
                f"The run used {self.optimizer} with {self.other or 'its own rule'}; its steps can be "
                f"repeated for {', '.join(OPTIMIZERS)} without such settings."
            )
        settings = {"weight_decay": self.weight_decay}
        if self.betas:
            beta1, beta2 = self.betas
            settings |= {"betas": (beta1, beta2), "eps": self.eps, "eps_root": self.eps_root}
        else:
            settings |= {"momentum": self.momentum}
        return OPTIMIZERS[self.optimizer](**settings)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """Parameters kept after some step.

    Attributes:
        step: Steps made before it; 0 for the initial parameters.
        path: Its safetensors file, relative to the record's folder.
        lr_sum: Sum of the learning rates of those steps, over all stages.
        optimizer_path: File of the optimizer's moments, or None.
    """

    step: int
    path: str
    lr_sum: float
    optimizer_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a run that one stage made: the steps from `start` to before `stop`.

    Attributes:
        start: Number of its first step.
        stop: Number of the step after its last.
        checkpoints: Numbers of its checkpoints.
        lr_sum: Sum of its learning rates.
        momentum: Decay of the velocity in its stage.
        stage: Number of its stage.
    """

    start: int
    stop: int
    checkpoints: tuple[int, ...]
    lr_sum: float
    momentum: float
    stage: int

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.stop - self.start

    @property
    def horizon(self) -> float:
        """How far a constant gradient moves the parameters: Σ η / (1 - μ)."""
        return self.lr_sum / (1 - self.momentum)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The record of one training run; a list has one value for each step.

    Attributes:
        optimizer: Its name, such as "AdamW"; of the last stage, as the next three are.
        lr: Learning rates.
        weight_decay: Decay of the parameters, in units of the optimizer.
        betas: Decay of the running means of gradients and of their squares; empty without any.
        momentum: Decay of the velocity; 0 where gradients are averaged (`betas`) instead.
        batches: Ids of the examples of each step.
        normalizers: What the sum of a step's example losses was divided by; the size of the batch
            when left out.
        losses: Mean training loss of each step's batch, before the step (nats a token).
        seed: Seed of the order of examples and of the initial weights.
        trained: Names of the trained parameters.
        distance: Squared distance between the trained parameters before and after.
        made_from: Fingerprints of the model, the data and the options.
        stages: The stages; a single one when left out.
        checkpoints: Parameters that were kept, in the order of their steps.
        folder: Where the files of the checkpoints are; set by `save` and `load`.
    """

    optimizer: str
    lr: list[float]
    weight_decay: float
    batches: list[list[str]]
    losses: list[float]
    seed: int
    betas: list[float] = field(default_factory=list)
    momentum: float = 0.0
    normalizers: list[float] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    distance: float | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self):
        if not self.stages:
            only = StageRecord(
                stop=len(self.lr),
                optimizer=self.optimizer,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                betas=self.betas,
            )
            object.__setattr__(self, "stages", [only])
        if not self.normalizers:
            object.__setattr__(self, "normalizers", [float(len(batch)) for batch in self.batches])

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.lr)

    @property
    def horizon(self) -> float:
        """Sum of the learning rates over one minus the momentum, over all stages.

        Example:
            >>> Trajectory(optimizer="SGD", lr=[0.1, 0.1], weight_decay=0.0, batches=[["a"], ["b"]],
            ...            losses=[1.0, 0.5], seed=0, momentum=0.5).horizon
            0.4
        """
        return sum(sum(self.lr[s.start : s.stop]) / (1 - s.momentum) for s in self.stages)

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer scales each parameter's step by its past gradients."""
        return self.optimizer.lower().startswith(("adam", "rmsprop", "adagrad", "adafactor"))

    def examples(self, start: int = 0, stop: int | None = None) -> set[str]:
        """Ids of the examples seen in the steps from `start` to before `stop`."""
        return {name for batch in self.batches[start:stop] for name in batch}

    def segments(self, n: int) -> list[Segment]:
        """Cut the run into `n` stretches of about equally many checkpoints.

        No segment reaches over the end of a stage, so there are as many as stages at least. A
        segment begins where the one before it ended and ends with its last checkpoint; steps after
        a stage's last checkpoint belong to the stage's last segment. The initial parameters are in
        no segment.

        Raises:
            ValueError: There are fewer checkpoints than segments, or more stages.
        """
        groups = [
            [i for i, each in enumerate(self.checkpoints) if stage.start < each.step <= stage.stop]
            for stage in self.stages
        ]
        counts = [1] * len(groups)
        while sum(counts) < n:  # one more for the stage with most checkpoints a segment
            most = max(range(len(groups)), key=lambda k: len(groups[k]) / counts[k])
            counts[most] += 1
        if n < len(groups) or any(c > len(g) for g, c in zip(groups, counts, strict=True)):
            raise ValueError(
                f"{n} segments need a checkpoint each, and every stage one segment or more; the run "
                f"has {[len(g) for g in groups]} checkpoints in its stages (the initial parameters "
                "not counted). Ask for another number, or train with more checkpoints."
            )
        found = []
        for number, (stage, group, count) in enumerate(
            zip(self.stages, groups, counts, strict=True)
        ):
            start = stage.start
            for k in range(count):
                part = group[k * len(group) // count : (k + 1) * len(group) // count]
                stop = stage.stop if k == count - 1 else self.checkpoints[part[-1]].step
                found.append(
                    Segment(
                        start=start,
                        stop=stop,
                        checkpoints=tuple(part),
                        lr_sum=sum(self.lr[start:stop]),
                        momentum=stage.momentum,
                        stage=number,
                    )
                )
                start = stop
        return found

    def load_checkpoint(self, i: int) -> dict[str, Tensor]:
        """The trained parameters of checkpoint number `i`, by name; -1 is the last.

        Raises:
            IndexError: There is no such checkpoint.
            ArtifactMissing: Its file is gone.
            ArtifactDamaged: Its file cannot be read.
        """
        return self._tensors(self._checkpoint(i).path)

    def load_optimizer(self, i: int) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments at checkpoint number `i`: "velocity", or "mean" and "square".

        Raises:
            ValueError: They were not kept.
        """
        record = self._checkpoint(i)
        if record.optimizer_path is None:
            raise ValueError(
                f"The optimizer's state at step {record.step} was not kept; record the run with "
                "keep_optimizer=True."
            )
        return by_moment(self._tensors(record.optimizer_path))

    def file(self, name: str) -> Path:
        """Where a checkpoint's file is.

        Raises:
            ArtifactMissing: It is gone.
            ArtifactDamaged: The record names one outside of its folder.
        """
        if self.folder is None:
            raise ValueError("The trajectory has no folder; read it with Trajectory.load.")
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ArtifactDamaged(f"{path} is outside of {self.folder}; it is not read.")
        if not path.is_file():
            raise ArtifactMissing(
                f"{path} does not exist; the run's checkpoints lie beside {FILE}."
            )
        return path

    def _checkpoint(self, i: int) -> CheckpointRecord:
        if not -len(self.checkpoints) <= i < len(self.checkpoints):
            raise IndexError(f"The run has {len(self.checkpoints)} checkpoints; asked for {i}.")
        return self.checkpoints[i]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.file(name)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ArtifactDamaged(f"{path} cannot be read: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a folder gets the file `trajectory.json`."""
        place = _file(path)
        write_json(place, {k: v for k, v in asdict(self).items() if k != "folder"})
        object.__setattr__(self, "folder", place.parent)

    @classmethod
    def load(cls, path: str | Path) -> "Trajectory":
        """Read what `save` wrote.

        Raises:
            ArtifactMissing: There is no such file.
            ArtifactDamaged: The file is no trajectory.
        """
        content: Any = read_json(_file(path))
        names = {each.name for each in fields(cls)} - {"folder"}
        try:
            known = {k: v for k, v in content.items() if k in names}
            known["stages"] = [StageRecord(**each) for each in known.get("stages", [])]
            known["checkpoints"] = [
                CheckpointRecord(**each) for each in known.get("checkpoints", [])
            ]
            found = cls(**known, folder=_file(path).parent)
            _require_steps(found)
            return found
        except (TypeError, AttributeError, ValueError) as error:
            raise ArtifactDamaged(
                f"{_file(path)} is no record of a training run ({error}); restore it from a copy, or train again."
            ) from error


def moments_by_name(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Moments as one flat dictionary, as `Trajectory.load_optimizer` reads it."""
    return {f"{moment}/{name}": t for moment, part in moments.items() for name, t in part.items()}


def by_moment(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Inverse of `moments_by_name`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        moment, _, parameter = name.partition("/")
        found.setdefault(moment, {})[parameter] = tensor
    return found


def checkpoint_steps(stages: Sequence[int], n: int) -> list[int]:
    """Steps after which `n` evenly spaced checkpoints are kept, and the end of every stage.

    Args:
        stages: How many steps each stage has.
        n: Checkpoints over the whole run.

    Example:
        >>> checkpoint_steps([10], 4)
        [2, 5, 8, 10]
        >>> checkpoint_steps([3, 7], 2)
        [3, 5, 10]
    """
    total = sum(stages)
    spaced = {round(total * (k + 1) / n) for k in range(n)}
    return sorted((spaced | set(accumulate(stages))) - {0})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file under another name, then rename it: a reader sees the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # Copies, because tensors that share memory cannot stand in one file.
    kept = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    partial.write_bytes(save(kept))  # `save_file` would leave a file of its own behind when killed
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def keep_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    lr_sum: float = 0.0,
) -> CheckpointRecord:
    """Write the parameters after `step` steps into a record's folder, and the optimizer's moments where given."""
    kept = checkpoint_at(step, lr_sum=lr_sum, moments=bool(moments))
    write_tensors(folder / kept.path, parameters)
    if moments and kept.optimizer_path:
        write_tensors(folder / kept.optimizer_path, moments_by_name(moments))
    return kept


def checkpoint_at(step: int, *, lr_sum: float = 0.0, moments: bool = False) -> CheckpointRecord:
    """The record of a checkpoint under the names that its files have."""
    name = f"checkpoints/step-{step:08}"
    return CheckpointRecord(
        step=step,
        path=f"{name}.safetensors",
        lr_sum=lr_sum,
        optimizer_path=f"{name}-optimizer.safetensors" if moments else None,
    )


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE


def _require_steps(record: Trajectory) -> None:
    """Refuse learning rates, stages and checkpoints of no run."""
    n = len(record.lr)
    if not all(type(rate) in (int, float) and isfinite(rate) for rate in record.lr):
        raise ValueError("a learning rate is no finite number")
    if not all(0 <= s.start <= s.stop <= n and 0 <= s.momentum < 1 for s in record.stages):
        raise ValueError(f"a stage is not among its {n} steps")
    if not all(type(c.step) is int and 0 <= c.step <= n for c in record.checkpoints):
        raise ValueError(f"a checkpoint is not among its {n} steps")
