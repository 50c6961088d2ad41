"""What the cascade finds and costs beside exact EK-FAC scores of everything, on a small GPT and real text.

    python benchmarks/cascade.py
    python benchmarks/cascade.py --followed blocks --tried 3    # a part: 300 candidates of index and words
    python benchmarks/cascade.py --dampings auto --tried 3 5 --first 20 --no-exact-matrix    # other queries

A GPT of 2 layers, d 64, trained for a few epochs on 4,000 beginnings of Wikipedia articles (64 words each); queries are
20 other articles, asked one at a time. Exact scores of all 4,000 are the truth. Recall counts both sides: the ten that
raise the loss most and the ten that lower it most. Results go to runs/bench/cascade.json.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

import headwater
from headwater.bench.text_workloads import TEXTS, next_token_loss, wikipedia_texts
from headwater.core.curvature import EKFAC
from headwater.core.examples import Examples, TensorExamples
from headwater.core.fit import Fit
from headwater.core.index import GradientIndex, Whitened
from headwater.numerics.resampling import bootstrap
from headwater.trace import BM25, Cascade, EmbeddingSimilarity, Indexed, Influence
from headwater.trace.base import Attributor

RUNS = Path(__file__).parents[1] / "runs" / "bench"
WORDS, TOP = BM25(column="text"), 10
SOURCES: dict[str, tuple[Attributor, ...]] = {
    "index": (),
    "index, words": (WORDS,),
    "index, words, embeddings": (WORDS, EmbeddingSimilarity()),
}
TRIED = [
    ("index", 100),
    *(("index, words", n) for n in (30, 100, 300)),
    ("index, words, embeddings", 100),
    ("index, words", 600),
]
LAYERS = {"blocks": ["blocks.*"], "everything": "trainable"}


def trained(folder: Path, train: TensorExamples, *, epochs: int = 6, batch: int = 20) -> Any:
    """The model, trained once."""
    torch.manual_seed(0)
    model, file = TEXTS[0].model(0), folder / f"cascade-{len(train)}.safetensors"
    if not file.exists():
        ids = train.tensors[0]
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        for _ in range(epochs):
            for some in torch.randperm(len(ids)).split(batch):
                optimizer.zero_grad()
                next_token_loss(model(ids[some]), ids[some]).mean().backward()
                optimizer.step()
        save_file({n: p.detach() for n, p in model.named_parameters()}, file)
    model.load_state_dict(load_file(file), strict=False)
    return model.eval()


def both_tops(values: Tensor, ids: Sequence[str]) -> list[set[str]]:
    """The ten largest and the ten smallest."""
    ends = (values.topk(min(TOP, len(values)), largest=side).indices for side in (True, False))
    return [{ids[i] for i in end.tolist()} for end in ends]


def recall(truth: Tensor, found: Any, ids: Sequence[str]) -> float:
    """Share of both tens that was found."""
    pairs = zip(both_tops(truth, ids), both_tops(found.values[0], found.train_ids), strict=True)
    return sum(len(a & b) for a, b in pairs) / (2 * TOP)


def one_by_one(
    method: Attributor, fit: Fit, queries: Examples, truth: Tensor
) -> tuple[dict[str, Any], list[Any]]:
    """Recall and cost over queries that are asked one at a time."""
    answers, spent, shares = [], 0.0, []
    for q in range(len(queries)):
        before = time.process_time()
        found = method.attribute(fit, queries.subset([q]))
        spent += time.process_time() - before
        answers.append(found)
        shares.append(recall(truth[q], found, fit.train.ids))
    each = torch.tensor(shares, dtype=torch.float64)
    estimate = bootstrap(lambda i: float(each[i].mean()), (len(each),), n=len(each))
    return {
        "recall_10": [estimate.value, estimate.low, estimate.high],
        "cpu_seconds": spent / len(queries),
        "each": shares,
    }, answers


def judged(method: Cascade, fit: Fit, queries: Examples, truth: Tensor) -> dict[str, Any]:
    """The same for the cascade, with what it said of itself."""
    found, answers = one_by_one(method, fit, queries, truth)
    told = [a.facts["stages"][-1]["missed"] for a in answers]
    lost = [1 - share for share in found.pop("each")]
    mean = {k: sum(t[k] for t in told) / len(told) for k in ("estimate", "high", "at_most")}
    passes = [sum(s.get("passes", 0.0) for s in a.facts["stages"]) for a in answers]
    return found | {
        "scored": sum(a.facts["stages"][-1]["examples"] for a in answers) / len(answers),
        "passes": sum(passes) / len(passes),
        "lost": sum(lost) / len(lost),
        "told": mean,
        "limit_holds": sum(t["at_most"] >= x - 1e-9 for t, x in zip(told, lost, strict=True)),
        "high_holds": sum(t["high"] >= x - 1e-9 for t, x in zip(told, lost, strict=True)),
        "queries": len(queries),
    }


def refined(fit: Fit, index: GradientIndex, queries: Examples) -> dict[str, Any]:
    """What the exact matrix costs for one question, and whose top ten it changes."""
    method = Cascade(index=index, sources=(WORDS,), keep=TOP, refine=TOP, cg_steps=10)
    before = time.process_time()
    found = method.attribute(fit, queries.subset([0]))
    spent = time.process_time() - before
    stages = {s["name"]: s for s in found.facts["stages"]}
    exact = stages["exact matrix"]
    told = {k: exact[k] for k in ("passes", "cg_steps", "cg_residual", "missed")}
    return told | {"cpu_seconds": spent}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the cascade finds and costs.

    Args:
        n_train: Texts of the corpus.
        n_queries: Queries.
        first: Queries that are passed over first, to ask others.
        followed: Layers that are followed.
        dampings: Dampings.
        tried: Which of the sources and numbers of candidates; results of others stay as they are.
        rank: Rank of the index.
        exact_matrix: Refine one question too.
        sample: Examples that each question's loss is estimated on.
        threads: Threads.
        folder: Where the model and results lie.
    """

    n_train: int = 4_000
    n_queries: int = 20
    first: int = 0
    followed: tuple[Literal["blocks", "everything"], ...] = ("blocks", "everything")
    dampings: tuple[str, ...] = ("auto", "0.1 relative")
    tried: tuple[int, ...] = tuple(range(len(TRIED)))
    rank: int = 16
    exact_matrix: bool = True
    sample: int = 200
    threads: int = 1
    folder: Path = RUNS


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    data = wikipedia_texts(options.n_train, options.first + options.n_queries)
    queries = data.queries.subset(range(options.first, options.first + options.n_queries))
    others = f" (queries from {options.first})" if options.first else ""
    place, file = options.folder / f"cascade-{options.n_train}", options.folder / "cascade.json"
    model = trained(options.folder, data.train)
    results = json.loads(file.read_text()) if file.exists() else {}

    def keep(name: str, result: dict[str, Any]) -> None:
        name += others
        results[name] = result
        print(name, json.dumps(result), flush=True)
        file.write_text(json.dumps(results, indent=1))

    for followed in options.followed:
        fit = headwater.fit(
            model, data.train, TEXTS[0].task, curvature=EKFAC(own_bases=False), layers=LAYERS[followed],
            folder=place / followed,
        )  # fmt: skip
        for damping in options.dampings:
            name = f"{followed}, {damping}"
            exact = Influence(damping=damping, n_intervals=0, precision="model")
            truth = exact.attribute(fit, queries).values
            keep(f"{name}: all scored", one_by_one(exact, fit, queries.subset([0]), truth)[0])
            index = GradientIndex.build(
                fit, place / f"{name}, {options.rank}".replace(" ", "-"),
                kind=Whitened(rank=options.rank, damping=damping, sides="leading"),
            )  # fmt: skip
            lookup = one_by_one(Indexed(index=index, keep=TOP), fit, queries, truth)[0]
            built = {"built": index.journal.facts["error"]["whole"]}
            keep(f"{name}: index alone", lookup | built | {"bytes": index.info()["bytes_per_row"]})
            for sources, n in (TRIED[i] for i in options.tried):
                method = Cascade(
                    index=index,
                    sources=SOURCES[sources],
                    candidates=n,
                    keep=TOP,
                    sample=options.sample,
                )
                keep(f"{name}: {sources}, {n}", judged(method, fit, queries, truth))
        if options.exact_matrix:
            keep(f"{followed}: exact matrix", refined(fit, index, queries))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(tyro.cli(Options))
