r"""A training run as a pure function of the weights of its examples.

A run is a list of steps: which examples, divided by what, at which learning rate. Step k takes
parameters and optimizer state to the next ones by the gradient of

$$\ell_k(\theta, w) = \frac{1}{B_k} \sum_{i \in \text{batch}_k} w_i L_i(\theta),$$

where $B_k$ does not depend on the weights, so that leaving an example out (w = 0) is a small change
of the run and not another run. `train_model` makes and records a run; `Run` repeats a recorded one.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater.core.capture import evaluation_mode
from headwater.core.checkpoint import SAVE_EVERY, Cadence, Checkpoint
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.files import require_same
from headwater.core.fingerprint import fingerprint_json, fingerprint_model
from headwater.core.locks import FolderLock
from headwater.core.task import Task
from headwater.training.optimizers import (
    Optimizer,
    OptimizerState,
    Parameters,
    Stage,
    as_stages,
    plan_steps,
)
from headwater.training.record import STATE, TrajectoryWriter
from headwater.training.trajectory import (
    FILE,
    StageRecord,
    Trajectory,
    by_moment,
    checkpoint_steps,
    moments_by_name,
)


@dataclass(frozen=True)
class State:
    """Where a run stands: parameters, and what the optimizer remembers."""

    parameters: Parameters
    optimizer: OptimizerState


class _Bound(nn.Module):
    """A function of a model as a module, so that `functional_call` can replace the parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Tensor]) -> Tensor:
        return function(self.model)


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A recorded run that can be repeated, with other weights of the examples or step by step.

    The model runs in evaluation mode (no dropout), with attention whose derivatives have
    derivatives. Its parameters are left as they are.

    Attributes:
        model: The model.
        task: What it was trained for.
        train: The examples, under the ids that the record knows.
        trajectory: The record, with the initial parameters as its first checkpoint.
        per_token: Weigh tokens, not examples.
    """

    model: nn.Module
    task: Task
    train: Examples
    trajectory: Trajectory
    per_token: bool = False

    def __post_init__(self):
        unknown = self.trajectory.examples() - set(self.train.ids)
        if unknown:
            raise ValueError(
                f"The run saw {len(unknown)} examples that the data does not have, such as "
                f"{min(unknown)!r}; pass the data of all its stages."
            )
        if not self.trajectory.checkpoints or self.trajectory.checkpoints[0].step:
            raise ValueError(
                "The record has no initial parameters (a checkpoint at step 0); record the run with "
                "headwater.training.record or train_model."
            )

    @property
    def steps(self) -> int:
        """How many steps the run has."""
        return self.trajectory.steps

    @cached_property
    def batches(self) -> list[list[int]]:
        """Numbers of the examples of each step."""
        number = {name: i for i, name in enumerate(self.train.ids)}
        return [[number[name] for name in batch] for batch in self.trajectory.batches]

    @cached_property
    def rules(self) -> list[Optimizer]:
        """The optimizer of each stage."""
        return [stage.rule() for stage in self.trajectory.stages]

    @cached_property
    def _stage_of(self) -> list[int]:
        stages = enumerate(self.trajectory.stages)
        return [number for number, s in stages for _ in range(s.start, s.stop)]

    def rule(self, k: int) -> Optimizer:
        """The optimizer of step k."""
        return self.rules[self._stage_of[k]]

    def stage(self, k: int) -> StageRecord:
        """The stage of step k."""
        return self.trajectory.stages[self._stage_of[k]]

    def begins_stage(self, k: int) -> bool:
        """Whether the optimizer starts afresh at step k."""
        return k == self.stage(k).start

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def initial(self) -> State:
        """Parameters and optimizer before the first step."""
        saved, own = self.trajectory.load_checkpoint(0), dict(self.model.named_parameters())
        differ = [n for n, v in saved.items() if n not in own or own[n].shape != v.shape]
        if differ:
            raise ValueError(
                f"The run trained {differ[0]!r} of shape {tuple(saved[differ[0]].shape)}, which the "
                "model does not have; pass the model that was trained."
            )
        parameters = {name: saved[name].to(self.device) for name in own if name in saved}
        return State(parameters, self.rules[0].init(parameters))

    def batch(self, k: int) -> Any:
        """The examples of step k, collated."""
        return to_device(self.train.batch(self.batches[k]), self.device)

    def losses(self, parameters: Parameters, batch: Any) -> Tensor:
        """Losses of a batch's examples (batch), or of their tokens (batch, pos)."""
        of = self.task.token_loss if self.per_token else self.task.loss
        return self.call(parameters, lambda model: of(model, batch))

    def call(self, parameters: Parameters, function: Callable[[nn.Module], Tensor]) -> Tensor:
        """A function of the model with these parameters in place of its own."""
        named = {f"model.{n}": p for n, p in parameters.items()}
        return functional_call(_Bound(self.model), named, (function,))

    def objective(
        self, k: int, parameters: Parameters, batch: Any, weights: Tensor | None = None
    ) -> Tensor:
        """What step k descends: its examples' weighted losses over its normalizer."""
        losses = self.losses(parameters, batch)
        if weights is not None:
            weights = weights[..., None] if weights.ndim < losses.ndim else weights
            losses = losses * weights[..., : losses.shape[-1]]
        return losses.sum() / self.trajectory.normalizers[k]

    def step(self, k: int, state: State, weights: Tensor | None = None) -> State:
        """The state after step k; weights are those of all examples, or None for ones."""
        return self.step_and_loss(k, state, weights)[0]

    def step_and_loss(
        self, k: int, state: State, weights: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """The state after step k, and the step's loss before it."""
        batch, own = self.batch(k), None if weights is None else weights[self.batches[k]]
        with evaluation_mode(self.model), sdpa_kernel(SDPBackend.MATH):
            gradients, loss = grad_and_value(lambda p: self.objective(k, p, batch, own))(
                state.parameters
            )
        return self.update(k, state, gradients), loss

    def update(self, k: int, state: State, gradients: Parameters) -> State:
        """What the optimizer makes of step k's gradients."""
        rule = self.rule(k)
        memory = rule.init(state.parameters) if self.begins_stage(k) else state.optimizer
        return State(*rule.step(state.parameters, memory, gradients, self.trajectory.lr[k]))

    def repeat(
        self,
        weights: Tensor | None = None,
        *,
        state: State | None = None,
        start: int = 0,
        stop: int | None = None,
        after_step: Callable[[int, State, float], None] | None = None,
    ) -> State:
        """The state that the run ends in, with these weights of the examples.

        Args:
            weights: One weight for each example (or example and position); ones when left out.
            state: Where to begin; the initial parameters when left out.
            start: The step to begin with.
            stop: The step to end before.
            after_step: Called with the number of steps done, the state and the step's loss.
        """
        state = self.initial() if state is None else state
        for k in range(start, self.steps if stop is None else stop):
            state, loss = self.step_and_loss(k, state, weights)
            if after_step is not None:
                after_step(k + 1, state, float(loss))
        return state


def train_model(
    model: nn.Module,
    train: Any,
    task: Task,
    optimizer: Optimizer | Sequence[Stage],
    *,
    folder: str | Path | None = None,
    checkpoints: int = 6,
    keep_optimizer: bool = False,
    normalize: Literal["examples", "tokens"] = "examples",
    weights: Float[Tensor, " train"] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Trajectory | None:
    """Train a model in place with the plain loop, and record the run.

    The order of examples is that of `headwater.training.loop.train` with the same seed. Dropout
    stays off, so that the run repeats exactly. A finished run of the same inputs that is in the
    folder is read instead of made again, and a killed one goes on where it stopped; both end as
    the run without interruption, bit by bit.

    Args:
        model: The model; parameters that require gradients are trained.
        train: The training data.
        task: What it is trained for.
        optimizer: Optimizer and length of training; or several stages.
        folder: Where the record goes; nothing is kept when left out.
        checkpoints: Evenly spaced checkpoints, beside the initial parameters and the ends of stages.
        keep_optimizer: Keep the optimizer's moments beside each checkpoint.
        normalize: Divide a batch's summed loss by its examples, or by its scored tokens.
        weights: Weight of each example in the loss.
        seed: Seed of the order of examples.
        progress: Called with (steps done, steps in all, note).

    Returns:
        The record, or None without a folder.

    Raises:
        ArtifactMismatch: The folder holds another run, or one of another model, other data or other options.
        FloatingPointError: The loss of a step, or the parameters at the end, were not finite. The folder is then
            free for another run.
        ValueError: There is not one weight for each example.
    """
    examples, stages = as_examples(train), as_stages(optimizer)
    if weights is not None and len(weights) != len(examples):
        raise ValueError(
            f"Expected a weight for each of {len(examples)} examples; got {len(weights)}."
        )
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    options = {
        "task": task.name,
        "stages": [stage.facts | {"name": stage.name} for stage in stages],
        "trained": list(trained),
        "normalize": normalize,
        "seed": seed,
        "weights": None if weights is None else weights.tolist(),
        "checkpoints": checkpoints,
        "keep_optimizer": keep_optimizer,
    }
    made_from = {
        "model": fingerprint_model(model),
        "data": examples.fingerprint(),
        "options": fingerprint_json(options),
    }
    with ExitStack() as held:
        place = Path(held.enter_context(TemporaryDirectory()) if folder is None else folder)
        held.enter_context(FolderLock(place))
        if (place / FILE).is_file():
            return _finished(place, model, made_from)
        for partial in place.glob(f".{FILE}.partial-*"):  # left where a run was killed at its end
            partial.unlink()
        saved = _Saved(Checkpoint(place / STATE), made_from)
        state, losses = saved.load(trained)
        plan = _plan(model, examples, task, stages, normalize, seed)
        lengths = [stage.stop - stage.start for stage in plan.stages]
        keep, cadence = set(checkpoint_steps(lengths, checkpoints)), Cadence(SAVE_EVERY)
        if folder is not None and not losses:
            saved.save(None, [])  # from here on the folder is known to be of this run
        writer = TrajectoryWriter(place, trained, seed=seed, made_from=made_from)
        plan = replace(plan, checkpoints=list(writer.checkpoints), folder=place)
        run = Run(model=model, task=task, train=examples, trajectory=plan)

        def note(done: int, loss: float) -> None:
            k = done - 1
            if run.begins_stage(k):
                writer.stage(run.stage(k))
            writer.step(plan.batches[k], plan.lr[k], loss, plan.normalizers[k])

        def after(done: int, state: State, loss: float) -> None:
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of step {done} is {loss}; lower lr (now {plan.lr[done - 1]:.3g})."
                )
            note(done, loss)
            if folder is not None and done in keep:
                moments = state.optimizer.moments if keep_optimizer else None
                writer.checkpoint(done, state.parameters, moments, sum(plan.lr[:done]))
            if folder is not None and cadence.due and done < run.steps:
                with cadence.saving():
                    saved.save(state, writer.losses)
            if progress is not None:
                progress(done, run.steps, f"training: loss {loss:.3f}")

        for done, loss in enumerate(losses, start=1):  # of the steps that were made before a kill
            note(done, loss)
            if done in keep:
                writer.again(done, sum(plan.lr[:done]), moments=keep_optimizer)
        try:
            final = run.repeat(weights, state=state, start=len(losses), after_step=after).parameters
            _put(model, final)
        except FloatingPointError:
            saved.checkpoint.clear()  # it would end so again
            raise
        if folder is None:
            return None
        record = writer.finish(final)
        saved.checkpoint.clear()
        return record


def _finished(folder: Path, model: nn.Module, made_from: dict[str, str]) -> Trajectory:
    """The record of a finished run; the model gets the parameters that it ended with."""
    record = Trajectory.load(folder)
    require_same(record.made_from, made_from, f"{folder} holds a finished run")
    _put(model, record.load_checkpoint(-1))
    Checkpoint(folder / STATE).clear()  # left where a run was killed after its last step
    return record


@dataclass(frozen=True)
class _Saved:
    """The state of a run on disk, to go on from after a kill."""

    checkpoint: Checkpoint
    made_from: dict[str, str]

    def save(self, state: State | None, losses: Sequence[float]) -> None:
        """Replace the state; None stands for the state before the first step."""
        parts = {} if state is None else {"parameter": state.parameters, **state.optimizer.moments}
        facts = {"made_from": self.made_from, "losses": list(losses)}
        count = {} if state is None else {"count": state.optimizer.count}
        self.checkpoint.save(moments_by_name(parts), facts | count)

    def load(self, initial: Parameters) -> tuple[State | None, list[float]]:
        """The state, in the order and on the devices of the initial one, and the losses before it.

        Raises:
            ArtifactMismatch: It is the state of another run.
        """
        found = self.checkpoint.load()
        if found is None:
            return None, []
        tensors, facts = found
        place = self.checkpoint.folder.parent
        require_same(facts["made_from"], self.made_from, f"{place} holds an unfinished run")
        if not facts["losses"]:
            return None, []
        parts = {
            kind: {name: part[name].to(value.device) for name, value in initial.items()}
            for kind, part in by_moment(tensors).items()
        }
        return State(parts.pop("parameter"), OptimizerState(facts["count"], parts)), facts["losses"]


def _put(model: nn.Module, parameters: Parameters) -> None:
    broken = [name for name, value in parameters.items() if not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"Training ended with weights that are not finite ({broken[0]}); lower lr."
        )
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            named[name].copy_(value)


def _plan(
    model: nn.Module,
    examples: Examples,
    task: Task,
    stages: Sequence[Stage],
    normalize: str,
    seed: int,
) -> Trajectory:
    """The run that is to be made, as a record of it."""
    counts = _scored(model, examples, task) if normalize == "tokens" else torch.ones(len(examples))
    batches, lr, normalizers = [], [], []
    lengths = [0] * len(stages)
    everything = torch.arange(len(examples))[None]
    for planned in plan_steps(everything, seeds=[seed], stages=stages):
        index = planned.examples[0]
        batches.append([examples.ids[i] for i in index.tolist()])
        normalizers.append(float(counts[index].sum()))
        lr.append(planned.lr)
        lengths[planned.stage] += 1
    records, start = [], 0
    for stage, length in zip(stages, lengths, strict=True):
        records.append(_record(stage, start, start + length))
        start += length
    last = records[-1]
    return Trajectory(
        optimizer=last.optimizer,
        lr=lr,
        weight_decay=last.weight_decay,
        betas=last.betas,
        momentum=last.momentum,
        batches=batches,
        normalizers=normalizers,
        losses=[],
        seed=seed,
        stages=records,
    )


def _record(stage: Stage, start: int, stop: int) -> StageRecord:
    facts = stage.optimizer.facts
    return StageRecord(
        name=stage.name,
        start=start,
        stop=stop,
        optimizer=facts["name"],
        weight_decay=facts["weight_decay"],
        momentum=facts.get("momentum", 0.0),
        betas=list(facts.get("betas", ())),
        eps=facts.get("eps", 1e-8),
        eps_root=facts.get("eps_root", 0.0),
    )


@torch.no_grad()
def _scored(model: nn.Module, examples: Examples, task: Task) -> Tensor:
    """How many positions of each example are scored."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        parts = [
            task.predict(model, to_device(examples.batch(part.tolist()), device)).mask.sum(1)
            for part in torch.arange(len(examples)).split(64)
        ]
    return torch.cat(parts).cpu()
