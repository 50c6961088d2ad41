"""Does a model need fewer directions and fewer edges in the local interaction basis than in principal directions?

After Bushnaq et al. (2024), arXiv:2405.10928. A perceptron with three hidden layers on handwritten digits, and one on
addition modulo p, three seeds each. The basis is found on the training data. Then for each hidden layer the least
number of directions is sought, and for each section the least number of edges, that keeps the accuracy on held-out
examples within half a point of the whole model's; of modular addition, all pairs are both.

    python studies/interaction_basis.py
    python studies/interaction_basis.py --workloads digits --seeds 0 --plots docs/images
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

import headwater
from headwater.audit.structure import ablate, degeneracy, interaction_basis, interaction_graph
from headwater.core.examples import Examples, TensorExamples
from headwater.data.images import digits
from headwater.models.vision import mlp
from headwater.numerics.resampling import mean_interval

BASES = ("lib", "pca")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Args:
        workloads: Names of workloads.
        seeds: Seeds of weights, splits and order.
        folder: Where each run's numbers are kept; those that are there are not measured again.
        p: Modulus of the addition.
        tolerance: Share of the answers that may be lost.
        plots: Folder for pictures of the first seed; none are drawn when left out.
    """

    workloads: tuple[str, ...] = ("digits", "addition")
    seeds: tuple[int, ...] = (0, 1, 2)
    folder: Path = Path("runs/interaction-basis")
    p: int = 23
    tolerance: float = 0.005
    plots: Path | None = None


def trained(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int, lr: float, decay: float, seed: int
) -> nn.Module:
    """AdamW on batches of 256, the rate falling to nothing."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(len(x), (256,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


Workload = Callable[[Study, int], tuple[nn.Module, Examples, Examples]]


def on_digits(options: Study, seed: int) -> tuple[nn.Module, Examples, Examples]:
    """1,437 digits to train on and 360 to measure on."""
    x, y = digits().tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    part, rest = order[:1437], order[1437:]
    model = mlp([64, 64, 64, 64, 10], seed=seed)
    trained(model, x[part], y[part], steps=1000, lr=3e-3, decay=1e-2, seed=seed)
    return model, TensorExamples(x[part], y[part]), TensorExamples(x[rest], y[rest])


def on_addition(options: Study, seed: int) -> tuple[nn.Module, Examples, Examples]:
    """All pairs a, b, each one-hot, to (a + b) mod p."""
    p = options.p
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    x = torch.cat([nn.functional.one_hot(n, p).float() for n in (a, b)], 1)
    model = mlp([2 * p, 64, 64, 64, p], seed=seed)
    trained(model, x, (a + b) % p, steps=3000, lr=3e-3, decay=0.3, seed=seed)
    data = TensorExamples(x, (a + b) % p)
    return model, data, data


WORKLOADS: dict[str, Workload] = {"digits": on_digits, "addition": on_addition}


def run(name: str, seed: int, options: Study) -> dict:
    """One model's numbers."""
    model, train, held_out = WORKLOADS[name](options, seed)
    fit = headwater.fit(model, train, headwater.Classification(), curvature="identity")
    report = degeneracy(fit, damping=1.0)
    found: dict = {
        "parameters": report.n_parameters,
        "free": report.free,
        "sync": sum(s.free for s in report.sync),
        "bases": {},
    }
    drawn = []
    for basis in BASES:
        started = time.process_time()
        one = interaction_basis(fit, basis=basis, nodes=["2", "4", "6"])
        spent = time.process_time() - started
        measured = {"data": held_out, "tolerance": options.tolerance, "points": 8}
        nodes, edges = (ablate(fit, one, kind, **measured) for kind in ("nodes", "edges"))
        graph = interaction_graph(one, floor=edges)
        found["accuracy"] = nodes.base
        found["bases"][basis] = {
            "kept": [layer.n_nodes for layer in one.layers],
            "nodes": nodes.needed[:3],
            "edges": edges.needed,
            "all_edges": [curve.n for curve in edges.curves],
            "modularity": graph.modularity,
            "modules": sum(size > 1 for size in graph.sizes),
            "method": graph.method,
            "cpu_seconds": spent,
            "sweeps": one.facts["sweeps"],
        }
        drawn.append((nodes, edges, graph))
    if options.plots is not None and seed == options.seeds[0]:
        options.plots.mkdir(parents=True, exist_ok=True)
        for number, kind in ((0, "nodes"), (1, "edges")):
            figure = drawn[0][number].plot(drawn[1][number])
            figure.savefig(options.plots / f"structure-{name}-{kind}.png", dpi=80)
        drawn[0][2].plot().savefig(options.plots / f"structure-{name}-graph.png", dpi=80)
    return found


def needed(found: dict, basis: str, kind: str) -> list[int | None]:
    return found["bases"][basis][kind]


def cell(values: list[int | None]) -> str:
    return " · ".join("all do not suffice" if v is None else str(v) for v in values)


def difference(runs: list[dict], kind: str, layer: int) -> str:
    """LIB's number less PCA's: the mean over seeds with its interval."""
    pairs = [[needed(r, basis, kind)[layer] for basis in BASES] for r in runs]
    if any(v is None for pair in pairs for v in pair):
        return "—"
    gaps = torch.tensor([float(a - b) for a, b in pairs])
    if len(gaps) < 2:
        return f"{float(gaps.mean()):+.1f}"
    found = mean_interval(gaps)
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def main(options: Study) -> None:
    for name in options.workloads:
        runs = []
        for seed in options.seeds:
            file = options.folder / f"{name}-{seed}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(run(name, seed, options)))
            runs.append(json.loads(file.read_text()))
        print(f"\n## {name}\n")
        print(
            "| hidden layer or section | counted | LIB, by seed | PCA, by seed | LIB - PCA [95 %] |"
        )
        print("|---|---|---|---|---|")
        for kind in ("nodes", "edges"):
            for layer in range(3):
                both = [cell([needed(r, basis, kind)[layer] for r in runs]) for basis in BASES]
                print(
                    f"| {layer + 1} | {kind} needed | {both[0]} | {both[1]} | {difference(runs, kind, layer)} |"
                )
        print("\n| seed | accuracy | free by ranks | sync | nodes kept, LIB | PCA | ", end="")
        print("modularity, LIB | PCA | modules, LIB | PCA | CPU s, LIB |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for seed, r in zip(options.seeds, runs, strict=True):
            lib, pca = (r["bases"][b] for b in BASES)
            free = f"{r['free']:,} of {r['parameters']:,}"
            print(
                f"| {seed} | {100 * r['accuracy']:.2f} % | {free} | {r['sync']} | {cell(lib['kept'])} | "
                f"{cell(pca['kept'])} | {lib['modularity']:.3f} | {pca['modularity']:.3f} | {lib['modules']} | "
                f"{pca['modules']} | {lib['cpu_seconds']:.1f} |"
            )


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
