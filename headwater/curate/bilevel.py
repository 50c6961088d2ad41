r"""Hypergradients of bilevel problems: implicit, unrolled and truncated, from cold and warm starts.

    min_u F(u, w*(u))  with  w*(u) among the minima of f(u, ·)

Vicol, Lorraine, Pedregosa, Duvenaud and Grosse (2022), "On Implicit Bias in Overparameterized Bilevel Optimization",
arXiv:2212.14032. Implicit differentiation with Neumann series: Lorraine, Vicol and Duvenaud (2020), "Optimizing
Millions of Hyperparameters by Implicit Differentiation", arXiv:1911.02590. Reverse mode through training: Maclaurin,
Duvenaud and Adams (2015), "Gradient-based Hyperparameter Optimization through Reversible Learning", arXiv:1502.03492.

Where the inner minimum is not unique, the answer depends on the algorithm. A cold start finds the minimum nearest to
the initial weights, so that u alone carries what is learned. A warm start remembers every u that it has seen: its
weights can be far better than any that retraining on the last u gives. `descend` therefore always retrains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

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
from headwater.numerics.linear_operator import (
    Operator,
    Solution,
    conjugate_gradients,
    largest_eigenvalue,
    neumann_series,
)

Objective = Callable[[Tensors, Tensors], Tensor]  # weights, meta-parameters -> one number
Solver = Callable[[Operator, Float[Tensor, "1 dim"]], Solution]


@dataclass(frozen=True)
class ImplicitGradient:
    """A hypergradient by the implicit function theorem, and how far to trust it.

    Attributes:
        gradient: dF/du.
        outer: The outer loss F.
        stationarity: Norm of the inner gradient; the theorem wants zero.
        residual: What the solver left of the linear system, relative to its right-hand side.
        steps: Products with the inner Hessian that the solver took.
    """

    gradient: Tensors
    outer: float
    stationarity: float
    residual: float
    steps: int


def implicit_gradient(
    inner: Objective, outer: Objective, weights: Tensors, meta: Tensors, solve: Solver
) -> ImplicitGradient:
    r"""Differentiate an outer loss through a minimum of the inner one.

    $$\frac{dF}{du} = F_u - f_{uw}\, q, \qquad f_{ww}\, q = F_w.$$

    Args:
        inner: f, from weights and meta-parameters.
        outer: F, from the same.
        weights: A stationary point of f.
        meta: u.
        solve: From products with f_ww and F_w (system, dim) to q.

    Raises:
        ValueError: u reaches neither f's gradient nor F.
    """
    (F_w, F_u), value = grad_and_value(outer, argnums=(0, 1))(weights, meta)
    slope, pull = vjp(grad(inner), weights, meta)[:2]

    def product(q: Tensor) -> Tensor:
        return torch.stack([pack(pull(unpack(row, weights))[0]) for row in q])

    solution = solve(product, pack(F_w)[None])
    cross = pull(unpack(solution.x[0], weights))[1]
    gradient = {k: (F_u[k] - cross[k]).detach() for k in meta}
    if bool(pack(F_w).any()) and not bool(pack(cross).any()) and not bool(pack(F_u).any()):
        raise ValueError(
            "The meta-parameters reach neither the inner gradient nor the outer loss (both "
            "derivatives are zero): check that the inner loss uses them."
        )
    return ImplicitGradient(
        gradient,
        float(value),
        float(pack(slope).norm()),
        float(solution.residual.max()),
        solution.steps,
    )


def cg_solver(
    *,
    steps: int = 100,
    tolerance: float = 1e-6,
    damping: float = 0.0,
    precondition: Operator | None = None,
) -> Solver:
    """Solve (f_ww + damping) q = F_w by conjugate gradients.

    Raises:
        ValueError: The Hessian has a direction of negative curvature that damping does not lift.
    """

    def solve(product: Operator, b: Tensor) -> Solution:
        def damped(p: Tensor) -> Tensor:
            Ap = product(p) + damping * p
            bend, size = (p * Ap).sum(1), p.square().sum(1)
            if bool((bend < -1e-6 * Ap.norm(dim=1) * size.sqrt()).any()):
                raise ValueError(
                    f"The inner Hessian has negative curvature ({float((bend / size).min()):.3g}) "
                    "here, so that conjugate gradients have no meaning. Add damping, or train the "
                    "inner problem further."
                )
            return Ap

        return conjugate_gradients(
            damped, b, precondition=precondition, steps=steps, tolerance=tolerance
        )

    return solve


def neumann_solver(*, terms: int = 20, lr: float | None = None, damping: float = 0.0) -> Solver:
    """Solve by a Neumann series, of step `lr`; 1 / the largest eigenvalue when left out."""

    def solve(product: Operator, b: Tensor) -> Solution:
        def damped(p: Tensor) -> Tensor:
            return product(p) + damping * p

        rate = lr
        if rate is None:
            key = torch.arange(b.shape[1])[None]
            start = noise.normal(key, torch.zeros_like(key), 0).to(b)
            rate = 1 / float(largest_eigenvalue(damped, start))
        return neumann_series(damped, b, lr=rate, terms=terms)

    return solve


def direct_solver(*, damping: float = 0.0) -> Solver:
    """Solve with the dense Hessian; where it is singular, by its pseudo-inverse.

    The pseudo-inverse gives the response of least norm, which is that of training from a cold start.
    """

    def solve(product: Operator, b: Tensor) -> Solution:
        eye = torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
        H = product(eye) + damping * eye
        q = b @ torch.linalg.pinv((H + H.mT) / 2, hermitian=True)
        left = (b - q @ H).norm(dim=1) / b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
        return Solution(q, left, len(eye))

    return solve


@dataclass(frozen=True)
class Training:
    """The inner problem of a bilevel estimator, between two outer steps.

    Attributes:
        state: The inner state.
        t: Inner steps taken since the state was fresh.
        problems: Fresh states so far, which numbers their seeds.
        seed: Seed of the first.
    """

    state: Tensors
    t: int
    problems: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Bilevel(HyperGradient):
    start: Literal["cold", "warm", "online"] = "cold"
    inner_steps: int | None = None
    sample_init: bool = False

    def __post_init__(self):
        if self.inner_steps is not None and self.inner_steps < 1:
            raise ValueError(f"inner_steps must be 1 or more; got {self.inner_steps}.")

    def span(self, problem: InnerProblem) -> int:
        return problem.horizon if self.inner_steps is None else self.inner_steps

    def init(self, problem: InnerProblem, meta: Tensors, *, seed: int = 0) -> Training:
        """A fresh inner state."""
        return Training(problem.init(problem_seed(seed, 0)), 0, 1, seed)

    def _begin(self, problem: InnerProblem, training: Training) -> Training:
        """Where the next inner steps set out: from scratch, or from where the last ones ended."""
        over = self.start == "online" and training.t >= problem.horizon
        if training.t == 0 or not (self.start == "cold" or over):
            return training
        number = training.problems if self.sample_init or over else 0
        fresh = problem.init(problem_seed(training.seed, number))
        return Training(fresh, 0, training.problems + 1, training.seed)

    def _seed(self, training: Training) -> int:
        """The seed of the data: that of the present inner problem."""
        same = self.start == "cold" and not self.sample_init
        return problem_seed(training.seed, 0 if same else training.problems - 1)


@dataclass(frozen=True, kw_only=True)
class Implicit(_Bilevel):
    """Train, then differentiate the minimum that was reached by the implicit function theorem.

    Where training has not converged the gradient is biased; `info.facts["stationarity"]` is the
    norm of the inner gradient. With `solver="neumann", terms=0, lr=...` the inverse Hessian is
    replaced by a multiple of the identity: T1-T2, and one step of DARTS.

    Args:
        start: Inner steps set out from initial weights each time ("cold"), from where the last
            ended ("warm"), or the latter with fresh weights after each horizon ("online").
        inner_steps: Inner steps before each estimate; the whole horizon when left out.
        sample_init: Every cold start has initial weights and data order of its own.
        solver: Conjugate gradients, a Neumann series, or the dense pseudo-inverse.
        steps: Most products of the conjugate gradients.
        tolerance: Relative residual at which they stop.
        terms: Terms of the Neumann series after the first.
        lr: Step of the Neumann series; 1 / the largest eigenvalue when left out.
        damping: Added to the eigenvalues of the inner Hessian.
    """

    paper: ClassVar[str] = "arXiv:1911.02590"

    solver: Literal["cg", "neumann", "direct"] = "cg"
    steps: int = 100
    tolerance: float = 1e-6
    terms: int = 20
    lr: float | None = None
    damping: float = 0.0

    def step(self, problem: InnerProblem, state: Training, meta: Tensors) -> tuple[Training, Info]:
        """Train, and estimate the gradient of the last outer loss."""
        if problem.inner is None or problem.objective != "final":
            raise ValueError(
                "Implicit differentiation needs the inner loss whose minimum training approaches "
                "(InnerProblem.inner) and objective='final'; got "
                f"{'no inner loss' if problem.inner is None else 'objective=' + problem.objective}."
            )
        training, steps = self._begin(problem, state), self.span(problem)
        seed, last = self._seed(training), training.t + steps - 1
        batches = problem.batches(seed, training.t, steps)
        with torch.no_grad():
            weights, _ = problem.unroll(training.state, meta, batches, start=training.t)
        batch, inner = batches[-1], problem.inner
        found = implicit_gradient(
            lambda w, u: inner(w, u, batch, last),
            lambda w, u: problem.outer(w, u, batch, last),
            weights,
            meta,
            self._solver(),
        )
        facts = {
            "stationarity": found.stationarity,
            "residual": found.residual,
            "products": float(found.steps),
        }
        info = Info(found.gradient, found.outer, steps, facts=facts)
        return Training(weights, last + 1, training.problems, training.seed), info

    def _solver(self) -> Solver:
        if self.solver == "cg":
            return cg_solver(steps=self.steps, tolerance=self.tolerance, damping=self.damping)
        if self.solver == "neumann":
            return neumann_solver(terms=self.terms, lr=self.lr, damping=self.damping)
        return direct_solver(damping=self.damping)


@dataclass(frozen=True, kw_only=True)
class Unrolled(_Bilevel):
    """Differentiate training itself, through all of its last steps or some of them.

    Truncation to the last k steps answers as a Neumann series of k terms does: flat directions are
    damped. With `start="online"` it is truncated backpropagation through time.

    Args:
        start: Inner steps set out from initial weights each time ("cold"), from where the last
            ended ("warm"), or the latter with fresh weights after each horizon ("online").
        inner_steps: Inner steps before each estimate; the whole horizon when left out.
        sample_init: Every cold start has initial weights and data order of its own.
        truncation: Last steps that are differentiated; all of them when left out.
        mode: Reverse mode keeps every differentiated step in memory; forward mode costs one pass
            for each meta-parameter, and keeps none.
    """

    paper: ClassVar[str] = "arXiv:1502.03492"

    truncation: int | None = None
    mode: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self):
        super().__post_init__()
        if self.truncation is not None and self.truncation < 1:
            raise ValueError(f"truncation must be 1 step or more; got {self.truncation}.")

    def step(self, problem: InnerProblem, state: Training, meta: Tensors) -> tuple[Training, Info]:
        """Train, and differentiate the loss of the last steps (the last one, or their mean)."""
        training, steps = self._begin(problem, state), self.span(problem)
        followed = steps if self.truncation is None else min(self.truncation, steps)
        free, weights = steps - followed, training.state
        batches = problem.batches(self._seed(training), training.t, steps)
        with torch.no_grad():
            weights, _ = problem.unroll(weights, meta, batches[:free], start=training.t)
        scale = followed if problem.objective == "mean" else 1

        def loss(u: Tensors) -> tuple[Tensor, Tensors]:
            after, lost = problem.unroll(weights, u, batches[free:], start=training.t + free)
            return lost / scale, after

        if self.mode == "reverse":
            value, pull, *aux = vjp(loss, meta, has_aux=True)
            gradient, after = pull(torch.ones_like(value))[0], aux[0]
        else:
            gradient, value, after = _forward(loss, meta)
        info = Info(
            {k: v.detach() for k, v in gradient.items()},
            float(value),
            steps,
            facts={"differentiated_steps": float(followed)},
        )
        after = {k: v.detach() for k, v in after.items()}
        return Training(after, training.t + steps, training.problems, training.seed), info


def _forward(
    loss: Callable[[Tensors], tuple[Tensor, Tensors]], meta: Tensors
) -> tuple[Tensors, Tensor, Tensors]:
    """Gradient by one forward-mode pass a meta-parameter, all side by side."""
    vector = pack(meta)
    eye = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)

    def along(direction: Tensor) -> Tensor:
        return jvp(lambda u: loss(unpack(u, meta))[0], (vector,), (direction,))[1]

    with torch.no_grad():
        value, after = loss(meta)
    return unpack(vmap(along)(eye), meta), value, after
