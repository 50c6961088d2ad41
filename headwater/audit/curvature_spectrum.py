r"""Along which directions of its weights a model is more active on what it has learnt by heart.

Merullo, Vatsavaya, Bushnaq and Lewis (2025), "From Memorization to Reasoning in the Spectrum of Loss Curvature",
arXiv:2510.24256.

A layer's $C = U_G^\top W U_A$ in the eigenbases of its K-FAC factors is split into bands of falling curvature, and
$\lVert C_\mathrm{band}\, U_A^\top x \rVert$ is compared between memorized and ordinary inputs. A ratio above one in the
last band says that they use directions which the data as a whole do not need. The same ratio for a task's inputs
predicts how much the task loses when these directions are removed.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwater.core.capture import first_tensor
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit
from headwater.core.forward import evaluate
from headwater.core.layers import KINDS, Layer
from headwater.forget.base import EVERY, Eigen, editable_layers, eigen, matrix_of
from headwater.numerics.resampling import Estimate, bootstrap
from headwater.numerics.staircase import staircase_by_count, staircase_mask

BANDS = (0.1, 0.25, 0.5, 1.0)  # upper ends: top 10 %, 10-25 %, 25-50 %, bottom 50 %


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    r"""How active bands of falling curvature are on several sets of inputs, beside ordinary ones.

    Attributes:
        layers: Names of the layers.
        bands: Upper end of each band, as a share of the directions.
        activity: For each set the mean of $\lVert C_\mathrm{band} U_A^\top x \rVert$ over an example's positions.
        clean: The set that the others are compared with.
        passes: Passes over the data beyond the fit's: forward passes of the sets alone.
    """

    layers: list[str]
    bands: tuple[float, ...]
    activity: dict[str, Float[Tensor, "_ layer band"]]
    clean: str
    passes: float = 0.0

    def ratio(self, name: str, layer: int, band: int, *, n_samples: int = 300) -> Estimate:
        """Mean activity on a set over that on the clean one, with an interval over the examples of both."""
        x, y = (self.activity[k][:, layer, band].double() for k in (name, self.clean))
        return bootstrap(
            lambda i, j: float(x[i].mean() / y[j].mean()),  # NaN where a band holds no direction
            (len(x), len(y)),
            n=len(x),
            n_samples=n_samples,
        )

    def sensitivity(self, name: str) -> float:
        """The ratio in the last band, mean over layers; above one, an edit takes more here than from clean inputs."""
        x, y = (self.activity[k][..., -1].double().mean(0) for k in (name, self.clean))
        return float((x / y).mean())

    def table(self) -> dict[str, list]:
        """One row a set, layer and band."""
        rows = []
        for name in self.activity:
            if name == self.clean:
                continue
            for i, layer in enumerate(self.layers):
                for b, end in enumerate(self.bands):
                    start = self.bands[b - 1] if b else 0.0
                    found = self.ratio(name, i, b)
                    label = f"{100 * start:g}-{100 * end:g} %"
                    rows.append((name, layer, label, found.value, found.low, found.high))
        columns = ("set", "layer", "band", "ratio", "low", "high")
        return {c: [row[i] for row in rows] for i, c in enumerate(columns)}

    def __repr__(self) -> str:
        told = ", ".join(f"{n} {self.sensitivity(n):.2f}" for n in self.activity if n != self.clean)
        return f"Spectrum({len(self.layers)} layers; activity in the last band over {self.clean}: {told})"


def spectrum(
    fit: Fit,
    sets: Mapping[str, Any],
    *,
    clean: str = "clean",
    layers: Sequence[str] = EVERY,
    bands: Sequence[float] = BANDS,
    by: Literal["input", "pair"] = "input",
) -> Spectrum:
    r"""How active bands of a model's weights are on sets of inputs.

    Args:
        fit: A fit with K-FAC factors.
        sets: Sets of examples by name, the clean one among them.
        clean: Name of the set that others are compared with.
        layers: Patterns of names of linear and convolutional layers.
        bands: Upper ends of the bands, ascending to 1.
        by: "input" orders the eigenvectors of A, whose joint mass is $\mu_j \sum_i \lambda_i$; "pair" orders the pairs
            (i, j) as the edit does, so that a band is a staircase less the one before.
    """
    if clean not in sets or len(sets) < 2:
        raise ValueError(
            f"Expected {clean!r} and another set to compare with it; got {', '.join(sets) or 'none'}."
        )
    ends = tuple(bands)
    if not ends or ends[-1] != 1 or list(ends) != sorted(set(ends)) or ends[0] <= 0:
        raise ValueError(f"Bands must ascend to 1, such as {BANDS}; got {ends}.")
    chosen = editable_layers(fit, layers)
    named = dict(fit.model.named_parameters(remove_duplicate=False))
    parts = {}
    for layer in chosen:
        W = named[layer.parameters[0]].detach()
        parts[layer.name] = _bands(matrix_of(layer, W), eigen(fit, layer), ends, by)
    data = {name: as_examples(value) for name, value in sets.items()}
    activity = {name: _activity(fit, chosen, parts, examples) for name, examples in data.items()}
    passes = sum(map(len, data.values())) / max(len(fit.train), 1) / 3  # a forward is a third
    return Spectrum([x.name for x in chosen], ends, activity, clean, passes)


def _bands(
    W: Tensor, factors: Eigen, ends: Sequence[float], by: str
) -> list[Float[Tensor, "out in"]]:
    """The weight's part in each band, in the coordinates of its output and input."""
    mu, U_A, lam, U_G = (t.to(W.device) for t in factors)
    C = U_G.mT @ W.double() @ U_A
    out, in_ = C.shape
    parts, before = [], torch.zeros_like(C, dtype=torch.bool)
    for end in ends:
        if by == "input":
            within = (torch.arange(in_, device=W.device) < round(end * in_)).expand(out, in_)
        else:
            within = staircase_mask(staircase_by_count(lam, mu, round(end * C.numel())), in_)
        parts.append((U_G @ (C * (within & ~before)) @ U_A.mT).to(W.dtype))
        before = within
    return parts


def _activity(
    fit: Fit, layers: Sequence[Layer], parts: dict[str, list[Tensor]], examples: Examples
) -> Float[Tensor, "n layer band"]:
    """Mean norm of what each band returns, over an example's positions and a layer's uses."""
    modules = dict(fit.model.named_modules(remove_duplicate=False))
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str, kind: str):
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs).detach()
            if kind == "conv":
                x = KINDS[kind][0](module, x, len(x), False)  # patches
            norms = [(x @ part.mT.to(x.dtype)).norm(dim=-1) for part in parts[name]]
            seen.setdefault(name, []).append(torch.stack(norms, dim=-1))

        return hook

    def norms(model: nn.Module, batch: Any) -> Float[Tensor, "batch layer band"]:
        seen.clear()
        fit.task.predict(model, batch)
        mask = fit.task.masks(batch).get("")
        found = []
        for layer in layers:
            uses = [_mean(x, mask) for x in seen[layer.name]]
            found.append(torch.stack(uses).mean(0))
        return torch.stack(found, dim=1)

    with ExitStack() as stack:
        for layer in layers:
            for use in layer.uses:
                handle = modules[use.module].register_forward_pre_hook(
                    listen(layer.name, use.kind), with_kwargs=True
                )
                stack.callback(handle.remove)
        return evaluate(fit.model, examples, norms, batches=fit.batches(examples), note="spectrum")


def _mean(x: Float[Tensor, "batch *pos band"], mask: Tensor | None) -> Float[Tensor, "batch band"]:
    x = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1)
    weight = mask[..., None].to(x)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


__all__ = ["Spectrum", "spectrum"]
