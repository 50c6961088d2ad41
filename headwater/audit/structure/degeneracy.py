r"""Degeneracy: how many directions of the weights change nothing that the model returns on its data.

Bushnaq et al. (2024), "Using Degeneracy in the Loss Landscape for Mechanistic Interpretability", arXiv:2405.10927.

The behavioural loss $\mathbb E \lVert f_\theta(x) - f_{\theta^*}(x) \rVert^2$ is zero at the trained weights, and the
rank of its Hessian is the number of parameters that are used. Three sources of its zero directions are counted:
linearly dependent activations and linearly dependent gradients (a layer has at least $d_\text{out} d_\text{in} -
\operatorname{rank} G_\text{jac} \operatorname{rank} A$ free directions), and ReLUs that fire on the same data, among
which the layer is linear.
"""

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from headwater.core.capture import Progress
from headwater.core.curvature import Layerwise
from headwater.core.curvature.jacobian import JacobianMoments, jacobian_moments, moment_layers
from headwater.core.damping import Damping
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gates import Gates, count_gates
from headwater.core.layers import Layer
from headwater.numerics import degeneracy as numerics
from headwater.numerics.spectral import eigvalsh


@dataclass(frozen=True, kw_only=True)
class LayerDegeneracy:
    """What one layer uses of its parameters.

    Attributes:
        name: The layer.
        d_in: Numbers that it reads at a position, the constant of its bias among them.
        d_out: Numbers that it returns.
        n_parameters: Its parameters.
        rank_A: Rank of its inputs' second moment; of several groups the sum.
        rank_G: Rank of the outputs' Jacobian in what it returns.
        free: At least so many directions of its parameters change nothing.
        effective_A: Soft rank of the inputs: eigenvalues above `soft` times their mean.
        effective_G: Soft rank of the Jacobian.
        participation_A: Participation ratio of the inputs.
        participation_G: Participation ratio of the Jacobian.
        effective_parameters: Eigenvalues of the fit's own curvature above its damping; None where the fit has no
            curvature by layers.
        n_rows: Positions that the inputs were seen on.
    """

    name: str
    d_in: int
    d_out: int
    n_parameters: int
    rank_A: int
    rank_G: int
    free: int
    effective_A: float
    effective_G: float
    participation_A: float
    participation_G: float
    effective_parameters: float | None
    n_rows: int


@dataclass(frozen=True, kw_only=True)
class SyncBlocks:
    """ReLUs of one module that fire on the same data.

    Attributes:
        name: The module.
        blocks: Units of each block of two or more, the largest first.
        n_units: Units in all.
        dead: Units that never fire.
        always: Units that always fire.
    """

    name: str
    blocks: tuple[tuple[int, ...], ...]
    n_units: int
    dead: int
    always: int

    @property
    def free(self) -> int:
        """Directions that turn and shear units within their blocks: s (s - 1) for a block of s.

        Each unit's own scale is free in any network of ReLUs and is not counted.
        """
        return sum(len(b) * (len(b) - 1) for b in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Degeneracy:
    """The degeneracy report of a model.

    Attributes:
        layers: A part for each linear and convolutional layer.
        sync: A part for each module of ReLUs.
        left_out: Followed layers of other kinds.
        passes: Passes over the data beyond the fit.
        facts: How it was made.
    """

    layers: tuple[LayerDegeneracy, ...]
    sync: tuple[SyncBlocks, ...]
    left_out: tuple[str, ...]
    passes: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def n_parameters(self) -> int:
        """Parameters of all layers in the report."""
        return sum(x.n_parameters for x in self.layers)

    @property
    def free(self) -> int:
        """Free directions by ranks, of all layers."""
        return sum(x.free for x in self.layers)

    def table(self) -> dict[str, list]:
        """A row for each layer."""
        names = LayerDegeneracy.__dataclass_fields__
        columns = {name: [getattr(x, name) for x in self.layers] for name in names}
        return {"layer": columns.pop("name")} | columns

    def __repr__(self) -> str:
        share = 100 * self.free / max(self.n_parameters, 1)
        turns = sum(x.free for x in self.sync)
        blocks = sum(len(x.blocks) for x in self.sync)
        lines = [
            f"Degeneracy({self.n_parameters:,} parameters in {len(self.layers)} layers; at least {self.free:,} free "
            f"directions = {share:.1f} % by ranks, {turns:,} more within {blocks} sync blocks; "
            f"{self.passes:.1f} passes beyond the fit)"
        ]
        lines += [
            f"  {x.name}: inputs rank {x.rank_A} of {x.d_in} (soft {x.effective_A:.1f}), Jacobian rank {x.rank_G} of "
            f"{x.d_out} (soft {x.effective_G:.1f}), {100 * x.free / x.n_parameters:.1f} % free"
            for x in self.layers
        ]
        lines += [
            f"  {x.name}: {x.n_units} ReLUs, {x.dead} never fire, {x.always} always, sync blocks of "
            f"{', '.join(str(len(b)) for b in x.blocks[:6]) or 'none'}"
            for x in self.sync
        ]
        return "\n".join(lines)


def sync_blocks(name: str, gates: Gates, *, delta: float = 0.0) -> SyncBlocks:
    """Group a module's ReLUs by when they fire.

    Args:
        name: The module.
        gates: Their counts.
        delta: Share of the data on which two units of a block may differ; blocks are chains of such pairs.
    """
    fires = gates.both.diagonal()
    dead = fires == 0
    # counts are whole numbers, so that an agreement of one is exactly one
    linked = numerics.agreement(gates.both, gates.n) >= 1 - delta
    linked = linked & ~dead[:, None] & ~dead[None, :]
    labels = numerics.connected_components(linked)
    groups = [(labels == n).nonzero().squeeze(1).tolist() for n in labels.unique().tolist()]
    blocks = sorted((tuple(g) for g in groups if len(g) > 1), key=lambda g: (-len(g), g))
    return SyncBlocks(
        name=name,
        blocks=tuple(blocks),
        n_units=len(fires),
        dead=int(dead.sum()),
        always=int((fires == gates.n).sum()),
    )


def degeneracy(
    fit: Fit,
    *,
    data: Any = None,
    moments: JacobianMoments | None = None,
    draws: int | None = None,
    tolerance: float | None = None,
    soft: float = 0.01,
    delta: float = 0.0,
    damping: str | float | Damping = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Degeneracy:
    """Count the directions that a model's layers leave unused.

    Args:
        fit: The fitted model.
        data: Examples; the training data when left out.
        moments: Second moments that were collected before; the sweep is saved then.
        draws: Random combinations of outputs in place of each output; see `jacobian_moments`.
        tolerance: Share of the largest eigenvalue below which one counts as zero; what rounding explains when left
            out.
        soft: τ of the soft ranks, as a share of the mean eigenvalue.
        delta: Share of the data on which two ReLUs of a block may differ.
        damping: At which the fit's own curvature counts its parameters.
        seed: Seed of the combinations.
        progress: Called with (done, total, note).

    Raises:
        ValueError: An option is out of range, or the moments are of other layers.
    """
    if soft <= 0 or not 0 <= delta < 0.5 or (tolerance is not None and not 0 <= tolerance < 1):
        raise ValueError(
            f"Expected soft above 0, delta from 0 to 0.5 and tolerance from 0 to 1; got {soft}, {delta} and "
            f"{tolerance}."
        )
    started, examples = time.perf_counter(), fit.train if data is None else as_examples(data)
    passes = 0.0
    if moments is None:
        moments = jacobian_moments(fit, examples, draws=draws, seed=seed, progress=progress)
        passes += moments.passes
    layers = moment_layers(fit)
    if missing := [x.name for x in layers if x.name not in moments.groups]:
        raise ValueError(
            f"The second moments lack layer {missing[0]!r}; collect those of this fit."
        )
    dtype = next(fit.model.parameters()).dtype
    curvature = fit.curvature.eigenvalues if isinstance(fit.curvature, Layerwise) else {}
    chosen = fit.damping(damping) if curvature else None
    rho = chosen.absolute(fit.curvature.mean_eigenvalue) if chosen else 0.0
    rows = []
    for layer in layers:
        own = curvature.get(layer.name)
        used = None if own is None else float(numerics.effective_dimension(own.double(), rho).sum())
        rows.append(_report(layer, moments, tolerance, soft, used, dtype))
    if few := [x for x in rows if x.n_rows < 2 * max(x.d_in, x.d_out)]:
        warnings.warn(
            f"Layer {few[0].name!r} was seen on {few[0].n_rows:,} rows, fewer than twice its width of "
            f"{max(few[0].d_in, few[0].d_out):,} ({len(few)} layers in all): its ranks say more about the data than "
            "about the model. Give more data.",
            stacklevel=2,
        )
    gates = count_gates(
        fit.model, fit.task, examples, batches=fit.batches(examples), progress=progress
    )
    passes += 1 / 3  # a forward pass without a backward one
    names = {x.name for x in rows}
    return Degeneracy(
        layers=tuple(rows),
        sync=tuple(sync_blocks(name, found, delta=delta) for name, found in gates.items()),
        left_out=tuple(x.name for x in fit.followed if x.name not in names),
        passes=passes,
        facts={
            "papers": ["arXiv:2405.10927"],
            "n_examples": len(examples),
            "damping": vars(chosen) if chosen else None,
            "soft": soft,
            "delta": delta,
            "tolerance": tolerance,
            "draws": moments.facts.get("draws"),
            "seconds": time.perf_counter() - started,
        },
    )


def _report(
    layer: Layer,
    moments: JacobianMoments,
    tolerance: float | None,
    soft: float,
    used: float | None,
    dtype: torch.dtype,
) -> LayerDegeneracy:
    A, G = moments.A[moments.groups[layer.name]], moments.G_jac[layer.name]
    groups, d_out, d_in = layer.shape
    ranks, effective, participation = [], [], []
    for moment in (A, G):
        values = eigvalsh(moment)
        share = numerics.rank_tolerance(values.shape[-1], dtype) if tolerance is None else tolerance
        ranks.append(numerics.rank(values, share))
        tau = (soft * values.mean(-1, keepdim=True)).clamp(min=1e-300)
        effective.append(float(numerics.effective_dimension(values, tau).sum()))
        participation.append(float(numerics.participation_ratio(values).sum()))
    both = [r.expand(groups) if r.ndim == 0 else r for r in ranks]
    return LayerDegeneracy(
        name=layer.name,
        d_in=d_in,
        d_out=d_out,
        n_parameters=layer.numel,
        rank_A=int(both[0].sum()),
        rank_G=int(both[1].sum()),
        free=numerics.free_directions(d_out, d_in, both[1], both[0]),
        effective_A=effective[0],
        effective_G=effective[1],
        participation_A=participation[0],
        participation_G=participation[1],
        effective_parameters=used,
        n_rows=round(moments.n_rows),
    )
