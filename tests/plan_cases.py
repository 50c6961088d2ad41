"""Small models and data to be planned for."""

from itertools import pairwise

import torch
from torch import nn

from headwater.core.capture import Capture
from headwater.core.examples import TensorExamples
from headwater.core.follow import follow


def mlp(*sizes):
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.ReLU())][:-1])


def images(n=300, pixels=20):
    return TensorExamples(torch.randn(n, pixels), torch.randint(4, (n,)))


def followed(model, data, task):
    return Capture(model, task, follow(model, task, data.batch([0, 1])))
