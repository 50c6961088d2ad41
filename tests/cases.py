"""Tiny models and data that the tests share, in float64, and the oracle: autograd, one example at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.core.capture import BatchInfo, Capture, Rows, evaluation_mode
from headwater.core.examples import TensorExamples, take
from headwater.core.follow import Followed
from headwater.core.target import Loss, Target
from headwater.core.task import Classification, Task
from headwater.numerics import kronecker


class Net(nn.Module):
    """A model from its modules and one function of (model, inputs)."""

    def __init__(self, run: Callable, **members: nn.Module | nn.Parameter):
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


TASK = Classification()


@dataclass(frozen=True)
class Case:
    """A model with a task and a batch.

    Attributes:
        build: Makes (model, batch) from torch's generator.
        functional: Parameters that only `torch.func` can follow.
        left_out: Parameters that are not followed.
        task: The task.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    functional: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    task: Task = TASK

    def make(self) -> tuple[nn.Module, Task, Any]:
        model, batch = self.build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # as after training
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model.double().eval(), self.task, batch


N, CLASSES = 4, 3


def labels() -> Tensor:
    return torch.randint(CLASSES, (N,))


def numbers(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, *shape, dtype=torch.float64), labels()


def tokens(length: int, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randint(vocabulary, (N, length)), labels()


def mlp(d_in: int = 5, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).double()


def mlp_data(n: int, d_in: int = 5) -> TensorExamples:
    """Examples for `mlp`."""
    return TensorExamples(torch.randn(n, d_in, dtype=torch.float64), torch.randint(CLASSES, (n,)))


def _mean_net(*layers: nn.Module) -> nn.Module:
    """Layers, then the mean over all but the first and last axes, then a head."""

    def run(self, x):
        h = self.body(x).tanh()
        return self.head(h.flatten(1, -2).mean(1) if h.ndim > 2 else h)

    return Net(run, body=nn.Sequential(*layers), head=nn.Linear(6, CLASSES))


def _conv_net(conv: nn.Module, *after: nn.Module) -> nn.Module:
    def run(self, x):
        return self.head(self.body(x).tanh().flatten(2).mean(2))

    return Net(run, body=nn.Sequential(conv, *after), head=nn.Linear(6, CLASSES))


def _conv_case(dims: int, **options) -> Case:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options
    kind, size = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (7, 6, 5)[:dims]
    return Case(lambda: (_conv_net(kind(**options)), numbers(options["in_channels"], *size)))


def _head(d: int = 6) -> nn.Linear:
    return nn.Linear(d, CLASSES)


def _tied_embedding():
    def run(self, x):
        return self.head(self.mix(self.embed(x)).tanh()).mean(1)[:, :CLASSES]

    net = Net(run, embed=nn.Embedding(7, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, 7))
    net.head.weight = net.embed.weight
    return net, tokens(5)


def _tied_linears():
    def run(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())

    net = Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6), head=_head())
    net.b.weight = net.a.weight
    return net, numbers(6)


def _shared_bias():
    def run(self, x):
        return self.head(self.c(self.b(self.a(x).tanh()).tanh()).tanh())

    net = Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6), head=_head())
    net.b.bias = net.a.bias
    net.c.weight = net.a.weight
    return net, numbers(6)


def _shared_norm():
    def run(self, x):
        return self.head(self.m(self.mix(self.n(x))).sum(1))

    net = Net(run, n=nn.LayerNorm(6), mix=nn.Linear(6, 6), m=nn.LayerNorm(6), head=_head())
    net.m.weight, net.m.bias = net.n.weight, net.n.bias
    return net, numbers(3, 6)


class ScaledLinear(nn.Linear):
    """A linear layer that does something else than its kind says."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class PositionEmbedding(nn.Embedding):
    """An embedding that is not called with tokens, as in OPT."""

    def forward(self, mask):
        return super().forward(mask.long().cumsum(1))


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is held in 8 bits, with a scale for each output."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        packed = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", torch.rand(out_features, 1) / 64)
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def dense(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x):
        return F.linear(x, self.dense(), self.bias)


def _routed(self, x):
    """A mixture of experts: tokens go to one of two layers."""
    flat = x.flatten(0, 1)
    left = flat[:, 0] > 0
    out = torch.zeros_like(flat)
    out[left], out[~left] = self.a(flat[left]).tanh(), self.b(flat[~left]).tanh()
    return self.head(out.view_as(x).sum(1))


def _without_gradient(self, x):
    with torch.no_grad():
        h = self.frozen(x)
    return self.head(h.tanh())


def _encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=batch_first)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(self, x):
        h = self.lift(x)
        h = self.body(h if batch_first else h.transpose(0, 1))
        return self.head(h.mean(1 if batch_first else 0))

    return Net(run, lift=nn.Linear(4, 6), body=body, head=_head())


_ATTENTION = tuple(
    f"body.layers.{i}.self_attn.{n}"
    for i in range(2)
    for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
)

CASES: dict[str, Case] = {
    "linear": Case(lambda: (_mean_net(nn.Linear(5, 6)), numbers(5))),
    "linear 3d": Case(lambda: (_mean_net(nn.Linear(5, 6), nn.Linear(6, 6)), numbers(7, 5))),
    "linear 4d": Case(lambda: (_mean_net(nn.Linear(5, 6)), numbers(2, 3, 5))),
    "linear without bias": Case(
        lambda: (_mean_net(nn.Linear(5, 6, bias=False), nn.Linear(6, 6)), numbers(3, 5))
    ),
    "conv1d": _conv_case(1),
    "conv1d same": _conv_case(1, padding="same", dilation=2),
    "conv1d groups": _conv_case(1, groups=2, padding=1, stride=2),
    "conv2d": _conv_case(2),
    "conv2d stride padding": _conv_case(2, stride=(2, 1), padding=(1, 2)),
    "conv2d dilation": _conv_case(2, dilation=(2, 1), bias=False),
    "conv2d same": _conv_case(2, padding="same", kernel_size=(2, 3)),
    "conv2d valid": _conv_case(2, padding="valid"),
    "conv2d reflect": _conv_case(2, padding=(1, 2), padding_mode="reflect"),
    "conv2d circular": _conv_case(2, padding=1, padding_mode="circular", stride=2),
    "conv2d replicate": _conv_case(2, padding="same", padding_mode="replicate"),
    "conv2d groups": _conv_case(2, groups=2),
    "conv2d groups without bias": _conv_case(2, groups=2, bias=False),
    "conv2d depthwise": _conv_case(2, in_channels=3, groups=3, padding=1),
    "conv3d": _conv_case(3, kernel_size=(3, 2, 2), stride=2, padding=1),
    "conv3d groups": _conv_case(3, kernel_size=2, groups=2, dilation=(1, 2, 1)),
    "conv2d over time": Case(
        lambda: (
            Net(
                lambda self, x: self.head(
                    self.norm(self.conv(x.flatten(0, 1)))
                    .tanh()
                    .flatten(1)
                    .view(len(x), 3, -1)
                    .sum(1)
                ),
                conv=nn.Conv2d(2, 4, 3, groups=2),
                norm=nn.GroupNorm(2, 4),
                head=nn.Linear(4 * 3 * 2, CLASSES),
            ),
            numbers(3, 2, 5, 4),
        )
    ),
    "embedding": Case(lambda: (_mean_net(nn.Embedding(7, 6)), tokens(5))),
    "embedding padding_idx": Case(
        lambda: (_mean_net(nn.Embedding(7, 6, padding_idx=2)), tokens(9))
    ),
    "embedding int32": Case(
        lambda: (_mean_net(nn.Embedding(7, 6)), (tokens(5)[0].int(), labels()))
    ),
    "layer norm": Case(lambda: (_mean_net(nn.Linear(5, 6), nn.LayerNorm(6)), numbers(3, 5))),
    "layer norm 2d": Case(
        lambda: (_mean_net(nn.LayerNorm((3, 5)), nn.Linear(5, 6)), numbers(2, 3, 5))
    ),
    "layer norm without bias": Case(
        lambda: (_mean_net(nn.Linear(5, 6), nn.LayerNorm(6, bias=False)), numbers(3, 5))
    ),
    "rms norm": Case(lambda: (_mean_net(nn.Linear(5, 6), nn.RMSNorm(6)), numbers(3, 5))),
    "group norm": Case(
        lambda: (_conv_net(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6)), numbers(4, 5, 5))
    ),
    "batch norm 1d": Case(lambda: (_mean_net(nn.Linear(5, 6), nn.BatchNorm1d(6)), numbers(5))),
    "batch norm 1d sites": Case(
        lambda: (_conv_net(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), numbers(4, 5))
    ),
    "batch norm 2d": Case(
        lambda: (_conv_net(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), numbers(4, 5, 5))
    ),
    "three times": Case(
        lambda: (
            Net(
                lambda self, x: self.head(self.a(self.a(self.a(x).tanh()).tanh()).sum(1)),
                a=nn.Linear(6, 6),
                head=_head(),
            ),
            numbers(3, 6),
        )
    ),
    "conv and norm twice": Case(
        lambda: (
            Net(
                lambda self, x: self.head(
                    self.n(self.c(self.n(self.c(x)).tanh())).flatten(2).sum(2)
                ),
                c=nn.Conv2d(6, 6, 3, groups=2, padding=1),
                n=nn.GroupNorm(2, 6),
                head=_head(),
            ),
            numbers(6, 4, 4),
        )
    ),
    "tied embedding": Case(_tied_embedding),
    "tied linears": Case(_tied_linears),
    "shared bias": Case(_shared_bias),
    "shared norm": Case(_shared_norm),
    "in place": Case(
        lambda: (
            nn.Sequential(
                nn.Linear(5, 6),
                nn.ReLU(inplace=True),
                nn.Linear(6, 6),
                nn.ReLU(inplace=True),
                _head(),
            ),
            numbers(5),
        )
    ),
    "batch times time": Case(
        lambda: (
            Net(
                lambda self, x: self.head(self.a(x.view(-1, 5)).tanh().view(len(x), -1, 6).sum(1)),
                a=nn.Linear(5, 6),
                head=_head(),
            ),
            numbers(3, 5),
        )
    ),
    "called with names": Case(
        lambda: (
            Net(
                lambda self, x: self.head(input=self.n(input=self.a(input=x)).tanh()),
                a=nn.Linear(5, 6),
                n=nn.LayerNorm(6),
                head=_head(),
            ),
            numbers(5),
        )
    ),
    "output unused": Case(
        lambda: (
            Net(
                lambda self, x: (self.unused(x), self.a(x), self.head(self.a(x).tanh()))[-1],
                a=nn.Linear(5, 6),
                unused=nn.Linear(5, 2),
                head=_head(),
            ),
            numbers(5),
        )
    ),
    "without gradient": Case(
        lambda: (Net(_without_gradient, frozen=nn.Linear(5, 6), head=_head()), numbers(5))
    ),
    "never run": Case(
        lambda: (Net(lambda self, x: self.head(x), a=nn.Linear(5, 6), head=_head(5)), numbers(5)),
        left_out=("a.weight", "a.bias"),
    ),
    "outside modules": Case(
        lambda: (
            Net(
                lambda self, x: self.head((self.a(x) * self.gain).tanh()) + self.shift,
                gain=nn.Parameter(torch.randn(6)),
                shift=nn.Parameter(torch.randn(CLASSES)),
                a=nn.Linear(5, 6),
                head=_head(),
            ),
            numbers(5),
        ),
        functional=("gain", "shift"),
    ),
    "weight used elsewhere": Case(
        lambda: (
            Net(
                lambda self, x: F.linear(self.mix(self.embed(x)).tanh(), self.embed.weight).sum(1)[
                    :, :CLASSES
                ],
                embed=nn.Embedding(7, 6),
                mix=nn.Linear(6, 6),
            ),
            tokens(4),
        ),
        functional=("embed.weight",),
    ),
    "another forward": Case(
        lambda: (
            Net(
                lambda self, x: self.head((self.a(x) + self.p(x > 0).sum(1)).tanh()),
                a=ScaledLinear(5, 6),
                p=PositionEmbedding(6, 6),
                head=_head(),
            ),
            numbers(5),
        ),
        functional=("a.weight", "a.bias", "p.weight"),
    ),
    "bilinear": Case(
        lambda: (
            Net(lambda self, x: self.b(x, x.tanh()), b=nn.Bilinear(5, 5, CLASSES)),
            numbers(5),
        ),
        functional=("b.weight", "b.bias"),
    ),
    "attention": Case(
        lambda: (
            Net(
                lambda self, x: self.head(self.att(self.a(x), self.a(x), self.a(x))[0].sum(1)),
                a=nn.Linear(5, 6),
                att=nn.MultiheadAttention(6, 2, batch_first=True),
                head=_head(),
            ),
            numbers(4, 5),
        ),
        functional=(
            "att.in_proj_weight",
            "att.in_proj_bias",
            "att.out_proj.weight",
            "att.out_proj.bias",
        ),
    ),
    "transformer encoder": Case(lambda: (_encoder(True), numbers(5, 4)), functional=_ATTENTION),
    "sequence first": Case(lambda: (_encoder(False), numbers(5, 4)), functional=_ATTENTION),
}


def gradients(
    model: nn.Module,
    task: Task,
    batch: Any,
    followed: Followed,
    target: Target | None = None,
) -> dict[str, Tensor]:
    """Per-example gradients of the model's parameters from one captured pass, each (n, *shape)."""
    found: dict[str, Tensor] = {}

    def emit(rows: Rows) -> None:
        dense = kronecker.gradient(rows.a, rows.g).movedim(-3, 0)
        parts = rows.layer.to_parameters(dense)
        assert not parts.keys() & found.keys(), "each parameter is covered once"
        found.update(parts)

    n = len(task.loss(model, batch))
    capture = Capture(model, task, followed)
    with capture.hooks():
        info = BatchInfo(torch.arange(n))
        capture.backward(batch, target or Loss(), info, torch.arange(n), emit)
    return found


def autograd(
    model: nn.Module, value: Callable[[nn.Module, Any], Tensor], batch: Any, names: Any = None
) -> dict[str, Tensor]:
    """The oracle: gradients of the model's parameters for one example after the other."""
    named = dict(model.named_parameters())
    named = {n: p for n, p in named.items() if names is None or n in names}
    frozen = [p for p in named.values() if not p.requires_grad]
    rows = {name: [] for name in named}
    with evaluation_mode(model):
        for p in frozen:
            p.requires_grad_(True)
        n = len(value(model, batch))
        for i in range(n):
            total = value(model, take(batch, torch.tensor([i]))).sum()
            found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
            for (name, p), g in zip(named.items(), found, strict=True):
                rows[name].append(torch.zeros_like(p) if g is None else g)
        for p in frozen:
            p.requires_grad_(False)
    return {name: torch.stack(part) for name, part in rows.items()}


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Equal names and values; by default only the order of float64 sums may differ."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
