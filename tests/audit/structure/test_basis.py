"""The interaction basis, held to networks whose structure is known and to the paper's sums written out."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.audit.structure import InteractionBasis, ablate, interaction_basis
from headwater.audit.structure.basis import Sources, gradients, sections_of
from headwater.core.curvature.jacobian import jacobian_moments
from headwater.core.sections import Sections, Step, steps_of
from headwater.models.gpt import GPT
from headwater.models.vision import mlp
from headwater.numerics.interaction_basis import integration_points, principal
from tests.structure_cases import change_basis, fitted, invertible, linear, orthogonal, two_networks


def inputs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(*sizes: int, seed: int = 0) -> nn.Sequential:
    return mlp(sizes, seed=seed).double()


def same_up_to_sign(x: InteractionBasis, y: InteractionBasis, tolerance: float = 1e-6) -> bool:
    """Λ and edges alike; edges are squares, so that signs do not show."""
    pairs = zip(x.layers, y.layers, strict=True)
    weights = [(a.directions.weight, b.directions.weight) for a, b in pairs]
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.max()))
        for a, b in [*weights, *zip(x.edges, y.edges, strict=True)]
    )


def naive(fit, found: InteractionBasis, number: int):
    """M' and E of one section of an MLP, by full Jacobians of one example at a time."""
    sections = sections_of(fit, found.names[:-1], None)
    here, there = found.layers[number].directions, found.layers[number + 1].directions
    first = int(there.constant)
    x = fit.train.batch(range(len(fit.train)))
    with sections.hooks():
        layers = sections.forward(x)
        M, E = 0.0, 0.0
        for i in range(len(fit.train)):
            f, one = layers[number].f[i : i + 1], fit.train.batch([i])

            def section(f, one=one):
                return sections.run(number, f, layers[number], one)[0, 0] @ there.C

            J = torch.autograd.functional.jacobian(section, f)[:, 0, 0]
            M = M + J[first:].mT @ J[first:]
            hat = (f[0, 0] @ here.C)[None]
            J_hat = torch.autograd.functional.jacobian(section, (hat @ here.C_pinv)[None])[:, 0, 0]
            E = E + (J_hat @ here.C_pinv.mT * hat).square()
    return M / len(fit.train), E / len(fit.train)


@pytest.mark.parametrize("center", [True, False])
def test_lambda_and_edges_are_the_paper_s_sums(center):
    fit = fitted(net(4, 6, 5, 3), inputs(12, 4))
    found = interaction_basis(fit, center=center, cutoff=1e-12)
    for number in range(len(found.layers) - 1):
        M, E = naive(fit, found, number)
        torch.testing.assert_close(found.edges[number], E, rtol=1e-9, atol=1e-14)
        directions = found.layers[number].directions
        # in the basis M is the identity: C was scaled by the root of Λ
        inside = directions.C_pinv @ M @ directions.C_pinv.mT
        first = int(center)
        n = len(inside) - first
        torch.testing.assert_close(inside[first:, first:], torch.eye(n).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("T", [orthogonal(6), invertible(6)], ids=["orthogonal", "invertible"])
def test_invertible_maps_between_linear_layers_change_nothing(T):
    model, x = two_networks()
    before = interaction_basis(fitted(model, x), cutoff=1e-10)
    after = interaction_basis(fitted(change_basis(model, 2, T), x), cutoff=1e-10)
    assert same_up_to_sign(before, after)


def test_a_duplicated_neuron_changes_nothing():
    model = net(4, 6, 5, 3)
    first, _, second, *rest = model
    twice = torch.cat([first.weight, first.weight[2:3]]).detach()
    bias = torch.cat([first.bias, first.bias[2:3]]).detach()
    half = second.weight.detach().clone()
    half = torch.cat([half, 0.7 * half[:, 2:3]], 1)
    half[:, 2] *= 0.3
    doubled = nn.Sequential(
        linear(twice, bias), nn.ReLU(), linear(half, second.bias.detach()), *rest
    )
    x = inputs(200, 4)
    torch.testing.assert_close(doubled(x), model(x))
    before, after = (interaction_basis(fitted(m, x), cutoff=1e-10) for m in (model, doubled))
    assert after.layers[1].n_neurons == 7 and after.layers[1].rank == before.layers[1].rank
    assert same_up_to_sign(before, after)


def test_in_a_linear_network_lambda_are_squared_singular_values_of_the_whitened_map():
    x, W = inputs(300, 5), [inputs(n, m, seed) for n, m, seed in ((6, 5, 1), (4, 6, 2), (3, 4, 3))]
    biases = [inputs(1, n, 9)[0] for n in (6, 4, 3)]
    model = nn.Sequential(*(linear(w, b) for w, b in zip(W, biases, strict=True)))
    found = interaction_basis(fitted(model, x), cutoff=1e-10)
    acts = [x]
    for layer in model:
        acts.append(layer(acts[-1]).detach())

    def whitening(a):
        values, vectors = torch.linalg.eigh(torch.cov(a.mT, correction=0))
        keep = values > 1e-10
        return vectors[:, keep] / values[keep].sqrt(), vectors[:, keep] * values[keep].sqrt()

    for number in range(3):
        _, unwhiten = whitening(acts[number])
        after = found.layers[number + 1].directions
        to_next = unwhiten.mT @ W[number].mT @ after.C[:-1, 1:]
        expected = torch.linalg.svdvals(to_next).square()
        actual = found.layers[number].directions.weight[1:]
        torch.testing.assert_close(actual, expected[: len(actual)], rtol=1e-8, atol=1e-10)
        assert float(expected[len(actual) :].sum()) < 1e-9


@pytest.mark.parametrize("basis", ["lib", "pca", "neuron"])
@pytest.mark.parametrize("center", [True, False])
def test_a_basis_and_its_inverse_cancel(basis, center):
    fit = fitted(net(4, 6, 5, 3), inputs(60, 4))
    found = interaction_basis(fit, basis=basis, center=center, cutoff=0.0, edges=None)
    assert found.edges is None
    for layer in found.layers:
        d = layer.directions
        eye = torch.eye(d.C.shape[1], dtype=torch.float64)
        torch.testing.assert_close(d.C_pinv @ d.C, eye, rtol=0, atol=1e-6)


def test_integrals_equal_the_local_gradient_where_a_section_is_homogeneous():
    # ReLU layers with folded biases scale with their input, so that the gradient is the same all along
    fit = fitted(net(4, 6, 5, 3), inputs(50, 4))
    local = interaction_basis(fit)
    for rule, n in (("gauss", 1), ("gauss", 4), ("trapezoid", 3)):
        along = interaction_basis(
            fit, formula="integrated", edges="integrated", rule=rule, n_points=n
        )
        assert same_up_to_sign(local, along)


def test_integrated_gradients_add_up_to_the_change_from_zero():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(), inputs(30, 3)
    fit = fitted(model, x)
    found = interaction_basis(fit, nodes=["0"], edges="integrated", n_points=12, cutoff=1e-12)
    here, there = (layer.directions for layer in found.layers)
    sections, batch = sections_of(fit, ["0"], None), fit.train.batch(range(30))
    alphas, weights = integration_points(12)
    with sections.hooks():
        before, after = sections.forward(batch)
        upstream = there.C.mT[:, None, None, :].expand(-1, 30, -1, -1)
        along = Sources(alphas=alphas, weights=weights)
        g = gradients(sections, 0, before.f, before, upstream, along, batch)[:, :, 0]
    hat = before.f[:, 0] @ here.C
    parts = (g @ here.C_pinv.mT) * hat  # of each node in each change
    # with the constant at zero the section makes zero of zero
    torch.testing.assert_close(parts.sum(-1), (after.f[:, 0] @ there.C).mT, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.edges[0], parts.square().mean(1), rtol=1e-8, atol=1e-10)


def test_the_cheap_formula_finds_the_direction_that_one_output_reads():
    fit = fitted(net(4, 6, 1), inputs(80, 4))
    found = interaction_basis(fit, formula="(1-0)*alpha", cutoff=1e-14)
    assert found.layers[1].n_nodes == 1
    cosine = torch.nn.functional.cosine_similarity(
        found.layers[1].directions.C[:-1, 1], fit.model[2].weight[0].detach(), dim=0
    )
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-9)
    wide = fitted(net(4, 6, 5), inputs(80, 4))
    cheap, full = (
        interaction_basis(wide, formula=f, edges=None).facts["backwards"]
        for f in ("(1-0)*alpha", "jacobian")
    )
    assert cheap == 2 < full  # one for each of two sections


def conv_net() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    ).double()
    nn.init.normal_(model[2].running_mean)
    nn.init.uniform_(model[2].running_var, 0.5, 2)
    nn.init.normal_(model[2].bias)
    return model.eval()


def test_sections_of_a_convolution_scale_with_their_input():
    x = inputs(20, 36)
    fit = fitted(conv_net(), x)
    sections, batch = sections_of(fit, None, None), fit.train.batch(range(20))
    assert sections.names == ("1", "5", "8", "output")
    with sections.hooks(), torch.no_grad():
        layers = sections.forward(batch)
        for n in range(3):
            doubled = sections.run(n, 2 * layers[n].f, layers[n], batch)
            torch.testing.assert_close(doubled, 2 * layers[n + 1].f)


def test_a_convolution_s_nodes_are_its_channels():
    x = inputs(60, 36)
    found = interaction_basis(fitted(conv_net(), x), cutoff=1e-9)
    assert [layer.n_neurons for layer in found.layers] == [1, 4, 20, 3]
    assert [layer.n_rows for layer in found.layers] == [60 * 36, 60 * 9, 60, 60]
    assert found.edges[0].shape == (found.layers[1].n_nodes + 1, 2)


def gpt_fit(n: int = 24, *, padded: bool = False):
    torch.manual_seed(1)
    model = GPT(7, context=5, n_layers=2, dim=8, n_heads=2, tied=False).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(7, (n, 5))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones_like(ids)
        mask[::2, 4:] = 0
        batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    rows = [{k: v[i] for k, v in batch.items()} for i in range(n)]
    return headwater.fit(model, rows, headwater.CausalLM(), curvature="identity")


NODES = ["blocks.0", "blocks.0.down", "blocks.1", "norm"]


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_is_cut_with_its_residual_stream_beside_the_branch(padded):
    fit = gpt_fit(padded=padded)
    sections = sections_of(fit, NODES, None)  # checks that they make up the model
    batch = fit.train.batch(range(24))
    with sections.hooks():
        found = sections.forward(batch)
    assert [a.f.shape[-1] - 1 for a in found] == [8, 8 + 32, 8, 8, 7]
    assert found[-1].f.shape[1] == 4  # the task scores four of five positions
    if padded:
        assert [a.n_positions for a in found] == [108, 108, 108, 108, 84]


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_s_edges_are_the_paper_s_sums_over_positions(padded):
    fit, number = gpt_fit(4, padded=padded), 1
    found = interaction_basis(fit, nodes=["blocks.0", "blocks.1"], cutoff=1e-12)
    sections, batch = sections_of(fit, found.names[:-1], None), fit.train.batch(range(4))
    here, there = (x.directions for x in found.layers[number : number + 2])
    with sections.hooks():
        layers = sections.forward(batch)
        hat = layers[number].f @ here.C

        def section(f):
            return sections.run(number, f, layers[number], batch) @ there.C

        J = torch.autograd.functional.jacobian(section, hat @ here.C_pinv)
    J = torch.einsum("btibsj->btisj", J) @ here.C_pinv.mT
    summed = (J * hat[:, None, None]).sum(3).square()
    scored = layers[2].mask
    if scored is not None:
        summed = summed[scored]
    expected = summed.flatten(0, -3).mean(0)
    torch.testing.assert_close(found.edges[number], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("basis", ["lib", "pca"])
def test_the_variance_that_a_norm_divides_by_is_a_node_of_its_own(basis, tmp_path):
    fit = gpt_fit(6)
    steps, nodes = fit.model.steps(variance=True), ["blocks.0", "blocks.0.mlp", "norm"]
    options = {"nodes": nodes, "steps": steps, "basis": basis, "cutoff": 1e-12}
    found = interaction_basis(fit, **options)
    sections = sections_of(fit, nodes, steps)  # checks that they make up the model
    batch = fit.train.batch(range(6))
    with sections.hooks():
        layers = sections.forward(batch)
    for number, layer in enumerate(found.layers[:-1]):
        f, made = layers[number].f, layer.directions
        assert f.shape[-1] == 8 + 1 + 1 and layer.n_neurons == 9  # stream, variance, constant
        stream, variance = f[..., :8], f[..., 8]
        torch.testing.assert_close(variance, stream.var(-1, correction=0))
        (node,) = made.apart
        others = [k for k in range(made.C.shape[1]) if k not in (0, node)]
        assert bool((made.C[:8, node] == 0).all()) and bool((made.C[8, others] == 0).all())
        assert made.weight[1:].tolist() == made.weight[1:].sort(descending=True).values.tolist()
        hat = (f @ made.C)[..., node]
        assert float(hat.mean()) == pytest.approx(0, abs=1e-12)
        assert float(hat.square().mean()) == pytest.approx(float(made.weight[node]))
        torch.testing.assert_close((f @ made.C @ made.C_pinv)[..., 8], variance)
        if basis == "pca":
            assert float(made.C[8, node]) == 1
            continue
        # Lambda of this one activation: its variance times the mean square of what the next nodes make of it
        C = found.layers[number + 1].directions.C
        C = C[:, int(found.layers[number + 1].directions.constant) :]
        with sections.hooks():
            J = torch.autograd.functional.jacobian(
                lambda f, n=number, C=C: sections.run(n, f, layers[n], batch) @ C, f
            )
        expected = variance.var(correction=0) * J[..., 8].square().sum() / variance.numel()
        assert float(made.weight[node]) == pytest.approx(float(expected), rel=1e-8)
    found.save(tmp_path / "basis")
    again = InteractionBasis.load(tmp_path / "basis")
    assert [x.directions.apart for x in again.layers] == [x.directions.apart for x in found.layers]
    # nothing is lost where nothing is left out
    whole = ablate(fit, found, "nodes", steps=steps, metric="loss")
    assert whole.curves[0].values[-1] == pytest.approx(whole.base, abs=1e-6)


def test_without_steps_that_say_so_nothing_is_kept_apart():
    found = interaction_basis(gpt_fit(6), nodes=["blocks.0", "norm"])
    assert all(layer.directions.apart == () for layer in found.layers)


def test_random_signs_over_positions_come_close_to_all_positions():
    fit, options = gpt_fit(24), {"nodes": ["blocks.0", "blocks.1"]}
    exact = interaction_basis(fit, **options)
    drawn = interaction_basis(fit, **options, n_sources=20, seed=1)
    assert drawn.facts["n_sources"] == 20
    for x, y in zip(exact.layers, drawn.layers, strict=True):
        # 20 signs of 24 examples: a relative error of a few times 1 / sqrt(480), larger for the largest eigenvalue
        assert float((x.directions.weight[:4] / y.directions.weight[:4]).log().abs().max()) < 0.15
    exact_edges, drawn_edges = (found.edges[1][1:5, 1:5].sum() for found in (exact, drawn))
    assert abs(float(drawn_edges / exact_edges) - 1) < 0.3


def test_a_node_layer_s_moment_is_the_fit_s_activation_covariance():
    # the constant is the column of the bias, and both are means over positions
    fit = fitted(net(4, 6, 5, 3), inputs(50, 4))
    found = interaction_basis(fit, basis="pca", center=False, edges=None, cutoff=1e-12)
    A = jacobian_moments(fit).A
    assert set(A) == {"0", "2", "4"}
    for layer in found.layers[:-1]:
        expected = torch.linalg.eigvalsh(A[layer.name]).flip(0)[: layer.directions.C.shape[1]]
        torch.testing.assert_close(layer.directions.weight, expected)


def test_batches_do_not_matter():
    x = inputs(50, 4)
    fit = fitted(net(4, 6, 5, 3), x)
    assert same_up_to_sign(
        interaction_basis(fit), interaction_basis(replace(fit, batch_size=7)), 1e-9
    )


def test_a_saved_basis_is_read_back(tmp_path):
    found = interaction_basis(fitted(net(4, 6, 3), inputs(50, 4)))
    found.save(tmp_path / "basis")
    again = InteractionBasis.load(tmp_path / "basis")
    assert same_up_to_sign(found, again, 0) and repr(again) == repr(found)
    assert again.table() == found.table()


def test_costs_are_told():
    found = interaction_basis(fitted(net(4, 6, 5, 3), inputs(60, 4)))
    # activations once, each of three node layers once, edges once
    assert found.facts["sweeps"] == 5
    nodes = [layer.n_nodes + 1 for layer in found.layers]
    assert found.facts["backwards"] == sum(nodes[1:]) + sum(n - 1 for n in nodes[1:])


def test_few_rows_are_warned_of():
    with pytest.warns(UserWarning, match="fewer than twice"):
        interaction_basis(fitted(net(4, 30, 3), inputs(50, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interaction_basis(fitted(net(4, 6, 3), inputs(50, 4)))


def test_a_dead_layer_is_refused():
    model = net(4, 6, 3)
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.raises(ValueError, match=r"'2'.*No direction matters.*relative=True"):
        interaction_basis(fitted(model, inputs(50, 4)))


def test_a_node_layer_too_wide_for_a_matrix_is_refused(monkeypatch):
    monkeypatch.setattr("headwater.audit.structure.basis._WIDEST", 6)
    with pytest.raises(ValueError, match=r"'2' has 6 activations.*5 do"):
        interaction_basis(fitted(net(4, 6, 3), inputs(50, 4)))


def test_small_scales_need_a_relative_cutoff():
    model = net(4, 6, 3)
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(1e-4)
    fit = fitted(model, inputs(50, 4))
    with pytest.raises(ValueError, match="relative=True"):
        interaction_basis(fit)
    assert interaction_basis(fit, relative=True).layers[1].n_nodes > 0


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(4, 6), Odd(), nn.Linear(6, 2)), {}, "not supported, Odd"),
        (net(4, 6, 3), {"nodes": ["7"]}, "Expected node layers among 0, 1, 2; got '7'"),
        (net(4, 6, 3), {"nodes": ["2", "0"]}, "in the model's order"),
        (net(4, 6, 3), {"nodes": []}, "got none"),
        (net(4, 6, 3), {"cutoff": -1.0}, "cutoff must not be negative"),
        (net(4, 6, 3), {"n_points": 0, "edges": "integrated"}, "Expected a rule"),
    ],
)
def test_what_cannot_be_done_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        interaction_basis(fitted(model.double(), inputs(50, 4)), **options)


def test_a_section_that_mixes_examples_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), Mixing(), nn.Linear(6, 2)).double()
    sections = Sections(model, headwater.Regression(), steps_of(model), ["0", "2"])
    with pytest.raises(ValueError, match="'0' mixes the examples of a batch"):
        sections.check((inputs(3, 4), inputs(3, 2)))


def test_a_model_without_steps_is_refused_and_steps_can_be_given():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(x + self.first(x).relu())

    torch.manual_seed(0)
    fit = fitted(Residual().double(), inputs(50, 4))
    with pytest.raises(ValueError, match="method `steps`; got Residual"):
        interaction_basis(fit)
    model = fit.model
    whole = [
        Step("first", lambda parts, batch: (batch[0], batch[0])),
        Step("branch", lambda p, batch: (p[0] + model.first(p[1]).relu(),), (model.first,)),
        Step("second", lambda p, batch: (model.second(p[0]),), (model.second,)),
    ]
    assert interaction_basis(fit, steps=whole).names == ["branch", "second", "output"]
    with pytest.raises(ValueError, match="do not make the model's outputs"):
        wrong = Step("branch", lambda p, batch: (model.first(p[1]).relu(),), (model.first,))
        interaction_basis(fit, steps=[whole[0], wrong, whole[2]])


def test_principal_directions_keep_the_constant_apart():
    x = inputs(200, 3) + torch.tensor([5.0, 0.0, -2.0])
    f = torch.cat([x, torch.ones(200, 1)], 1)
    found = principal(f.mT @ f / 200)
    hat = f @ found.U
    torch.testing.assert_close(hat[:, 0], torch.ones(200).double())
    assert float(hat[:, 1:].mean(0).abs().max()) < 1e-12
    torch.testing.assert_close(hat[:, 1:].square().mean(0), found.D[1:])
