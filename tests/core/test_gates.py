"""Counts of ReLUs that fire together."""

import torch
from torch import nn

import headwater
from headwater.core.gates import count_gates
from tests.structure_cases import fitted


def test_counts_are_those_of_the_patterns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(30, 3).double()
    fit = fitted(model, x)
    batches = fit.batches(fit.train)
    (gates,) = count_gates(model, fit.task, fit.train, batches=batches).values()
    fires = (model[0](x) > 0).double()
    assert gates.n == 30 and torch.equal(gates.both, fires.mT @ fires)


def test_channels_are_units_and_padding_is_not_counted():
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)
    ).double()
    fit = fitted(conv, torch.randn(7, 16).double())
    found = count_gates(conv, fit.task, fit.train, batches=fit.batches(fit.train))
    assert found["2"].n == 7 * 9 and found["2"].both.shape == (3, 3)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.relu, self.head = nn.Embedding(5, 3), nn.ReLU(), nn.Linear(3, 5)

        def forward(self, input_ids, attention_mask):
            return self.head(self.relu(self.embed(input_ids)))

    mask = torch.ones(6, 4, dtype=torch.int64)
    mask[:, 3] = 0
    ids = torch.randint(5, (6, 4))
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]
    model = Tokens().double()
    fit = headwater.fit(model, rows, headwater.CausalLM(), curvature="identity")
    found = count_gates(model, fit.task, fit.train, batches=fit.batches(fit.train))
    assert found["relu"].n == 18
