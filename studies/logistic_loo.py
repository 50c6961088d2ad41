r"""Leave-one-out retraining of logistic regression, exactly.

The objective is strictly convex, so there is one model for each training set and "what would have
happened without this example" has one answer. With W the weights and b the biases, minimised is

$$F(W, b) = \frac{1}{N} \sum_{i=1}^{N} L_i(W, b) + \frac{\rho}{2} (\|W\|^2 + \|b\|^2)$$

over 4,000 MNIST images; then again for each of some examples with that example taken out. The
changes of the queries' losses are what influence functions approximate to first order.

    python studies/logistic_loo.py --out runs/logistic-loo.safetensors
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from headwater.data.images import mnist5000


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """A logistic regression, and the same without each of some training examples.

    Args:
        weight: Weights of the model of all examples, as `torch.nn.Linear` holds them.
        bias: Its biases.
        l2: The coefficient ρ of the objective.
        removed: Numbers of the training examples that were left out, one at a time.
        delta: Query loss without the example minus with it, the sum of the others' losses still
            divided by N: the example's weight set to 0.
        delta_mean: The same with the objective a mean over the N - 1 examples left.
        gradient_norm: Greatest gradient norm left at any solution.
    """

    weight: Float[Tensor, "class in"]
    bias: Float[Tensor, " class"]
    l2: float
    removed: Int[Tensor, " removed"]
    delta: Float[Tensor, "removed query"]
    delta_mean: Float[Tensor, "removed query"]
    gradient_norm: float


def with_ones(x: Float[Tensor, "n in"]) -> Float[Tensor, "n in_1"]:
    """Inputs in float64 with a last coordinate of one, which multiplies the bias."""
    return torch.cat([x.double(), x.new_ones(len(x), 1).double()], dim=1)


def gradient(
    theta: Float[Tensor, "model class in_1"],
    x: Float[Tensor, "n in_1"],
    y: Int[Tensor, " n"],
    weights: Float[Tensor, "model n"],
    l2: float,
) -> Float[Tensor, "model class in_1"]:
    """Gradient of Σ_i w_i L_i + (ρ/2)‖θ‖² for several models at once."""
    error = torch.einsum("mci,ni->mnc", theta, x).softmax(-1) - one_hot(y, theta.shape[1])
    return torch.einsum("mnc,ni->mci", error * weights[..., None], x) + l2 * theta


def hessian(
    theta: Float[Tensor, "class in_1"], x: Float[Tensor, "n in_1"], l2: float
) -> Float[Tensor, "p p"]:
    """Hessian of (1/N) Σ_i L_i + (ρ/2)‖θ‖²: blocks X^T diag(p_c (δ_cd - p_d)) X / N."""
    n_classes, width = theta.shape
    p = (x @ theta.T).softmax(-1)
    result = torch.empty(n_classes, width, n_classes, width, dtype=x.dtype)
    for c in range(n_classes):
        for d in range(c + 1):
            curvature = p[:, c] * (float(c == d) - p[:, d]) / len(x)
            block = x.T @ (x * curvature[:, None])
            result[c, :, d], result[d, :, c] = block, block
    result = result.reshape(theta.numel(), theta.numel())
    result.diagonal().add_(l2)
    return result


def minimise(
    x: Float[Tensor, "n in_1"], y: Int[Tensor, " n"], n_classes: int, l2: float, tolerance: float
) -> tuple[Float[Tensor, "class in_1"], Float[Tensor, "p p"]]:
    """The minimiser by Newton's method with halved steps, and a Cholesky factor of its Hessian."""
    weights = x.new_full((1, len(x)), 1 / len(x))

    def objective(theta: Tensor) -> float:
        return (cross_entropy(x @ theta.T, y) + l2 / 2 * theta.square().sum()).item()

    theta, factor, before = x.new_zeros(n_classes, x.shape[1]), None, torch.inf
    for _ in range(100):
        slope = gradient(theta[None], x, y, weights, l2)[0]
        left = slope.norm().item()
        if factor is not None and left <= tolerance:
            return theta, factor
        if factor is None or left > before / 10:  # the Hessian is kept while it serves
            factor = torch.linalg.cholesky(hessian(theta, x, l2))
        step = torch.cholesky_solve(slope.reshape(-1, 1), factor).reshape(theta.shape)
        size, value, before = 1.0, objective(theta), left
        while objective(theta - size * step) > value + 1e-12 and size > 1e-6:
            size /= 2
        theta = theta - size * step
    raise RuntimeError(f"Newton's method left a gradient of {left:.1e} after 100 steps.")


def retrain(
    theta: Float[Tensor, "class in_1"],
    factor: Float[Tensor, "p p"],
    x: Float[Tensor, "n in_1"],
    y: Int[Tensor, " n"],
    removed: Int[Tensor, " model"],
    divisor: int,
    l2: float,
    tolerance: float,
) -> tuple[Float[Tensor, "model class in_1"], float]:
    r"""Minimisers without one example each, and the greatest gradient norm left.

    Newton's iteration from $\theta$ with one Hessian an example, that of the full objective less
    the example's own part $U U^T$, where $U = S \otimes x_i / \sqrt{N}$ and
    $S S^T = \mathrm{diag}(p) - p p^T$:

    $$(H - U U^T)^{-1} = H^{-1} + H^{-1} U (I - U^T H^{-1} U)^{-1} U^T H^{-1}.$$
    """
    n, n_models = len(x), len(removed)
    weights = x.new_full((n_models, n), 1 / divisor)
    weights[torch.arange(n_models), removed] = 0

    p = (x[removed] @ theta.T).softmax(-1)
    root = (torch.eye(len(theta), dtype=x.dtype) - p[:, :, None]) * p[:, None].sqrt()
    U = torch.einsum("mcd,mi->mcid", root, x[removed]).flatten(1, 2) / n**0.5
    HU = torch.cholesky_solve(U.transpose(0, 1).flatten(1), factor)
    HU = HU.reshape(theta.numel(), n_models, -1).transpose(0, 1)
    inner = torch.eye(len(theta), dtype=x.dtype) - U.mT @ HU

    several = theta.repeat(n_models, 1, 1)
    for _ in range(100):
        slope = gradient(several, x, y, weights, l2).flatten(1)
        left = slope.norm(dim=1).max().item()
        if left <= tolerance:
            return several, left
        step = torch.cholesky_solve(slope.T, factor).T
        step = step + (HU @ torch.linalg.solve(inner, HU.mT @ slope[..., None]))[..., 0]
        several = several - step.reshape(several.shape)
    raise RuntimeError(f"Retraining left a gradient of {left:.1e} after 100 steps.")


def leave_one_out(
    x: Float[Tensor, "n in"],
    y: Int[Tensor, " n"],
    x_query: Float[Tensor, "query in"],
    y_query: Int[Tensor, " query"],
    removed: Int[Tensor, " removed"],
    *,
    l2: float,
    n_classes: int = 10,
    tolerance: float = 1e-12,
    n_parallel: int = 50,
) -> LeaveOneOut:
    """Train on all examples and without each of `removed`, in float64.

    Args:
        x: Training inputs.
        y: Training classes.
        x_query: Query inputs.
        y_query: Query classes.
        removed: Numbers of the training examples to leave out, one at a time.
        l2: Coefficient of the penalty, biases included.
        n_classes: Number of classes.
        tolerance: Gradient norm at which a solution counts as one.
        n_parallel: Examples left out side by side.
    """
    x, x_query = with_ones(x), with_ones(x_query)
    n = len(x)
    theta, factor = minimise(x, y, n_classes, l2, tolerance)

    def losses(several: Tensor) -> Tensor:
        logits = torch.einsum("mci,qi->mcq", several, x_query)
        return cross_entropy(logits, y_query.expand(len(several), -1), reduction="none")

    deltas, worst = {"delta": [], "delta_mean": []}, 0.0
    for some in removed.split(n_parallel):
        for name, divisor in (("delta", n), ("delta_mean", n - 1)):
            several, left = retrain(theta, factor, x, y, some, divisor, l2, tolerance)
            deltas[name].append(losses(several) - losses(theta[None]))
            worst = max(worst, left)
    return LeaveOneOut(
        weight=theta[:, :-1].contiguous(),
        bias=theta[:, -1].contiguous(),
        l2=l2,
        removed=removed,
        gradient_norm=worst,
        **{name: torch.cat(values) for name, values in deltas.items()},
    )


def influence(
    loo: LeaveOneOut,
    x: Float[Tensor, "n in"],
    y: Int[Tensor, " n"],
    x_query: Float[Tensor, "query in"],
    y_query: Int[Tensor, " query"],
) -> Float[Tensor, "removed query"]:
    """First-order prediction of `delta` by the dense Hessian: g_q^T H^{-1} g_i / N."""
    x, x_query = with_ones(x), with_ones(x_query)
    theta = torch.cat([loo.weight, loo.bias[:, None]], dim=1)

    def gradients(inputs: Tensor, classes: Tensor) -> Tensor:
        error = (inputs @ theta.T).softmax(-1) - one_hot(classes, len(theta))
        return (error[:, :, None] * inputs[:, None]).flatten(1)

    factor = torch.linalg.cholesky(hessian(theta, x, loo.l2))
    solved = torch.cholesky_solve(gradients(x_query, y_query).T, factor)
    return gradients(x[loo.removed], y[loo.removed]) @ solved / len(x)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to train and leave out.

    Args:
        out: The file of results.
        n_train: Training images.
        n_query: Queries.
        n_removed: Training images left out, one at a time, drawn at random.
        l2: Coefficient of the penalty, biases included.
        threads: Threads of PyTorch.
    """

    out: Path
    n_train: int = 4000
    n_query: int = 50
    n_removed: int = 200
    l2: float = 0.01
    threads: int = 1


def main(plan: Plan) -> None:
    torch.set_num_threads(plan.threads)
    start = time.perf_counter()
    images, labels = mnist5000().tensors
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, query = order[: plan.n_train], order[-1000:][: plan.n_query]
    generator = torch.Generator().manual_seed(1)
    removed = torch.randperm(plan.n_train, generator=generator)[: plan.n_removed].sort().values
    x, y, x_query, y_query = images[train], labels[train], images[query], labels[query]
    loo = leave_one_out(x, y, x_query, y_query, removed, l2=plan.l2)

    result = {
        "x": x,
        "y": y,
        "x_query": x_query,
        "y_query": y_query,
        "weight": loo.weight,
        "bias": loo.bias,
        "l2": torch.tensor(loo.l2, dtype=torch.float64),
        "removed": loo.removed,
        "delta": loo.delta,
        "delta_mean": loo.delta_mean,
    }
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    partial = plan.out.with_suffix(".partial")
    save_file(result, partial)
    os.replace(partial, plan.out)

    predicted = influence(loo, x, y, x_query, y_query)
    right = ((x_query.double() @ loo.weight.T + loo.bias).argmax(-1) == y_query).double().mean()
    pairs = torch.stack([predicted.flatten(), loo.delta.flatten()])
    print(f"{right:.2f} of the queries right; greatest gradient norm {loo.gradient_norm:.0e}")
    print(f"correlation of first-order influence with the truth: {torch.corrcoef(pairs)[0, 1]:.5f}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Plan, description=__doc__))
