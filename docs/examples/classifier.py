"""Which training images speak for a prediction? A small network on scikit-learn's digits."""

import torch
from torch import nn

import headwater
from headwater.core.doctor import examine
from headwater.data.images import digits
from headwater.trace import Influence

x, y = digits().tensors
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
lr, momentum, weight_decay, epochs = 0.05, 0.9, 1e-3, 5
optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
train, queries = (x[:1000], y[:1000]), (x[1000:1010], y[1000:1010])
steps = 0
for _ in range(epochs):
    for batch in torch.randperm(1000).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
        optimizer.step()
        steps += 1

task = headwater.Classification(measurement_of="margin")
assert examine(
    model, train, task
).ok  # gradients equal autograd's, losses do not depend on the batch
fit = headwater.fit(
    model, train, task, weight_decay=weight_decay, horizon=lr * steps / (1 - momentum)
)
scores = Influence().attribute(fit, queries)
print(scores)
print(
    "self-influence, the largest first:", Influence().self_influence(fit).topk(3).indices.tolist()
)
