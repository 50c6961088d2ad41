r"""One interface for gradients through training: of an outer loss, with respect to what training was given.

An inner problem is a pure step function $s_{t+1} = \Phi(s_t, \theta, b_t, t)$ on tensors by name. The meta-parameters
θ (data weights, learning rates, distilled images) enter the steps, and the outer loss $L(s, \theta)$ judges the states.
Every estimator is used alike:

    state = method.init(problem, meta)
    state, info = method.step(problem, state, meta)  # info.gradient, and what it cost

and `descend` does so until θ is learned.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad

Tensors = dict[str, Tensor]  # a state or meta-parameters: tensors by name
Loss = Callable[[Tensors, Tensors, Any, int], Tensor]  # state, meta, batch, t -> one number


def pack(tensors: Tensors) -> Float[Tensor, " dim"]:
    """All tensors in one vector, in the order of the dictionary."""
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def unpack(vector: Float[Tensor, " dim"], like: Tensors) -> Tensors:
    """A vector's parts under the names and shapes of `like`."""
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


def problem_seed(seed: int, problem: int) -> int:
    """The seed of the data and initial weights of an estimator's inner problem, by its number."""
    return seed * 1_000_003 + problem


def functional_model(
    make: Callable[[int], nn.Module],
) -> tuple[Callable[[int], Tensors], Callable[[Tensors, Tensor], Tensor]]:
    """A model as pure functions: a seed to initial weights, and (weights, inputs) to outputs.

    Raises:
        ValueError: The model has buffers (running statistics), which a pure step cannot keep.
    """
    skeleton = make(0)
    if next(skeleton.buffers(), None) is not None:
        raise ValueError(
            f"{type(skeleton).__name__} has buffers, which would carry data from one loss into the "
            "other; use a model without running statistics."
        )

    def init(seed: int) -> Tensors:
        return {name: p.detach() for name, p in make(seed).named_parameters()}

    def outputs(weights: Tensors, x: Tensor) -> Tensor:
        return functional_call(skeleton, weights, (x,))

    return init, outputs


def minibatch(n: int, size: int, seed: int, t: int) -> Int[Tensor, " batch"]:
    """Which of n examples step t sees: every epoch in an order of its own, the odd rest left out.

    Example:
        >>> sorted(torch.cat([minibatch(6, 2, 0, t) for t in range(3)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    size = min(size, n)
    epoch, number = divmod(t, n // size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    return order[number * size : (number + 1) * size]


def _no_batch(seed: int, t: int) -> None:
    """No data a step: the whole data set is inside the step function."""


@dataclass(frozen=True, kw_only=True)
class InnerProblem:
    """Training as a pure function of its meta-parameters.

    Args:
        init: A seed to the state before the first step.
        step: (state, meta, batch, t) to the next state; draws nothing, changes nothing in place.
        outer: The loss that judges a state, from the same arguments as `step`.
        horizon: Steps of the whole inner problem, T.
        objective: Whether the outer loss counts after the last step only ("final") or as the mean
            over all steps ("mean").
        batch: (seed, t) to the data of a step. All particles of a population get the same.
        inner: The training loss whose minimum the steps approach, from the same arguments;
            implicit differentiation needs it.
        vectorized: Whether `step` and `outer` can go through `torch.func.vmap`; else particles
            take turns.
    """

    init: Callable[[int], Tensors]
    step: Callable[[Tensors, Tensors, Any, int], Tensors]
    outer: Loss
    horizon: int
    objective: Literal["final", "mean"] = "final"
    batch: Callable[[int, int], Any] = _no_batch
    inner: Loss | None = None
    vectorized: bool = True

    def __post_init__(self):
        if self.horizon < 1:
            raise ValueError(f"horizon must be 1 step or more; got {self.horizon}.")

    def batches(self, seed: int, start: int, steps: int) -> list[Any]:
        """The data of some steps, drawn before they are taken (nothing is drawn inside a vmap)."""
        return [self.batch(seed, t) for t in range(start, start + steps)]

    def unroll(
        self, state: Tensors, meta: Tensors, batches: Sequence[Any], *, start: int
    ) -> tuple[Tensors, Tensor]:
        """Take one step for each batch, and say what they lost.

        Returns:
            The state, and the sum of the outer losses after each step ("mean") or the one after
            the last step ("final").
        """
        loss, end = next(iter(meta.values())).new_zeros(()), start + len(batches)
        for t, batch in enumerate(batches, start):
            state = self.step(state, meta, batch, t)
            if self.objective == "mean" or t == end - 1:
                loss = loss + self.outer(state, meta, batch, t)
        return state, loss

    def retrain(self, meta: Tensors, *, seed: int = 0) -> tuple[Tensors, float]:
        """Train from scratch at fixed meta-parameters: the last state, and the objective."""
        with torch.no_grad():
            batches = self.batches(seed, 0, self.horizon)
            state, loss = self.unroll(self.init(seed), meta, batches, start=0)
        return state, loss.item() / (self.horizon if self.objective == "mean" else 1)


def gradient_step(
    loss: Loss, lr: float | Callable[[Tensors, int], Tensor]
) -> Callable[[Tensors, Tensors, Any, int], Tensors]:
    """The step function of plain gradient descent on a training loss.

    Args:
        loss: Training loss of a state, from (state, meta, batch, t).
        lr: The learning rate, or a function of (meta, t) that gives it.
    """

    def step(state: Tensors, meta: Tensors, batch: Any, t: int) -> Tensors:
        slope = grad(loss)(state, meta, batch, t)
        rate = lr(meta, t) if callable(lr) else lr
        return {name: w - rate * slope[name] for name, w in state.items()}

    return step


@dataclass(frozen=True)
class Info:
    """What one step of an estimator gives beside its next state.

    Attributes:
        gradient: The estimate of the meta-gradient.
        loss: The outer loss that was seen, a mean over steps.
        inner_steps: Steps of the inner problem that were taken, all particles together.
        pairs: The estimates of single antithetic pairs, whose mean is the gradient; None where
            nothing was drawn.
        facts: Diagnostics of the method, such as the stationarity of the inner solution.
    """

    gradient: Tensors
    loss: float
    inner_steps: int
    pairs: Float[Tensor, "pair dim"] | None = None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def variance(self) -> float:
        """Estimated total variance of the gradient: zero without draws, NaN with a single pair."""
        if self.pairs is None:
            return 0.0
        kept = self.pairs[self.pairs.isfinite().all(1)]
        return float(kept.var(0).sum()) / len(kept) if len(kept) > 1 else float("nan")


class HyperGradient(ABC):
    """Estimates gradients through an inner problem, one truncation of it at a time."""

    paper: ClassVar[str]

    @abstractmethod
    def init(self, problem: InnerProblem, meta: Tensors, *, seed: int = 0) -> Any:
        """The estimator's state before its first step."""

    @abstractmethod
    def step(self, problem: InnerProblem, state: Any, meta: Tensors) -> tuple[Any, Info]:
        """Go on with training under `meta`: the next state, and an estimate of the gradient."""

    @abstractmethod
    def span(self, problem: InnerProblem) -> int:
        """Steps of the inner problem that one step of the estimator covers."""

    def estimate(self, problem: InnerProblem, meta: Tensors, *, seed: int = 0) -> Info:
        """The gradient at fixed meta-parameters: the mean of the steps over one inner problem."""
        span = self.span(problem)
        if problem.horizon % span:
            raise ValueError(
                f"An estimate covers whole truncations; got {span} steps a truncation for a "
                f"horizon of {problem.horizon}. Choose a divisor of the horizon."
            )
        state, infos = self.init(problem, meta, seed=seed), []
        for _ in range(problem.horizon // span):
            state, info = self.step(problem, state, meta)
            infos.append(info)
        _warn_if_dead([float(pack(i.gradient).norm()) for i in infos])
        return mean_info(infos)


def _warn_if_dead(norms: Sequence[float]) -> None:
    if not any(norms):
        warnings.warn(
            "Every meta-gradient was zero: the meta-parameters do not reach the outer loss (or, for "
            "evolution strategies, sigma is too small to change it).",
            stacklevel=3,
        )


def mean_info(infos: Sequence[Info]) -> Info:
    """The mean of several estimates, with all that they cost."""
    n = len(infos)
    pairs = [i.pairs for i in infos if i.pairs is not None]
    return Info(
        gradient={
            k: torch.stack([i.gradient[k] for i in infos]).mean(0) for k in infos[0].gradient
        },
        loss=sum(i.loss for i in infos) / n,
        inner_steps=sum(i.inner_steps for i in infos),
        pairs=torch.stack(pairs).mean(0) if len(pairs) == n else None,
        facts={k: sum(i.facts[k] for i in infos) / n for k in infos[0].facts},
    )


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Meta-parameters that were learned, and whether they carry what was learned.

    Attributes:
        meta: The meta-parameters.
        state: The estimator's last state.
        losses: Outer loss at each outer step, as the estimator saw it.
        gradient_norms: Norm of the meta-gradient at each outer step.
        inner_steps: Steps of the inner problem up to each outer step, all particles together.
        coadapted: The last of `losses`: the outer loss of the weights that grew up beside the
            meta-parameters.
        retrained: The objective of fresh weights trained on the final meta-parameters alone, one
            for each fresh seed.
        facts: The method, its papers, and its last diagnostics.
    """

    meta: Tensors
    state: Any
    losses: list[float]
    gradient_norms: list[float]
    inner_steps: list[int]
    coadapted: float
    retrained: list[float]
    facts: dict[str, Any]

    def __repr__(self) -> str:
        mean = sum(self.retrained) / len(self.retrained)
        return (
            f"Learned({', '.join(self.meta)}; {len(self.losses)} outer and "
            f"{self.inner_steps[-1]} inner steps; outer loss {self.coadapted:.4g} of the co-adapted "
            f"weights, {mean:.4g} after retraining from scratch)"
        )


def descend(
    problem: InnerProblem,
    meta: Tensors,
    method: HyperGradient,
    *,
    steps: int,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    clip: float | None = None,
    seed: int = 0,
    fresh_seeds: Sequence[int] = (0,),
    watch: Callable[[int, Tensors, Any], None] | None = None,
    papers: Sequence[str] = (),
) -> Learned:
    """Learn meta-parameters by stochastic descent on an estimator's gradients.

    Args:
        problem: The inner problem.
        meta: Where to start.
        method: The estimator.
        steps: Outer steps.
        lr: Learning rate of the outer optimizer.
        optimizer: From parameters and `lr` to a `torch.optim.Optimizer`.
        clip: Largest norm of a meta-gradient; longer ones are scaled down to it.
        seed: Seed of the estimator and of the inner problems' data and initial weights.
        fresh_seeds: Seeds of the initial weights that are trained on the final meta-parameters.
        watch: Called after each outer step with its number, the meta-parameters and the
            estimator's state.
        papers: What to cite beside the estimator's paper.

    Returns:
        What was learned, always with the loss after retraining from scratch.

    Raises:
        FloatingPointError: The gradient is NaN or infinite.
    """
    current = {name: t.detach().clone() for name, t in meta.items()}
    outer = optimizer(list(current.values()), lr=lr)
    state = method.init(problem, current, seed=seed)
    losses, norms, taken = [], [], []
    info = None
    for number in range(steps):
        state, info = method.step(problem, state, current)
        flat = pack(info.gradient)
        if not bool(flat.isfinite().all()):
            raise FloatingPointError(
                f"The meta-gradient of outer step {number} is NaN or infinite: the inner problem "
                "has diverged. Begin with a smaller inner learning rate, or a shorter horizon."
            )
        norm = float(flat.norm())
        scale = 1.0 if clip is None or norm <= clip else clip / norm
        for name, t in current.items():
            t.grad = info.gradient[name] * scale
        outer.step()
        losses.append(info.loss)
        norms.append(norm)
        taken.append((taken[-1] if taken else 0) + info.inner_steps)
        if watch is not None:
            watch(number, current, state)
    if info is None:
        raise ValueError(f"steps must be 1 or more; got {steps}.")
    for t in current.values():
        t.grad = None
    _warn_if_dead(norms)
    cited = list(dict.fromkeys([*papers, method.paper]))
    facts = {"method": type(method).__name__, "papers": cited, **info.facts}
    return Learned(
        meta=current,
        state=state,
        losses=losses,
        gradient_norms=norms,
        inner_steps=taken,
        coadapted=losses[-1],
        retrained=[problem.retrain(current, seed=s)[1] for s in fresh_seeds],
        facts=facts,
    )
