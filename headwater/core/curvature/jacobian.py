r"""Second moments of a layer's inputs and of the outputs' Jacobian: A and $G_\text{jac}$.

Where K-FAC's second factor is the second moment of the loss's gradients, this one has no loss in it:
$G_\text{jac} = \mathbb E \sum_k J_k J_k^\top$ with $J_k$ the derivative of output k in what the layer returns. The
Kronecker product of the two bounds the Hessian of the behavioural loss $\mathbb E \lVert f_\theta - f_{\theta^*}
\rVert^2 / 2$ (Bushnaq et al. 2024, arXiv:2405.10927).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwater.core.capture import Capture, Progress, sweep
from headwater.core.curvature.moments import SecondMoments
from headwater.core.examples import Examples, to_device
from headwater.core.fingerprint import fingerprint_model
from headwater.core.fit import Fit
from headwater.core.layers import Layer
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.target import Outputs

KINDS = ("linear", "conv1d", "conv")  # whose rows are what was read, and a gradient
EXACT = 64  # outputs an example up to which each has a pass of its own
DRAWS = 16


@dataclass(frozen=True, kw_only=True)
class JacobianMoments:
    r"""Both second moments of the linear and convolutional layers of a fit, in float64.

    Attributes:
        A: By input group, $\mathbb E[a a^\top]$ over positions, the constant of the bias last.
        G_jac: By layer, the second moment of the outputs' Jacobian.
        groups: The input group of each layer.
        n_rows: Positions that they are taken over.
        passes: Forward and backward passes over the data that they took.
        facts: How they were made.
    """

    A: dict[str, Tensor]
    G_jac: dict[str, Tensor]
    groups: dict[str, str]
    n_rows: float
    passes: float
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write them as an artifact."""
        body = {"groups": self.groups, "n_rows": self.n_rows, "passes": self.passes} | self.facts
        made_from = self.facts["made_from"]
        with ArtifactWriter(folder, kind="jacobian", facts=body, made_from=made_from) as writer:
            for side, moments in (("A", self.A), ("G_jac", self.G_jac)):
                for name, moment in moments.items():
                    writer.tensor(f"{side}:{name}", moment)

    @classmethod
    def load(cls, folder: str | Path, fit: Fit, data: Examples | None = None) -> "JacobianMoments":
        """Read what `save` wrote.

        Raises:
            ArtifactMismatch: They are of another model or other data.
        """
        artifact = Artifact.open(folder, kind="jacobian")
        examples = fit.train if data is None else data
        artifact.require(model=fingerprint_model(fit.model), data=examples.fingerprint())
        facts, tensors = dict(artifact.facts), dict(artifact.tensors())
        known = {name: facts.pop(name) for name in ("groups", "n_rows", "passes")}
        sides = {
            side: {k.split(":", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{side}:")}
            for side in ("A", "G_jac")
        }
        return cls(A=sides["A"], G_jac=sides["G_jac"], facts=facts, **known)


def moment_layers(fit: Fit) -> list[Layer]:
    """The followed layers whose rows are what a linear map read and the gradient of what it returned."""
    return [
        layer
        for layer in fit.followed
        if layer.kind in KINDS and all(use.kind in KINDS for use in layer.uses)
    ]


def jacobian_moments(
    fit: Fit,
    data: Examples | None = None,
    *,
    draws: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> JacobianMoments:
    """Collect both second moments in one sweep, with a backward pass for each output.

    Args:
        fit: The fitted model.
        data: Examples; the training data when left out.
        draws: Random combinations of the outputs in place of each output; decided by their number when left out: each
            up to 64 an example, else 16 combinations.
        seed: Seed of the combinations.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The fit follows no linear or convolutional layer, or a layer is too wide for a whole matrix.
    """
    examples, layers = fit.train if data is None else data, moment_layers(fit)
    if not layers:
        raise ValueError(
            "The fit follows no linear or convolutional layer, so there are no second moments to take; fit with "
            "layers='all'."
        )
    moments = SecondMoments(layers)
    wide = [x.name for x in layers if max(x.shape[1:]) > moments.max_factor]
    if wide:
        raise ValueError(
            f"Layer {wide[0]!r} is wider than {moments.max_factor} numbers, whose second moment does not fit: "
            "leave it out with skip=[…] when you fit."
        )
    base = fit.capture()
    if draws is None:
        batch = to_device(examples.batch([0]), base.device)
        with torch.no_grad():
            n_outputs = fit.task.predict(fit.model, batch).outputs[0].numel()
        draws = None if n_outputs <= EXACT else DRAWS
        passes = n_outputs if draws is None else draws
    else:
        passes = draws
    capture = Capture(fit.model, fit.task, layers, dtype=torch.float64)
    batches = fit.batches(examples)
    sweep(
        capture,
        examples,
        [moments],
        Outputs(draws, seed),
        batches=batches,
        progress=progress,
        note="Jacobian",
    )
    found = moments.finish()
    made_from = {"model": fingerprint_model(fit.model), "data": examples.fingerprint()}
    return JacobianMoments(
        A={k[2:]: v.double().cpu() for k, v in found.items() if k.startswith("A:")},
        G_jac={k[2:]: v.double().cpu() for k, v in found.items() if k.startswith("G:")},
        groups={layer.name: layer.input_group for layer in layers},
        n_rows=min(v for k, v in moments.counts.items() if k.startswith("A:")),
        passes=float(passes),
        facts={"made_from": made_from, "draws": draws, "seed": seed},
    )
