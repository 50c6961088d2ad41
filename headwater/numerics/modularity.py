r"""Modules of a weighted graph: groups of nodes with more weight inside than chance would put there.

Newman and Girvan's modularity of a partition, with resolution $\gamma$ (Reichardt and Bornholdt 2006):

$$Q = \frac1{2m} \sum_{ij} \Big(w_{ij} - \gamma \frac{k_i k_j}{2m}\Big) [c_i = c_j],
\qquad k_i = \sum_j w_{ij}, \quad 2m = \sum_i k_i .$$

It is raised by the Leiden algorithm (Traag, Waltman and van Eck 2019, arXiv:1810.08473) where `igraph` is installed, by
Louvain's where `networkx` is, and else by leading eigenvectors of the modularity matrix with single nodes moved
afterwards (Newman 2006, arXiv:physics/0605087), which needs nothing but torch.
"""

import random
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headwater.extras import require
from headwater.numerics.spectral import eigh

Method = Literal["auto", "leiden", "louvain", "spectral"]
_PACKAGES = {"leiden": "igraph", "louvain": "networkx"}


def modularity(
    weights: Float[Tensor, "n n"], labels: Int64[Tensor, " n"], *, resolution: float = 1.0
) -> float:
    """The modularity Q of a partition of an undirected graph; 0 of a graph without edges.

    Example:
        >>> pairs = torch.block_diag(*[torch.tensor([[0.0, 1.0], [1.0, 0.0]])] * 2)
        >>> modularity(pairs, torch.tensor([0, 0, 1, 1]))
        0.5
    """
    same = labels[:, None] == labels[None, :]
    return float((_matrix(weights, resolution) * same).sum())


def _matrix(weights: Tensor, resolution: float) -> Tensor:
    """The modularity matrix over 2m."""
    weights = weights.double()
    degree = weights.sum(1)
    total = degree.sum().clamp(min=1e-300)
    return weights / total - resolution * torch.outer(degree / total, degree / total)


def communities(
    weights: Float[Tensor, "n n"],
    *,
    method: Method = "auto",
    resolution: float = 1.0,
    seed: int = 0,
) -> tuple[Int64[Tensor, " n"], str]:
    """A partition of high modularity, the largest module first, and the method that found it.

    Args:
        weights: Symmetric weights, none negative.
        method: "leiden" needs `igraph`, "louvain" `networkx`; "auto" takes the first that is there.
        resolution: γ; higher makes more and smaller modules.
        seed: Seed of the random order of moves.

    Raises:
        ImportError: The method's package is not installed.
        ValueError: The weights are no undirected graph.

    Example:
        >>> pairs = torch.block_diag(*[torch.tensor([[0.0, 1.0], [1.0, 0.0]])] * 2)
        >>> communities(pairs, method="spectral")
        (tensor([0, 0, 1, 1]), 'spectral')
    """
    if method not in get_args(Method):
        raise ValueError(f"Expected a method among {', '.join(get_args(Method))}; got {method!r}.")
    if bool((weights < 0).any()) or not torch.allclose(weights, weights.mT):
        raise ValueError("Expected symmetric weights, none negative.")
    if method == "auto":
        there = (name for name, package in _PACKAGES.items() if find_spec(package))
        method = next(there, "spectral")  # type: ignore[assignment]
    find = {"leiden": _leiden, "louvain": _louvain, "spectral": _spectral}[method]
    labels = find(weights.double().cpu(), resolution, seed)
    alone = (weights.sum(1) == 0).cpu()  # a node without edges is a module of its own
    labels[alone] = len(labels) + torch.arange(int(alone.sum()))
    return _by_size(labels), method


def _by_size(labels: Tensor) -> Tensor:
    """Labels numbered by the size of their module, and where those are alike by its first node."""
    names = labels.tolist()
    sizes: dict[int, int] = {}
    for name in names:
        sizes[name] = sizes.get(name, 0) + 1
    order = sorted(sizes, key=lambda name: (-sizes[name], names.index(name)))
    place = {name: i for i, name in enumerate(order)}
    return torch.tensor([place[name] for name in names], dtype=torch.int64)


def _edges(weights: Tensor) -> tuple[list[tuple[int, int]], list[float]]:
    i, j = weights.triu().nonzero(as_tuple=True)
    return list(zip(i.tolist(), j.tolist(), strict=True)), weights[i, j].tolist()


def _leiden(weights: Tensor, resolution: float, seed: int) -> Tensor:
    igraph = require("igraph", extra="modules")
    edges, values = _edges(weights)
    if not edges:
        return torch.arange(len(weights))
    graph = igraph.Graph(n=len(weights), edges=edges)
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden(
            objective_function="modularity", weights=values, resolution=resolution, n_iterations=-1
        )
    finally:
        igraph.set_random_number_generator(random)
    return torch.tensor(found.membership)


def _louvain(weights: Tensor, resolution: float, seed: int) -> Tensor:
    networkx = require("networkx", extra="modules")
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(weights)))
    edges, values = _edges(weights)
    graph.add_weighted_edges_from((*e, w) for e, w in zip(edges, values, strict=True))
    labels = torch.arange(len(weights))
    if edges:
        found = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed)
        for number, nodes in enumerate(found):
            labels[list(nodes)] = number
    return labels


def _spectral(weights: Tensor, resolution: float, seed: int) -> Tensor:
    """Split by the leading eigenvector while that raises the modularity, then move single nodes, merge modules."""
    B = _matrix(weights, resolution)
    labels, waiting, count = torch.zeros(len(B), dtype=torch.int64), [torch.arange(len(B))], 1
    while waiting:
        nodes = waiting.pop()
        part = B[nodes][:, nodes]
        part = part - torch.diag(part.sum(1))  # what a split of these nodes alone would change
        shift = (
            float(part.abs().sum(1).max()) + 1e-300
        )  # eigh is for matrices without negative values
        _, vectors = eigh(part + shift * torch.eye(len(part), dtype=part.dtype))
        side = _moved(part, (vectors[:, -1] > 0).long())
        sign = 2.0 * side.double() - 1
        if float(sign @ part @ sign) <= 1e-12 or not 0 < int(side.sum()) < len(side):
            continue
        first, second = nodes[side == 0], nodes[side == 1]
        labels[second], count = count, count + 1
        waiting += [first, second]
    order = torch.randperm(len(B), generator=torch.Generator().manual_seed(seed))
    while True:
        before = _gain(B, labels)
        labels = _merged(B, _moved(B, labels, order))
        if _gain(B, labels) <= before + 1e-12:
            return labels


def _gain(B: Tensor, labels: Tensor) -> float:
    return float((B * (labels[:, None] == labels[None, :])).sum())


def _moved(B: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
    """Move single nodes to the module where they raise the modularity most, until none does."""
    labels = labels.clone()
    n_modules = int(labels.max()) + 1
    off = B - torch.diag(B.diagonal())
    member = torch.nn.functional.one_hot(labels, n_modules).to(B)
    changed = True
    while changed:
        changed = False
        for node in range(len(B)) if order is None else order.tolist():
            gains = off[node] @ member
            best, now = int(gains.argmax()), int(labels[node])
            if gains[best] > gains[now] + 1e-12:
                member[node, now], member[node, best] = 0, 1
                labels[node], changed = best, True
    return labels


def _merged(B: Tensor, labels: Tensor) -> Tensor:
    """Merge the pair of modules that raises the modularity most, until none does."""
    while True:
        _, labels = labels.unique(return_inverse=True)
        member = torch.nn.functional.one_hot(labels).to(B)
        between = member.mT @ B @ member
        between.fill_diagonal_(-torch.inf)
        best = int(between.argmax())
        i, j = divmod(best, len(between))
        if len(between) < 2 or float(between[i, j]) <= 1e-12:
            return labels
        labels = torch.where(labels == j, i, labels)
