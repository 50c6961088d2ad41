"""The subnet of weights that only the forget set needs."""

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import KFAC
from headwater.core.examples import TensorExamples
from headwater.core.task import Classification
from headwater.forget import BalancedSubnet


def test_balanced_subnet_drops_the_weights_that_the_forget_set_needs():
    # two halves of the input; the forget set lives in the second, the retain set in the first
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 1.0, 2.0, 1.0], [-2.0, -1.0, -2.0, -1.0]]))
    x = torch.rand(40, 4).double() + 0.5
    x[:20, 2:], x[20:, :2] = 0, 0
    data = TensorExamples(x, torch.zeros(40, dtype=torch.int64))
    fit = headwater.fit(model, data, Classification(), curvature=KFAC(fisher="empirical"))
    before = model[0].weight.detach().clone()
    edit = BalancedSubnet(sparsity=0.5).edit(
        fit, forget=data.subset(range(20, 40)), retain=data.subset(range(20))
    )
    after = edit.applied(model)[0].weight
    assert bool((after[:, 2:] == 0).all()) and torch.equal(after[:, :2], before[:, :2])
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.requires_grad
    assert edit.facts["passes"] == pytest.approx(5.0)  # five epochs over both halves
    with pytest.raises(ValueError, match="needs neither"):
        BalancedSubnet().edit(fit)
