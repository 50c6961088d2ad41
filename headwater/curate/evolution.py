r"""Evolution strategies in unrolled computation: full ES, truncated ES, PES and ES-Single.

Vicol, Kolter and Swersky (2023), "Low-Variance Gradient Estimation in Unrolled Computation Graphs with ES-Single",
arXiv:2304.11153. PES: Vicol, Metz and Sohl-Dickstein (2021), "Unbiased Gradient Estimation in Unrolled Computation
Graphs with Persistent Evolution Strategies", arXiv:2112.13835.

One engine serves all four. A population of antithetic pairs goes through the inner problem; every $K_p$ steps a
perturbation $\epsilon$ is drawn, and each loss is multiplied by the sum $\xi$ of all perturbations that the particle's
state has seen. What differs is when perturbations are drawn and whether particles keep states of their own:

| | draws | particles' states |
|---|---|---|
| full ES | once an inner problem, which one estimate covers whole | their own |
| truncated ES | each truncation | those of one unperturbed run |
| PES | each truncation; ξ is their sum | their own |
| ES-Single | once an inner problem, so that ξ = ε | their own |
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from headwater.curate.base import (
    HyperGradient,
    Info,
    InnerProblem,
    Tensors,
    pack,
    problem_seed,
    unpack,
)
from headwater.numerics import noise
from headwater.numerics.evolution import antithetic_gradients


@dataclass(frozen=True)
class Population:
    """Antithetic pairs on their way through one inner problem.

    Attributes:
        states: The states of the particles, stacked: θ + ε of all pairs, then θ - ε, then (in
            truncated ES) the unperturbed one.
        noise: The perturbation in force.
        total: The sum ξ of all perturbations that the states have seen.
        previous: The outer loss at the last truncation's end, for differences of final losses.
        t: Steps taken in this inner problem.
        problems: Inner problems begun, which numbers the seeds.
        draws: Perturbations drawn, which numbers them.
        first_pair: Number of the first pair among those of all populations.
        delay: Truncations to wait before the first inner problem begins.
    """

    states: Tensors
    noise: Float[Tensor, "pair dim"]
    total: Float[Tensor, "pair dim"]
    previous: Float[Tensor, " particle"]
    t: int
    problems: int
    draws: int
    first_pair: int
    delay: int


@dataclass(frozen=True)
class EvolutionState:
    """The populations of an estimator, and the seed of their draws."""

    populations: tuple[Population, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Evolution(HyperGradient):
    persistent: ClassVar[bool] = True

    sigma: float = 0.1
    n_particles: int = 4
    stagger: int = 1

    def __post_init__(self):
        if self.n_particles < 2 or self.n_particles % 2:
            raise ValueError(
                f"n_particles must be even (antithetic pairs); got {self.n_particles}."
            )
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive; got {self.sigma}.")
        if not 1 <= self.stagger <= self.n_particles // 2:
            raise ValueError(
                f"stagger must be between 1 and the {self.n_particles // 2} pairs; got "
                f"{self.stagger}."
            )
        if (self.n_particles // 2) % self.stagger:
            raise ValueError(
                f"The {self.n_particles // 2} pairs must fall into {self.stagger} equal groups."
            )

    @abstractmethod
    def interval(self, problem: InnerProblem) -> int:
        """Steps of the inner problem between two draws, K_p."""

    def init(self, problem: InnerProblem, meta: Tensors, *, seed: int = 0) -> EvolutionState:
        """Populations whose inner problems have not begun."""
        for name, value in meta.items():
            if not value.is_floating_point():
                raise TypeError(
                    f"Meta-parameter {name!r} must be of floating point; got {value.dtype}. Let "
                    "the step function round it."
                )
        vector = pack(meta)
        n_pairs = self.n_particles // 2 // self.stagger
        rounds = -(-problem.horizon // self.span(problem))
        blank = vector.new_zeros(n_pairs, len(vector))
        populations = tuple(
            Population(
                states={},
                noise=blank,
                total=blank,
                previous=vector.new_zeros(2 * n_pairs + (not self.persistent)),
                t=0,
                problems=0,
                draws=0,
                first_pair=g * n_pairs,
                delay=g * rounds // self.stagger,
            )
            for g in range(self.stagger)
        )
        return EvolutionState(populations, seed)

    @torch.no_grad()
    def step(
        self, problem: InnerProblem, state: EvolutionState, meta: Tensors
    ) -> tuple[EvolutionState, Info]:
        """Take every particle through one truncation under `meta`.

        The gradient is that of the mean outer loss a step ("mean"), or of the last loss as a sum of
        differences that telescopes ("final"). Pairs in which a particle diverged are left out and
        counted.

        Raises:
            FloatingPointError: Every pair has diverged.
        """
        populations, gradients, losses, taken = [], [], [], 0
        for population in state.populations:
            if population.delay:
                populations.append(replace(population, delay=population.delay - 1))
                continue
            population, per_pair, loss = self._advance(problem, population, meta, state.seed)
            populations.append(population)
            gradients.append(per_pair)
            losses.append(loss)
            taken += len(population.previous) * self.span(problem)
        pairs, seen = torch.cat(gradients), torch.cat(losses)
        kept = pairs.isfinite().all(1)
        if not bool(kept.any()):
            raise FloatingPointError(
                f"All {len(pairs)} pairs have diverged. Begin with a smaller inner learning rate, "
                "or take a smaller sigma."
            )
        info = Info(
            gradient=unpack(pairs[kept].mean(0), meta),
            loss=float(seen[seen.isfinite()].mean()),
            inner_steps=taken,
            pairs=pairs,
            facts={"dropped_pairs": float((~kept).sum())},
        )
        return EvolutionState(tuple(populations), state.seed), info

    def _advance(
        self, problem: InnerProblem, population: Population, meta: Tensors, seed: int
    ) -> tuple[Population, Tensor, Tensor]:
        """One truncation, in pieces that end where a draw or a new inner problem is due."""
        left = span = self.span(problem)
        interval, T = self.interval(problem), problem.horizon
        per_pair, loss = torch.zeros_like(population.noise), torch.zeros_like(population.previous)
        while left:
            if population.t % interval == 0:
                population = self._draw(problem, population, meta, seed)
            steps = min(left, interval - population.t % interval, T - population.t)
            population, lost, last = self._unroll(problem, population, meta, seed, steps)
            plus, minus = lost[: 2 * len(population.noise)].chunk(2)
            per_pair = per_pair + antithetic_gradients(
                population.total, plus / span, minus / span, sigma=self.sigma
            )
            loss = last if problem.objective == "final" else loss + lost / span
            left -= steps
        return population, per_pair, loss

    def _draw(
        self, problem: InnerProblem, population: Population, meta: Tensors, seed: int
    ) -> Population:
        """New perturbations, and a new inner problem where one is due."""
        vector, n = pack(meta), len(population.noise)
        number = torch.arange(n * len(vector)).reshape(n, -1)
        key = number + population.first_pair * len(vector)
        drawn = noise.normal(key, torch.full_like(key, population.draws), seed)
        drawn = self.sigma * drawn.to(vector)
        states, previous, problems = population.states, population.previous, population.problems
        many = len(previous)
        if population.t == 0:
            fresh = problem.init(problem_seed(seed, problems))
            states = {k: v.expand(many, *v.shape) for k, v in fresh.items()}
            previous, problems = torch.zeros_like(previous), problems + 1
        elif not self.persistent:  # every particle starts from the unperturbed one
            states = {k: v[-1:].expand_as(v) for k, v in states.items()}
            previous = previous[-1:].expand_as(previous)
        added = self.persistent and population.t > 0
        return replace(
            population,
            states=states,
            previous=previous,
            problems=problems,
            noise=drawn,
            total=population.total + drawn if added else drawn,
            draws=population.draws + 1,
        )

    def _unroll(
        self, problem: InnerProblem, population: Population, meta: Tensors, seed: int, steps: int
    ) -> tuple[Population, Tensor, Tensor]:
        """All particles through some steps: the population, what each lost, its last loss."""
        vector = pack(meta)
        thetas = torch.cat([vector + population.noise, vector - population.noise])
        if not self.persistent:
            thetas = torch.cat([thetas, vector[None]])
        batches = problem.batches(problem_seed(seed, population.problems - 1), population.t, steps)

        def one(state: Tensors, theta: Tensor) -> tuple[Tensors, Tensor]:
            return problem.unroll(state, unpack(theta, meta), batches, start=population.t)

        if problem.vectorized:
            states, lost = vmap(one)(population.states, thetas)
        else:
            alone = [
                one({k: v[i] for k, v in population.states.items()}, theta)
                for i, theta in enumerate(thetas)
            ]
            states = {k: torch.stack([s[k] for s, _ in alone]) for k in alone[0][0]}
            lost = torch.stack([loss for _, loss in alone])
        last = lost
        if problem.objective == "final":
            lost = problem.horizon * (lost - population.previous)
        t = (population.t + steps) % problem.horizon
        return replace(population, states=states, previous=last, t=t), lost, last


@dataclass(frozen=True, kw_only=True)
class FullES(_Evolution):
    """Evolution strategies over whole inner problems: unbiased for the smoothed loss, and slow.

    Args:
        sigma: Standard deviation of the perturbations, in units of the meta-parameters.
        n_particles: Particles, two for each antithetic pair.
        stagger: Groups of pairs that begin their inner problems at different times.
    """

    paper: ClassVar[str] = "arXiv:2304.11153"

    def span(self, problem: InnerProblem) -> int:
        return problem.horizon

    def interval(self, problem: InnerProblem) -> int:
        return problem.horizon


@dataclass(frozen=True, kw_only=True)
class _Truncated(_Evolution):
    truncation: int = 10

    def __post_init__(self):
        super().__post_init__()
        if self.truncation < 1:
            raise ValueError(f"truncation must be 1 step or more; got {self.truncation}.")

    def span(self, problem: InnerProblem) -> int:
        if self.truncation > problem.horizon:
            raise ValueError(
                f"A truncation of {self.truncation} steps is longer than the inner problem of "
                f"{problem.horizon}; choose a shorter one, or FullES."
            )
        return self.truncation


@dataclass(frozen=True, kw_only=True)
class TruncatedES(_Truncated):
    """Evolution strategies on single truncations of one unperturbed run: cheap, and biased.

    What θ did to the state before the truncation is not seen.

    Args:
        sigma: Standard deviation of the perturbations, in units of the meta-parameters.
        n_particles: Particles, two for each antithetic pair.
        stagger: Groups of pairs that begin their inner problems at different times.
        truncation: Steps of the inner problem an estimate.
    """

    paper: ClassVar[str] = "arXiv:2304.11153"
    persistent: ClassVar[bool] = False

    def interval(self, problem: InnerProblem) -> int:
        return self.truncation


@dataclass(frozen=True, kw_only=True)
class PES(_Truncated):
    """Persistent evolution strategies: unbiased from truncations, with a variance that grows.

    Args:
        sigma: Standard deviation of the perturbations, in units of the meta-parameters.
        n_particles: Particles, two for each antithetic pair.
        stagger: Groups of pairs that begin their inner problems at different times.
        truncation: Steps of the inner problem an estimate.
        perturbation: Steps between two draws; those of a truncation when left out. Longer ones are
            hybrids, with ES-Single at the horizon.
    """

    paper: ClassVar[str] = "arXiv:2112.13835"

    perturbation: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.perturbation is not None and self.perturbation < self.truncation:
            raise ValueError(
                f"perturbation must be the {self.truncation} steps of a truncation or more; got "
                f"{self.perturbation}."
            )

    def interval(self, problem: InnerProblem) -> int:
        return self.truncation if self.perturbation is None else self.perturbation


@dataclass(frozen=True, kw_only=True)
class ESSingle(_Truncated):
    """One perturbation a particle for the whole inner problem: full ES, paid in instalments.

    At fixed θ the mean of its estimates over an inner problem is that of full ES to rounding, so its
    variance does not depend on the number of truncations. While θ moves, the states are those of
    earlier values of it: a bias that a small outer learning rate keeps small.

    Args:
        sigma: Standard deviation of the perturbations, in units of the meta-parameters.
        n_particles: Particles, two for each antithetic pair.
        stagger: Groups of pairs that begin their inner problems at different times, so that the
            estimates see early and late training side by side.
        truncation: Steps of the inner problem an estimate.
    """

    paper: ClassVar[str] = "arXiv:2304.11153"

    def interval(self, problem: InnerProblem) -> int:
        return problem.horizon
