"""A task from your own functions: a model that returns two things, and a loss of its own."""

import torch
from torch import nn

import headwater
from headwater.core.curvature import EKFAC
from headwater.trace import Influence


class TwoHeads(nn.Module):
    """Predicts a value and how sure it is."""

    def __init__(self):
        super().__init__()
        self.body, self.value, self.scale = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.value(hidden).squeeze(1), self.scale(hidden).squeeze(1)


def loss(model, batch):
    """Negative log-likelihood under the predicted spread, one number an example."""
    x, y = batch
    value, log_scale = model(x)
    return 0.5 * ((y - value) / log_scale.exp()) ** 2 + log_scale


def spread(model, batch):
    """What is asked: the predicted spread."""
    return model(batch[0])[1]


x, y = torch.randn(64, 4), torch.randn(64)
task = headwater.FunctionTask(loss_with=loss, measure_with=spread, label="two heads")
fit = headwater.fit(TwoHeads(), (x, y), task, curvature=EKFAC(fisher="empirical"))
print(Influence(damping="0.1 relative").attribute(fit, (x[:2], y[:2])))
