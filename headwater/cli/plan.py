"""`headwater plan`: what a fit and a trace will take on this machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from headwater.cli.common import DataFlags, FollowFlags, ModelFlags, emit_json, open_session, parse
from headwater.cli.fit import CurvatureFlags


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict time, memory and disk before they are spent, from a few seconds of measurement.

    The exit code is 1 when they do not suffice.

    Example: headwater plan path/to/model train.jsonl --n-queries 20

    Args:
        model: Model folder, GGUF file, or adapter folder.
        data: The training data.
        n_queries: Queries that will be asked.
        out: The run folder that the fit will go to, whose disk is looked at.
        json: Print the result as JSON.
    """

    model: tyro.conf.Positional[Path]
    data: tyro.conf.Positional[Path]
    n_queries: int = 10
    out: Path = Path("runs")
    kind: Annotated[CurvatureFlags, tyro.conf.arg(name="")] = field(default_factory=CurvatureFlags)
    columns: Annotated[DataFlags, tyro.conf.arg(name="")] = field(default_factory=DataFlags)
    weights: Annotated[ModelFlags, tyro.conf.arg(name="")] = field(default_factory=ModelFlags)
    follow: Annotated[FollowFlags, tyro.conf.arg(name="")] = field(default_factory=FollowFlags)
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Plan, words, prog="plan")
    from headwater.core.plan import plan
    from headwater.core.task import CausalLM
    from headwater.report.checks import show_plan

    session = open_session(
        command.model, command.data, command.columns, choose=command.weights, follow=command.follow
    )
    made = plan(
        session.language.model,
        session.train,
        CausalLM(),
        curvature=command.kind.method(),
        layers=session.layers,
        skip=session.skip,
        n_queries=command.n_queries,
        batch_tokens=command.follow.batch_tokens,
        folder=command.out,
    )
    if command.json:
        emit_json(made.to_json())
    else:
        show_plan(made)
    return 0 if made.ok else 1
