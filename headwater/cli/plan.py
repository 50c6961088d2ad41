"""`headwater plan`: what a fit and a trace will take on this machine."""

from dataclasses import dataclass
from pathlib import Path

from headwater.cli.common import emit_json, open_session
from headwater.cli.flags import FitInputs, parse, require


@dataclass(frozen=True, kw_only=True)
class Plan(FitInputs):
    """Predict time, memory and disk before they are spent, from a few seconds of measurement.

    The exit code is 1 when they do not suffice.

    Example: headwater plan path/to/model train.jsonl --n-queries 20

    Args:
        n_queries: Queries that will be asked.
        out: The run folder that the fit will go to, whose disk is looked at.
    """

    n_queries: int = 10
    out: Path = Path("runs")

    def check(self) -> None:
        """Refuse to plan for no query."""
        require("--n-queries", self.n_queries, "at least 1", self.n_queries >= 1)


def run(words: list[str]) -> int:
    command = parse(Plan, words, prog="plan")
    from headwater.core.plan import plan
    from headwater.core.task import CausalLM
    from headwater.report.checks import show_plan

    session = open_session(command)
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
