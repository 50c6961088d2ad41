"""How each attribution method is run where it needs more than a fit and queries."""

from typing import Any

import torch

from headwater.core.examples import Examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.trace import LESS, TRAK, LiSSA, Source
from headwater.trace.base import Attributor


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
    if method == LiSSA():  # its default is for larger models
        method = LiSSA(steps=6, n_samples=3, tolerance=9.0)
    if method == Source():  # the shortest run has two steps
        method = Source(segments=2)
    if isinstance(method, LESS):
        options = {"moments": [moments_like(fit, 0.01)]} | options
    return method.attribute(fit, queries, **options)  # type: ignore[call-arg]
