"""Networks whose structure is known: two that share no weight, spread over each other by changes of basis."""

import torch
from torch import Tensor, nn

import headwater
from headwater.core.examples import TensorExamples
from headwater.core.fit import Fit


def fitted(model: nn.Module, x: Tensor, y: Tensor | None = None, *, task=None) -> Fit:
    """A fit in float64 that costs nothing."""
    task = headwater.Regression() if task is None else task
    if y is None:
        with torch.no_grad():
            y = model(x)
    return headwater.fit(model, TensorExamples(x, y), task, curvature="identity")


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer with these weights (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def two_networks(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    """Two networks side by side, 2-4-3-4-2 each, on a grid of inputs, so that they are exactly independent."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def block(out: int, in_: int) -> nn.Linear:
        both = [draw(out, in_) / in_**0.5, 1.7 * draw(out, in_) / in_**0.5]
        return linear(torch.block_diag(*both), 0.3 * draw(2 * out))

    model = nn.Sequential(block(4, 2), nn.ReLU(), block(3, 4), block(4, 3), nn.ReLU(), block(2, 4))
    a, b = draw(30, 2), draw(30, 2)
    grid = torch.cat([a.repeat_interleave(30, 0), b.repeat(30, 1)], 1)
    return model, grid


def change_basis(model: nn.Sequential, place: int, T: Tensor) -> nn.Sequential:
    """The same function, with activations between two linear layers turned by T: x becomes x T."""
    first, second = model[place], model[place + 1]
    changed = linear(T.mT @ first.weight.detach(), first.bias.detach() @ T)
    undone = linear(second.weight.detach() @ torch.linalg.inv(T).mT, second.bias.detach())
    return nn.Sequential(*model[:place], changed, undone, *model[place + 2 :])


def orthogonal(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def invertible(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-0.7, 0.7, n, dtype=torch.float64)
    return (
        orthogonal(n, seed)
        @ torch.diag(scale[torch.randperm(n, generator=g)])
        @ orthogonal(n, seed + 1)
    )
