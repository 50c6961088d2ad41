"""What an index costs and loses: build, scan, questions, memory, and error against bytes.

    python benchmarks/index.py build scan questions memory error coordinates outliers

`peer` sets other libraries beside it and says which of them are not installed. All numbers come from one process and
one thread unless --threads says more. Costs are CPU seconds in units of one plain forward and backward pass over the
same data, as in benchmarks/cost.py, which trains the model and makes its fit (runs/bench/). Results go to
runs/bench/index.json and docs/images/index-error.png.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from workloads import Workload, wikipedia

import headwater
from headwater.core.capture import sweep
from headwater.core.curvature import EKFAC, Layerwise
from headwater.core.damping import Damping, mean_of
from headwater.core.fit import Fit
from headwater.core.index import Approximate, GradientIndex, LoGra, Whitened
from headwater.core.index.encoding import Dtype, Encoding, encoding_of
from headwater.core.index.gradient_index import SHARD_BYTES
from headwater.core.index.journal import Journal, ShardFacts, Source
from headwater.core.index.metric import ProjectedMetric
from headwater.core.index.quality import take_sample
from headwater.core.index.search import scan
from headwater.core.index.shards import ShardWriter
from headwater.core.index.spaces import (
    LoGraSpace,
    Space,
    WhitenedSpace,
    best_rectangle,
    effective,
    factors_of,
    heaviest,
)
from headwater.core.index.stored import StoredRows
from headwater.core.index.writing import SpaceRows, write_table
from headwater.core.scoring import Norms
from headwater.core.target import Loss
from headwater.numerics import spectral
from headwater.trace import Influence

RUNS = Path(__file__).parents[1] / "runs" / "bench"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "index-error.png"
DIM = 4_096
STEP = 512  # rows that are made at a time
ANY = 1 << 30  # columns of a side


def cpu(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of all threads, and wall seconds."""
    before, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - before, time.perf_counter() - wall


def small_gpt(folder: Path) -> tuple[Workload, Fit]:
    """The small language model with its EK-FAC fit."""
    workload = wikipedia(folder)
    fit = headwater.fit(
        workload.model, workload.train, workload.task, curvature=EKFAC(own_bases=False),
        layers=list(workload.layers), folder=folder / "work-gpt" / "fit", batch_size=1_000,
    )  # fmt: skip
    return workload, fit


def in_passes(workload: Workload, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """What each piece of work costs in plain passes over the same sequences; each stands between two of them."""
    found = {}
    workload.plain_pass()
    plain = [cpu(workload.plain_pass)[0]]
    for name, work in works.items():
        spent, _ = cpu(work)
        plain.append(cpu(workload.plain_pass)[0])
        found[name] = spent / ((plain[-1] + plain[-2]) / 2)
        print(f"  {name}: {found[name]:.3f}", flush=True)
    return found


def built(fit: Fit, place: Path, kind: Whitened | LoGra, dtype: Dtype = "int8") -> GradientIndex:
    """A new index of the fit's training data."""
    shutil.rmtree(place, ignore_errors=True)
    return GradientIndex.build(fit, place, kind=kind, dtype=dtype, sample=0)


def build(folder: Path) -> dict[str, float]:
    """Building an index."""
    workload, fit = small_gpt(folder)
    place = folder / "work-gpt" / "index"
    kinds = {
        "whitened, leading 16²": Whitened(sides="leading"),
        "LoGra, random 16 x 16": LoGra(),
    }
    return in_passes(workload, {n: partial(built, fit, place, kind) for n, kind in kinds.items()})


def peer(folder: Path, n_queries: int = 20) -> dict[str, Any]:
    """Building and asking, beside a peer's store of projected gradients and a peer that scans the data again."""
    workload, fit = small_gpt(folder)
    place, missing = folder / "work-gpt" / "index", []
    queries = workload.queries.subset(range(n_queries))
    works: dict[str, Callable[[], Any]] = {
        "build: LoGra, random 16 x 16, float32": partial(built, fit, place, LoGra(), "float32"),
    }
    if find_spec("bergson") is None:
        missing.append("bergson is not installed (pip install bergson): its store is left out")
    else:
        from peer_store import Bergson

        store = Bergson(workload, folder / "work-gpt" / "store")
        works["build: bergson, random 16 x 16, float32"] = store.build
    works["build: whitened, leading 16², int8"] = lambda: built(
        fit, place, Whitened(sides="leading")
    )
    works[f"{n_queries} questions by the index"] = lambda: GradientIndex(place).attribute(
        fit, queries, keep=10
    )
    if find_spec("kronfluence") is None:
        missing.append("kronfluence is not installed (pip install kronfluence): it is left out")
    else:
        from peers import Kronfluence

        tool = Kronfluence(workload, "gpt", str(folder / "work-gpt" / "peer"))
        if not (folder / "work-gpt" / "peer" / "peer" / "factors_ekfac").exists():
            tool.covariance(), tool.eigen(), tool.eigenvalues()
        works[f"{n_queries} questions by kronfluence"] = lambda: tool.scores(n_queries)
    for line in missing:
        print(f"peer: {line}", flush=True)
    found: dict[str, Any] = {"left_out": missing} | in_passes(workload, works)
    if find_spec("bergson") is not None:
        found["bergson's rows"] = list(store.rows().shape)
    return found


def synthetic(folder: Path, n: int, dtype: str) -> StoredRows:
    """An index of random rows, written as a build writes them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    journal = Journal(
        made_from={"model": "", "task": "", "projection": ""},
        space={
            "kind": "whitened",
            "fingerprint": "",
            "damping": {"value": 1.0, "unit": "absolute", "source": "made up"},
        },
        layers={"all": DIM},
        dtype=dtype,  # type: ignore[arg-type]
        n_train=n,
        sources=[Source(data="", n=n, batch_size=1, batch_tokens=1, block_rows=STEP, shard_rows=n)],
    )
    encoding, per = Encoding(dtype, DIM), 0  # type: ignore[arg-type]
    per = SHARD_BYTES // encoding.bytes_per_row // STEP * STEP
    shards = []
    for number, start in enumerate(range(0, n, per)):
        count = min(per, n - start)
        blocks = [min(STEP, count - s) for s in range(0, count, STEP)]
        with ShardWriter(folder, number, blocks, encoding) as writer:
            writer.open()
            for block in blocks:
                writer.write(torch.randn(block, DIM))
            rows = writer.seal()
        columns = {
            "id": [str(i) for i in range(start, start + count)],
            "number": list(range(start, start + count)),
        }
        ids = write_table(folder, number, columns)
        shards.append(
            ShardFacts(
                number=number,
                source=0,
                first=start,
                last=start + count,
                blocks=blocks,
                digests=writer.digests,
                rows=rows,
                ids=ids,
            )
        )
    journal = replace(journal, shards=shards, following=len(shards))
    journal.write(folder)
    return StoredRows(folder)


def bandwidth() -> dict[str, float]:
    """Bytes a second of adding up numbers that lie in memory, by CPU time and by the clock."""
    x = torch.ones(1 << 28)
    best = min((cpu(x.sum) for _ in range(7)), key=lambda t: t[0])
    return {"cpu": x.nbytes / best[0], "wall": x.nbytes / best[1]}


def scanned(folder: Path, n: int = 100_000) -> dict[str, Any]:
    """Scans of 100,000 rows of 4,096 numbers, beside the memory's bandwidth measured around them."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        stored = synthetic(folder / "scan", n, dtype)
        memory = [bandwidth()]
        for n_queries in (1, 20):
            queries = torch.randn(n_queries, DIM)
            scan(stored, queries, 100)  # the files' pages are mapped
            times = [cpu(partial(scan, stored, queries, 100)) for _ in range(5)]
            best, wall = min(t[0] for t in times), min(t[1] for t in times)
            memory.append(bandwidth())
            size = n * stored.encoding.bytes_per_row
            by_cpu, by_wall = (max(m[k] for m in memory) for k in ("cpu", "wall"))
            found[f"{dtype}, {n_queries} queries"] = {
                "ms": 1000 * wall, "ms_cpu": 1000 * best, "bytes": size,
                "of_bandwidth": size / best / by_cpu, "of_bandwidth_wall": size / wall / by_wall,
            }  # fmt: skip
        shutil.rmtree(folder / "scan")
    found["memory, GB/s by CPU time and by the clock"] = [
        max(m[k] for m in memory) / 1e9 for k in ("cpu", "wall")
    ]
    return found


def questions(folder: Path) -> dict[str, float]:
    """Twenty queries by a pass over the data and by the index of the same data."""
    workload, fit = small_gpt(folder)
    index = built(fit, folder / "work-gpt" / "index", Whitened(sides="leading"))
    queries = workload.queries.subset(range(20))
    exact = cpu(lambda: Influence(n_intervals=0, precision="model").attribute(fit, queries))[0]
    asked = index.ask(fit, queries)
    ask = cpu(lambda: index.ask(fit, queries))[0]
    search = min(cpu(lambda: index.search(asked, keep=10))[0] for _ in range(5))
    collect = cpu(
        lambda: Influence(n_intervals=0, precision="model", keep=1).tokens(fit, queries, [0])
    )[0]
    return {
        "n_train": len(workload.train), "pass_cpu_seconds": exact, "ask_cpu_seconds": ask,
        "search_cpu_seconds": search, "ratio": exact / (ask + search),
        "queries_alone_cpu_seconds": collect, "ratio_without_queries": (exact - collect) / search,
    }  # fmt: skip


def own_memory() -> int:
    """Bytes of this process that are not pages of files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def memory(folder: Path) -> dict[str, Any]:
    """Own memory while scanning N and 10 N rows, each in a process of its own."""
    found = {}
    for n in (20_000, 200_000):
        synthetic(folder / "memory", n, "int8")
        words = [sys.executable, "-W", "ignore", __file__, "memory-of", str(folder / "memory")]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[f"{n:,} rows"] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(folder / "memory")
    return found


def memory_of(folder: Path) -> dict[str, int]:
    """Most own memory above the start's, sampled by a thread while a scan runs."""
    import threading

    torch.set_num_threads(1)
    start, most, over = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], own_memory() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stored = StoredRows(folder)
    scan(stored, torch.randn(20, DIM), 100)
    over.set()
    watcher.join()
    return {"own_bytes": most[0]}


def error(folder: Path) -> dict[str, Any]:
    """Agreement with unprojected scores for each rank, type, factors and damping; one pass over a sample for all."""
    _, fit = small_gpt(folder)
    found: dict[str, Any] = {}
    for damping in ("auto", "0.1 relative"):
        kinds = {
            f"{sides} {rank}²": kind
            for rank in (4, 8, 16, 32)
            for sides, kind in {
                "leading": Whitened(rank=rank, sides="leading", damping=damping),
                "random": Whitened(rank=rank, sides="random", damping=damping),
            }.items()
        }
        spaces = {name: kind.spaces(fit)[0] for name, kind in kinds.items()}
        chosen = fit.damping(damping)
        taken = take_sample(fit, list(spaces.values()), fit.train, chosen, 200)
        assert taken is not None
        for i, (name, space) in enumerate(spaces.items()):
            ways = {dtype: (dtype, None) for dtype in ("float32", "bfloat16", "float16", "int8")}
            if space.shapes() is not None:
                ways |= {f"int8 rank {rank}": ("int8", rank) for rank in (1, 2, 4, 8)}
            for way, (dtype, rank) in ways.items():
                encoding = encoding_of(dtype, space.widths, factors_of(space, rank))  # type: ignore[arg-type]
                whole = taken.error(i, encoding)
                found[f"{damping}: {name} {way}"] = {
                    "bytes": encoding.bytes_per_row, **whole["whole"],
                    "dtype_alone": whole["dtype_alone"]["spearman"],
                    "dtype_recall_10": whole["dtype_alone"]["recall_10"],
                }  # fmt: skip
    plot(found)
    return found


def plot(found: dict[str, Any]) -> None:
    """Recall and rank correlation against bytes an example."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    styles = {"float32": "-", "float16": "--", "int8": ":", "int8 rank 1": "-."}
    titles = {
        "auto": "damping of the evidence",
        "0.1 relative": "damping 0.1 of the mean eigenvalue",
    }
    for axis, (damping, title) in zip(axes, titles.items(), strict=True):
        for sides, colour in {"leading": "tab:blue", "random": "tab:orange"}.items():
            for dtype, style in styles.items():
                rows = [
                    v for k, v in found.items()
                    if k.startswith(f"{damping}: {sides} ") and k.endswith(f" {dtype}")
                ]  # fmt: skip
                if not rows:  # leading coordinates have no factors
                    continue
                axis.plot(
                    [r["bytes"] for r in rows], [r["recall_10"] for r in rows],
                    style, color=colour, marker=".", label=f"{sides}, {dtype}",
                )  # fmt: skip
        axis.set(xscale="log", title=title, xlabel="bytes an example", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of each top ten that is found")
    axes[1].legend(fontsize=8, loc="upper left")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=110)


def coordinates(folder: Path) -> dict[str, Any]:
    """Which coordinates to keep: as many for each example, chosen within squares of columns or anywhere."""
    _, fit = small_gpt(folder)
    layers, curvature = list(fit.followed), fit.curvature
    assert isinstance(curvature, Layerwise)
    number, found = 256 * len(layers), {}
    for choice in ("auto", "0.1 relative"):
        damping, weights = fit.damping(choice), {}
        for layer in layers:
            eigenvalues = curvature.eigenvalues[layer.name].reshape(layer.shape)
            weights[layer.name] = effective(eigenvalues, damping.absolute(mean_of(eigenvalues)))
        kept = {
            f"the heaviest within {side} x {side}": heaviest(
                {name: within(w, side) for name, w in weights.items()}, number, reach=ANY
            )
            for side in (16, 32, 64, 128)
        }
        kept["the heaviest in at most 64 columns of a side"] = heaviest(weights, number, reach=64)
        kept["the heaviest anywhere"] = heaviest(weights, number, reach=ANY)
        spaces = {name: WhitenedSpace(layers, curvature, damping, k) for name, k in kept.items()}
        taken = take_sample(fit, list(spaces.values()), fit.train, damping, 200)
        assert taken is not None
        for i, (name, space) in enumerate(spaces.items()):
            whole = taken.error(i, Encoding("float32", space.dim))["whole"]
            found[f"{choice}: {name}"] = {"numbers": space.dim} | whole
    return found


def within(weight: Tensor, side: int) -> Tensor:
    """Weights with all zero but those of the best square of columns."""
    left = torch.zeros_like(weight)
    for group, part in zip(weight, left, strict=True):
        rows, columns = best_rectangle(group, side, side)
        part[rows[:, None], columns] = group[rows[:, None], columns]
    return left


def outliers(folder: Path, n_train: int = 1_024, share: float = 0.01) -> dict[str, Any]:
    """How often the strongest hits are examples of the largest gradients, by plain influence and by RelatIF.

    One pass over the data makes the rows of both kinds and the lengths of whole gradients.
    """
    _, fit = small_gpt(folder)
    more = wikipedia(folder, n_train=n_train)
    spaces: dict[str, Space] = {
        "whitened, leading 16²": Whitened(sides="leading").spaces(fit)[0],
        "LoGra, random 16 x 16": LoGra().spaces(fit)[0],
    }
    found: dict[str, Any] = {}
    norms, rows = Norms(n_train), [SpaceRows(s, n_train) for s in spaces.values()]
    asked = [SpaceRows(s, len(more.queries)) for s in spaces.values()]
    for data, gathered in ((more.train, [norms, *rows]), (more.queries, asked)):
        sweep(fit.capture(), data, gathered, Loss(), batches=fit.batches(data))
    large = torch.zeros(n_train, dtype=torch.bool)
    large[norms.finish().topk(round(share * n_train)).indices] = True
    for (name, space), mine, theirs in zip(spaces.items(), rows, asked, strict=True):
        train, queries = mine.finish(), theirs.finish()
        ready = train
        if isinstance(space, LoGraSpace):
            ready = second_moment(space, train)(train)
        products = queries @ ready.mT
        lengths = (train * ready).sum(1).sqrt()
        for mode, scores in (("dot", products), ("relatif", products / lengths)):
            hits = large[scores.topk(10).indices]
            found[f"{name}: {mode}"] = {
                "first": float(hits[:, 0].double().mean()), "ten": float(hits.double().mean()),
                "different_first": len(scores.argmax(1).unique()), "queries": len(queries),
            }  # fmt: skip
    return found


def second_moment(space: LoGraSpace, rows: Tensor) -> ProjectedMetric:
    """The damped inverse of the rows' own second moment, as an index of them has it."""
    parts = rows.double().split(list(space.widths.values()), dim=1)
    moments = [part.mT @ part / len(rows) for part in parts]
    spectra = {n: spectral.eigh(m) for n, m in zip(space.widths, moments, strict=True)}
    return ProjectedMetric(space.widths, spectra, Damping(**space.facts["damping"]))


def faiss(folder: Path, n: int = 100_000) -> dict[str, Any]:
    """Approximate search of random rows, the hardest case, and of clustered ones."""
    stored = synthetic(folder / "faiss", n // 10, "float16")
    queries, found = stored.rows(torch.arange(20)), {}
    found["scan"] = 1000 * min(cpu(lambda: scan(stored, queries, 10))[0] for _ in range(3))
    for structure in ("ivf", "hnsw"):
        made = Approximate.build(stored, structure)  # type: ignore[arg-type]
        spent = min(cpu(lambda made=made: made.strongest(queries, 10))[0] for _ in range(3))
        found[structure] = {"ms_cpu": 1000 * spent, "recall": made.recall}
    shutil.rmtree(folder / "faiss")
    return found


PARTS: dict[str, Callable[[Path], Any]] = {
    "build": build, "scan": scanned, "questions": questions, "memory": memory, "error": error,
    "faiss": faiss, "coordinates": coordinates, "outliers": outliers, "peer": peer,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an index costs and loses.

    Args:
        parts: What to measure.
        threads: Threads.
        folder: Where the model and results lie.
    """

    parts: tyro.conf.Positional[tuple[str, ...]] = tuple(PARTS)
    threads: int = 1
    folder: Path = RUNS


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    (options.folder / "work-gpt").mkdir(parents=True, exist_ok=True)
    file = options.folder / "index.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in options.parts:
        results[name] = PARTS[name](options.folder)
        print(name, json.dumps(results[name], indent=1), flush=True)
        file.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["memory-of"]:
        print(json.dumps(memory_of(Path(sys.argv[2]))))
    else:
        main(tyro.cli(Options))
