"""What every edit of weights has in common: a change that can be saved, applied and undone to the last bit."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from headwater.core.curvature import Layerwise
from headwater.core.files import ArtifactMismatch
from headwater.core.fingerprint import fingerprint_tensors
from headwater.core.fit import Fit
from headwater.core.layers import Layer
from headwater.core.store import Artifact, ArtifactWriter
from headwater.numerics import spectral

MATRICES = (
    "linear",
    "conv1d",
    "conv",
)  # kinds whose weight is a matrix that reads inputs or patches
EVERY = ("*",)  # every linear and convolutional layer that the fit follows


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WeightEdit:
    """A change of some of a model's weights.

    Attributes:
        deltas: What is added to each parameter, by name; float32 for parameters with fewer digits.
        before: The parameters as they were: a sum of rounded numbers cannot be taken back by a subtraction.
        rows: What was done to each layer, one dictionary a layer.
        facts: The method with its options, what it was made from, what it cost.
    """

    deltas: dict[str, Tensor]
    before: dict[str, Tensor]
    rows: list[dict[str, Any]]
    facts: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        """Change the model's weights in place.

        Raises:
            ArtifactMismatch: The weights are not those that the edit was made for, or it is applied already.
        """
        self._write(model, here="before", there="after", verb="apply")

    def undo(self, model: nn.Module) -> None:
        """Give the model the weights back that it had, bit by bit.

        Raises:
            ArtifactMismatch: The weights are not those that the edit left.
        """
        self._write(model, here="after", there="before", verb="undo")

    def applied(self, model: nn.Module) -> nn.Module:
        """A copy of the model with the edit."""
        edited = copy.deepcopy(model)
        self.apply(edited)
        return edited

    def after(self) -> dict[str, Tensor]:
        """The parameters as the edit leaves them."""
        return {name: _sum(self.before[name], delta) for name, delta in self.deltas.items()}

    def _write(self, model: nn.Module, *, here: str, there: str, verb: str) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        if missing := [name for name in self.deltas if name not in named]:
            raise ArtifactMismatch(
                f"The model has no parameter {missing[0]!r}, which the edit changes; {verb} it on the model it was "
                "made for."
            )
        found = fingerprint_tensors((name, named[name].detach()) for name in self.deltas)
        states = {
            "before": fingerprint_tensors(self.before.items()),
            "after": fingerprint_tensors(self.after().items()),
        }
        if found != states[here]:
            if found == states[there]:
                why = (
                    "the edit is applied already" if verb == "apply" else "the edit is not applied"
                )
            else:
                why = "the weights are not those the edit was made for; undo later edits of these layers first"
            raise ArtifactMismatch(f"Cannot {verb} this edit: {why}.")
        values = self.before if there == "before" else self.after()
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)

    def table(self) -> dict[str, list]:
        """Columns, one row a layer."""
        return {key: [row.get(key) for row in self.rows] for key in self.rows[0]}

    def save(self, folder: str | Path) -> None:
        """Write the edit as an artifact."""
        facts = {"edit": self.facts, "rows": self.rows}
        made_from = self.facts["made_from"]
        with ArtifactWriter(folder, kind="weight edit", facts=facts, made_from=made_from) as writer:
            for name, delta in self.deltas.items():
                writer.tensor(f"delta:{name}", delta)
                writer.tensor(f"before:{name}", self.before[name])

    @classmethod
    def load(cls, folder: str | Path) -> "WeightEdit":
        """Read a saved edit, every byte checked.

        Raises:
            ArtifactMissing: There is none.
            ArtifactDamaged: It has changed since it was written.
        """
        artifact = Artifact.open(folder, kind="weight edit", verify=True)
        parts: dict[str, dict[str, Tensor]] = {"delta": {}, "before": {}}
        for name, tensor in artifact.tensors():
            part, _, parameter = name.partition(":")
            parts[part][parameter] = tensor
        facts = artifact.facts
        return cls(
            deltas=parts["delta"], before=parts["before"], rows=facts["rows"], facts=facts["edit"]
        )

    def __repr__(self) -> str:
        share = 1 - sum(r["kept"] for r in self.rows) / max(1, sum(r["pairs"] for r in self.rows))
        moved = sum(float(d.double().square().sum()) for d in self.deltas.values())
        whole = sum(float(b.double().square().sum()) for b in self.before.values())
        return (
            f"WeightEdit({self.facts['method']} of {len(self.rows)} layers: {100 * share:.1f} % of the directions "
            f"removed, weights changed by {100 * (moved / max(whole, 1e-30)) ** 0.5:.1f} % of their norm, "
            f"{self.facts['passes']:g} passes beyond the fit)"
        )


def _sum(before: Tensor, delta: Tensor) -> Tensor:
    return (before.to(delta.dtype) + delta.to(before.device)).to(before.dtype)


def as_edit(
    fit: Fit,
    edited: Mapping[str, Float[Tensor, "out in"]],
    rows: Sequence[dict[str, Any]],
    facts: Mapping[str, Any],
) -> WeightEdit:
    """The edit that gives layers these weight matrices.

    Args:
        fit: The fit whose model is edited.
        edited: The new matrices (out, in), by the layers' names.
        rows: What was done to each layer; the size of the change, and what it is predicted to cost, are added.
        facts: The method with its options, and its passes over the data beyond the fit.
    """
    named = dict(fit.model.named_parameters(remove_duplicate=False))
    layers = {layer.name: layer for layer in fit.followed}
    deltas, before, told = {}, {}, []
    for row, (name, matrix) in zip(rows, edited.items(), strict=True):
        layer = layers[name]
        parameter = layer.parameters[0]
        old = named[parameter].detach()
        wide = torch.promote_types(old.dtype, torch.float32)
        change = matrix.double() - matrix_of(layer, old).double()
        delta = change.mT if layer.kind == "conv1d" else change.reshape(old.shape)
        deltas[parameter], before[parameter] = delta.to(wide).cpu(), old.cpu().clone()
        norm = float(matrix_of(layer, old).double().norm())
        told.append(
            dict(row)
            | {"change": float(change.norm()) / max(norm, 1e-30)}
            | {"predicted_increase": predicted_increase(fit, layer, change)}
        )
    facts = dict(facts) | {"made_from": fit.made_from}
    return WeightEdit(deltas=deltas, before=before, rows=told, facts=facts)


def matrix_of(layer: Layer, weight: Tensor) -> Shaped[Tensor, "out in"]:
    """A layer's weight as the matrix that multiplies its input, which is a patch for a convolution."""
    return weight.mT if layer.kind == "conv1d" else weight.flatten(1)


class Eigen(NamedTuple):
    """A layer's K-FAC factors by their eigenvalues, greatest first, and eigenvectors as columns.

    Attributes:
        mu: Eigenvalues of A, the second moment of what the layer reads (in).
        U_A: Its eigenvectors.
        lam: Eigenvalues of G, that of the gradients at its output (out).
        U_G: Its eigenvectors.
    """

    mu: Float[Tensor, " in"]
    U_A: Float[Tensor, "in in"]
    lam: Float[Tensor, " out"]
    U_G: Float[Tensor, "out out"]


def descending(
    matrix: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Eigenvalues of a second moment, greatest first, and their eigenvectors as columns."""
    values, vectors = spectral.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def eigen(fit: Fit, layer: Layer) -> Eigen:
    """The factors of a layer's weight, as the fit holds them; the one that stands for a bias is left out of A.

    Raises:
        ValueError: The fit has no such factors, or they rest on too few positions.
    """
    curvature, name = fit.curvature, layer.name
    if not isinstance(curvature, Layerwise):
        raise ValueError(
            f"This fit holds a {curvature.kind} curvature without factors A and G; fit with curvature 'kfac' or "
            "'ekfac'."
        )
    if name not in curvature.factor_eigenvalues:
        curvature.activation_covariance(name)  # says what is missing
    n, widest = positions_of(fit, layer), max(layer.shape)
    if n < widest / 10:
        raise ValueError(
            f"The factors of {name!r} ({widest} wide) rest on {n:.0f} positions; with less than a tenth of the "
            "width their eigenvectors are noise. Fit on more data."
        )
    sides = []
    for values, basis in zip(
        curvature.factor_eigenvalues[name], curvature.bases[name], strict=True
    ):
        if basis is None:
            raise ValueError(f"{name!r} was fitted with a diagonal factor; raise max_factor.")
        if not bool(values.isfinite().all() & basis.isfinite().all()):
            raise ValueError(f"The factors of {name!r} hold NaN or infinity; fit again.")
        order = values.double().argsort(descending=True, stable=True)
        sides += [values.double()[order], basis.double()[:, order]]
    if layer.has_bias:
        sides[:2] = descending(curvature.activation_covariance(name)[:-1, :-1])
    return Eigen(*sides)


def quadratic_increase(delta: Float[Tensor, "out in"], factors: Eigen) -> float:
    r"""$\tfrac12 \mathrm{tr}(G\, \delta\, A\, \delta^\top)$: a change's cost at an optimum with Hessian G ⊗ A."""
    mu, U_A, lam, U_G = (t.to(delta.device) for t in factors)
    seen = U_G.mT @ delta.double() @ U_A
    return 0.5 * float((lam[:, None] * seen.square() * mu).sum())


def predicted_increase(fit: Fit, layer: Layer, delta: Float[Tensor, "out in"]) -> float | None:
    """What a layer's change adds to the loss of an example (nats), by the fit's factors; None without them."""
    try:
        factors = eigen(fit, layer)
    except ValueError:
        return None
    positions = positions_of(fit, layer) / fit.curvature.facts.get("moments_examples", fit.n_rows)
    return positions * quadratic_increase(delta, factors)


def positions_of(fit: Fit, layer: Layer) -> float:
    """Positions that a layer's factors rest on: of a convolution the sites of its output."""
    facts = fit.curvature.facts
    own = facts.get("moments_layer_positions", {}).get(layer.name)
    return facts.get("moments_positions", fit.n_rows) if own is None else own


def editable_layers(fit: Fit, patterns: Sequence[str]) -> list[Layer]:
    """The linear and convolutional layers of a fit whose names match.

    Raises:
        ValueError: A pattern matches nothing, or a layer of another kind, a convolution in groups, one that shares its
            weight with a layer of another kind, or a quantized one.
    """
    fit.capture()  # refuses a model whose weights were changed since
    parameters = {name for name, _ in fit.model.named_parameters(remove_duplicate=False)}
    able = [x for x in fit.followed if _is_matrix(x) and x.parameters[0] in parameters]
    editable = {x.name for x in able}
    chosen: dict[str, Layer] = {}
    for pattern in patterns:
        matched = [x for x in fit.followed if fnmatchcase(x.name, pattern)]
        found = [x for x in matched if x.name in editable]
        other = sorted((x for x in matched if x.name not in editable), key=_is_matrix)[::-1]
        if not found or (other and pattern not in EVERY):
            there = ", ".join(x.name for x in able) or "none"
            what = f"{other[0].name!r} is {_why(other[0])}" if other else "it matches nothing"
            raise ValueError(
                f"Expected linear or convolutional layers that the fit follows for {pattern!r}; {what}. There are: "
                f"{there}."
            )
        chosen |= {x.name: x for x in found}
    return list(chosen.values())


def _is_matrix(layer: Layer) -> bool:
    """Whether the weight is one matrix; of a convolution in groups every group is one of its own."""
    kinds = {layer.kind, *(use.kind for use in layer.uses)}
    return layer.kind in MATRICES and len(kinds) == 1 and layer.shape[0] == 1


def _why(layer: Layer) -> str:
    if layer.shape[0] > 1:
        return f"a convolution of {layer.shape[0]} groups, whose weight is no single matrix"
    if _is_matrix(layer):
        return "quantized, so that its weights cannot be edited; edit the model it was made from"
    kinds = sorted({use.kind for use in layer.uses} | {layer.kind})
    return " tied with ".join(kinds) if len(kinds) > 1 else f"of kind {kinds[0]}"


class Editor(ABC):
    """A way of editing weights; its fields are the hyperparameters."""

    paper: ClassVar[str]

    @abstractmethod
    def edit(self, fit: Fit, *, forget: Any = None, retain: Any = None) -> WeightEdit:
        """The edit of a fit's model, which is left as it is.

        Args:
            fit: The model with its training data and curvature.
            forget: Examples that are to be forgotten, for methods that learn from them.
            retain: Examples that are to be kept, likewise.
        """

    def facts(self, passes: float) -> dict[str, Any]:
        """What an edit says of its making."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        method = type(self).__name__
        return {"method": method, "options": options, "papers": [self.paper], "passes": passes}


__all__ = ["Editor", "Eigen", "WeightEdit", "eigen", "quadratic_increase"]
