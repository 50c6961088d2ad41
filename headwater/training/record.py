"""Record a training run: parameters, learning rates, the order of examples, as a `Trajectory`.

Around a loop of your own a context manager reads all settings from the optimizer:

    with record(model, optimizer, "runs/a", every=100) as recorder:
        for batch in loader:
            ...
            optimizer.step()
            recorder.step(batch["id"], loss)

For the Trainer of `transformers` there is `record_trainer`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer
from torch.utils.data import Dataset

from headwater.core.files import ArtifactMismatch
from headwater.core.prediction import IGNORE
from headwater.extras import require
from headwater.training.trajectory import (
    FILE,
    CheckpointRecord,
    StageRecord,
    Trajectory,
    checkpoint_at,
    keep_checkpoint,
)

STATE = "checkpoint"  # folder of the state that a killed `train_model` goes on from
_MOMENTS = {"momentum_buffer": "velocity", "exp_avg": "mean", "exp_avg_sq": "square"}
_OTHER = ("nesterov", "dampening", "amsgrad", "maximize")


def require_free(folder: str | Path) -> None:
    """Refuse a folder whose run would be overwritten; one with nothing but checkpoints is free.

    Raises:
        ArtifactMismatch: It holds a finished run, or the state of one that `train_model` goes on with.
    """
    folder = Path(folder)
    if (folder / FILE).exists():
        raise ArtifactMismatch(
            f"{folder} holds a finished run ({FILE}), which would be overwritten; choose another "
            "folder, or remove that one."
        )
    if any((folder / STATE).glob("generation-*")):
        raise ArtifactMismatch(
            f"{folder} holds an unfinished run that can go on (its state is in {STATE}); finish it "
            "with the call that began it, choose another folder, or remove that one."
        )


class TrajectoryWriter:
    """Gathers what a run does and writes it into a folder; every recorder is a caller of this one.

    Whether the folder is free, callers ask before (`require_free`).

    Args:
        folder: Where `trajectory.json` and the folder `checkpoints` go.
        parameters: The initial parameters, kept as the first checkpoint.
        seed: Seed of the order of examples and of the initial weights.
        made_from: Fingerprints of model, data and options.
    """

    def __init__(
        self,
        folder: str | Path,
        parameters: Mapping[str, Tensor],
        *,
        seed: int = 0,
        made_from: Mapping[str, str] | None = None,
    ):
        self.folder, self.seed, self.made_from = Path(folder), seed, dict(made_from or {})
        self.lr: list[float] = []
        self.batches: list[list[str]] = []
        self.losses: list[float] = []
        self.normalizers: list[float] = []
        self.stages: list[StageRecord] = []
        self.checkpoints: list[CheckpointRecord] = []
        self._start = {name: value.detach().clone() for name, value in parameters.items()}
        self.checkpoint(0, parameters)

    def again(self, step: int, lr_sum: float, *, moments: bool = False) -> None:
        """Note a checkpoint that is in the folder already, where a run goes on."""
        self.checkpoints.append(checkpoint_at(step, lr_sum=lr_sum, moments=moments))

    def stage(self, record: StageRecord) -> None:
        """Begin another stage at the step that comes next."""
        self.end_stage()
        self.stages.append(replace(record, start=len(self.lr)))

    def end_stage(self) -> None:
        """The stage at hand ends with the last step; one without steps is forgotten."""
        if self.stages and self.stages[-1].start == len(self.lr):
            self.stages.pop()
        elif self.stages:
            self.stages[-1] = replace(self.stages[-1], stop=len(self.lr))

    def step(self, ids: Sequence[str], lr: float, loss: float, normalizer: float) -> None:
        """Note a step that was made."""
        self.lr.append(lr)
        self.batches.append(list(ids))
        self.losses.append(loss)
        self.normalizers.append(normalizer)

    def checkpoint(
        self,
        step: int,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]] | None = None,
        lr_sum: float = 0.0,
    ) -> None:
        """Keep the parameters after `step` steps, and the optimizer's moments where given."""
        kept = keep_checkpoint(self.folder, step, parameters, moments, lr_sum=lr_sum)
        self.checkpoints.append(kept)

    def finish(self, parameters: Mapping[str, Tensor]) -> Trajectory:
        """Write the record, and the last parameters if they were not kept yet."""
        if self.checkpoints[-1].step < len(self.lr):
            self.checkpoint(len(self.lr), parameters, lr_sum=sum(self.lr))
        self.end_stage()
        last = self.stages[-1] if self.stages else StageRecord()
        trajectory = Trajectory(
            optimizer=last.optimizer,
            lr=self.lr,
            weight_decay=last.weight_decay,
            betas=last.betas,
            momentum=last.momentum,
            batches=self.batches,
            normalizers=self.normalizers,
            losses=self.losses,
            seed=self.seed,
            trained=list(parameters),
            distance=sum(
                float((value.detach() - self._start[name]).double().square().sum())
                for name, value in parameters.items()
            ),
            made_from=self.made_from,
            stages=self.stages,
            checkpoints=self.checkpoints,
        )
        trajectory.save(self.folder)  # last: a folder that has it is complete
        return trajectory


class Recorder:
    """Follows a PyTorch optimizer; made by `record`.

    Attributes:
        trajectory: The record, once the `with` block has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: TorchOptimizer,
        folder: str | Path,
        *,
        every: int | None = None,
        ids: Sequence[str] | None = None,
        keep_optimizer: bool = False,
        seed: int = 0,
        made_from: Mapping[str, str] | None = None,
        other: Mapping[str, Any] | None = None,
    ):
        self.model, self.every, self.keep_optimizer = model, every, keep_optimizer
        self.ids, self.other = ids, dict(other or {})
        self.trajectory: Trajectory | None = None
        require_free(folder)
        self._writer = TrajectoryWriter(folder, self._parameters(), seed=seed, made_from=made_from)
        self._made: deque[float] = (
            deque()
        )  # learning rates of steps whose examples are not told yet
        self._told: deque[tuple[list[str], float, float]] = deque()  # and the other way round
        self._steps, self._lr_sum = 0, 0.0
        self._follow(optimizer, "")

    def step(
        self, examples: Any, loss: Tensor | float = math.nan, *, normalizer: float | None = None
    ) -> None:
        """Tell of one step's examples, before or after `optimizer.step()`.

        Args:
            examples: Their ids; or their numbers, where `record` was given all ids or the numbers
                are the ids.
            loss: Mean training loss of the batch.
            normalizer: What the sum of the example losses was divided by; their number when left
                out.
        """
        numbers: list = examples.tolist() if isinstance(examples, Tensor) else list(examples)
        names = [self._name(each) for each in numbers]
        mean = float(loss.detach()) if isinstance(loss, Tensor) else loss
        self._told.append((names, mean, float(normalizer or len(names))))
        self._pair()

    def stage(self, name: str, optimizer: TorchOptimizer | None = None) -> None:
        """Begin another stage, with an optimizer of its own unless it goes on with the old one."""
        self._check()
        self.checkpoint()
        self._follow(optimizer or self._optimizer, name)

    def checkpoint(self) -> None:
        """Keep the parameters as they are now."""
        if self._writer.checkpoints[-1].step == self._steps:
            return
        moments = moments_of(self._optimizer, self._names) if self.keep_optimizer else None
        self._writer.checkpoint(self._steps, self._parameters(), moments, self._lr_sum)

    def finish(self) -> Trajectory:
        """Write the record; called at the end of the `with` block.

        Raises:
            ValueError: The optimizer made more steps, or fewer, than were told of.
        """
        self.stop()
        self._check()
        self.checkpoint()
        self.trajectory = self._writer.finish(self._parameters())
        return self.trajectory

    def stop(self) -> None:
        """Follow the optimizer no longer."""
        self._hook.remove()

    def _name(self, example: str | int) -> str:
        if isinstance(example, str):
            return example
        return str(example) if self.ids is None else self.ids[example]

    def _follow(self, optimizer: TorchOptimizer, name: str) -> None:
        if hasattr(self, "_hook"):
            self._hook.remove()
        self._optimizer = optimizer
        self._names = dict(self.model.named_parameters())
        self._settings = _settings(optimizer)
        self._writer.stage(stage_of(optimizer, name, self.other))
        self._hook = optimizer.register_step_post_hook(self._after)

    def _after(self, optimizer: TorchOptimizer, *_: Any) -> None:
        self._steps += 1
        rate = float(optimizer.param_groups[0]["lr"])
        self._lr_sum += rate
        now = _settings(optimizer)
        if now != self._settings:
            varying = sorted(k for k in now if now[k] != self._settings.get(k))
            current = self._writer.stages[-1]
            self._writer.stages[-1] = replace(current, other=current.other | {"varies": varying})
        self._made.append(rate)
        self._pair()
        if self.every and self._steps % self.every == 0:
            self.checkpoint()

    def _pair(self) -> None:
        while self._made and self._told:
            names, loss, normalizer = self._told.popleft()
            self._writer.step(names, self._made.popleft(), loss, normalizer)

    def _check(self) -> None:
        if self._made or self._told:
            told = self._steps - len(self._made) + len(self._told)
            raise ValueError(
                f"The optimizer made {self._steps} steps and {told} were told of; call "
                "recorder.step(ids, loss) once for every optimizer.step()."
            )

    def _parameters(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


@contextmanager
def record(
    model: nn.Module,
    optimizer: TorchOptimizer,
    folder: str | Path,
    *,
    every: int | None = None,
    ids: Sequence[str] | None = None,
    keep_optimizer: bool = False,
    seed: int = 0,
    made_from: Mapping[str, str] | None = None,
) -> Iterator[Recorder]:
    """Record the training that happens inside the `with` block.

    Learning rates and all other settings are read from the optimizer at each of its steps; the loop
    tells which examples a step saw. The initial and the last parameters are always kept. Nothing is
    written but checkpoints if the block ends by an exception; another run may then overwrite them.

    Args:
        model: The model in training; parameters that require gradients are kept.
        optimizer: Its optimizer.
        folder: Where `trajectory.json` and the checkpoints go.
        every: Steps between checkpoints; the first and the last parameters only when left out.
        ids: Names of all examples, so that batches can be told by number.
        keep_optimizer: Keep the optimizer's moments beside each checkpoint.
        seed: Seed of the run, for the record.
        made_from: Fingerprints of model, data and options, for the record.

    Raises:
        ArtifactMismatch: The folder holds a recorded run already.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with record(model, sgd, folder) as recorder:
        ...         loss = model(torch.ones(1, 2)).sum()
        ...         loss.backward()
        ...         sgd.step()
        ...         recorder.step(["first"], loss)
        ...     recorder.trajectory.batches, recorder.trajectory.lr
        ([['first']], [0.1])
    """
    recorder = Recorder(
        model,
        optimizer,
        folder,
        every=every,
        ids=ids,
        keep_optimizer=keep_optimizer,
        seed=seed,
        made_from=made_from,
    )
    try:
        yield recorder
    except BaseException:
        recorder.stop()
        raise
    recorder.finish()


def record_trainer(
    trainer: Any,
    folder: str | Path,
    *,
    every: int | None = None,
    ids: Sequence[str] | None = None,
    keep_optimizer: bool = False,
) -> None:
    """Make a Trainer of `transformers` record its next run; needs the extra `language`.

    The record is in the folder when `trainer.train()` returns. Losses are means over the steps
    between two logs. What a step's summed loss was divided by is counted as the Trainer counts it:
    labels that are not -100.

    Args:
        trainer: The Trainer, with a map-style dataset that it loads without worker processes.
        folder: Where `trajectory.json` and the checkpoints go.
        every: Steps between checkpoints.
        ids: Names of the examples; their numbers when left out.
        keep_optimizer: Keep the optimizer's moments beside each checkpoint.

    Raises:
        ArtifactMismatch: The folder holds a recorded run already.
        ValueError: Examples are loaded by worker processes, where their order is not seen.
    """
    require_free(folder)
    transformers = require("transformers", extra="language")
    if trainer.args.dataloader_num_workers:
        raise ValueError(
            "The order of examples is seen only without worker processes; set "
            "dataloader_num_workers=0 (now "
            f"{trainer.args.dataloader_num_workers})."
        )
    order = Order()
    trainer.train_dataset = FollowedDataset(trainer.train_dataset, order)
    trainer.data_collator = order.collating(trainer.data_collator)

    class RecordCallback(transformers.TrainerCallback):
        """Turns the Trainer's events into steps of a recorder."""

        recorder: Any = None

        def on_train_begin(
            self, args, state, control, model: Any = None, optimizer: Any = None, **_
        ):
            clip = {"max_grad_norm": args.max_grad_norm} if args.max_grad_norm else {}
            plain = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
            self.recorder = Recorder(
                model,
                plain,
                folder,
                every=every,
                ids=ids,
                keep_optimizer=keep_optimizer,
                seed=args.seed,
                other=clip,
            )
            self.parts: list[tuple[list[int], float]] = []
            self.since = 0

        def on_substep_end(self, args, state, control, **_):
            self.parts.append(order.next())

        def on_step_end(self, args, state, control, **_):
            self.parts.append(order.next())
            numbers = [i for part, _ in self.parts for i in part]
            self.recorder.step(numbers, normalizer=sum(n for _, n in self.parts))
            self.parts = []

        def on_log(self, args, state, control, logs=None, **_):
            losses = self.recorder._writer.losses if self.recorder else []
            if logs and "loss" in logs:
                losses[self.since :] = [float(logs["loss"])] * (len(losses) - self.since)
                self.since = len(losses)

        def on_train_end(self, args, state, control, **_):
            self.recorder.finish()

    trainer.add_callback(RecordCallback())


class Order:
    """Which examples are loaded, and how they fall into batches."""

    def __init__(self):
        self.loaded: deque[int] = deque()
        self.batches: deque[tuple[list[int], float]] = deque()

    def collating(self, collate: Callable[[list], Any]) -> Callable[[list], Any]:
        def collated(features: list) -> Any:
            batch = collate(features)
            if len(self.loaded) >= len(features):  # a batch of evaluation data was not loaded here
                labels = batch.get("labels") if isinstance(batch, Mapping) else None
                scored = isinstance(labels, Tensor) and labels.ndim > 1
                n = float((labels != IGNORE).sum()) if scored else float(len(features))
                self.batches.append(([self.loaded.popleft() for _ in features], n))
            return batch

        return collated

    def next(self) -> tuple[list[int], float]:
        return self.batches.popleft()


class FollowedDataset(Dataset):
    """A dataset that notes which of its examples are loaded."""

    def __init__(self, dataset: Any, order: Order):
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        self.order.loaded.append(int(i))
        return self.dataset[int(i)]


def _settings(optimizer: TorchOptimizer) -> dict[str, Any]:
    """Everything but learning rates that steps depend on, one list over the groups."""
    keys = ("weight_decay", "momentum", "betas", "eps", *_OTHER)
    return {
        key: [group[key] for group in optimizer.param_groups]
        for key in keys
        if key in optimizer.param_groups[0]
    }


def moments_of(
    optimizer: TorchOptimizer, parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """What an optimizer remembers of named parameters: "velocity", or "mean" and "square"."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in parameters.items():
        state = optimizer.state.get(p, {})
        for key, moment in _MOMENTS.items():
            if isinstance(state.get(key), Tensor):
                found.setdefault(moment, {})[name] = state[key].detach()
    return found


def stage_of(
    optimizer: TorchOptimizer, name: str, other: Mapping[str, Any] | None = None
) -> StageRecord:
    """What a stage with this optimizer is recorded as."""
    group, settings = optimizer.param_groups[0], _settings(optimizer)
    odd = {key: group[key] for key in _OTHER if group.get(key)} | dict(other or {})
    rates = {float(each["lr"]) for each in optimizer.param_groups}
    differ = sorted(k for k, v in settings.items() if any(each != v[0] for each in v))
    differ += ["lr"] * (len(rates) > 1)
    if differ:
        odd["differs_between_groups"] = differ
    return StageRecord(
        name=name,
        optimizer=type(optimizer).__name__,
        weight_decay=float(group.get("weight_decay", 0.0)),
        momentum=float(group.get("momentum", 0.0)),
        betas=[float(beta) for beta in group.get("betas", ())],
        eps=float(group.get("eps", 1e-8)),
        other=odd,
    )
