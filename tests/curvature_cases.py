"""Tiny models with data, and the slow truth about them: gradients by plain autograd, dense matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from headwater.core.capture import BatchInfo, Rows
from headwater.core.examples import Examples, TensorExamples
from headwater.core.fit import Fit, fit
from headwater.core.layers import Layer, Use
from headwater.core.prediction import Gaussian
from headwater.core.task import CausalLM, Classification, FunctionTask, Regression, Task


class Tokens(Examples):
    """Token sequences of several lengths, padded on the right as far as the longest and a little further."""

    def __init__(self, sequences: Sequence[Sequence[int]], extra: int = 0, n_vocab: int = 7):
        self.sequences, self.extra = [list(s) for s in sequences], extra
        self.ids = [f"s{i}" for i in range(len(self.sequences))]
        self.lengths = [len(s) for s in self.sequences]
        self.metadata = {"source": ["ab"[i % 2] for i in range(len(self.ids))]}

    def batch(self, indices):
        width = max(self.lengths[i] for i in indices) + self.extra
        ids = torch.zeros(len(indices), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, : self.lengths[i]] = torch.tensor(self.sequences[i])
            mask[row, : self.lengths[i]] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }

    def fingerprint(self) -> str:
        return str(self.sequences)


class TinyLM(nn.Module):
    """One block of causal attention; query, key and value read the same tensor."""

    def __init__(self, n_vocab: int = 7, dim: int = 4):
        super().__init__()
        self.embed = nn.Embedding(n_vocab, dim)
        self.norm = nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.up, self.head = nn.Linear(dim, dim + 1), nn.Linear(dim + 1, n_vocab, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.norm(x)
        seen = (
            torch.ones(2 * (x.shape[1],), dtype=torch.bool).tril() & attention_mask[:, None].bool()
        )
        x = x + nn.functional.scaled_dot_product_attention(
            self.q(y),
            self.k(y),
            self.v(y),
            attn_mask=seen | torch.eye(x.shape[1], dtype=torch.bool),
        )
        return self.head(self.up(x).tanh())


class Pooled(nn.Module):
    """The same layers at every position, then the mean (or nothing) over positions."""

    def __init__(self, sides: Sequence[int], *, linear: bool = False, pool: bool = True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sides))
        self.linear, self.pool = linear, pool

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x if self.linear or i == 0 else x.tanh())
        return x.mean(1) if self.pool else x


class GroupedConv(nn.Module):
    """A grouped convolution, a strided one, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 2, groups=2)
        self.second = nn.Conv2d(4, 2, 2, stride=2, bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh().mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A model, its task and its data."""

    model: nn.Module
    task: Task
    train: Examples
    query: Examples
    fits: dict[Any, Fit] = field(default_factory=dict)

    def fit(self, curvature: Any, **options: Any) -> Fit:
        return fit(self.model, self.train, self.task, curvature=curvature, **options)

    def fitted(self, curvature: Any) -> Fit:
        """A fit that is made once; for models that stay as they are."""
        if curvature not in self.fits:
            self.fits[curvature] = self.fit(curvature)
        return self.fits[curvature]


def position_regression(n_out: int) -> FunctionTask:
    """Squared error at every position by itself."""

    def predict(model: nn.Module, batch: Any) -> Gaussian:
        mean = model(batch[0])
        return Gaussian(mean, batch[1], torch.ones(mean.shape[:2], dtype=torch.bool))

    return FunctionTask(predict_with=predict, label=f"positions{n_out}")


def _classes(
    model: nn.Module, *shape: int, n: int = 18, n_query: int = 4, n_classes: int = 3
) -> Case:
    x, y = torch.randn(n + n_query, *shape).double(), torch.randint(n_classes, (n + n_query,))
    return Case(
        model.double(), Classification(), TensorExamples(x[:n], y[:n]), TensorExamples(x[n:], y[n:])
    )


def case(name: str, seed: int = 0) -> Case:
    """One of the cases, in float64."""
    torch.manual_seed(seed)
    if name == "mlp":
        return _classes(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 6)
    if name == "positions":
        return _classes(Pooled((4, 5, 3)), 6, 4)
    if name == "short positions":  # gradients that are smaller factored than dense
        return _classes(Pooled((7, 8, 3)), 2, 7)
    if name == "conv":
        return _classes(GroupedConv(), 2, 4, 5)
    if name == "norm":
        return _classes(
            nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), 6
        )
    if name == "regression":
        x = torch.randn(24, 4).double()
        y = x @ torch.randn(4, 2).double() + torch.randn(24, 2).double()
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        return Case(
            model, Regression(), TensorExamples(x[:20], y[:20]), TensorExamples(x[20:], y[20:])
        )
    if name == "lm":
        sequences = [torch.randint(7, (n,)).tolist() for n in (4, 3, 5, 2, 5, 3)]
        return Case(TinyLM().double(), CausalLM(), Tokens(sequences[:4]), Tokens(sequences[4:]))
    raise ValueError(name)


@cache
def shared(name: str) -> Case:
    """A case that all tests share, as long as they leave its model alone."""
    return case(name)


CLASSIFIERS = ("mlp", "positions", "short positions", "conv", "norm")
EVERY = (*CLASSIFIERS, "regression", "lm")


def autograd_rows(
    fitted: Fit, value: Callable[[nn.Module, Any], Tensor], examples: Examples
) -> dict[str, Tensor]:
    """Gradients of `value(model, batch of one)`, one example after another, layer by layer (n, numel)."""
    named = dict(fitted.model.named_parameters())
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in fitted.followed}
    for i in range(len(examples)):
        names = [n for layer in fitted.followed for n in layer.parameters]
        grads = torch.autograd.grad(
            value(fitted.model, examples.batch([i])).sum(),
            [named[n] for n in names],
            allow_unused=True,
        )
        each = {
            n: (torch.zeros_like(named[n]) if g is None else g)[None]
            for n, g in zip(names, grads, strict=True)
        }
        for layer in fitted.followed:
            found[layer.name].append(layer.from_parameters(each).flatten(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def loss_gradients(fitted: Fit, examples: Examples | None = None) -> Tensor:
    """Gradients of the loss of each example (n, parameter), layers side by side."""
    examples = fitted.train if examples is None else examples
    return side_by_side(autograd_rows(fitted, fitted.task.loss, examples))


def side_by_side(blocks: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(blocks.values()), dim=1)


def dense_gauss_newton(fitted: Fit) -> Tensor:
    """The mean of JᵀHJ over the examples, from whole Jacobians and Hessians of the loss in the outputs."""
    layers = list(fitted.followed)
    names = [n for layer in layers for n in layer.parameters]
    parameters = {n: p.detach() for n, p in fitted.model.named_parameters() if n in names}
    total: Tensor | float = 0.0
    for i in range(len(fitted.train)):
        batch = fitted.train.batch([i])
        prediction = fitted.task.predict(fitted.model, batch)
        outputs = prediction.outputs.detach()

        def run(values: dict[str, Tensor], batch: Any = batch) -> Tensor:
            call = _Outputs(fitted.model, fitted.task)
            return functional_call(call, {f"model.{n}": v for n, v in values.items()}, (batch,))

        def loss(z: Tensor, prediction: Any = prediction) -> Tensor:
            field = "mean" if isinstance(prediction, Gaussian) else "logits"
            return type(prediction)(**{**vars(prediction), field: z}).loss().sum()

        jacobian = jacrev(run)(parameters)
        rows = {n: j.reshape(outputs.numel(), *parameters[n].shape) for n, j in jacobian.items()}
        J = torch.cat([layer.from_parameters(rows).flatten(1) for layer in layers], dim=1)
        H = torch.autograd.functional.hessian(loss, outputs).reshape(2 * (outputs.numel(),))
        total = total + J.mT @ H @ J
    return total / len(fitted.train)  # type: ignore[return-value]


class _Outputs(nn.Module):
    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Tensor:
        return self.task.predict(self.model, batch).outputs


def blocks_of(matrix: Tensor, fitted: Fit) -> dict[str, Tensor]:
    """The diagonal blocks of a matrix over all parameters, by layer."""
    found, start = {}, 0
    for layer in fitted.followed:
        stop = start + layer.numel
        found[layer.name] = matrix[start:stop, start:stop]
        start = stop
    return found


def block_matrices(fitted: Fit) -> dict[str, Tensor]:
    """The matrices that a layerwise curvature stands for, from its eigenbases and eigenvalues alone."""
    found = {}
    for layer in fitted.followed:
        Q_A, Q_G = fitted.curvature.bases[layer.name]
        eigenvalues = fitted.curvature.eigenvalues[layer.name].double()
        groups, out, in_ = layer.shape
        Q_A = torch.eye(in_).double() if Q_A is None else Q_A
        Q_G = torch.eye(out).double() if Q_G is None else Q_G
        parts = []
        for group in range(groups):
            q_a, q_g, e = (x[group] if x.ndim == 3 else x for x in (Q_A, Q_G, eigenvalues))
            Q = torch.kron(q_g.contiguous(), q_a.contiguous())
            parts.append(Q @ torch.diag(e.flatten()) @ Q.mT)
        found[layer.name] = torch.block_diag(*parts)
    return found


def layer_of(name: str, out: int, in_: int, groups: int = 1, group: str | None = None) -> Layer:
    """A layer without a model."""
    return Layer(
        name,
        (Use(name, "linear"),),
        (groups, out, in_),
        (name,),
        ((out, in_),),
        "linear",
        group or name,
    )


def random_rows(
    layer: Layer, n: int, pos: int, *, fold: int = 0, start: int = 0, weights: Tensor | None = None
) -> Rows:
    """Rows of n examples, numbered from `start`."""
    groups, out, in_ = layer.shape
    lead = (groups,) if groups > 1 else ()
    info = BatchInfo(torch.arange(start, start + n), fold, weights)
    a, g = (torch.randn(*lead, n, pos, d).double() for d in (in_, out))
    return Rows(layer, a, g, info)
