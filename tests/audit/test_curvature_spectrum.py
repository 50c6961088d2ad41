"""Activity by band of curvature, where the answer is known."""

import pytest
import torch

import headwater
from headwater.audit.curvature_spectrum import spectrum
from headwater.core.curvature import KFAC
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification
from headwater.forget import CurvatureEdit
from headwater.models.gpt import GPT
from tests.cases import mlp, mlp_data


def _fit():
    torch.manual_seed(0)
    return headwater.fit(mlp(), mlp_data(60), Classification(), curvature=KFAC(fisher="empirical"))


@pytest.mark.parametrize("by", ["input", "pair"])
def test_the_bands_of_a_layer_add_up_to_what_it_does(by):
    from headwater.audit.curvature_spectrum import _bands
    from headwater.forget.base import eigen

    fit = _fit()
    layer = next(iter(fit.followed))
    W = fit.model[0].weight.detach()
    parts = _bands(W, eigen(fit, layer), (0.1, 0.4, 1.0), by)
    torch.testing.assert_close(sum(parts), W, rtol=0, atol=1e-12)
    for i, part in enumerate(parts):  # orthogonal to each other
        for other in parts[i + 1 :]:
            assert abs(float((part * other).sum())) < 1e-12


def test_activity_is_the_norm_of_what_a_band_returns():
    fit, x = _fit(), torch.randn(7, 5).double()
    data = TensorExamples(x, torch.zeros(7, dtype=torch.int64))
    found = spectrum(fit, {"clean": data, "same": data}, layers=("0",), bands=(1.0,))
    expected = (x @ fit.model[0].weight.detach().mT).norm(dim=1)
    torch.testing.assert_close(found.activity["same"][:, 0, 0], expected, rtol=1e-10, atol=0)
    assert found.ratio("same", 0, 0).value == pytest.approx(1.0)
    assert found.sensitivity("same") == pytest.approx(1.0)
    assert found.table()["band"] == ["0-100 %"]


def test_activity_of_a_convolution_is_the_mean_over_its_sites():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(60, 3)
    ).double()
    x, y = torch.randn(60, 2, 4, 5).double(), torch.randint(3, (60,))
    fit = headwater.fit(model, (x, y), Classification(), curvature=KFAC(fisher="empirical"))
    data = TensorExamples(x[:7], y[:7])
    found = spectrum(fit, {"clean": data, "same": data}, layers=("0",), bands=(1.0,))
    with torch.no_grad():
        returned = model[0](x[:7]) - model[0].bias[:, None, None]
    expected = returned.norm(dim=1).mean((1, 2))
    torch.testing.assert_close(found.activity["same"][:, 0, 0], expected, rtol=1e-10, atol=0)


def test_inputs_along_rare_directions_light_up_the_last_band():
    torch.manual_seed(0)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.1, 0.1]).double()
    x, y = scales * torch.randn(200, 5).double(), torch.randint(3, (200,))
    model = mlp()
    fit = headwater.fit(model, (x, y), Classification(), curvature=KFAC(fisher="empirical"))
    rare = torch.zeros(20, 5).double()
    rare[:, 3:] = torch.randn(20, 2).double()
    sets = {
        "clean": TensorExamples(x[:50], y[:50]),
        "rare": TensorExamples(rare, y[:20]),
    }
    found = spectrum(fit, sets, layers=("0",), bands=(0.4, 0.6, 1.0))
    table = found.table()
    assert table["ratio"][-1] > 3 > 1 > table["ratio"][0]
    assert table["low"][-1] > 1
    assert found.sensitivity("rare") == pytest.approx(table["ratio"][-1])
    assert "rare" in repr(found) and found.passes == pytest.approx(70 / 200 / 3)
    edited = CurvatureEdit(keep_mass=0.99, layers=("0",)).edit(fit).applied(model)
    with torch.no_grad():  # what the band says is what the edit takes
        lost = [
            float((edited[0](v) - model[0](v)).norm() / (model[0](v) - model[0].bias).norm())
            for v in (rare, x)
        ]
    assert lost[0] > 1.5 * lost[1]


def test_positions_that_are_padding_are_not_active():
    torch.manual_seed(0)
    model = GPT(9, context=8, n_layers=1, dim=8, n_heads=2)
    ids = torch.randint(9, (30, 8))
    fit = headwater.fit(model, (ids, ids), CausalLM(), curvature=KFAC(fisher="empirical"))
    from headwater.core.examples import DatasetExamples

    def padded(n):
        row = ids[0, : 8 - n]
        fill = torch.zeros(n, dtype=torch.int64)
        return {
            "input_ids": torch.cat([row, fill]),
            "attention_mask": torch.cat([torch.ones_like(row), fill]),
            "labels": torch.cat([row, fill - 100]),
        }

    long = DatasetExamples([padded(0) | {"input_ids": ids[0]}])
    short = DatasetExamples([{k: v[:5] for k, v in padded(3).items()}])
    with_padding = DatasetExamples([padded(3)])
    sets = {"clean": short, "padded": with_padding, "long": long}
    found = spectrum(fit, sets, layers=("*.up",))
    torch.testing.assert_close(found.activity["padded"], found.activity["clean"], rtol=1e-5, atol=0)
    assert not torch.allclose(found.activity["long"], found.activity["clean"], rtol=1e-3)


def test_sets_and_bands_are_checked():
    fit, data = _fit(), mlp_data(4)
    with pytest.raises(ValueError, match="another set to compare"):
        spectrum(fit, {"clean": data})
    with pytest.raises(ValueError, match="ascend to 1"):
        spectrum(fit, {"clean": data, "other": data}, bands=(0.5, 0.2, 1.0))
