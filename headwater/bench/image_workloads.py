"""Workloads on images: perceptrons, convolutions and logistic regression on digits, MNIST and clothes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from headwater.bench.workload import LARGE, Data, Workload
from headwater.core.examples import TensorExamples
from headwater.data.images import digits, fashion_mnist, mnist5000
from headwater.models.vision import cnn, logistic_regression, mlp
from headwater.training.optimizers import SGD


def _split(
    images: TensorExamples, n_train: int, n_queries: int = 200
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training images and queries: the first and the next in one random order."""
    x, y = images.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, asked = order[:n_train], order[n_train : n_train + n_queries]
    return (x[train], y[train]), (x[asked], y[asked])


def _images(load: Callable[[], TensorExamples], n_train: int) -> Callable[[], Data]:
    def data() -> Data:
        train, queries = _split(load(), n_train)
        return Data(train=TensorExamples(*train), queries=TensorExamples(*queries))

    return data


def _noisy_digits() -> Data:
    """Digits with a fifth of the training labels replaced by another one; the queries' are right."""
    (x, y), queries = _split(digits(), 1000)
    noise = torch.Generator().manual_seed(1)
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=noise)[: len(y) // 5]] = True
    other = (y + torch.randint(1, 10, y.shape, generator=noise)) % 10
    labels = torch.where(wrong, other, y)
    return Data(train=TensorExamples(x, labels), queries=TensorExamples(*queries), wrong=wrong)


def rotated(x: Float[Tensor, "n pixel"], degrees: float) -> Float[Tensor, "n pixel"]:
    """Square images turned about their centre, with values between pixels interpolated.

    Example:
        >>> rotated(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 90.0).round().tolist()
        [[2.0, 4.0, 1.0, 3.0]]
    """
    side, angle = math.isqrt(x.shape[1]), math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]], dtype=x.dtype).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, [len(x), 1, side, side], align_corners=False)
    return F.grid_sample(x.view(-1, 1, side, side), grid, align_corners=False).flatten(1)


def _rotated_digits(degrees: float = 45.0) -> Data:
    """Upright digits first, then turned ones; half of the queries are of either kind."""
    (x, y), (x_query, y_query) = _split(digits(), 1000)
    x, x_query = x.clone(), x_query.clone()
    x[500:], x_query[100:] = rotated(x[500:], degrees), rotated(x_query[100:], degrees)
    mixed = torch.arange(200).view(2, 100).T.flatten()  # both halves of the queries hold both kinds
    return Data(
        train=TensorExamples(x, y),
        queries=TensorExamples(x_query[mixed], y_query[mixed]),
        parts=(torch.arange(500), torch.arange(500, 1000)),
    )


_DIGITS_RULE = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=50, epochs=20)
_MNIST_RULE = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=100, epochs=20)


def fashion_mnist_workload(folder: Path) -> Workload:
    """A perceptron on Fashion-MNIST, stopped early, from the four files of the data set."""
    return Workload(
        name="fashion-mlp",
        title="Fashion-MNIST: MLP 784-512-256-10, 4,000 images, 5 epochs",
        load=_images(lambda: fashion_mnist(folder), 4000),
        model=lambda seed: mlp((784, 512, 256, 10), seed=seed),
        recipe=(SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=100, epochs=5),),
        parallel=10,
        slow=LARGE,
    )


IMAGES = (
    Workload(
        name="digits-mlp",
        title="digits: MLP 64-64-32-10, 1,000 images",
        load=_images(digits, 1000),
        model=lambda seed: mlp((64, 64, 32, 10), seed=seed),
        recipe=(_DIGITS_RULE,),
    ),
    Workload(
        name="digits-logistic",
        title="digits: logistic regression, 1,000 images",
        load=_images(digits, 1000),
        model=lambda seed: logistic_regression(64, 10, seed=seed),
        recipe=(_DIGITS_RULE,),
    ),
    Workload(
        name="digits-cnn",
        title="digits: CNN of two convolutions, 1,000 images",
        load=_images(digits, 1000),
        model=lambda seed: cnn(8, 10, channels=(8, 16), seed=seed),
        recipe=(replace(_DIGITS_RULE, lr=0.1),),  # with 0.02 models of halves learn nothing
        repeats=2,
        parallel=10,
    ),
    Workload(
        name="digits-noise",
        title="digits with a fifth of the labels wrong: MLP 64-64-32-10, 1,000 images",
        load=_noisy_digits,
        model=lambda seed: mlp((64, 64, 32, 10), seed=seed),
        recipe=(_DIGITS_RULE,),
        cut=0.05,  # a model of noisy labels gives every class a few per cent
    ),
    Workload(
        name="digits-rotated",
        title="upright digits, then digits turned by 45°: MLP 64-64-32-10, 500 + 500 images",
        load=_rotated_digits,
        model=lambda seed: mlp((64, 64, 32, 10), seed=seed),
        recipe=(_DIGITS_RULE, replace(_DIGITS_RULE, lr=0.02, epochs=10)),
    ),
    Workload(
        name="mnist-logistic",
        title="MNIST: logistic regression, 4,000 images",
        load=_images(mnist5000, 4000),
        model=lambda seed: logistic_regression(784, 10, seed=seed),
        recipe=(replace(_MNIST_RULE, lr=0.01),),
        parallel=20,
        slow=LARGE,
    ),
    Workload(
        name="mnist-mlp",
        title="MNIST: MLP 784-512-256-10, 4,000 images",
        load=_images(mnist5000, 4000),
        model=lambda seed: mlp((784, 512, 256, 10), seed=seed),
        recipe=(_MNIST_RULE,),
        parallel=10,
        slow=LARGE,
    ),
    Workload(
        name="mnist-cnn",
        title="MNIST: CNN of two convolutions, 4,000 images",
        load=_images(mnist5000, 4000),
        model=lambda seed: cnn(28, 10, channels=(8, 16), seed=seed),
        recipe=(replace(_MNIST_RULE, lr=0.02, epochs=10),),
        repeats=2,
        parallel=5,
        slow=LARGE,
    ),
)
