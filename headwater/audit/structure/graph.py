r"""The interaction graph of a model, and its modules.

Nodes are the directions of all node layers and edges what they do to each other, weighted by
$\max(0, \log_{10} E_{ij} / \varepsilon_l)$, where $\varepsilon_l$ is the smallest edge of the section that is needed.
The logarithm has a reason: modules that do not interact add free directions to the loss landscape, and where they
interact a little, about as many as the logarithm of the strength (Bushnaq et al. 2024, arXiv:2405.10927).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headwater.audit.structure.ablation import Ablation
from headwater.audit.structure.basis import InteractionBasis
from headwater.extras import require
from headwater.numerics.modularity import Method, communities, modularity


@dataclass(frozen=True, kw_only=True)
class InteractionGraph:
    """Nodes of all node layers, their weighted edges and modules.

    Attributes:
        layers: Names of the node layers.
        layer: Node layer of each node.
        index: Its place in that layer's basis.
        weights: Symmetric weights of edges.
        module: Module of each node; the largest is 0.
        modularity: Of these modules.
        method: How they were found.
        resolution: γ of the modularity.
        floors: ε of each section.
    """

    layers: tuple[str, ...]
    layer: Int64[Tensor, " node"]
    index: Int64[Tensor, " node"]
    weights: Float[Tensor, "node node"]
    module: Int64[Tensor, " node"]
    modularity: float
    method: str
    resolution: float
    floors: tuple[float, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What to cite for it."""
        leiden = ["arXiv:1810.08473"] if self.method == "leiden" else []
        return {"papers": ["arXiv:2405.10927", *leiden]}

    @property
    def sizes(self) -> list[int]:
        """Nodes of each module."""
        return self.module.bincount().tolist()

    @property
    def spans(self) -> list[int]:
        """Node layers that each module reaches into."""
        return [len(set(self.layer[self.module == m].tolist())) for m in range(len(self.sizes))]

    def table(self) -> dict[str, list]:
        """A row for each node."""
        return {
            "node_layer": [self.layers[i] for i in self.layer.tolist()],
            "node": self.index.tolist(),
            "module": self.module.tolist(),
            "strength": self.weights.sum(1).tolist(),
        }

    def plot(self, *, most: int = 40):
        """Node layers as columns, modules as colours, strong edges as thick lines; needs the extra `plots`.

        Args:
            most: Nodes of a layer that are drawn: those with the strongest edges. Nodes without edges are not.
        """
        pyplot = require("matplotlib.pyplot", extra="plots")
        figure, axes = pyplot.subplots(
            figsize=(1.9 * len(self.layers) + 0.8, 4.2), layout="constrained"
        )
        strength = self.weights.sum(1)
        columns = []
        for column in range(len(self.layers)):
            nodes = ((self.layer == column) & (strength > 0)).nonzero().squeeze(1)
            nodes = nodes[strength[nodes].argsort(descending=True)][:most].tolist()
            columns.append(sorted(nodes, key=lambda n: (int(self.module[n]), int(self.index[n]))))
        rows = max(map(len, columns))
        place = {
            node: (float(x), (rows - len(nodes)) / 2 + y)
            for x, nodes in enumerate(columns)
            for y, node in enumerate(nodes)
        }
        colours, other = pyplot.get_cmap("tab10"), "0.75"
        sizes = self.sizes

        def colour(module: int):
            return colours(module) if module < 10 and sizes[module] > 1 else other

        largest = float(self.weights.max()) if self.weights.numel() else 0.0
        for i, j in self.weights.triu().nonzero().tolist():
            if i in place and j in place:
                same = self.module[i] == self.module[j]
                width = float(self.weights[i, j]) / max(largest, 1e-30)
                axes.plot(
                    *zip(place[i], place[j], strict=True),
                    color=colour(int(self.module[i])) if same else other,
                    alpha=0.15 + 0.6 * width,
                    lw=0.2 + 1.6 * width,
                    zorder=1 + width,
                )
        for node, (x, y) in place.items():
            axes.plot(
                x,
                y,
                "o",
                ms=5,
                mec="white",
                mew=0.5,
                color=colour(int(self.module[node])),
                zorder=3,
            )
        hidden = self.layer.bincount(minlength=len(self.layers)) - torch.tensor(
            [len(nodes) for nodes in columns]
        )
        names = [
            f"{name}\n+{n} not drawn" if n else name
            for name, n in zip(self.layers, hidden.tolist(), strict=True)
        ]
        axes.set_xticks(range(len(self.layers)), names)
        axes.set_xlabel("node layer")
        axes.set_yticks([])
        axes.spines[["left", "right", "top"]].set_visible(False)
        shared = sum(s > 1 for s in sizes)
        axes.set_title(f"{shared} modules, modularity {self.modularity:.2f}", fontsize=10)
        return figure

    def __repr__(self) -> str:
        several = [(s, p) for s, p in zip(self.sizes, self.spans, strict=True) if s > 1]
        alone = len(self.sizes) - len(several)
        parts = ", ".join(f"{s} nodes over {p} layers" for s, p in several[:6])
        more = f", … ({len(several) - 6} more)" if len(several) > 6 else ""
        return (
            f"InteractionGraph({len(self.module)} nodes, modularity {self.modularity:.3f} by {self.method}; "
            f"{len(several)} modules: {parts}{more}; {alone} nodes alone)"
        )


def edge_weights(
    E: Float[Tensor, "node_out node_in"], floor: float
) -> Float[Tensor, "node_out node_in"]:
    r"""$\max(0, \log_{10} E / \varepsilon)$.

    Example:
        >>> edge_weights(torch.tensor([[1e-2, 1e-5]]), 1e-4)
        tensor([[2., 0.]])
    """
    return torch.where(E > 0, (E / floor).clamp(min=1e-300).log10(), 0.0).clamp(min=0)


def interaction_graph(
    basis: InteractionBasis,
    *,
    floor: Ablation | Sequence[float] | float,
    method: Method = "auto",
    resolution: float = 1.0,
    seed: int = 0,
) -> InteractionGraph:
    """The graph of a basis, and its modules of highest modularity.

    Args:
        basis: A basis with edges.
        floor: ε, at and below which an edge counts nothing: an ablation of edges, whose least needed edge it is,
            or a number for each section or for all.
        method: "leiden" (package igraph), "louvain" (networkx), "spectral" (nothing else), or the first that is there.
        resolution: γ; higher makes more and smaller modules.
        seed: Seed of the search.

    Raises:
        ImportError: The method's package is not installed.
        ValueError: The basis has no edges, or floors do not fit them.
    """
    if basis.edges is None:
        raise ValueError("The basis was found without edges; pass edges='jacobian'.")
    floors = _floors(basis, floor)
    kept = [x.directions for x in basis.layers]
    sizes = [x.n_nodes for x in kept]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    weights = torch.zeros(starts[-1], starts[-1], dtype=torch.float64)
    for n, (E, least) in enumerate(zip(basis.edges, floors, strict=True)):
        E = E[
            int(kept[n + 1].constant) :, int(kept[n].constant) :
        ].double()  # the constant is no part of a module
        block = edge_weights(E, least)
        rows, columns = slice(starts[n + 1], starts[n + 2]), slice(starts[n], starts[n + 1])
        weights[rows, columns], weights[columns, rows] = block, block.mT
    module, found_by = communities(weights, method=method, resolution=resolution, seed=seed)
    return InteractionGraph(
        layers=tuple(basis.names),
        layer=torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)]),
        index=torch.cat([torch.arange(n) for n in sizes]),
        weights=weights,
        module=module,
        modularity=modularity(weights, module, resolution=resolution),
        method=found_by,
        resolution=resolution,
        floors=tuple(floors),
    )


def _floors(basis: InteractionBasis, floor: Ablation | Sequence[float] | float) -> list[float]:
    assert basis.edges is not None
    n = len(basis.edges)
    if isinstance(floor, Ablation):
        if floor.kind != "edges" or floor.basis != basis.basis or len(floor.curves) != n:
            raise ValueError(
                f"Expected an ablation of the edges of this basis ({basis.basis}); got one of {floor.kind} of "
                f"{floor.basis}."
            )
        found = []
        for curve, E in zip(floor.curves, basis.edges, strict=True):
            if curve.needed == 0:  # no edge is needed: none is left
                found.append(float(E.max()))
            else:  # where all of them do not suffice, all are left
                found.append(float(E[E > 0].min()) if curve.floor is None else curve.floor)
            found[-1] = max(found[-1], 1e-300)
        return found
    floors = [float(floor)] * n if isinstance(floor, int | float) else [float(x) for x in floor]
    if len(floors) != n or any(not x > 0 for x in floors):
        raise ValueError(f"Expected one positive floor for each of {n} sections; got {floors}.")
    return floors
