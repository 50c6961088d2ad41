import pytest
import torch
from torch import nn

from headwater.core.follow import follow
from headwater.core.layers import KINDS, matrix_shape, module_kind
from tests.cases import CASES, QuantizedLinear


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Using padding='same'")
def test_blocks_become_parameters_and_parameters_blocks(name):
    model, task, batch = CASES[name].make()
    named = dict(model.named_parameters(remove_duplicate=False))
    for layer in follow(model, task, batch, prove=False):
        blocks = torch.randn(2, *layer.block)
        values = layer.to_parameters(blocks)
        assert {n: v.shape[1:] for n, v in values.items()} == {n: named[n].shape for n in values}
        assert tuple(v.shape[1:] for v in values.values()) == layer.shapes
        assert torch.equal(layer.from_parameters(values), blocks)
        assert layer.numel == sum(named[n].numel() for n in values)
        assert all(use.kind in KINDS for use in layer.uses)


class MyRMSNorm(nn.Module):
    def __init__(self, eps_name="eps", bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        if bias:
            self.bias = nn.Parameter(torch.ones(4))
        if eps_name:
            setattr(self, eps_name, 1e-6)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 3), "linear"),
        (QuantizedLinear(2, 3), "linear"),
        (nn.Bilinear(2, 2, 3), None),
        (nn.Conv2d(2, 2, 1), "conv"),
        (nn.ConvTranspose2d(2, 2, 1), None),
        (nn.Embedding(3, 2), "embedding"),
        (nn.Embedding(3, 2, max_norm=1.0), None),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), None),
        (nn.LayerNorm(3), "norm"),
        (nn.LayerNorm(3, elementwise_affine=False), None),
        (nn.BatchNorm1d(3), "norm"),
        (nn.BatchNorm1d(3, track_running_stats=False), None),
        (nn.BatchNorm1d(3, affine=False), None),
        (MyRMSNorm(), "norm"),
        (MyRMSNorm("variance_epsilon"), "norm"),
        (MyRMSNorm(""), None),
        (MyRMSNorm(bias=True), None),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), None),
        (nn.LSTM(2, 3), None),
    ],
)
def test_modules_are_known_by_their_kind(module, kind):
    assert module_kind(module) == kind


def test_a_kind_without_a_matrix_has_no_shape():
    with pytest.raises(ValueError, match="weight matrix; got 'norm'"):
        matrix_shape(nn.LayerNorm(3), "norm")
