"""The drift monitor tells distances, moves and flipped gates, and warns."""

import copy

import pytest
import torch
from torch import nn

from headwater.adapt import drift
from headwater.core.function_space import function_space_distance
from headwater.core.task import Classification


def test_checkpoints_are_told_apart_without_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    distance = function_space_distance(
        net, (torch.randn(50, 4), torch.randint(3, (50,))), Classification()
    )
    near = {k: p.detach() + 0.01 * torch.randn_like(p) for k, p in net.named_parameters()}
    turned = copy.deepcopy(net)
    with torch.no_grad():
        turned[0].weight *= -1
        turned[0].bias *= -1
    with pytest.warns(UserWarning, match="no estimate"):
        found = drift(distance, {"same": net, "near": near, "turned": turned})
    table = found.table()
    assert table["checkpoint"] == ["same", "near", "turned"]
    assert table["distance"][0] == table["moved"][0] == table["relative"][0] == 0
    assert 0 < table["distance"][1] < table["distance"][2]
    assert table["flipped"][0] == 0 and table["flipped"][2] > 0.9
    moved = sum(float((near[k] - p).square().sum()) for k, p in net.named_parameters()) ** 0.5
    assert table["moved"][1] == pytest.approx(moved, rel=1e-5)
    assert table["relative"][1] == pytest.approx(2 * table["distance"][1] / moved**2, rel=1e-4)
    assert "turned" in repr(found) and drift(distance, [near]).names == ["0"]
    with pytest.raises(ValueError, match="one checkpoint or more"):
        drift(distance, {})
