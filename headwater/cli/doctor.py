"""`headwater doctor`: proof on a few examples that the numbers will be right."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from headwater.cli.common import (
    DataFlags,
    FollowFlags,
    ModelFlags,
    emit_json,
    open_session,
    parse,
    progress_bar,
)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check a model and its data before anything long runs; exit code 1 when something is wrong.

    Per-example gradients of every followed layer are compared with autograd's; the loss is checked for dependence on
    batching, padding, masks and dropout; what is covered, tied or reused is listed.

    Example: headwater doctor path/to/model train.jsonl

    Args:
        model: Model folder, GGUF file, or adapter folder.
        data: The training data.
        n: Examples to check.
        json: Print the result as JSON.
    """

    model: tyro.conf.Positional[Path]
    data: tyro.conf.Positional[Path]
    n: int = 4
    columns: Annotated[DataFlags, tyro.conf.arg(name="")] = field(default_factory=DataFlags)
    weights: Annotated[ModelFlags, tyro.conf.arg(name="")] = field(default_factory=ModelFlags)
    follow: Annotated[FollowFlags, tyro.conf.arg(name="")] = field(default_factory=FollowFlags)
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Doctor, words, prog="doctor")
    from headwater.core.doctor import examine
    from headwater.core.task import CausalLM
    from headwater.report.checks import show_diagnosis

    session = open_session(
        command.model, command.data, command.columns, choose=command.weights, follow=command.follow
    )
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
