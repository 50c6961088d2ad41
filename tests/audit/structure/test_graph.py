"""Ablation and modules, on two networks whose separation is hidden by a change of basis."""

import pytest
import torch

import headwater
from headwater.audit.structure import ablate, interaction_basis, interaction_graph
from headwater.audit.structure.ablation import bisect
from headwater.audit.structure.graph import edge_weights
from headwater.models.vision import mlp
from headwater.numerics.degeneracy import connected_components
from tests.structure_cases import change_basis, fitted, invertible, orthogonal, two_networks


def owners(found) -> torch.Tensor:
    """Which of the two networks each node belongs to, by the neurons that it reads in the original model."""
    owner = []
    for layer in found.layers:
        C = layer.directions.C[:-1, 1:].square()
        owner.append((C[: len(C) // 2].sum(0) > 0.5 * C.sum(0)).long())
    return torch.cat(owner)


def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two partitions are one."""
    return torch.equal(x[:, None] == x[None, :], y[:, None] == y[None, :])


@pytest.mark.parametrize("T", [orthogonal(6), invertible(6)], ids=["orthogonal", "invertible"])
@pytest.mark.parametrize("method", ["leiden", "louvain", "spectral"])
def test_two_networks_are_told_apart_after_a_change_of_basis(method, T):
    pytest.importorskip({"leiden": "igraph", "louvain": "networkx", "spectral": "torch"}[method])
    (model, x), options = two_networks(), {"nodes": ["0", "3"], "cutoff": 1e-8}
    truth = owners(interaction_basis(fitted(model, x), **options))
    found = interaction_basis(fitted(change_basis(model, 2, T), x), **options)
    graph = interaction_graph(found, floor=1e-9, method=method)
    assert alike(graph.module, truth) and graph.spans == [3, 3] and graph.modularity > 0.4


def test_over_all_layers_no_edge_joins_the_two_networks():
    model, x = two_networks()
    truth = owners(interaction_basis(fitted(model, x), cutoff=1e-8))
    turned = fitted(change_basis(model, 2, orthogonal(6)), x)
    found = interaction_basis(turned, cutoff=1e-8)
    weights = interaction_graph(found, floor=1e-12, method="spectral").weights
    assert alike(connected_components(weights > 0), truth)
    # a long network is cut across as well, unless modules may be large
    assert alike(interaction_graph(found, floor=1e-9, resolution=0.3).module, truth)


def test_principal_directions_mix_the_networks_where_the_change_is_not_orthogonal():
    (model, x), options = two_networks(), {"nodes": ["0", "3"], "cutoff": 1e-8}
    turned = fitted(change_basis(model, 2, invertible(6)), x)
    weights = [
        interaction_graph(interaction_basis(turned, basis=b, **options), floor=1e-12).weights
        for b in ("lib", "pca")
    ]
    assert [int(connected_components(w > 0).max()) + 1 for w in weights] == [2, 1]


def classifier(n: int = 150):
    torch.manual_seed(0)
    model = mlp([5, 12, 9, 4]).double()
    x = torch.randn(n, 5, dtype=torch.float64)
    return fitted(model, x, model(x).argmax(1).detach(), task=headwater.Classification())


@pytest.mark.parametrize("basis", ["lib", "pca"])
def test_all_nodes_and_all_edges_leave_the_outputs_as_they_are(basis):
    fit = classifier()
    found = interaction_basis(fit, basis=basis, cutoff=1e-12)
    for kind in ("nodes", "edges"):
        result = ablate(fit, found, kind, tolerance=1e-7, metric="loss", points=3)
        for curve in result.curves:
            assert curve.k[-1] == curve.n and curve.needed is not None
            assert abs(curve.values[-1] - result.base) < 1e-6
            assert (
                abs(curve.values[0] - result.base) > 1e-3
            )  # nothing kept: only the constant speaks


def test_kept_nodes_are_those_of_the_projection():
    fit = classifier()
    found = interaction_basis(fit)
    result = ablate(fit, found, "nodes", metric="loss", points=4)
    curve, d = result.curves[1], found.layers[1].directions
    k = curve.k[2]
    x, y = fit.train.tensors
    with torch.no_grad():
        h = fit.model[:2](x)
        f = torch.cat([h, torch.ones(len(h), 1)], 1) @ d.C[:, : k + 1] @ d.C_pinv[: k + 1]
        loss = torch.nn.functional.cross_entropy(fit.model[2:](f[:, :-1]), y)
    assert curve.values[2] == pytest.approx(float(loss), rel=1e-9)


def test_cut_edges_mask_the_input_of_each_node():
    fit = classifier(40)
    found = interaction_basis(fit)
    result = ablate(fit, found, "edges", metric="loss", points=5)
    curve, E = result.curves[1], found.edges[1]
    k = curve.k[3]
    here, there = (layer.directions for layer in found.layers[1:3])
    strongest = E[1:, 1:].flatten().argsort(descending=True)[:k].tolist()
    x, y = fit.train.tensors
    with torch.no_grad():
        h = fit.model[:2](x)
        hat = torch.cat([h, torch.ones(len(h), 1)], 1) @ here.C
        new = torch.ones(len(h), there.C.shape[1], dtype=torch.float64)
        for i in range(there.n_nodes):
            kept = [0] + [1 + e % here.n_nodes for e in strongest if e // here.n_nodes == i]
            f = hat[:, kept] @ here.C_pinv[kept]
            # the constant of f is 1 - what was cut of it, and it scales the bias
            z = f[:, :-1] @ fit.model[2].weight.mT + f[:, -1:] * fit.model[2].bias
            out = torch.cat([z.relu(), f[:, -1:]], 1)
            new[:, 1 + i] = out @ there.C[:, 1 + i]
        back = new @ there.C_pinv
        logits = back[:, :-1] @ fit.model[4].weight.mT + back[:, -1:] * fit.model[4].bias
        loss = torch.nn.functional.cross_entropy(logits, y)
    assert curve.values[3] == pytest.approx(float(loss), rel=1e-9)


def test_bisection_finds_the_least_number_and_says_when_there_is_none():
    assert [bisect(lambda k, t=t: k >= t, 9) for t in (0, 1, 7, 9)] == [0, 1, 7, 9]
    assert bisect(lambda k: False, 9) is None


def test_needed_counts_hold_and_the_curves_show_them():
    fit = classifier()
    found = interaction_basis(fit)
    nodes = ablate(fit, found, "nodes", tolerance=0.05)
    assert nodes.metric == "accuracy" and nodes.base == 1
    for curve in nodes.curves:
        value = dict(zip(curve.k, curve.values, strict=True))
        assert value[curve.needed] >= nodes.base - 0.05 > value[curve.needed - 1]
    assert nodes.table()["needed"] == nodes.needed
    assert f"of {found.layers[0].n_nodes}" in repr(nodes)


def test_the_floor_of_a_graph_is_the_smallest_needed_edge():
    fit = classifier()
    found = interaction_basis(fit)
    edges = ablate(fit, found, "edges", tolerance=0.05)
    graph = interaction_graph(found, floor=edges, method="spectral")
    assert list(graph.floors) == edges.floors
    n = [x.n_nodes for x in found.layers]
    first = graph.weights[n[0] : n[0] + n[1], : n[0]]
    kept = found.edges[0][1:, 1:] > edges.floors[0]
    assert torch.equal(first > 0, kept) and int(kept.sum()) == edges.needed[0] - 1
    assert len(graph.module) == sum(n) == len(graph.table()["module"])


def test_edge_weights_count_decades_above_the_floor():
    E = torch.tensor([[1e-1, 1e-3], [0.0, 1e-4]], dtype=torch.float64)
    weights = edge_weights(E, 1e-3)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double())


def test_results_say_what_to_cite():
    fit = classifier(60)
    found = interaction_basis(fit)
    nodes = ablate(fit, found, "nodes", points=2)
    graph = interaction_graph(found, floor=1e-6, method="spectral")
    for result, key in ((found, "local"), (nodes, "local"), (graph, "degeneracy")):
        assert f"bushnaq2024{key}" in headwater.cite(result)


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    fit = classifier(60)
    found = interaction_basis(fit)
    other = interaction_basis(fit, basis="pca")
    edges, others = (ablate(fit, b, "edges", points=4) for b in (found, other))
    edges.plot(others).savefig(tmp_path / "curves.png")
    interaction_graph(found, floor=edges, method="spectral").plot().savefig(tmp_path / "graph.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert (tmp_path / "graph.png").stat().st_size > 5000


def test_wrong_uses_are_refused():
    fit = classifier(60)
    found, plain = (interaction_basis(fit, edges=e) for e in ("jacobian", None))
    with pytest.raises(ValueError, match="found without edges"):
        ablate(fit, plain, "edges")
    with pytest.raises(ValueError, match="found without edges"):
        interaction_graph(plain, floor=1e-3)
    with pytest.raises(ValueError, match="one positive floor for each of 3 sections"):
        interaction_graph(found, floor=[1e-3, 1e-3])
    with pytest.raises(ValueError, match="Expected an ablation of the edges"):
        interaction_graph(found, floor=ablate(fit, found, "nodes", points=2))
    other = classifier(60)
    with torch.no_grad():
        other.model[0].weight.add_(1)
    changed = fitted(other.model, *other.train.tensors, task=headwater.Classification())
    with pytest.raises(ValueError, match="of another model"):
        ablate(changed, found)
