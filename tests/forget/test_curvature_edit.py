"""The edit where its answer is known: rho 1, twice, rescaled factors, and least squares at its optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headwater
from headwater.core.curvature import KFAC
from headwater.core.files import ArtifactMismatch
from headwater.core.task import Classification, Regression
from headwater.forget import CurvatureEdit, edit_matrix
from headwater.forget.base import Eigen, descending, positions_of, quadratic_increase
from headwater.forget.curvature_edit import at_random, greatest, keep_pairs, rectangle
from tests.cases import mlp, mlp_data
from tests.forget_cases import fitted, matrix


def moment(dim, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank or 3 * dim, dim, generator=generator, dtype=torch.float64)
    return x.mT @ x / len(x)


# Exact cases


def test_all_of_the_mass_gives_the_weights_back():
    W = matrix(4, 6, 0)
    edited, mask = edit_matrix(W, moment(6, 1, rank=3), moment(4, 2, rank=2), 1.0)
    assert bool(mask.all())  # pairs without any mass too
    torch.testing.assert_close(edited, W, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(keep=st.floats(0.05, 0.99), seed=st.integers(0, 1000))
def test_an_edit_of_an_edited_matrix_changes_nothing(keep, seed):
    W, A, G = matrix(4, 6, seed), moment(6, seed + 1), moment(4, seed + 2)
    once, _ = edit_matrix(W, A, G, keep)
    twice, _ = edit_matrix(once, A, G, keep)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(keep=st.floats(0.05, 0.99), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_the_scale_of_a_factor_does_not_matter(keep, scale, seed):
    W, A, G = matrix(4, 6, seed), moment(6, seed + 1), moment(4, seed + 2)
    edited, mask = edit_matrix(W, A, G, keep)
    for a, g in ((scale * A, G), (A, scale * G)):
        other, again = edit_matrix(W, a, g, keep)
        assert torch.equal(again, mask)
        torch.testing.assert_close(other, edited, rtol=0, atol=1e-10)


def test_signs_of_eigenvectors_do_not_matter():
    W, A, G = matrix(4, 6, 0), moment(6, 1), moment(4, 2)
    edited, mask = edit_matrix(W, A, G, 0.6)
    (_, U_A), (_, U_G) = descending(A), descending(G)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0]).double()
    other = keep_pairs(W, U_A * signs, U_G * signs[:4], mask)
    torch.testing.assert_close(other, edited, rtol=0, atol=1e-12)


def test_in_a_degenerate_eigenspace_only_what_is_kept_whole_is_determined():
    # A has the eigenvalues 5, 1, 1 and G the one 1: a share of 5/7 keeps the first direction, 1 keeps all three
    W = matrix(2, 3, 0)
    A = torch.diag(torch.tensor([5.0, 1.0, 1.0])).double()
    G = torch.eye(2).double()
    edited, mask = edit_matrix(W, A, G, 10 / 14)
    assert mask.tolist() == [[True, False, False]] * 2
    expected = W * torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-12)
    _, partly = edit_matrix(W, A, G, 11.5 / 14)  # two of four equal pairs
    assert partly.tolist() == [[True, True, True], [True, False, False]]


def test_the_staircase_is_not_a_truncation_of_ranks():
    lam = mu = 1 / torch.arange(1, 9).double()
    A, G = torch.diag(mu), torch.diag(lam)
    _, mask = edit_matrix(matrix(8, 8, 0), A, G, 0.8)
    kept = mask.sum(1)
    assert kept.tolist() == kept.sort(descending=True).values.tolist()
    cut = rectangle(lam, mu, 0.8)
    assert float((lam[:, None] * mu)[cut].sum()) >= 0.8 * float(lam.sum() * mu.sum())
    assert int(cut.any(1).sum()) < 8 == int(mask.any(1).sum())  # directions that the rectangle cuts
    assert int(mask.sum()) < int(cut.sum())  # and yet fewer pairs for as much mass


def test_a_change_at_the_optimum_of_least_squares_costs_what_is_predicted():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, d, generator=generator, dtype=torch.float64) for d in (6, 4))
    model = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
    A, G = x.mT @ x / 50, torch.eye(4).double()
    edited, _ = edit_matrix(model.weight.detach(), A, G, 0.7)

    def loss(W):
        return float(0.5 * (x @ W.mT - y).square().sum(1).mean())

    delta = edited - model.weight.detach()
    assert float(delta.norm()) > 0.1
    actual = loss(edited) - loss(model.weight.detach())
    expected = 0.5 * float((G @ delta @ A @ delta.mT).trace())
    assert actual == pytest.approx(expected, rel=1e-12)
    found = quadratic_increase(delta, Eigen(*descending(A), *descending(G)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_fit_predicts_the_same_with_a_bias_that_stays():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, d, generator=generator, dtype=torch.float64) for d in (6, 4))
    model = nn.Linear(6, 4).double()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1)], 1).double(), y).solution.mT
    with torch.no_grad():
        model.weight.copy_(solution[:, :-1])
        model.bias.copy_(solution[:, -1])
    task = Regression()
    fit = headwater.fit(model, (x, y), task, curvature=KFAC(fisher="exact"))
    edit = CurvatureEdit(keep_mass=0.7).edit(fit)
    before = float(task.loss(model, (x, y)).mean().detach())
    edited = edit.applied(model)
    assert torch.equal(edited.bias, model.bias)
    actual = float(task.loss(edited, (x, y)).mean().detach()) - before
    assert actual == pytest.approx(edit.rows[0]["predicted_increase"], rel=1e-9)


# Convolutions: the weight is a matrix that reads patches


def test_a_convolution_of_the_whole_picture_is_edited_as_the_linear_layer_it_is():
    torch.manual_seed(0)
    conv, line = nn.Conv2d(2, 3, 4).double(), nn.Linear(32, 3).double()
    with torch.no_grad():
        line.weight.copy_(conv.weight.flatten(1))
        line.bias.copy_(conv.bias)
    x, y = torch.randn(60, 2, 4, 4).double(), torch.randint(3, (60,))
    edits = []
    for model, inputs in (
        (nn.Sequential(conv, nn.Flatten()), x),
        (nn.Sequential(nn.Identity(), line), x.flatten(1)),
    ):
        method = KFAC(fisher="empirical")
        fit = headwater.fit(model, (inputs, y), Classification(), curvature=method)
        for ranking in ("mass", "rectangular"):
            edits.append(CurvatureEdit(keep_mass=0.6, ranking=ranking).edit(fit))
    for of_conv, of_line in zip(edits[:2], edits[2:], strict=True):
        delta, same = of_conv.deltas["0.weight"], of_line.deltas["1.weight"]
        assert delta.shape == (3, 2, 4, 4) and float(delta.abs().max()) > 1e-3
        torch.testing.assert_close(delta.flatten(1), same, rtol=0, atol=1e-9)
        rows = zip(of_conv.rows, of_line.rows, strict=True)
        for mine, others in rows:
            assert mine["predicted_increase"] == pytest.approx(others["predicted_increase"])
            assert mine["kept"] == others["kept"]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_a_convolutions_change_at_the_optimum_costs_what_is_predicted(options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, 6, 5, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.Flatten()).double()
    conv = model[0]
    y = torch.randn(*conv(x).shape, generator=generator, dtype=torch.float64)
    patches = nn.functional.unfold(x, 3, **options).mT.flatten(0, 1)
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    solution = torch.linalg.lstsq(patches, y.flatten(2).mT.flatten(0, 1)).solution.mT
    with torch.no_grad():
        conv.weight.copy_(solution[:, :-1].view_as(conv.weight))
        conv.bias.copy_(solution[:, -1])
    task, data = Regression(), (x, y.flatten(1))
    fit = headwater.fit(model, data, task, curvature=KFAC(fisher="exact"))
    edit = CurvatureEdit(keep_mass=0.7).edit(fit)
    edited = edit.applied(model)
    assert torch.equal(edited[0].bias, conv.bias)
    increase = [float(task.loss(m, data).mean().detach()) for m in (edited, model)]
    assert increase[0] - increase[1] == pytest.approx(edit.rows[0]["predicted_increase"], rel=1e-9)
    edit.apply(model)
    edit.undo(model)
    assert torch.equal(conv.weight, solution[:, :-1].view_as(conv.weight))


def test_layers_of_fewer_sites_are_predicted_by_their_own_positions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    data = (torch.randn(50, 1, 8, 8).double(), torch.randint(3, (50,)))
    fit = headwater.fit(model, data, Classification(), curvature=KFAC(fisher="empirical"))
    layers = {x.name: x for x in fit.followed}
    sites = {name: positions_of(fit, x) / 50 for name, x in layers.items()}
    assert sites == {"0": 36, "2": 4, "4": 1}
    # K-FAC's eigenvalues are of the example's loss: as many positions times those of G and A
    for name in layers:
        mu, lam = (v.double() for v in fit.curvature.factor_eigenvalues[name])
        expected = sites[name] * lam[:, None] * mu
        torch.testing.assert_close(fit.curvature.eigenvalues[name].double(), expected)
    whole = CurvatureEdit(keep_mass=1.0, ranking="corrected")
    with pytest.raises(ValueError, match="fit with 'ekfac'"):
        whole.edit(fit)
    ekfac = headwater.fit(model, data, Classification(), curvature="ekfac")
    assert all(float(d.abs().max()) < 1e-12 for d in whole.edit(ekfac).deltas.values())
    assert CurvatureEdit(layers=("2",)).edit(fit).table()["layer"] == ["2"]


def test_a_convolution_in_groups_is_refused_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).double()
    data = (torch.randn(50, 2, 4, 4).double(), torch.randint(3, (50,)))
    fit = headwater.fit(model, data, Classification(), curvature=KFAC(fisher="empirical"))
    with pytest.raises(ValueError, match="'0' is a convolution of 2 groups, whose weight is no"):
        CurvatureEdit(layers=("0",)).edit(fit)
    assert CurvatureEdit().edit(fit).table()["layer"] == ["2"]


def test_the_last_position_can_be_left_out_of_what_layers_read_as_in_the_paper():
    from headwater.models.gpt import GPT

    ids = torch.randint(9, (30, 6))
    model = GPT(9, context=6, n_layers=1, dim=8, n_heads=2, tied=False).double()
    read: list[torch.Tensor] = []
    hook = model.blocks[0].up.register_forward_hook(lambda m, x, y: read.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    sums = None
    for kept, last in ((6, True), (5, False)):
        task = headwater.CausalLM(last_position=last)
        fit = headwater.fit(model, (ids, ids), task, curvature=KFAC(fisher="empirical"))
        rows = read[0][:, :kept].flatten(0, 1)
        A = fit.curvature.activation_covariance("blocks.0.up")[:-1, :-1]
        torch.testing.assert_close(A, rows.mT @ rows / len(rows))
        layer = next(x for x in fit.followed if x.name == "blocks.0.up")
        assert positions_of(fit, layer) == 30 * kept
        # gradients at the last position are zero, so that their sum over positions is the same
        G = fit.curvature.gradient_covariance("blocks.0.up") * 30 * kept
        sums = G if sums is None else sums
        torch.testing.assert_close(G, sums)
        CurvatureEdit().edit(fit)


# Variants


def test_the_greatest_entries_hold_the_share():
    scores = torch.tensor([[4.0, 1.0], [2.0, 1.0]])
    assert greatest(scores, 0.5).tolist() == [[True, False], [False, False]]
    assert greatest(scores, 0.76).tolist() == [[True, True], [True, False]]
    assert bool(greatest(torch.zeros(2, 2), 1.0).all())


def test_the_random_control_drops_as_many_pairs():
    fit = fitted()
    by_mass, control = (
        CurvatureEdit(keep_mass=0.6, ranking=r).edit(fit) for r in ("mass", "random")
    )
    assert [r["kept"] for r in by_mass.rows] == [r["kept"] for r in control.rows]
    assert sum(r["mass"] for r in control.rows) < sum(r["mass"] for r in by_mass.rows)
    mask = torch.rand(5, 7) > 0.5
    drawn = at_random(mask, 0)
    assert int(drawn.sum()) == int(mask.sum()) and not torch.equal(drawn, mask)


def test_corrected_eigenvalues_are_used_only_where_asked_for():
    fit = fitted()
    by_mass, corrected = (
        CurvatureEdit(keep_mass=0.6, ranking=r).edit(fit) for r in ("mass", "corrected")
    )
    assert by_mass.facts["options"]["ranking"] == "mass"
    assert not torch.equal(by_mass.deltas["0.weight"], corrected.deltas["0.weight"])
    for row in corrected.rows:
        spectrum = fit.curvature.eigenvalues[row["layer"]]
        assert row["kept"] == int(greatest(spectrum, 0.6).sum())
    with pytest.raises(ValueError, match="fit with 'ekfac'"):
        CurvatureEdit(ranking="corrected").edit(fitted(method=KFAC()))


def test_a_whole_corrected_edit_gives_the_weights_back():
    edit = CurvatureEdit(keep_mass=1.0, ranking="corrected").edit(fitted())
    for delta in edit.deltas.values():
        assert float(delta.abs().max()) < 1e-12


# Refusals


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_shares_outside_zero_to_one_are_refused(keep):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        CurvatureEdit(keep_mass=keep)


def test_a_model_that_was_trained_on_is_refused():
    fit = fitted()
    with torch.no_grad():
        fit.model[0].weight.mul_(1.1)
    with pytest.raises(ArtifactMismatch, match="were changed after the fit"):
        CurvatureEdit().edit(fit)


def test_layers_that_are_not_linear_are_refused_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)).double()
    fit = headwater.fit(model, mlp_data(40), Classification(), curvature=KFAC())
    with pytest.raises(ValueError, match="'0' is of kind norm"):
        CurvatureEdit(layers=("0",)).edit(fit)
    with pytest.raises(ValueError, match="matches nothing"):
        CurvatureEdit(layers=("head",)).edit(fit)
    assert CurvatureEdit().edit(fit).table()["layer"] == ["1"]


def test_an_embedding_tied_with_a_head_is_refused():
    from headwater.models.gpt import GPT

    ids = torch.randint(9, (30, 6))
    model = GPT(9, context=6, n_layers=1, dim=8, n_heads=2)
    fit = headwater.fit(model, (ids, ids), headwater.CausalLM(), curvature=KFAC(fisher="empirical"))
    tied = next(x.name for x in fit.followed if "embed.weight" in x.parameters)
    with pytest.raises(ValueError, match="embedding tied with linear"):
        CurvatureEdit(layers=(tied,)).edit(fit)
    names = CurvatureEdit().edit(fit).table()["layer"]
    assert "blocks.0.up" in names and tied not in names


def test_factors_over_too_few_positions_are_refused():
    torch.manual_seed(0)
    model, data = mlp(d_in=200), mlp_data(12, d_in=200)
    fit = headwater.fit(model, data, Classification(), curvature=KFAC(fisher="empirical"))
    with pytest.raises(ValueError, match="rest on 12 positions"):
        CurvatureEdit().edit(fit)


def test_a_fit_without_factors_is_refused():
    for kind in ("identity", "dual"):
        with pytest.raises(ValueError, match="'ekfac'"):
            CurvatureEdit().edit(fitted(method=kind))


def test_broken_factors_are_refused():
    fit = fitted(method=KFAC(fisher="empirical"))
    fit.curvature.factor_eigenvalues["0"][0][0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        CurvatureEdit().edit(fit)


def test_a_quantized_layer_is_refused_by_name():
    from headwater.adapt import QuIP

    model, data, task = mlp(), mlp_data(40), Classification()
    small = QuIP(bits=4).adapt(model, headwater.fit(model, data, task, curvature=KFAC())).model
    fit = headwater.fit(small, data, task, curvature=KFAC(), layers=["*"])
    with pytest.raises(ValueError, match="is quantized, so that its weights cannot be edited"):
        CurvatureEdit().edit(fit)
    with pytest.raises(ValueError, match="are quantized already"):
        QuIP(bits=2).adapt(small, fit)
