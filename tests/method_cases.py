"""How each attribution method is run where it needs more than a fit and queries."""

from typing import Any

import torch
from torch.func import functional_call

import headwater
from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.trace import LESS, TRAK, Arnoldi, LiSSA, Newton, Proximal, Source
from headwater.trace.base import Attributor
from tests.curvature_cases import loss_gradients


def moments_like(fit: Fit, scale: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    """Moments that an optimizer might hold, the same for the same model."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, torch.Tensor]] = {"mean": {}, "square": {}}
    for name, p in fit.model.named_parameters():
        noise = torch.randn(2, *p.shape, generator=generator).to(p)
        found["mean"][name], found["square"][name] = scale * noise[0], scale * noise[1].square()
    return found


def run(method: Attributor, fit: Fit, queries: Examples, **options: Any) -> Scores:
    """Scores of a method, given what it cannot do without."""
    if method == TRAK():  # the cases have hardly more examples than layers
        method = TRAK(ridge=0.1)
    if method == LiSSA():  # these defaults are for larger models
        method = LiSSA(steps=6, n_samples=3, tolerance=9.0)
    if method == Arnoldi():
        method = Arnoldi(steps=12, rank=5)
    if method == Proximal():  # an optimization for each example
        method = Proximal(steps=3)
    if method == Source():  # the shortest run has two steps
        method = Source(segments=2)
    if isinstance(method, Newton):  # needs the rows of the Gauss–Newton root
        known = {k: fit.facts[k] for k in ("weight_decay",) if fit.facts.get(k) is not None}
        fit = headwater.fit(fit.model, fit.train, fit.task, curvature="dual", **known)
    if isinstance(method, LESS):
        options = {"moments": [moments_like(fit, 0.01)]} | options
    return method.attribute(fit, queries, **options)  # type: ignore[call-arg]


def influence(fitted, queries, inverse):
    """Scores under a dense inverse, from gradients by autograd."""
    return (
        -loss_gradients(fitted, queries) @ inverse @ loss_gradients(fitted).mT / len(fitted.train)
    )


def damped_inverse(matrix, rho):
    return torch.linalg.inv(matrix + rho * torch.eye(len(matrix)).double())


def dense_hessian(fitted):
    """The Hessian of a classifier's mean loss, over the followed layers side by side."""
    named = {n: p.detach() for n, p in fitted.model.named_parameters()}
    layers, batch = list(fitted.followed), fitted.train.batch(range(len(fitted.train)))

    def loss(flat):
        values, start = {}, 0
        for layer in layers:
            part = flat[start : start + layer.numel].reshape(1, *layer.block)
            values |= {n: v[0] for n, v in layer.to_parameters(part).items()}
            start += layer.numel
        logits = functional_call(fitted.model, values, (batch[0],))
        return torch.nn.functional.cross_entropy(logits, batch[1])

    start = {n: p[None] for n, p in named.items()}
    flat = torch.cat([layer.from_parameters(start).flatten() for layer in layers])
    return torch.autograd.functional.hessian(loss, flat)  # reverse over reverse
