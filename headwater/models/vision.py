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


def cnn(
    side: int,
    classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    in_channels: int = 1,
    seed: int = 0,
) -> nn.Sequential:
    """A convolutional network on square images held as vectors.

    Each stage is a 3 × 3 convolution that keeps the size, a ReLU, and a mean over 2 × 2 pixels; a
    linear layer reads all that is left.

    Args:
        side: Height and width of the images in pixels.
        classes: Number of classes.
        channels: Output channels of each stage.
        in_channels: Colours of the images.
        seed: Seed of the initial weights (PyTorch's defaults).

    Example:
        >>> cnn(8, 10)(torch.zeros(3, 64)).shape
        torch.Size([3, 10])
    """
    if side >> len(channels) == 0:
        raise ValueError(
            f"{len(channels)} stages halve images of {side} pixels to nothing; use fewer channels."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Unflatten(1, (in_channels, side, side))]
        for n_in, n_out in pairwise([in_channels, *channels]):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        features = ([in_channels, *channels])[-1] * (side >> len(channels)) ** 2
        layers += [nn.Flatten(), nn.Linear(features, classes)]
    return nn.Sequential(*layers)
