"""Modules of graphs: the three searches against brute force, and the fallback without any package."""

import itertools

import pytest
import torch

from headwater.numerics import modularity as numerics
from headwater.numerics.modularity import communities, modularity


def graph(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, n, generator=g, dtype=torch.float64)
    weights = (weights * (weights > 0.6)).triu(1)
    return weights + weights.mT


def best(weights: torch.Tensor) -> float:
    """The highest modularity of all partitions, each numbered in the order of first members."""
    n, found = len(weights), -1.0
    for labels in itertools.product(range(n), repeat=n - 1):
        labels = (0, *labels)
        if all(v <= max(labels[:i], default=-1) + 1 for i, v in enumerate(labels)):
            found = max(found, modularity(weights, torch.tensor(labels)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_small_graphs_reach_the_best_partition(seed):
    weights = graph(6, seed)
    truth = best(weights)
    for method in ("leiden", "louvain", "spectral"):
        if method != "spectral":
            pytest.importorskip({"leiden": "igraph", "louvain": "networkx"}[method])
        labels, name = communities(weights, method=method)
        assert name == method
        assert modularity(weights, labels) == pytest.approx(truth, abs=0.02)


def test_the_fallback_finds_planted_modules():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 4
    chance = torch.where(truth[:, None] == truth[None, :], 0.6, 0.05)
    weights = (torch.rand(60, 60, generator=g) < chance).double().triu(1)
    labels, _ = communities(weights + weights.mT, method="spectral")
    assert torch.equal(labels[:, None] == labels[None, :], truth[:, None] == truth[None, :])


def test_nodes_without_edges_are_modules_of_their_own():
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[1, 3] = weights[3, 1] = 1
    for method in ("auto", "spectral"):
        assert communities(weights, method=method)[0].tolist() == [1, 0, 2, 0]


def test_a_higher_resolution_makes_more_modules():
    weights = graph(30, 1)
    few, many = (communities(weights, method="spectral", resolution=r)[0] for r in (0.3, 3.0))
    assert int(few.max()) < int(many.max())


def test_without_packages_the_fallback_is_taken_and_a_named_method_says_what_to_install(
    monkeypatch,
):
    monkeypatch.setattr(numerics, "find_spec", lambda name: None)
    assert communities(graph(8, 0))[1] == "spectral"
    monkeypatch.setitem(__import__("sys").modules, "igraph", None)
    with pytest.raises(ImportError, match=r"pip install 'headwater\[modules\]'"):
        communities(graph(8, 0), method="leiden")


def test_no_undirected_graph_is_refused():
    with pytest.raises(ValueError, match="symmetric weights"):
        communities(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
