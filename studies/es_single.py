"""Evolution strategies in unrolled computation, after Vicol, Kolter and Swersky (2023), arXiv:2304.11153.

Four questions of the paper at a small scale, on one thread: what truncation does to the influence-balancing system, how
the variance grows with the number of truncations, how fast a learning-rate schedule is found, and what the same
estimator does for the weights of four sources of data, one of them with shuffled labels.

    python studies/es_single.py            # all four tables
    python studies/es_single.py schedule --seeds 3
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from headwater.curate import (
    PES,
    DataWeights,
    ESSingle,
    HyperGradient,
    InnerProblem,
    TruncatedES,
    Unrolled,
    descend,
    functional_model,
    schedule_problem,
    source_weights,
    weighting_problem,
)
from headwater.curate.base import pack
from headwater.data.images import digits, mnist5000
from headwater.models.vision import mlp
from headwater.numerics.resampling import Estimate, mean_interval

SEEDS = range(5)  # --seeds


def interval(values: list[float]) -> Estimate:
    """The mean over seeds with Student's 95 % interval."""
    return mean_interval(torch.tensor(values, dtype=torch.float64))


def influence_balancing(horizon: int = 300, n: int = 23, positive: int = 10) -> InnerProblem:
    """A linear system in which θ helps at first and harms later: the sign that counts comes late."""
    A = torch.diag(torch.full((n,), 0.5)) + torch.diag(torch.full((n - 1,), 0.5), 1)
    sign = torch.cat([torch.ones(positive), -torch.ones(n - positive)])
    return InnerProblem(
        init=lambda seed: {"s": torch.ones(n)},
        step=lambda s, u, b, t: {"s": A @ s["s"] + u["theta"] * sign},
        outer=lambda s, u, b, t: (s["s"][0] - 1).square() / 2,
        horizon=horizon,
        objective="mean",
    )


def balance() -> None:
    """θ begins at 0.5; every method takes 6,000 steps of the inner problem a particle."""
    problem, start = influence_balancing(), {"theta": torch.tensor(0.5)}
    grid = torch.linspace(-0.3, 0.5, 81)
    losses = [problem.retrain({"theta": g})[1] for g in grid]
    best = min(range(81), key=losses.__getitem__)
    print(f"best θ {grid[best]:.2f}, loss {losses[best]:.3f}; at the start 0.50, ", end="")
    print(f"{problem.retrain(start)[1]:.2f}\n")
    print("| method | θ [95 %] | loss after retraining |")
    print("|---|---|---|")
    rows: dict[str, tuple[HyperGradient, int]] = {
        "truncated backpropagation, 1 step": (Unrolled(start="online", inner_steps=1), 1),
        "truncated backpropagation, 10 steps": (Unrolled(start="online", inner_steps=10), 10),
        "truncated backpropagation, 100 steps": (Unrolled(start="online", inner_steps=100), 100),
        "truncated ES, 10 steps, 4 particles": (TruncatedES(n_particles=4), 10),
        "PES, 10 steps, 4 particles": (PES(n_particles=4), 10),
        "PES, 10 steps, 400 particles": (PES(n_particles=400), 10),
        "ES-Single, 10 steps, 4 particles": (ESSingle(n_particles=4), 10),
        "ES-Single, 10 steps, 400 particles": (ESSingle(n_particles=400), 10),
    }
    for name, (method, k) in rows.items():
        found = [
            descend(problem, start, method, steps=6_000 // k, lr=4e-4 * k, clip=10.0, seed=seed)
            for seed in SEEDS
        ]
        theta = interval([float(r.meta["theta"]) for r in found])
        loss = interval([r.retrained[0] for r in found])
        print(f"| {name} | {theta} | {loss} |", flush=True)


def rows_of_digits(hidden: int = 16) -> tuple[InnerProblem, dict[str, Tensor]]:
    """A recurrent network that reads images of digits row after row, and guesses after each."""
    x, y = digits().tensors
    rows = x[:64].reshape(64, 8, 8)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

    meta = {"W": drawn(hidden, hidden), "U": drawn(8, hidden), "V": drawn(hidden, 10)}

    def step(state: dict, u: dict, batch: object, t: int) -> dict:
        return {"h": torch.tanh(state["h"] @ u["W"] + rows[:, t % 8] @ u["U"])}

    return InnerProblem(
        init=lambda seed: {"h": torch.zeros(64, hidden)},
        step=step,
        outer=lambda s, u, b, t: cross_entropy(s["h"] @ u["V"], y[:64]),
        horizon=64,
        objective="mean",
    ), meta


def variance() -> None:
    """Total variance of one antithetic pair, in units of (P + 1)·‖gradient‖²."""
    problem, meta = rows_of_digits()
    dim = sum(v.numel() for v in meta.values())
    final = InnerProblem(**{**vars(problem), "objective": "final"})
    print("| loss | truncations | ES-Single | PES | truncated ES |")
    print("|---|---|---|---|---|")
    for name, p in (("mean over steps", problem), ("last step only", final)):
        gradient = Unrolled().estimate(p, meta).gradient
        size = (dim + 1) * float(sum(g.square().sum() for g in gradient.values()))
        for n in (1, 4, 16, 64):
            cells = []
            for method in (ESSingle, PES, TruncatedES):
                estimator = method(n_particles=1000, sigma=0.003, truncation=64 // n)
                cells.append(f"{estimator.estimate(p, meta).variance * 500 / size:.2f}")
            print(f"| {name} | {n} | {' | '.join(cells)} |", flush=True)


LOG_LR = torch.linspace(-0.9, 0.6, 16)  # the grid: below and above, every loss is 20 % worse
LOG_DECAY = torch.tensor([-4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0])
BOX = (9.2, 6.0)  # what random search draws from: log lr in -6.9 .. 2.3, log decay in -4 .. 2
RUNS = range(10_000, 10_005)  # initial weights and orders of the data that judge a schedule


def judged(problem: InnerProblem, points: Tensor) -> Tensor:
    """The loss of fresh training under each (log lr, log decay), a mean over RUNS."""
    total = torch.zeros(len(points))
    for seed in RUNS:
        batches = problem.batches(seed, 0, problem.horizon)
        fresh = {k: v.expand(len(points), *v.shape) for k, v in problem.init(seed).items()}

        def one(state: dict, point: Tensor, batches: list = batches) -> Tensor:
            meta = {"log_lr": point[0], "log_decay": point[1]}
            return problem.unroll(state, meta, batches, start=0)[1]

        with torch.no_grad():
            total += vmap(one)(fresh, points) / problem.horizon / len(RUNS)
    return total.nan_to_num(torch.inf)


def share_of_box(good: Tensor) -> float:
    """Chance that a random trial is good, by the area of the grid's cells around good points."""
    rows, columns = (
        torch.cat([v[:1], (v[1:] + v[:-1]) / 2, v[-1:]]).diff() for v in (LOG_LR, LOG_DECAY)
    )
    return float((rows[:, None] * columns * good).sum()) / (BOX[0] * BOX[1])


def schedule() -> None:
    """Learning a learning rate and its decay from 0.01 / (1 + t/T), against random search, in inner steps.

    A schedule is judged by five fresh trainings, outside the budget, on the grid and after every second update
    alike. Random search is exact: trials are independent, so it takes 300 / p steps in the mean, where p is the
    share of its box that is within 5 % of the grid's best. "Never" counts as the budget.
    """
    x, y = digits().tensors
    start = {"log_lr": torch.tensor(0.01).log(), "log_decay": torch.tensor(0.0)}
    methods: dict[str, HyperGradient] = {  # chosen on seeds 100 to 102
        "ES-Single, 4 staggered pairs": ESSingle(n_particles=8, sigma=0.1, stagger=4),
        "ES-Single, 4 pairs in lockstep": ESSingle(n_particles=8, sigma=0.1),
        "PES, 4 staggered pairs": PES(n_particles=8, sigma=0.1, stagger=4),
    }
    budget = 6_400
    reached: dict[str, list[float]] = {name: [] for name in methods}
    later: dict[str, list[float]] = {name: [] for name in methods}
    share: list[float] = []
    for seed in SEEDS:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:900]
        data = x[order], y[order]
        problem = schedule_problem(_network(seed), data, steps=300, decay_steps=300.0)
        grid = judged(problem, torch.cartesian_prod(LOG_LR, LOG_DECAY))
        best = float(grid.min())
        share.append(share_of_box((grid <= 1.05 * best).reshape(len(LOG_LR), -1)))
        for name, method in methods.items():
            path: list[Tensor] = []
            found = descend(
                problem,
                start,
                method,
                steps=budget // 80,
                lr=0.1,
                clip=1.0,
                seed=seed,
                watch=lambda number, meta, state, path=path: path.append(pack(meta).clone()),
            )
            ratios = (judged(problem, torch.stack(path[1::2])) / best).tolist()
            cost = [c for c, r in zip(found.inner_steps[1::2], ratios, strict=True) if r <= 1.05]
            reached[name].append(float(cost[0]) if cost else float(budget))
            later[name].append(float(torch.tensor(ratios[len(ratios) // 2 :]).median()))
        print(f"seed {seed}: best {best:.3f}, share {share[-1]:.4f}", flush=True)
    expected = [300 / p for p in share]
    print("\n| method | inner steps until within 5 % of the grid's best | mean [95 %] | ", end="")
    print("median loss / best, later half |\n|---|---|---|---|")
    for name, values in reached.items():
        told = ", ".join("never" if v >= budget else f"{v:,.0f}" for v in values)
        print(f"| {name} | {told} | {interval(values)} | {interval(later[name])} |")
    told = ", ".join(f"{v:,.0f}" for v in expected)
    print(f"| random search, expected | {told} | {interval(expected)} | |\n")
    print(f"Share of the box within 5 %: {interval(share)}")
    for name, values in reached.items():
        gain = interval([a - b for a, b in zip(expected, values, strict=True)])
        luck = [1 - (1 - p) ** (v // 300) for p, v in zip(share, values, strict=True)]
        print(f"{name}: random search takes {gain} steps more, paired by seed; ", end="")
        print(f"it is there as early with probability {interval(luck)}")


def _network(seed: int) -> Callable[[int], torch.nn.Module]:
    """A small network; the seeds of different studies give different initial weights."""
    return lambda number: mlp([64, 32, 10], seed=100 * seed + number)


def small_mnist() -> tuple[Tensor, Tensor]:
    """MNIST's digits at the size and range of scikit-learn's: the middle 20 x 20, in 8 x 8."""
    x, y = mnist5000().tensors
    grey = (x * 0.3081 + 0.1307).reshape(-1, 1, 28, 28)[..., 4:24, 4:24]
    small = adaptive_avg_pool2d(grey, 8).flatten(1)
    return small / small.amax(1, keepdim=True), y


def mixture(seed: int) -> tuple[tuple, Tensor, tuple, tuple]:
    """Four sources of 300 images: two of digits, MNIST, and digits with shuffled labels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = digits().tensors
    order = torch.randperm(len(x), generator=generator)
    first, second, bad, validation, test = order.split([300, 300, 300, 200, len(x) - 1100])
    x_mnist, y_mnist = small_mnist()
    other = torch.randperm(len(x_mnist), generator=generator)[:300]
    shuffled = y[bad][torch.randperm(300, generator=generator)]
    images = torch.cat([x[first], x[second], x_mnist[other], x[bad]])
    labels = torch.cat([y[first], y[second], y_mnist[other], shuffled])
    source = torch.arange(4).repeat_interleave(300)
    return (images, labels), source, (x[validation], y[validation]), (x[test], y[test])


def accuracy(make: Callable, weights: dict, data: tuple) -> float:
    _, outputs = functional_model(make)
    return float((outputs(weights, data[0]).argmax(-1) == data[1]).double().mean())


def sources() -> dict[str, list[float]]:
    """Shares of the four sources, and test accuracy of retraining with them."""
    estimators: dict[str, tuple[HyperGradient, int, float]] = {
        "ES-Single, 16 particles, 10 steps": (ESSingle(n_particles=16, sigma=0.3), 300, 0.05),
        "PES, 16 particles, 10 steps": (PES(n_particles=16, sigma=0.3), 300, 0.05),
        "unrolled, last 20 steps": (Unrolled(truncation=20), 40, 0.3),
        "unrolled, all steps": (Unrolled(), 40, 0.3),
    }
    shares: dict[str, list[list[float]]] = {name: [] for name in estimators}
    right: dict[str, list[float]] = {name: [] for name in estimators}
    right |= {"uniform shares": [], "the shuffled source left out": []}
    for seed in SEEDS:
        train, source, validation, test = mixture(seed)
        make = _network(seed)
        problem = weighting_problem(make, train, source, validation, lr=0.3, steps=200)
        fixed = {
            "uniform shares": torch.zeros(4),
            "the shuffled source left out": torch.tensor([0.0, 0.0, 0.0, -30.0]),
        }
        for name, (estimator, steps, lr) in estimators.items():
            method = DataWeights(
                estimator=estimator, outer_steps=steps, outer_lr=lr, lr=0.3, steps=200, seed=seed
            )
            fixed[name] = method.learn(make, train, source, validation).meta["logits"]
            shares[name].append((source_weights(fixed[name], "share") / 4).tolist())
        for name, logits in fixed.items():
            weights, _ = problem.retrain({"logits": logits}, seed=77)
            right[name].append(accuracy(make, weights, test))
    print("| weights | digits | digits | MNIST | shuffled labels | test accuracy [95 %] |")
    print("|---|---|---|---|---|---|")
    for name, values in right.items():
        told = ["", "", "", ""]
        if name in shares:
            told = [f"{v:.3f}" for v in torch.tensor(shares[name]).mean(0).tolist()]
            told[3] += f" (at most {max(s[3] for s in shares[name]):.3f})"
        print(f"| {name} | {' | '.join(told)} | {interval(values)} |", flush=True)
    learned = "ES-Single, 16 particles, 10 steps"
    gain = [a - b for a, b in zip(right[learned], right["uniform shares"], strict=True)]
    print(f"\nES-Single over uniform shares, paired: {interval(gain)}")
    return right


TABLES = {"balance": balance, "variance": variance, "schedule": schedule, "sources": sources}


def main(names: list[str]) -> None:
    global SEEDS
    if "--seeds" in names:
        at = names.index("--seeds")
        SEEDS, names = range(int(names[at + 1])), names[:at] + names[at + 2 :]
    torch.set_num_threads(1)
    for name in names or TABLES:
        started = time.perf_counter()
        print(f"\n## {name}: {TABLES[name].__doc__}\n", flush=True)
        TABLES[name]()
        print(f"\n{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
