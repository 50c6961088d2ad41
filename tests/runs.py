"""Run folders for tests, written at once and without training: a plain one, and one whose every text is hostile."""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import headwater
from headwater.audit.survey import Survey
from headwater.core.evidence import Evidence
from headwater.core.files import write_json
from headwater.core.task import Classification
from headwater.trace.timeline import Timeline
from headwater.training.trajectory import Segment, StageRecord
from headwater.training.verify import Outcome, Verification
from tests.report import samples

COLUMNS = {
    "text": "text",
    "prompt": None,
    "completion": None,
    "messages": None,
    "unit": "paragraph",
    "max_length": None,
    "limit": None,
}
HUGE = 10**300  # no 64-bit integer
LINE = "<b>one line</b> " * 65_536  # 1 MiB without a break


def plain_run(folder: str | Path, n: int = 48) -> Path:
    """A run folder with two traces, a survey of n examples, a verification, a timeline and a draft of changes."""
    run = Path(folder)
    _record(run)
    _fit(run)
    whole = samples.evidence()
    whole.save(run / "traces" / "trace")
    first = replace(whole, answers=whole.answers[:1])
    first.save(run / "traces" / "lava")
    survey(n).save(run / "corpus")
    _verification(["lava", "leaves", "kepler"]).save(run / "verify" / "trace" / f"{7:016x}.json")
    timeline(["lava", "leaves"]).save(run / "timelines" / "timeline" / "data")
    ids = [i.example_id for _, _, i in whole.answers[0].ranked()]
    write_json(run / "changes.json", _changes(ids[:3]))
    return run


def hostile_run(folder: str | Path, n: int = 200) -> Path:
    """The same with hostile text wherever text can come from: ids, titles, sources, names of columns, whole texts."""
    run = Path(folder)
    _record(run, name="<script>alert(1)</script>")
    _fit(run)
    bad = samples.hostile()
    bad.save(run / "traces" / "trace")
    hostile_survey(n).save(run / "corpus")
    text = " ".join(samples.HOSTILE[:8])
    _verification([text, "</script><script>alert(9)</script>"]).save(
        run / "verify" / "trace" / f"{9:016x}.json"
    )
    timeline([text]).save(run / "timelines" / "timeline" / "data")
    write_json(run / "changes.json", _changes(["</script><script>alert(10)</script>"]))
    return run


def linked_run(folder: Path) -> Path:
    """A plain run in which a file of a trace, and the data of a timeline, are links that lead out of it."""
    run, outside = plain_run(folder / "run", n=16), folder / "outside"
    outside.mkdir()
    (outside / "notes.txt").write_text("of another folder", encoding="utf-8")
    (run / "traces" / "lava" / "notes.txt").symlink_to(outside / "notes.txt")
    data = run / "timelines" / "timeline" / "data"
    data.symlink_to(data.rename(outside / "data"), target_is_directory=True)
    return run


def survey(n: int = 48) -> Survey:
    """The sample passages, then copies of them under other names, of which the first four are equal to the passage."""
    draw = random.Random(0)
    ids, texts, metadata = [], [], {"title": [], "topic": [], "year": []}
    for i in range(n):
        title, topic, text = samples.PASSAGES[i % len(samples.PASSAGES)]
        again = i // len(samples.PASSAGES)
        equal = again == 0 or (again == 1 and i % len(samples.PASSAGES) < 4)
        ids.append(f"wiki-{i % len(samples.PASSAGES) * 613 + 1009:05d}" + f"-{again}" * (again > 0))
        texts.append(text if equal else f"{text} ({again})")
        metadata["title"].append(title if again == 0 else f"{title} ({again})")
        metadata["topic"].append(topic)
        metadata["year"].append(1900 + i if i % 3 else None)
    own = torch.tensor([draw.lognormvariate(-3, 0.5) for _ in range(n)])
    own[5] = 9.0
    return Survey(
        ids=ids,
        self_influence=own,
        loss=torch.tensor([draw.uniform(60, 240) for _ in range(n)]),
        lengths=[len(samples.tokens_of(t)) for t in texts],
        outlier=own > 1,
        first=torch.tensor([texts.index(t) for t in texts]),
        texts=texts,
        metadata=metadata,
        source_column="topic",
        facts={
            "self_influence": "by the gradients of every example",
            "duplicates": "equal texts",
            "passes": "1 with gradients",
            "n_passes": 1.0,
            "seconds": 38.5,
            "made_from": {},
        },
    )


def hostile_survey(n: int = 200) -> Survey:
    """Hostile texts in turn; example 3 is one line of a mebibyte."""
    kinds = samples.HOSTILE
    draw = random.Random(1)
    texts = [f"{kinds[i % len(kinds)]} {i}" for i in range(n)]
    texts[3 % n] = LINE
    if n > 11:
        texts[11] = texts[10]
    own = torch.tensor([draw.lognormvariate(-3, 1) for _ in range(n)])
    own[0] = 5.0
    first = torch.arange(n)
    if n > 11:
        first[11] = 10
    return Survey(
        ids=[f"{i} {kinds[i % len(kinds)]}"[:400] for i in range(n)],
        self_influence=own,
        loss=torch.tensor([draw.uniform(1, 1e12) for _ in range(n)]),
        lengths=[len(t) // 4 for t in texts],
        outlier=own > 4,
        first=first,
        texts=texts,
        metadata={
            "title": [kinds[(i + 1) % len(kinds)][:200] for i in range(n)],
            "source</script>": [kinds[i % 7] for i in range(n)],
            "number": [HUGE if i % 2 else float("nan") for i in range(n)],
            "<script>alert(11)</script>": [i for i in range(n)],
        },
        source_column="source</script>",
        facts={"passes": "1 with gradients", "seconds": 1e9, "made_from": {}},
    )


def large_run(folder: str | Path, n: int = 100_000) -> Path:
    """A hostile run of many examples."""
    return hostile_run(folder, n)


def timeline(queries: list[str], n: int = 8) -> Timeline:
    draw = torch.Generator().manual_seed(0)
    ids = [f"wiki-{i * 613 + 1009:05d}" for i in range(n)]
    return Timeline(
        values=torch.randn(3, len(queries), n, generator=draw) / 10,
        segments=tuple(
            Segment(start=s, stop=s + 20, checkpoints=(k,), lr_sum=0.1, momentum=0.9, stage=k // 2)
            for k, s in enumerate((0, 20, 40))
        ),
        stages=(
            StageRecord(name="pretrain", start=0, stop=40),
            StageRecord(name="</script>tune", start=40, stop=60),
        ),
        losses=[3.0 - 0.03 * k for k in range(60)],
        query_ids=[f"q{i}" for i in range(len(queries))],
        train_ids=ids,
        measurement="log_prob",
        queries=queries,
        metadata={"topic": [samples.PASSAGES[i][1] for i in range(n)]},
        gap=1e-6,
    )


def evidence() -> Evidence:
    return samples.evidence()


def _verification(queries: list[str]) -> Verification:
    outcomes = []
    for k, query in enumerate(queries):
        for change, control, predicted, actual in (
            ("without the top 10", False, -0.41 + 0.1 * k, -0.38 + 0.1 * k),
            ("without 10 at random", True, -0.01, 0.013),
            ("with the top 10 twice", False, 0.39, 0.33),
        ):
            outcomes.append(
                Outcome(
                    query_id=query,
                    change=change,
                    control=control,
                    n_changed=10,
                    predicted=predicted,
                    actual=actual,
                    before=-7.5 + k,
                    low=actual - 0.05,
                    high=actual + 0.05,
                )
            )
    return Verification(
        outcomes=tuple(outcomes),
        measurement="log_prob",
        protocol="mean over 3 seeds",
        facts={"seeds": [0, 1, 2], "runs": 12},
    )


def _changes(ids: list[str]) -> dict:
    return {"name": "draft", "remove": ids, "relabel": {}, "keep": [], "weights": {}}


def _record(run: Path, name: str = "model") -> None:
    record = {
        "fit": {
            "model": f"/nowhere/{name}",
            "data": f"/nowhere/{name}/train.jsonl",
            "columns": COLUMNS,
            "weights": {"base": None, "dtype": "auto"},
            "follow": {"layers": [], "skip": [], "batch_tokens": 1024},
            "heldout": "/nowhere/heldout.jsonl",
        },
        "cost": {"pass_seconds": 38.0, "fit_seconds": 155.0},
        "timelines": {"timeline": {"source": "topic"}},
        "traces": {},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps(record, indent=1))


def _fit(run: Path) -> None:
    """A fit of two small layers, one of which is left out in part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = (torch.randn(30, 6), torch.randint(3, (30,)))
    headwater.fit(
        model, data, Classification(), curvature="ekfac", skip=["2.bias"], folder=run / "fit"
    )
