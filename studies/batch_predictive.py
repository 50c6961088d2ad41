"""Do promises about batches hold on real data, and what do they cost?

Two questions, of Lee, Tchetgen Tchetgen and Dobriban (2024), arXiv:2409.13990, section 5:

- coverage: how often do intervals cover 90 % of a batch of 100 examples? Ridge regression on diabetes (scikit-learn),
  Boston housing and Auto MPG (mlxtend), random splits into training, 200 calibration and 100 test examples; beside
  split conformal prediction, whose exact probability is known too.
- claims: a tenth of the labels of real digits is made wrong; every image gets the margin by which kernel ridge
  regression, fitted on other folds, prefers another label. How many wrong labels are claimed, and how often are there
  more false claims than promised; beside conformal selection (Jin and Candès 2023, arXiv:2210.01408), which
  controls the expected share of false claims, and beside choosing a threshold after counting the claims.

Everything is random only through splits and draws of labels, so that intervals are over those (Wilson, 95 %).

    python studies/batch_predictive.py
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from headwater.calibrate import (
    claim_curve,
    coverage_bound,
    draw_sample,
    select,
    split_conformal_coverage,
)
from headwater.data.images import digits, mnist5000
from headwater.numerics.batch_ranks import rank_quantile


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        splits: Random splits of each regression set.
        noises: Draws of wrong labels.
        draws: Draws of verified examples for each of those.
        wrong: Share of wrong labels.
        images: Sets of images.
    """

    splits: int = 300
    noises: int = 5
    draws: int = 100
    wrong: float = 0.1
    images: tuple[str, ...] = ("digits", "mnist")


def wilson(hits: int, n: int) -> str:
    """A share with its 95 % interval."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return f"{p:.3f} [{low:.3f}, {high:.3f}]"


def mean_of(values: list[float]) -> str:
    """A mean with its 95 % interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.3f} ± {1.96 * x.std() / math.sqrt(len(x)):.3f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# Coverage of a batch


def regression_sets() -> dict[str, tuple[Tensor, Tensor]]:
    """Features and outcomes of three real sets that come inside packages."""
    found = {}
    for name, package, files in (
        ("diabetes", "sklearn", {"diabetes_data_raw.csv.gz": None, "diabetes_target.csv.gz": None}),
        ("Boston", "mlxtend", {"boston_housing.csv": ","}),
        ("Auto MPG", "mlxtend", {"autompg.csv.gz": ","}),
    ):
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{package!r} holds the {name} data; run: pip install {package}")
        folder = Path(spec.submodule_search_locations[0])
        folder /= "datasets/data" if package == "sklearn" else "data/data"
        tables = [np.genfromtxt(folder / f, delimiter=d) for f, d in files.items()]
        table = torch.from_numpy(np.hstack([t.reshape(len(t), -1) for t in tables]))
        table = table[:, ~table.isnan().all(0)]  # names of cars are no numbers
        found[name] = (table[:, :-1], table[:, -1])
    return found


def residuals(x: Tensor, y: Tensor, train: Tensor, held: Tensor) -> Tensor:
    """|outcome - prediction| of held examples by ridge regression on standardised features."""
    mean, std = x[train].mean(0), x[train].std(0).clamp(min=1e-9)
    a, b = ((torch.cat([(x[i] - mean) / std, torch.ones(len(i), 1)], 1)) for i in (train, held))
    a, b = a.double(), b.double()
    weights = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]), a.T @ y[train].double())
    return (y[held] - b @ weights).abs()


def coverage(plan: Plan, say: Callable[[str], None]) -> dict[str, tuple[int, int]]:
    """How often 90 % of the batch is covered, by batch predictive inference and by split conformal prediction."""
    n, m, delta, alpha = 200, 100, 0.1, 0.1
    exact = rank_quantile(n, m, 90, alpha)[1]
    split = split_conformal_coverage(n, m, delta)
    say(f"Intervals for {m} examples from {n}: is {1 - delta:.0%} of the batch covered?")
    say(
        row("data", "training examples", "batch PI", "split conformal", "width of batch PI / split")
    )
    say(row(*["---"] * 5))
    say(row("exact", "", f"{float(exact):.3f}", f"{split:.3f}", ""))
    found = {}
    for name, (x, y) in regression_sets().items():
        hits, widths = [0, 0], []
        for seed in range(plan.splits):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            held = order[-(n + m) :]
            scores = residuals(x, y, order[: -(n + m)], held)
            limits = (
                coverage_bound(scores[:n], m, delta=delta, alpha=alpha).upper,
                scores[:n].sort().values[math.ceil(0.9 * (n + 1)) - 1].item(),
            )
            for i, limit in enumerate(limits):
                hits[i] += int((scores[n:] <= limit).sum()) >= 90
            widths.append(limits[0] / limits[1])
        found[name] = (hits[0], hits[1])
        cells = (wilson(h, plan.splits) for h in hits)
        say(row(name, str(len(x) - n - m), *cells, mean_of(widths)))
    return found


# Claims about labels


def wrong_labels(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which a share was replaced by other ones, and which."""
    generator = torch.Generator().manual_seed(seed)
    bad = torch.zeros(len(y), dtype=torch.bool)
    bad[torch.randperm(len(y), generator=generator)[: round(share * len(y))]] = True
    moved = (y + torch.randint(1, 10, (len(y),), generator=generator)) % 10
    return torch.where(bad, moved, y), bad


def flag_scores(x: Tensor, labels: list[Tensor], folds: int = 5) -> list[Tensor]:
    """By how much an out-of-fold prediction prefers another label to the given one, for each set of labels."""
    x = x.double()
    squares = x.square().sum(1)
    distance = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    kernel = (-distance / (0.5 * distance.mean())).exp()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(99))
    targets = torch.cat([torch.nn.functional.one_hot(y, 10).double() - 0.1 for y in labels], 1)
    outputs = torch.empty_like(targets)
    for held in order.tensor_split(folds):
        kept = torch.ones(len(x), dtype=torch.bool).index_fill(0, held, False).nonzero().squeeze(1)
        system = kernel[kept][:, kept]
        system.diagonal().add_(0.1)
        solved = torch.cholesky_solve(targets[kept], torch.linalg.cholesky(system))
        outputs[held] = kernel[held][:, kept] @ solved
    scores = []
    for y, own in zip(labels, outputs.split(10, 1), strict=True):
        given = own.gather(1, y[:, None])[:, 0]
        scores.append(own.scatter(1, y[:, None], -math.inf).amax(1) - given)
    return scores


def conformal_selection(scores: Tensor, right: Tensor, level: float) -> Tensor:
    """Which of the scores are selected by Benjamini and Hochberg's procedure on conformal p-values.

    Args:
        scores: Of unverified examples.
        right: Of verified examples, minus infinity for those that are wrong.
        level: False discovery rate.
    """
    ordered = right.sort().values
    at_least = len(ordered) - torch.searchsorted(ordered, scores)
    p_values = (1 + at_least) / (len(ordered) + 1)
    ranked = p_values.sort().values
    passed = (ranked <= level * torch.arange(1, len(scores) + 1) / len(scores)).nonzero()
    limit = ranked[passed[-1, 0]] if len(passed) else -1.0
    return p_values <= limit


@dataclass
class Tally:
    """What came of many draws."""

    broken: int = 0
    draws: int = 0
    claims: int = 0
    false: int = 0
    wrong: int = 0

    def add(self, claims: int, false: int, wrong: int, broken: bool) -> None:
        """One more draw: claims, false ones, wrong examples that there were, and whether the promise was broken."""
        self.draws += 1
        self.claims += claims
        self.false += false
        self.wrong += wrong
        self.broken += broken

    def cells(self) -> list[str]:
        """Probability of a broken promise, claims, false claims, and the share of wrong examples that is found."""
        found = (self.claims - self.false) / max(self.wrong, 1)
        return [
            wilson(self.broken, self.draws),
            f"{self.claims / self.draws:.1f}",
            f"{self.false / self.draws:.2f}",
            f"{found:.3f}",
        ]


HEADER = ("data", "promise", "method", "broken", "claims", "false", "wrong ones found")


def numbers(
    plan: Plan, name: str, sets: list[tuple[Tensor, Tensor]], say: Callable[[str], None]
) -> dict[int, tuple[Tally, Tally]]:
    """At most eta false claims, beside conformal selection with as many false claims on average."""
    n, m, alpha = 500, 400, 0.1
    etas, levels = (0, 5, 20), [0.005 * 1.12**i for i in range(48)]
    ours = {eta: Tally() for eta in etas}
    others = {eta: [Tally() for _ in levels] for eta in etas}
    for noise, (scores, bad) in enumerate(sets):
        for draw in range(plan.draws):
            seed = 1000 * noise + draw
            batch = draw_sample(len(scores), n + m, seed=seed)
            s, b = scores[batch], bad[batch]
            verified = torch.arange(n)  # of a batch in random order
            picked = [
                conformal_selection(s[n:], s[:n].masked_fill(b[:n], -math.inf), level)
                for level in levels
            ]
            wrong = int(b[n:].sum())
            for eta in etas:
                found = select(s, verified, b[:n], eta=eta, alpha=alpha)
                false = int((found.selected & ~b).sum())
                ours[eta].add(len(found), false, wrong, false > eta)
                for tally, chosen in zip(others[eta], picked, strict=True):
                    false = int((chosen & ~b[n:]).sum())
                    tally.add(int(chosen.sum()), false, wrong, false > eta)
    results = {}
    for eta in etas:
        matched = min(others[eta], key=lambda t: abs(t.false - ours[eta].false))
        level = levels[others[eta].index(matched)]
        promise = f"at most {eta} false, 90 %"
        say(row(name, promise, "selection", *ours[eta].cells()))
        say(row("", "", f"conformal selection, FDR {level:.3f}", *matched.cells()))
        results[eta] = (ours[eta], matched)
    return results


def shares(
    plan: Plan, name: str, sets: list[tuple[Tensor, Tensor]], say: Callable[[str], None]
) -> dict[tuple[int, int, float], dict[str, Tally]]:
    """At most a share of false claims, among all images and among the more suspicious ones."""
    alpha, results = 0.05, {}
    total = len(sets[0][0])
    for among, n in ((total, 500), (total // 4, 200)):
        for share in (0.05, 0.1, 0.2):
            m = among - n
            ranks = [rank_quantile(n, m, m - eta, alpha)[0] for eta in range(int(share * m))]
            tallies = {k: Tally() for k in ("selection", "counted first", "conformal selection")}
            for noise, (scores, bad) in enumerate(sets):
                pool = scores.topk(among).indices
                s, b = scores[pool], bad[pool]
                for draw in range(plan.draws):
                    verified = draw_sample(among, n, seed=1000 * noise + draw)
                    others = torch.ones(among, dtype=torch.bool).index_fill(0, verified, False)
                    right = s[verified].masked_fill(b[verified], -math.inf).sort().values
                    chosen = {
                        "selection": select(s, verified, b[verified], share=share).selected,
                        "counted first": others & (s > searched(s[others], right, ranks, share)),
                        "conformal selection": torch.zeros_like(others),
                    }
                    chosen["conformal selection"][others] = conformal_selection(
                        s[others], right, share
                    )
                    for method, claims in chosen.items():
                        k, false = int(claims.sum()), int((claims & ~b).sum())
                        wrong = int((b & others).sum())
                        tallies[method].add(k, false, wrong, false > share * k)
            where = "all" if among == total else f"the {among:,} most suspicious"
            promise = f"at most {share:.0%} false, 95 %; {n} verified of {where}"
            for method, tally in tallies.items():
                first = method == "selection"
                say(row(name if first else "", promise if first else "", method, *tally.cells()))
            results[among, n, share] = tallies
    return results


def searched(scores: Tensor, right: Tensor, ranks: list[int], share: float) -> float:
    """The lowest threshold of those with a bound of their own whose list is long enough: chosen after counting."""
    rank = torch.tensor(ranks)
    finite = rank <= len(right)
    thresholds = right[rank[finite] - 1]
    lists = len(scores) - torch.searchsorted(scores.sort().values, thresholds, right=True)
    long = torch.arange(len(ranks))[finite] <= share * lists
    return float(thresholds[long].min()) if long.any() else math.inf


def curve(name: str, scores: Tensor, bad: Tensor, say: Callable[[str], None]) -> None:
    """Bounds of many lists that hold together, of one draw, beside the truth."""
    pool = scores.topk(len(scores) // 4).indices
    s, b = scores[pool], bad[pool]
    verified = draw_sample(len(s), 200)
    others = torch.ones(len(s), dtype=torch.bool).index_fill(0, verified, False)
    found = claim_curve(s, verified, b[verified], most=len(s) // 5)
    say(f"{name}: 200 of the {len(s):,} most suspicious verified; 95 % confidence for all lists")
    say(row("most suspicious", "false at most", "in fact false"))
    say(row(*["---"] * 3))
    ordered = s[others].sort(descending=True).values
    for k in (25, 50, 100, 150, 200, 300):
        if k < len(ordered):
            claims = others & (s > ordered[k])
            say(row(str(k), str(found.bound(claims)), str(int((claims & ~b).sum()))))


def main(plan: Plan, *, say: Callable[[str], None] = print) -> dict[str, dict]:
    """Both tables."""
    started = time.process_time()
    results: dict[str, dict] = {"coverage": coverage(plan, say)}
    say(f"\n{plan.wrong:.0%} of the labels wrong")
    say(row(*HEADER))
    say(row(*["---"] * len(HEADER)))
    prepared = {}
    for name in plan.images:
        x, y = {"digits": digits, "mnist": mnist5000}[name]().tensors
        labels, bad = zip(
            *(wrong_labels(y, plan.wrong, seed) for seed in range(plan.noises)), strict=True
        )
        prepared[name] = list(zip(flag_scores(x, list(labels)), bad, strict=True))
    for name, sets in prepared.items():
        results[f"{name} numbers"] = numbers(plan, name, sets, say)
        results[f"{name} shares"] = shares(plan, name, sets, say)
    for name, sets in prepared.items():
        say("")
        curve(name, *sets[0], say)
    say(f"\n{time.process_time() - started:.0f} s of CPU time")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Plan, description=__doc__))
