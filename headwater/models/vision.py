"""Small reference classifiers for images held as vectors: they train in minutes on a CPU."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(sizes: Sequence[int], *, seed: int = 0) -> nn.Sequential:
    """A multilayer perceptron: linear layers with biases, a ReLU between each two.

    Args:
        sizes: Width of the input, of each hidden layer, and the number of classes.
        seed: Seed of the initial weights (PyTorch's default for linear layers).

    Returns:
        Layers and ReLUs in one `nn.Sequential`, so that the weights of the first layer are
        named "0.weight" and those of the second "2.weight".

    Example:
        >>> mlp([784, 512, 256, 10])(torch.zeros(3, 784)).shape
        torch.Size([3, 10])
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes needs at least an input and an output width; got {list(sizes)}.")
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def logistic_regression(in_features: int, classes: int, *, seed: int = 0) -> nn.Sequential:
    """Multinomial logistic regression: one linear layer, weights named "0.weight" and "0.bias".

    Example:
        >>> sum(p.numel() for p in logistic_regression(64, 10).parameters())
        650
    """
    return mlp([in_features, classes], seed=seed)
