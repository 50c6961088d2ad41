"""Edits as differences: applied, saved and undone to the last bit, and refused where they do not belong."""

import copy

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import KFAC
from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactDamaged, ArtifactMismatch
from headwater.core.provenance import PAPERS, cite
from headwater.core.task import Classification
from headwater.forget import BalancedSubnet, CurvatureEdit, SVDTruncation, WeightEdit, edit_matrix
from tests.cases import mlp
from tests.forget_cases import fitted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_applied_is_undone_to_the_last_bit(dtype, tmp_path):
    torch.manual_seed(0)
    fit = headwater.fit(
        mlp().float().to(dtype),
        TensorExamples(torch.randn(40, 5).to(dtype), torch.randint(3, (40,))),
        Classification(),
        curvature=KFAC(fisher="empirical"),
    )
    model = copy.deepcopy(fit.model)
    before = copy.deepcopy(model.state_dict())
    CurvatureEdit(keep_mass=0.5).edit(fit).save(tmp_path / "edit")
    edit = WeightEdit.load(tmp_path / "edit")
    edit.apply(model)
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    edit.undo(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_delta_is_the_difference_of_the_weights():
    fit = fitted()
    edit = CurvatureEdit(keep_mass=0.5).edit(fit)
    edited = edit.applied(fit.model)
    difference = edited[0].weight.detach() - fit.model[0].weight.detach()
    torch.testing.assert_close(edit.deltas["0.weight"], difference, rtol=0, atol=1e-15)
    A, G = fit.curvature.factors("0")
    expected, _ = edit_matrix(fit.model[0].weight.detach(), A[:-1, :-1], G, 0.5)
    torch.testing.assert_close(edited[0].weight.detach(), expected, rtol=0, atol=1e-12)


def test_an_edit_is_applied_once_and_undone_only_where_it_is_applied():
    fit = fitted()
    edit, model = CurvatureEdit(keep_mass=0.5).edit(fit), copy.deepcopy(fit.model)
    with pytest.raises(ArtifactMismatch, match="is not applied"):
        edit.undo(model)
    edit.apply(model)
    with pytest.raises(ArtifactMismatch, match="applied already"):
        edit.apply(model)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ArtifactMismatch, match="not those the edit was made for"):
        edit.undo(model)
    with pytest.raises(ArtifactMismatch, match="no parameter"):
        edit.apply(nn.Linear(2, 2))


def test_edits_of_different_layers_compose_and_are_undone_in_any_order():
    fit = fitted()
    first, second = (CurvatureEdit(keep_mass=0.5, layers=(n,)).edit(fit) for n in ("0", "2"))
    model = first.applied(fit.model)
    second.apply(model)
    whole = CurvatureEdit(keep_mass=0.5).edit(fit).applied(fit.model)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
    first.undo(model)
    second.undo(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in fit.model.state_dict().items())


def test_a_saved_edit_says_what_it_was_made_from_and_is_checked(tmp_path):
    fit = fitted()
    edit = CurvatureEdit(keep_mass=0.5).edit(fit)
    edit.save(tmp_path / "edit")
    found = WeightEdit.load(tmp_path / "edit")
    assert found.facts["made_from"] == fit.made_from
    assert found.facts["options"]["keep_mass"] == 0.5
    assert found.facts["fisher"] == "empirical" and found.facts["passes"] == 0
    assert found.table() == edit.table()
    assert "0 passes beyond the fit" in repr(found)
    file = next((tmp_path / "edit").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactDamaged):
        WeightEdit.load(tmp_path / "edit")


@pytest.mark.parametrize("editor", [CurvatureEdit(), SVDTruncation(), BalancedSubnet()])
def test_every_editor_says_how_it_was_made_and_repeats_itself(editor):
    fit = fitted()
    sets = {"forget": fit.train.subset(range(10)), "retain": fit.train.subset(range(10, 40))}
    first, again = editor.edit(fit, **sets), editor.edit(fit, **sets)
    assert first.rows == again.rows
    assert all(torch.equal(v, again.deltas[k]) for k, v in first.deltas.items())
    assert first.facts["method"] == type(editor).__name__
    assert set(first.facts["options"]) == set(vars(editor))
    assert editor.paper in PAPERS and PAPERS[editor.paper] in cite(first)
    assert set(first.table()) >= {"layer", "out", "in", "pairs", "kept", "change"}
    assert sum(row["predicted_increase"] for row in first.rows) > 0
    assert [w.requires_grad for w in fit.model.parameters()] == [True] * 4


def test_a_fit_without_factors_predicts_nothing():
    edit = SVDTruncation(keep_rank=0.5).edit(fitted(method="dual"))
    assert [row["predicted_increase"] for row in edit.rows] == [None, None]
