import io

import torch
from rich.console import Console

from headwater.report.timeline import show
from headwater.trace.timeline import Timeline
from headwater.training.trajectory import Segment, StageRecord


def made() -> Timeline:
    values = torch.tensor([[[0.5, -0.25, 0.0]], [[0.0, 0.0, 2.0]]])
    stages = (StageRecord(name="first", stop=4), StageRecord(name="then", start=4, stop=10))
    segments = tuple(
        Segment(start=s.start, stop=s.stop, checkpoints=(k,), lr_sum=1.0, momentum=0.0, stage=k)
        for k, s in enumerate(stages)
    )
    return Timeline(
        values=values,
        segments=segments,
        stages=stages,
        losses=[1.0] * 10,
        query_ids=["q"],
        train_ids=["a", "b", "[bold]c"],
        measurement="log_prob",
        queries=["what is\x1b[2J this →\nthat"],
        metadata={"topic": ["x", "y", "x\x07"]},
        texts={"b": "text \u202eback"},
        gap=0.0,
    )


def printed(**options) -> str:
    out = io.StringIO()
    show(made(), Console(file=out, width=100, force_terminal=False), **options)
    return out.getvalue()


def test_segments_are_shown_with_their_sums_and_strongest_examples():
    lines = printed(top=2).splitlines()
    assert lines[0].strip() == "what is this → that"
    row = next(line for line in lines if "0–4" in line)
    assert all(part in row for part in ("+0.25", "+0.50", "-0.25", "first", "+0.50 a"))
    assert any("+2.00 [bold]c" in line for line in lines)
    everything = next(line for line in lines if line.startswith("│ all"))
    assert all(part in everything for part in ("+2.25", "+2.50", "-0.25"))
    assert "The sum over segments is the attribution made as a whole, to 0 nats." in printed()


def test_corpus_text_steers_no_terminal_and_totals_are_by_column():
    out = printed(column="topic")
    assert "\x1b" not in out and "\x07" not in out and "⟨RLO⟩" in out
    assert "by topic" in out and "+0.50 x" in out and "-0.25 y" in out
