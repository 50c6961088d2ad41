"""Degeneracy, held to the rank of the behavioural loss's Hessian by brute force."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

import headwater
from headwater.audit.structure import degeneracy
from headwater.core.curvature.jacobian import JacobianMoments, jacobian_moments
from headwater.core.files import ArtifactMismatch
from headwater.models.vision import mlp
from tests.structure_cases import fitted, linear

XOR = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)], dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:Layer:UserWarning")


def nullity(model: nn.Module, x: torch.Tensor, layer: str) -> int:
    """Free directions of one layer: zero eigenvalues of the behavioural loss's Hessian."""
    names = [n for n, _ in model.named_parameters() if n.startswith(f"{layer}.")]
    start = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [start[n].numel() for n in names]
    target = model(x).detach()

    def loss(flat):
        parts = flat.split(sizes)
        own = {n: p.view_as(start[n]) for n, p in zip(names, parts, strict=True)}
        return (functional_call(model, start | own, (x,)) - target).square().sum() / len(x)

    H = hessian(loss)(torch.cat([start[n].flatten() for n in names]))
    values = torch.linalg.eigvalsh(H)
    return int((values < 1e-10 * values.max()).sum())


def xor_net(seed: int) -> nn.Sequential:
    """A network on three bits, which it was not trained on; two units are made alike, one input is not read."""
    model = mlp([3, 6, 2], seed=seed).double()
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].bias[1] = model[0].bias[0]
        model[0].weight[:, 2] = 0
    return model


@pytest.mark.parametrize("seed", range(3))
def test_free_directions_are_at_least_the_bound(seed):
    model = xor_net(seed)
    report = degeneracy(fitted(model, XOR))
    for layer in report.layers:
        assert nullity(model, XOR, layer.name) >= layer.free
    second = report.layers[1]
    assert second.rank_A <= 4 and second.free >= 2 * (7 - 4)  # it sees four inputs of two bits
    # the last layer is linear in its weights: there the bound is reached
    assert nullity(model, XOR, "2") == second.free


@pytest.mark.parametrize("rank_in, rank_out", [(4, 3), (2, 3), (4, 1), (2, 2)])
def test_a_linear_layer_s_bound_is_reached(rank_in, rank_out):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(40, rank_in) @ draw(rank_in, 4)
    model = nn.Sequential(
        linear(draw(3, 4), draw(3)), linear(draw(5, rank_out) @ draw(rank_out, 3))
    )
    report = degeneracy(fitted(model, x))
    first = report.layers[0]
    assert (first.rank_A, first.rank_G) == (rank_in + 1, rank_out)
    assert first.free == 15 - (rank_in + 1) * rank_out == nullity(model, x, "0")


def test_the_moments_are_those_of_autograd():
    torch.manual_seed(0)
    model, x = mlp([3, 4, 2]).double(), torch.randn(11, 3).double()
    found = jacobian_moments(fitted(model, x))
    a = torch.cat([x, torch.ones(11, 1)], 1)
    torch.testing.assert_close(found.A["0"], a.mT @ a / 11)
    h = model[0](x).detach()
    J = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda s: model[1:](s), one[None])[0, :, 0]
            for one in h
        ]
    )
    torch.testing.assert_close(found.G_jac["0"], torch.einsum("nki,nkj->ij", J, J) / 11)
    assert found.passes == 2 and found.n_rows == 11


def test_drawn_combinations_of_outputs_come_close_to_all_of_them():
    torch.manual_seed(0)
    fit = fitted(mlp([3, 4, 6]).double(), torch.randn(200, 3).double())
    exact, drawn = jacobian_moments(fit), jacobian_moments(fit, draws=8, seed=3)
    assert drawn.passes == 8
    torch.testing.assert_close(exact.A["0"], drawn.A["0"])
    gap = (exact.G_jac["0"] - drawn.G_jac["0"]).norm() / exact.G_jac["0"].norm()
    assert 0 < float(gap) < 0.1  # 1,600 signs


def test_moments_are_saved_and_save_the_sweep(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(30, 3).double()
    fit = fitted(mlp([3, 4, 2]).double(), x)
    moments = jacobian_moments(fit)
    moments.save(tmp_path / "m")
    again = JacobianMoments.load(tmp_path / "m", fit)
    whole, reused = degeneracy(fit), degeneracy(fit, moments=again)
    assert whole.table() == reused.table()
    assert whole.passes == pytest.approx(2 + 1 / 3) and reused.passes == pytest.approx(1 / 3)
    with pytest.raises(ArtifactMismatch, match="data"):
        JacobianMoments.load(tmp_path / "m", fitted(fit.model, x[:20]))


def test_a_duplicated_relu_makes_one_sync_block():
    torch.manual_seed(0)
    model, x = mlp([3, 6, 2]).double(), torch.randn(300, 3).double()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 2.0 * model[0].weight[1], 2.0 * model[0].bias[1]
    (sync,) = degeneracy(fitted(model, x)).sync
    assert sync.blocks == ((1, 4),) and sync.free == 2 and sync.n_units == 6


def test_dead_and_constant_relus_are_counted_apart():
    torch.manual_seed(0)
    model, x = mlp([3, 6, 2]).double(), torch.randn(300, 3).double()
    with torch.no_grad():
        model[0].bias[:4] = torch.tensor([-50.0, -60.0, 50.0, 60.0])
    (sync,) = degeneracy(fitted(model, x)).sync
    assert (sync.dead, sync.always, sync.blocks) == (2, 2, ((2, 3),))


def test_units_that_nearly_agree_join_where_that_is_allowed():
    torch.manual_seed(0)
    model, x = mlp([3, 6, 2]).double(), torch.randn(400, 3).double()
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[1]
        model[0].bias[4] = model[0].bias[1] + 0.02
    fit = fitted(model, x)
    assert degeneracy(fit).sync[0].blocks == ()
    assert degeneracy(fit, delta=0.05).sync[0].blocks == ((1, 4),)


def test_soft_ranks_and_the_fit_s_own_curvature():
    torch.manual_seed(0)
    model, x = mlp([3, 8, 4]).double(), torch.randn(300, 3).double()
    fit = headwater.fit(
        model, (x, model(x).argmax(1)), headwater.Classification(), curvature="ekfac"
    )
    report = degeneracy(fit, damping=1e-3)
    for layer in report.layers:
        eigenvalues = fit.curvature.eigenvalues[layer.name]
        used = (eigenvalues / (eigenvalues + 1e-3)).sum()
        assert layer.effective_parameters == pytest.approx(float(used))
        assert layer.effective_A <= layer.rank_A and layer.participation_G <= layer.rank_G
    more = degeneracy(fit, damping=1e-6)
    assert more.layers[0].effective_parameters > report.layers[0].effective_parameters


def test_convolutions_are_reported_and_other_layers_named():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 5, 5)),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(36),
        nn.Linear(36, 3),
    ).double()
    report = degeneracy(fitted(model, torch.randn(120, 50).double()))
    conv, last = report.layers
    assert (conv.d_in, conv.d_out, conv.rank_A, conv.rank_G) == (10, 2, 20, 4)
    assert conv.free == 0 and last.rank_G == 3
    assert report.left_out == ("4",) and report.sync[0].n_units == 4
    assert report.table()["layer"] == ["1", "5"]
    assert "at least" in repr(report) and "soft" in repr(report)


def test_texts_and_many_outputs_draw_combinations():
    from headwater.models.gpt import GPT

    torch.manual_seed(0)
    ids = torch.randint(20, (30, 6))
    rows = [{"input_ids": i, "labels": i} for i in ids]
    model = GPT(20, context=6, n_layers=1, dim=8, n_heads=2).double()
    report = degeneracy(headwater.fit(model, rows, headwater.CausalLM(), curvature="identity"))
    assert report.facts["draws"] == 16 and report.passes == pytest.approx(16 + 1 / 3)
    assert {x.name for x in report.layers} >= {"blocks.0.up", "blocks.0.down"}


@pytest.mark.filterwarnings("default")
def test_few_rows_are_warned_of():
    with pytest.warns(UserWarning, match="fewer than twice its width"):
        degeneracy(fitted(mlp([3, 30, 2]).double(), torch.randn(40, 3).double()))


@pytest.mark.parametrize("options", [{"soft": 0.0}, {"delta": 0.7}, {"tolerance": -1.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="Expected soft above 0"):
        degeneracy(fitted(mlp([3, 4, 2]).double(), torch.randn(40, 3).double()), **options)
