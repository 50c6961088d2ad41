r"""The local learning coefficient: how fast the volume of good weights shrinks with their loss.

Lau, Furman, Wang, Murfet and Wei (2023), "The Local Learning Coefficient: A Singularity-Aware Complexity Measure",
arXiv:2308.12108.

$$\hat\lambda = n \beta \big( \mathbb E_{w}[L_n(w)] - L_n(w^*) \big), \qquad \beta = 1 / \ln n,$$

with w drawn around the trained weights in proportion to $\exp(-n\beta L_n(w) - \frac\gamma2 \lVert w - w^* \rVert^2)$,
by stochastic gradient Langevin dynamics (Welling and Teh 2011):

$$w \leftarrow w - \tfrac\epsilon2 \big( n\beta \nabla L_n(w) + \gamma (w - w^*) \big) + \mathcal N(0, \epsilon).$$

A model whose Hessian has full rank d has $\lambda = d / 2$; every direction that changes nothing lowers it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from headwater.core.capture import Progress, evaluation_mode
from headwater.core.examples import to_device
from headwater.core.fit import Fit
from headwater.core.sharding import refuse_sharded
from headwater.numerics.resampling import Estimate, mean_interval

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LearningCoefficient:
    """An estimate of the local learning coefficient.

    Attributes:
        estimate: Mean over chains with its 95 % interval (of Student's t over chains).
        chains: The estimate of each chain.
        losses: Mean loss along each chain (chain, draw), to see whether it has settled.
        loss: Loss at the trained weights.
        n: Examples.
        n_parameters: Parameters that were moved; half of them is the coefficient of a regular model.
        passes: Passes over the data beyond the fit.
    """

    estimate: Estimate
    chains: tuple[float, ...]
    losses: Tensor
    loss: float
    n: int
    n_parameters: int
    passes: float

    @property
    def facts(self) -> dict[str, Any]:
        """What to cite for it."""
        return {"papers": ["arXiv:2308.12108"]}

    @property
    def drift(self) -> float:
        """How far the mean of the last third of the draws lies from that of the middle third, in coefficients.

        Near zero where chains have settled.
        """
        third = max(self.losses.shape[1] // 3, 1)
        last, middle = self.losses[:, -third:], self.losses[:, -2 * third : -third]
        return float(last.mean() - middle.mean()) * self.n / math.log(self.n)

    def __repr__(self) -> str:
        return (
            f"LearningCoefficient({self.estimate.value:.2f} [{self.estimate.low:.2f}, {self.estimate.high:.2f}] of at "
            f"most {self.n_parameters / 2:g} for a regular model, {len(self.chains)} chains, drift {self.drift:+.2f}, "
            f"{self.passes:.1f} passes beyond the fit)"
        )


def langevin(
    gradient: Callable[[Parameters, int], tuple[float, Parameters]],
    start: Parameters,
    *,
    n: int,
    beta: float,
    gamma: float,
    lr: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Losses along one chain of stochastic gradient Langevin dynamics around `start`.

    Args:
        gradient: (parameters, step) to the mean loss and its gradient.
        start: The trained parameters.
        n: Examples that the mean loss stands for.
        beta: Inverse temperature.
        gamma: Pull back to the start.
        lr: Step size ε.
        steps: How many.
        generator: Source of the noise.
    """
    now = {name: p.clone() for name, p in start.items()}
    losses = []
    for step in range(steps):
        loss, found = gradient(now, step)
        losses.append(loss)
        for name, p in now.items():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            pull = n * beta * found[name] + gamma * (p - start[name])
            p.sub_(lr / 2 * pull).add_(noise, alpha=lr**0.5)
    return torch.tensor(losses, dtype=torch.float64)


def learning_coefficient(
    fit: Fit,
    *,
    lr: float = 1e-5,
    gamma: float = 100.0,
    steps: int = 500,
    burn_in: int = 200,
    n_chains: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearningCoefficient:
    """Estimate the local learning coefficient of a fit's model on its training data, over the followed parameters.

    Args:
        fit: The fitted model.
        lr: Step size ε; stable below 4 / (n β h + γ) with h the largest eigenvalue of the Hessian.
        gamma: Pull back to the trained weights; small, and yet large enough to stay in their basin.
        steps: Draws of each chain, the burn-in among them.
        burn_in: Draws left out at the beginning.
        n_chains: Chains.
        batch_size: Examples in each step; all when left out.
        seed: Seed of noise and batches.
        progress: Called with (done, total, note).

    Raises:
        ValueError: An option is out of range.
        FloatingPointError: A chain diverged.
    """
    n = len(fit.train)
    if not 0 <= burn_in < steps or n_chains < 2 or lr <= 0 or gamma < 0 or n < 3:
        raise ValueError(
            "Expected 0 <= burn_in < steps, n_chains of 2 or more, lr above 0, gamma of 0 or more and 3 examples; got "
            f"{burn_in}, {steps}, {n_chains}, {lr}, {gamma} and {n}."
        )
    refuse_sharded(fit.model, "Langevin dynamics", "load it whole")
    fit.capture()
    named = dict(fit.model.named_parameters())
    chosen = sorted({p for layer in fit.followed for p in layer.parameters if p in named})
    start = {name: named[name].detach().clone() for name in chosen}
    size, beta = min(batch_size or n, n), 1 / math.log(n)
    mean_loss = _MeanLoss(fit)
    with evaluation_mode(fit.model):
        base, _ = mean_loss(start, range(n))
        chains = []
        for chain in range(n_chains):
            generator = torch.Generator().manual_seed(seed * n_chains + chain)

            def gradient(now: Parameters, step: int, generator=generator, chain=chain):
                some: Sequence[int] = range(n)
                if size < n:
                    some = torch.randperm(n, generator=generator)[:size].tolist()
                found = mean_loss(now, some)
                if not math.isfinite(found[0]):
                    raise FloatingPointError(
                        f"A chain diverged at step {step} with lr={lr:g}; choose a smaller one."
                    )
                if progress is not None:
                    progress(chain * steps + step + 1, n_chains * steps, "Langevin")
                return found

            options = {"n": n, "beta": beta, "gamma": gamma, "lr": lr, "steps": steps}
            chains.append(langevin(gradient, start, generator=generator, **options))
    losses = torch.stack(chains)
    each = n * beta * (losses[:, burn_in:].mean(1) - base)
    return LearningCoefficient(
        estimate=mean_interval(each),
        chains=tuple(each.tolist()),
        losses=losses,
        loss=base,
        n=n,
        n_parameters=sum(p.numel() for p in start.values()),
        passes=1 + n_chains * steps * size / n,
    )


class _MeanLoss:
    """The mean loss over some examples with other parameters, and its gradient."""

    def __init__(self, fit: Fit):
        self.fit = fit
        self.device = next(fit.model.parameters()).device

    def __call__(self, parameters: Parameters, some: Sequence[int]) -> tuple[float, Parameters]:
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        total, sums = 0.0, {name: torch.zeros_like(p) for name, p in leaves.items()}
        examples = (
            self.fit.train.subset(some) if len(some) < len(self.fit.train) else self.fit.train
        )
        for plan in self.fit.batches(examples):
            batch = to_device(examples.batch(plan.indices), self.device)
            with torch.enable_grad():
                task, bound = self.fit.task, _Bound(self.fit.model, leaves)
                loss = task.loss(bound, batch).sum()
            found = torch.autograd.grad(loss, list(leaves.values()))
            total += float(loss.detach())
            for sum_, g in zip(sums.values(), found, strict=True):
                sum_.add_(g)
        n = len(some)
        return total / n, {name: s / n for name, s in sums.items()}


class _Bound(torch.nn.Module):
    """A model with other parameters."""

    def __init__(self, model: torch.nn.Module, parameters: Parameters):
        super().__init__()
        self._model, self._parameters_of = [model], parameters  # in a list: no submodule

    def forward(self, *args, **kwargs):
        return functional_call(self._model[0], self._parameters_of, args, kwargs)
