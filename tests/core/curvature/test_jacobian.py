"""Second moments of inputs and of the outputs' Jacobian, against autograd."""

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature.jacobian import jacobian_moments
from headwater.models.vision import mlp
from tests.structure_cases import fitted


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


def test_positions_that_are_not_scored_count_for_nothing():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    torch.manual_seed(0)
    ids = torch.randint(5, (20, 4))
    labels = ids.clone()
    labels[:, 2:] = -100  # only the second token is scored, from the first position
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    model = Tokens().double()
    fit = headwater.fit(model, rows, headwater.CausalLM(), curvature="identity")
    found = jacobian_moments(fit)
    assert list(found.G_jac) == ["head"] and found.passes == 15  # 3 positions of 5 outputs
    # of four positions one is scored, and each of its outputs reaches itself
    torch.testing.assert_close(found.G_jac["head"], torch.eye(5).double() / 4)


def test_a_fit_without_linear_layers_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def forward(self, x):
            return self.norm(x)

    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        jacobian_moments(fitted(Scale().double(), torch.randn(9, 3).double()))
