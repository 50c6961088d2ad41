r"""Weights without the directions that the loss's curvature, averaged over data, has little mass in.

Merullo, Vatsavaya, Bushnaq and Lewis (2025), "From Memorization to Reasoning in the Spectrum of Loss Curvature",
arXiv:2510.24256.

What a layer does for many inputs at once lies along directions of high curvature of the mean loss. What it does to
recite one text is sharp for that text and, averaged over data, flat. With $A = U_A \mathrm{diag}(\mu) U_A^\top$ the
second moment of what the layer reads, $G = U_G \mathrm{diag}(\lambda) U_G^\top$ that of the gradients at its output,
and $C = U_G^\top W U_A$, the pair (i, j) of directions has the mass $\Pi_{ij} = \lambda_i \mu_j$. The greatest pairs
that hold a share $\rho$ of $\sum \Pi$ are kept, $W \leftarrow U_G (C \circ M)\, U_A^\top$: a staircase in (i, j), not
a truncation of ranks.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.core.curvature import Layerwise
from headwater.core.fingerprint import fingerprint_tensors
from headwater.core.fit import Fit
from headwater.core.layers import Layer
from headwater.forget.base import (
    EVERY,
    Editor,
    Eigen,
    WeightEdit,
    as_edit,
    descending,
    editable_layers,
    eigen,
    matrix_of,
)
from headwater.numerics.staircase import staircase_by_mass, staircase_mask

Ranking = Literal["mass", "corrected", "rectangular", "random"]


def greatest(scores: Float[Tensor, "out in"], share: float) -> Bool[Tensor, "out in"]:
    """The fewest entries that hold a share of the sum, greatest first; ties by their index, and 1 keeps all."""
    if share == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten().double()
    order = flat.argsort(descending=True, stable=True)
    cumulative = flat[order].cumsum(0)
    n = int((cumulative < share * cumulative[-1]).sum()) + 1
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[order[:n]] = True
    return mask.view(scores.shape)


def rectangle(
    lam: Float[Tensor, " out"], mu: Float[Tensor, " in"], share: float
) -> Bool[Tensor, "out in"]:
    r"""Rows and columns cut each on its own, at $\sqrt\rho$ of its mass: a low-rank truncation, for comparison."""
    rows, columns = (greatest(v[None], math.sqrt(share))[0] for v in (lam, mu))
    return rows[:, None] & columns


def at_random(mask: Bool[Tensor, "out in"], seed: int) -> Bool[Tensor, "out in"]:
    """As many pairs as a mask keeps, drawn at random."""
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(mask.numel(), dtype=torch.bool)
    drawn[order[: int(mask.sum())]] = True
    return drawn.view(mask.shape).to(mask.device)


def keep_pairs(
    W: Float[Tensor, "out in"],
    U_A: Float[Tensor, "in in"],
    U_G: Float[Tensor, "out out"],
    mask: Bool[Tensor, "out in"],
) -> Float[Tensor, "out in"]:
    r"""$U_G (C \circ M)\, U_A^\top$ with $C = U_G^\top W U_A$: W less what is not kept, so that all of it is W."""
    C = U_G.mT @ W @ U_A
    return W - U_G @ (C * ~mask) @ U_A.mT


def edit_matrix(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "in in"],
    G: Float[Tensor, "out out"],
    keep_mass: float,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """The edited matrix, and which pairs of (G's, A's) eigenvectors it keeps, greatest eigenvalues first.

    Example:
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
        >>> A, G = torch.diag(torch.tensor([9.0, 1.0])).double(), torch.eye(2).double()
        >>> edit_matrix(W, A, G, 0.9)[0].abs().tolist()
        [[1.0, 0.0], [3.0, 0.0]]
    """
    (mu, U_A), (lam, U_G) = descending(A), descending(G)
    mask = staircase_mask(staircase_by_mass(lam, mu, keep_mass), len(mu))
    return keep_pairs(W.double(), U_A, U_G, mask), mask


@dataclass(frozen=True, kw_only=True)
class CurvatureEdit(Editor):
    """Keep the pairs of K-FAC eigendirections that hold most of the mass; needs nothing but the fit.

    The factors should come from the given labels (`KFAC(fisher="empirical")` or `EKFAC(fisher="empirical")`) over
    ordinary training data. Biases stay as they are.

    Args:
        keep_mass: Share ρ of the mass that is kept, in (0, 1].
        layers: Patterns of names of linear and convolutional layers.
        ranking: By "mass" λᵢμⱼ, which is the paper's. Variants: "corrected" ranks by EK-FAC's corrected eigenvalues,
            "rectangular" cuts the eigenvalues of A and of G apart, "random" keeps as many pairs as "mass", drawn at
            random, and is the control.
        seed: Seed of the random pairs.
    """

    paper: ClassVar[str] = "arXiv:2510.24256"

    keep_mass: float = 0.6
    layers: tuple[str, ...] = EVERY
    ranking: Ranking = "mass"
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.keep_mass <= 1:
            raise ValueError(f"keep_mass must be in (0, 1]; got {self.keep_mass}.")
        if self.ranking not in ("mass", "corrected", "rectangular", "random"):
            raise ValueError(
                f"Expected a ranking 'mass', 'corrected', 'rectangular' or 'random'; got {self.ranking!r}."
            )

    def edit(self, fit: Fit, *, forget: Any = None, retain: Any = None) -> WeightEdit:
        named = dict(fit.model.named_parameters(remove_duplicate=False))
        edited, rows, used = {}, [], {}
        for number, layer in enumerate(editable_layers(fit, self.layers)):
            W = matrix_of(layer, named[layer.parameters[0]].detach()).double()
            mu, U_A, lam, U_G = found = Eigen(*(t.to(W.device) for t in eigen(fit, layer)))
            used |= {f"{k}:{layer.name}": t for k, t in found._asdict().items()}
            mask = staircase_mask(staircase_by_mass(lam, mu, self.keep_mass), len(mu))
            mass = lam[:, None] * mu
            if self.ranking == "corrected":
                edited[layer.name], mask, mass = self._corrected(fit, layer, W, named)
            else:
                if self.ranking == "rectangular":
                    mask = rectangle(lam, mu, self.keep_mass)
                elif self.ranking == "random":
                    mask = at_random(mask, self.seed + number)
                edited[layer.name] = keep_pairs(W, U_A, U_G, mask)
            rows.append({"layer": layer.name} | mask_facts(mask, mass))
        facts = self.facts(passes=0.0)
        facts["factors"] = fingerprint_tensors(used.items())
        facts["fisher"] = fit.facts["options"]["curvature"].get("fisher")
        return as_edit(fit, edited, rows, facts)

    def _corrected(
        self, fit: Fit, layer: Layer, W: Tensor, named: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In EK-FAC's own basis, where a bias is the last column of the matrix; it is left as it was."""
        kind, curvature = fit.facts["options"]["curvature"]["kind"], fit.curvature
        if kind != "ekfac" or not isinstance(curvature, Layerwise):
            raise ValueError("ranking='corrected' needs corrected eigenvalues; fit with 'ekfac'.")
        Q_A, Q_G = (q.to(W) for q in curvature.bases[layer.name] if q is not None)
        eigenvalues = curvature.eigenvalues[layer.name].to(W)
        mask = greatest(eigenvalues, self.keep_mass)
        whole = W
        if layer.has_bias:
            whole = torch.cat([W, named[layer.parameters[1]].detach().to(W)[:, None]], dim=1)
        return keep_pairs(whole, Q_A, Q_G, mask)[:, : W.shape[1]], mask, eigenvalues


def mask_facts(mask: Bool[Tensor, "out in"], mass: Float[Tensor, "out in"]) -> dict[str, Any]:
    """How many pairs, rows and columns a mask keeps, and how much mass.

    Example:
        >>> facts = mask_facts(torch.tensor([[True, True], [True, False]]), torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
        >>> facts["kept"], facts["rows_cut"], facts["columns_cut"], round(facts["mass"], 3)
        (3, 1, 1, 0.889)
    """
    out, in_ = mask.shape
    return {
        "out": out,
        "in": in_,
        "pairs": mask.numel(),
        "kept": int(mask.sum()),
        "mass": float((mass * mask).sum() / mass.sum()),
        "rows_cut": int((~mask).any(1).sum()),
        "columns_cut": int((~mask).any(0).sum()),
    }
