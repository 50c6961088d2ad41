from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.core.doctor import examination, examine
from headwater.core.task import Classification
from tests.doctor_cases import Forward, failed, images, mlp


@pytest.fixture
def unproven(monkeypatch):
    """Layers as their modules suggest, without the proof that `follow` makes for itself."""
    monkeypatch.setattr(examination, "follow", partial(examination.follow, prove=False))


def test_a_parameter_that_also_acts_outside_its_module_is_a_fail_that_names_its_layer(unproven):
    model = Forward(
        lambda self, x: self.head(torch.tanh(F.linear(torch.tanh(self.mid(x)), self.mid.weight))),
        mid=nn.Linear(6, 6, bias=False),
        head=nn.Linear(6, 3),
    )
    diagnosis = examine(model, images(), Classification())
    assert failed(diagnosis)[0] == "gradients"
    by_name = {layer.name: layer for layer in diagnosis.layers}
    assert by_name["mid"].status == "fail"
    assert by_name["mid"].relative_error > 0.4
    assert by_name["head"].status == "ok"
    assert "skip=['mid']" in diagnosis["gradients"].remedy
    skipped = examine(model, images(), Classification(), skip=["mid"])
    assert skipped.ok
    assert [left.name for left in skipped.left_out] == ["mid.weight"]


def test_a_module_that_reads_sequence_first_is_found_only_in_a_batch(unproven):
    model = Forward(
        lambda self, x: self.head(self.mid(x.transpose(0, 1)).tanh().transpose(0, 1).sum(1)),
        mid=nn.Linear(5, 4),
        head=nn.Linear(4, 3),
    )
    data = (torch.randn(9, 7, 5).double(), torch.randint(3, (9,)))
    diagnosis = examine(model, data, Classification())
    assert diagnosis["gradients"].status == "ok"
    assert failed(diagnosis) == ["batched gradients"]
    assert "'mid'" in diagnosis["batched gradients"].remedy
    assert next(x for x in diagnosis.layers if x.name == "mid").status == "fail"


def test_reused_modules_and_quantized_weights_are_proven_too():
    class Quantized(nn.Module):
        in_features, out_features = 6, 6

        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (6, 6), dtype=torch.int8))

        def forward(self, x):
            return F.linear(x, self.codes.to(x) / 8)

    model = Forward(
        lambda self, x: self.head(self.mid(torch.tanh(self.mid(self.low(x))))),
        low=Quantized(),
        mid=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    layers = ["low.weight", "mid.*", "head.*"]
    diagnosis = examine(model, images(), Classification(), layers=layers)
    assert diagnosis.ok
    assert ("mid", 2) in diagnosis.reused
    assert "low" in {layer.name for layer in diagnosis.layers}
    assert "unused" not in {check.name for check in diagnosis.checks}


def test_an_error_of_rounding_alone_is_a_warning():
    model = mlp(6, 5, 3).float()
    data = (torch.randn(12, 6), torch.randint(3, (12,)))
    diagnosis = examine(model, data, Classification(), tolerance=1e-12)
    assert diagnosis.ok
    assert any(layer.status == "warn" for layer in diagnosis.layers)
    assert "float64 agrees" in diagnosis["batched gradients"].detail
