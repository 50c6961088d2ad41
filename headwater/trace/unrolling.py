r"""Exact unrolling: the derivative of a training run's outcome in the weight of each of its examples.

Engstrom, Ilyas, Chen, Feldmann, Moses and Madry (2025), "Optimizing ML Training with Metagradient Descent",
arXiv:2503.13751 (REPLAY); Ilyas and Engstrom (2025), "MAGIC: Near-Optimal Data Attribution for Deep Learning",
arXiv:2504.16430.

A run is $s_{k+1} = F_k(s_k, w)$ with state $s = (\theta, \text{moments})$. From $\Delta_T = \nabla_s \varphi(s_T)$
backwards,

$$\frac{d\varphi}{dw} = \sum_k \left(\frac{\partial F_k}{\partial w}\right)^{\!\top} \Delta_{k+1}, \qquad
\Delta_k = \left(\frac{\partial F_k}{\partial s}\right)^{\!\top} \Delta_{k+1}.$$

States are made again from a few that are kept: all, √T of them, or a tree of k log_k T. The answer is that of one run:
of its initial weights and its order of examples.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater.core.capture import Progress, evaluation_mode
from headwater.core.cost import available_memory_bytes
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.core.target import Measured
from headwater.core.task import Measurement
from headwater.numerics.checkpointing import Keep, Meter, backwards, branching_of, choose
from headwater.trace.base import Attributor
from headwater.trace.influence import measurement_name
from headwater.training.optimizers import OptimizerState, Parameters
from headwater.training.run import Run, State
from headwater.training.trajectory import Trajectory

Measure = Callable[[Parameters], Tensor]  # parameters -> one number a query

REPLAY_GAP = 1e-3  # of the way that training went; rounding alone stays far below


# Derivatives of one step


@dataclass(frozen=True)
class Tangent:
    """Derivatives of, or in, a state; every tensor with one further axis in front."""

    parameters: Parameters
    moments: dict[str, Parameters]

    def norms(self) -> Tensor:
        """Norm over all parameters, for each along the axis in front."""
        squares = [v.flatten(1).double().square().sum(1) for v in self.parameters.values()]
        return torch.stack(squares).sum(0).sqrt()


@dataclass(frozen=True)
class _Step:
    """Step k as two differentiable functions: the weighted gradient, and what is made of it."""

    run: Run
    k: int
    batch: Any

    def gradient(self, parameters: Parameters, weights: Tensor) -> Parameters:
        return grad(lambda p: self.run.objective(self.k, p, self.batch, weights))(parameters)

    def update(
        self, parameters: Parameters, moments: dict[str, Parameters], gradients: Parameters
    ) -> tuple[Parameters, dict[str, Parameters]]:
        count = self.k - self.run.stage(self.k).start
        state = State(parameters, OptimizerState(count, moments))
        after = self.run.update(self.k, state, gradients)
        return after.parameters, after.optimizer.moments


def step_back(
    run: Run, k: int, state: State, adjoint: Tangent, *, at_once: int | None = None
) -> tuple[Tangent, Tensor]:
    """The adjoint before step k, and the derivative in the weights of its examples.

    Args:
        run: The run.
        k: Number of the step.
        state: The state before it.
        adjoint: Derivative of each query's measurement in the state after it.
        at_once: Queries that are taken through the model together; all when left out.

    Returns:
        The adjoint of the state before, and (query, batch) or (query, batch, pos).
    """
    step = _Step(run, k, run.batch(k))
    (theta, moments), ones = _own_moments(run, k, state), _ones(run, k, state, step.batch)
    gradients, pull_gradient = vjp(step.gradient, theta, ones)[:2]
    pull_update = vjp(step.update, theta, moments, gradients)[1]

    def one(after: tuple) -> tuple[Parameters, dict[str, Parameters], Tensor]:
        direct, memory, in_gradient = pull_update(after)
        curved, in_weights = pull_gradient(in_gradient)
        return {n: direct[n] + curved[n] for n in direct}, memory, in_weights

    pulled = vmap(one, chunk_size=at_once)((adjoint.parameters, adjoint.moments))
    before, memory, in_weights = pulled
    if run.begins_stage(k):  # the memory begins at zero, whatever came before
        memory = _like_stage_before(run, k, before)
    return Tangent(before, memory), in_weights


def step_ahead(run: Run, k: int, state: State, tangent: Tangent, chosen: Tensor) -> Tangent:
    """Derivatives of the state after step k in the weights of chosen examples (chosen ...)."""
    step = _Step(run, k, run.batch(k))
    (theta, moments), ones = _own_moments(run, k, state), _ones(run, k, state, step.batch)
    index = torch.tensor(run.batches[k], device=run.device)
    gradients = step.gradient(theta, ones)
    own = tangent.moments
    if run.begins_stage(k):
        own = {m: {n: torch.zeros_like(v) for n, v in tangent.parameters.items()} for m in moments}

    def one(theta_dot: Parameters, memory: dict[str, Parameters], which: Tensor) -> tuple:
        weight_dot = (index == which).to(ones)
        change = jvp(step.gradient, (theta, ones), (theta_dot, weight_dot))[1]
        return jvp(step.update, (theta, moments, gradients), (theta_dot, memory, change))[1]

    return Tangent(*vmap(one)(tangent.parameters, own, chosen))


def _own_moments(run: Run, k: int, state: State) -> tuple[Parameters, dict[str, Parameters]]:
    """Parameters and moments that step k begins with."""
    fresh = run.begins_stage(k)
    memory = run.rule(k).init(state.parameters) if fresh else state.optimizer
    return state.parameters, memory.moments


def _like_stage_before(run: Run, k: int, parameters: Parameters) -> dict[str, Parameters]:
    """Zeros for the moments of the step before k, which nothing after it reads."""
    moments = run.rule(k - 1).MOMENTS if k else ()
    return {m: {n: torch.zeros_like(v) for n, v in parameters.items()} for m in moments}


def _ones(run: Run, k: int, state: State, batch: Any) -> Tensor:
    """Weights of one for the examples, or the tokens, of step k."""
    like = next(iter(state.parameters.values()))
    if not run.per_token:
        return like.new_ones(len(run.batches[k]))
    with torch.no_grad():
        return torch.ones_like(run.losses(state.parameters, batch)).to(like)


# Whole runs


@dataclass(frozen=True, eq=False, kw_only=True)
class Unrolled:
    """Derivatives of the measurements after a run.

    Attributes:
        values: In the weight of every example (query, train), or of every token (query, train, pos).
        final: Parameters at the end of the run.
        adjoint_norms: Norm of each query's adjoint before each step (step, query).
        policy: How states were kept.
        peak_states: States held at once.
        steps_made: Steps made forwards.
    """

    values: Tensor
    final: Parameters
    adjoint_norms: Float[Tensor, "step query"]
    policy: str
    peak_states: int
    steps_made: int


def unroll(
    run: Run,
    measure: Measure,
    *,
    keep: Keep = "auto",
    branching: int = 4,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> Unrolled:
    """Derivatives of measurements after a run in the weights of all its examples, in reverse.

    Args:
        run: The run; with `per_token` derivatives are those in the weights of tokens, which stand
            where the task's token losses have them (pad on the right).
        measure: From parameters to one number for each query.
        keep: States kept: "all", "sqrt", "tree", or the first of them that fits into half of the
            free memory ("auto").
        branching: Branches of the tree.
        at_once: Queries taken through the model together.
        progress: Called with (steps done, steps in all, note).

    Raises:
        FloatingPointError: An adjoint is not finite; the message names the step.
        ValueError: A step does not repeat itself.
        MemoryError: The states do not fit into memory.
    """
    n, first = run.steps, run.initial()
    budget = available_memory_bytes() // 2
    policy = choose(keep, n=n, state_bytes=_bytes(first), budget=budget, k=branching)
    meter = Meter(held=1, peak=1)
    values: Tensor | None = None
    norms: list[Tensor] = []
    adjoint, final = None, first.parameters
    with evaluation_mode(run.model), sdpa_kernel(SDPBackend.MATH):
        _require_repeats(run, first)
        states = backwards(
            run.step, first, n, branching=branching_of(policy, n, branching), meter=meter
        )
        for k, state in states:
            if adjoint is None:
                last = run.step(k, state)
                meter.made += 1
                final = last.parameters
                adjoint = _measured(measure, last)
            adjoint, in_weights = step_back(run, k, state, adjoint, at_once=at_once)
            values = _gather(values, in_weights.detach(), run, k)
            norms.append(adjoint.norms())
            if not norms[-1].isfinite().all():
                raise FloatingPointError(
                    f"The adjoint is not finite before step {k + 1} of {n}: the run is too rough to "
                    "be differentiated. Lower lr, raise eps_root or the batch size, or train for "
                    "fewer steps."
                )
            if progress is not None:
                progress(n - k, n, "unrolling")
    if values is None:
        raise ValueError("The run has no steps; there is nothing to unroll.")
    return Unrolled(
        values=values,
        final=final,
        adjoint_norms=torch.stack(norms[::-1]),
        policy=policy,
        peak_states=meter.peak,
        steps_made=meter.made,
    )


def responses(
    run: Run, chosen: Sequence[int], *, progress: Progress | None = None
) -> tuple[Parameters, State]:
    r"""Derivatives $d\theta_T / dw_i$ for a few examples, forwards, and the final state.

    Nothing is kept; the cost is one derivative of every step for each chosen example.
    """
    state, index = run.initial(), torch.tensor(list(chosen), device=run.device)
    zero = {n: v.new_zeros(len(index), *v.shape) for n, v in state.parameters.items()}
    moments = {m: {n: v.clone() for n, v in zero.items()} for m in run.rules[0].MOMENTS}
    tangent = Tangent(zero, moments)
    with evaluation_mode(run.model), sdpa_kernel(SDPBackend.MATH):
        for k in range(run.steps):
            tangent = step_ahead(run, k, state, tangent, index)
            state = run.step(k, state)
            if progress is not None:
                progress(k + 1, run.steps, "unrolling forwards")
    return tangent.parameters, state


def metasmoothness(run: Run, *, h: float = 0.1, seed: int = 0) -> float:
    r"""How straight the outcome is along a random reweighting: near 1 derivatives mean something.

    With $\theta_0, \theta_h, \theta_{2h}$ trained under weights $1, 1 + hv, 1 + 2hv$ for $v \sim N(0, I)$ and
    $d = |\theta_{2h} - \theta_0|$ (Definition 2 of arXiv:2503.13751),

    $$\sum_j \frac{d_j}{\|d\|_1} \operatorname{sign}(\theta_{2h} - \theta_h)_j \operatorname{sign}(\theta_h -
    \theta_0)_j.$$

    Args:
        run: The run.
        h: Size of the reweighting.
        seed: Seed of its direction.
    """
    generator = torch.Generator().manual_seed(seed)
    like = next(iter(run.initial().parameters.values()))
    v = torch.randn(len(run.train), generator=generator, dtype=torch.float64).to(like)
    ends = [_flat(run.repeat(1 + scale * h * v).parameters) for scale in (0, 1, 2)]
    zero, one, two = ends
    d = (two - zero).abs()
    return float((d * torch.sign(two - one) * torch.sign(one - zero)).sum() / d.sum())


def _measured(measure: Measure, last: State) -> Tangent:
    """The adjoint after the last step: the gradient of every query's measurement."""
    values, pull = vjp(measure, last.parameters)[:2]
    if values.ndim != 1:
        raise ValueError(
            f"Expected one number a query from the measurement; got shape {tuple(values.shape)}."
        )
    eye = torch.eye(len(values), dtype=values.dtype, device=values.device)
    gradients = vmap(pull)(eye)[0]
    moments = {
        m: {n: torch.zeros_like(v) for n, v in gradients.items()} for m in last.optimizer.moments
    }
    return Tangent({n: v.detach() for n, v in gradients.items()}, moments)


def _gather(values: Tensor | None, part: Tensor, run: Run, k: int) -> Tensor:
    """Add a step's derivatives to those of the examples that it saw."""
    shape = (part.shape[0], len(run.train), *part.shape[2:])
    if values is None:
        values = part.new_zeros(shape)
    elif part.ndim == 3 and part.shape[2] > values.shape[2]:  # a longer text than any before
        values = torch.nn.functional.pad(values, (0, part.shape[2] - values.shape[2]))
    elif part.ndim == 3:
        part = torch.nn.functional.pad(part, (0, values.shape[2] - part.shape[2]))
    index = torch.tensor(run.batches[k], device=part.device)
    return values.index_add(1, index, part)


def _require_repeats(run: Run, first: State) -> None:
    one, two = (run.step(0, first).parameters for _ in range(2))
    if not all(torch.equal(one[name], two[name]) for name in one):
        raise ValueError(
            "A step made twice gave two results, so the run cannot be repeated; turn off whatever "
            "draws at random in the model, and use torch.use_deterministic_algorithms(True)."
        )


def _bytes(state: State) -> int:
    parts = [state.parameters, *state.optimizer.moments.values()]
    return sum(v.nbytes for part in parts for v in part.values())


def _flat(parameters: Parameters) -> Tensor:
    return torch.cat([parameters[name].flatten().double() for name in sorted(parameters)])


# The method


@dataclass(frozen=True, kw_only=True)
class Unrolling(Attributor):
    """Differentiate through a recorded training run, exactly.

    The scores are those of this one run: they predict the same run with examples left out, and say
    less about runs with other initial weights or another order.

    Args:
        keep: States kept on the way back: "all", "sqrt", "tree", or what fits ("auto").
        branching: Branches of the tree.
        mode: "reverse" costs a few training runs for all examples and queries together; "forward"
            one for each example, whatever the queries, and keeps nothing.
        at_once: Queries (or, forwards, examples) taken through the model together; 0 for all.
    """

    paper: ClassVar[str] = "arXiv:2503.13751"

    keep: Keep = "auto"
    branching: int = 4
    mode: Literal["reverse", "forward"] = "reverse"
    at_once: int = 0

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        trajectory: Trajectory | str | Path,
        measurement: Measurement | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example; the fit's curvature is not used.

        Args:
            fit: The model after the run, its task, and the data of all stages.
            queries: What is asked about.
            trajectory: The record of the run, with its initial parameters.
            measurement: What queries ask about; the task's when left out.
            progress: Called with (steps done, steps in all, note).

        Raises:
            ValueError: The record does not lead to the fit's model.
        """
        examples, started = as_examples(queries), time.perf_counter()
        record = trajectory if isinstance(trajectory, Trajectory) else Trajectory.load(trajectory)
        run = Run(model=fit.model, task=fit.task, train=fit.train, trajectory=record)
        measure = measure_of(run, examples, measurement)
        facts: dict[str, Any] = {"mode": self.mode}
        if self.mode == "reverse":
            found = unroll(
                run,
                measure,
                keep=self.keep,
                branching=self.branching,
                at_once=self.at_once or None,
                progress=progress,
            )
            values, final = found.values, found.final
            facts |= {
                "keep": found.policy,
                "peak_states": found.peak_states,
                "steps_made": found.steps_made,
                "adjoint_norms": found.adjoint_norms.mean(1).tolist(),
            }
        else:
            values, final = self._forwards(run, measure, progress)
        asked = fit.task.measurement_of if measurement is None else measurement
        return Scores(
            values=values.float().cpu(),
            query_ids=examples.ids,
            train_ids=fit.train.ids,
            measurement=measurement_name(asked),
            metadata=fit.train.metadata,
            facts={
                "method": "Unrolling",
                "papers": [self.paper, "arXiv:2504.16430"],
                "made_from": fit.made_from,
                "replay_gap": _require_same_end(run, final),
                "seconds": time.perf_counter() - started,
            }
            | facts,
        )

    def _forwards(
        self, run: Run, measure: Measure, progress: Progress | None
    ) -> tuple[Tensor, Parameters]:
        size, parts = self.at_once or len(run.train), []
        for chosen in torch.arange(len(run.train)).split(size):
            response, last = responses(run, chosen.tolist(), progress=progress)
            gradients = _measured(measure, last).parameters
            parts.append(sum(gradients[n].flatten(1) @ r.flatten(1).T for n, r in response.items()))
        return torch.cat(parts, dim=1), last.parameters


def measure_of(run: Run, queries: Examples, measurement: Measurement | None = None) -> Measure:
    """The queries' measurements as a function of the parameters."""
    batch = to_device(queries.batch(range(len(queries))), run.device)
    asked = Measured(measurement)

    def measure(parameters: Parameters) -> Tensor:
        return run.call(parameters, lambda model: asked(model, run.task, batch, queries.keys)[0])

    return measure


def _require_same_end(run: Run, final: Parameters) -> float:
    """How far the repeated run ends from the model, over the way it went."""
    model, start = dict(run.model.named_parameters()), run.initial().parameters
    end = _flat(final)
    gap = (end - _flat({n: model[n].detach() for n in final})).norm()
    way = (end - _flat(start)).norm()
    relative = float(gap / way.clamp(min=torch.finfo(end.dtype).tiny))
    if not relative <= REPLAY_GAP:
        raise ValueError(
            f"Repeating the recorded run ends {relative:.2g} of its way from the fit's model (at most "
            f"{REPLAY_GAP:g} is rounding). Is this the model at the end of that run? Was there dropout, "
            "clipping, data augmentation, or another loss or normalizer than the record's?"
        )
    return relative
