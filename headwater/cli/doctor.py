"""`headwater doctor`: proof on a few examples that the numbers will be right."""

from dataclasses import dataclass

from headwater.cli.common import emit_json, open_session, progress_bar
from headwater.cli.flags import Inputs, parse, require


@dataclass(frozen=True, kw_only=True)
class Doctor(Inputs):
    """Check a model and its data before anything long runs; exit code 1 when something is wrong.

    Per-example gradients of every followed layer are compared with autograd's; the loss is checked for dependence on
    batching, padding, masks and dropout; what is covered, tied or reused is listed.

    Example: headwater doctor path/to/model train.jsonl

    Args:
        n: Examples to check.
    """

    n: int = 4

    def check(self) -> None:
        """Refuse to check nothing."""
        require("--n", self.n, "at least 1", self.n >= 1)


def run(words: list[str]) -> int:
    command = parse(Doctor, words, prog="doctor")
    from headwater.core.doctor import examine
    from headwater.core.task import CausalLM
    from headwater.report.checks import show_diagnosis

    session = open_session(command)
    with progress_bar(quiet=command.json) as progress:
        diagnosis = examine(
            session.language.model,
            session.train,
            CausalLM(),
            layers=session.layers,
            skip=session.skip,
            n=command.n,
            progress=progress,
        )
    if command.json:
        emit_json(diagnosis.to_json())
    else:
        show_diagnosis(diagnosis)
    return 0 if diagnosis.ok else 1
