"""What a run folder is asked, and how an answer is found again: shared by `trace` and `timeline`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from headwater.cli.common import Session, read_examples, run_session, say, update_record
from headwater.cli.flags import RUN, DataFlags, to_json

if TYPE_CHECKING:
    from headwater.data.tokens import TextExamples


@dataclass(frozen=True, kw_only=True)
class Question:
    """Completions that a run folder is asked about.

    Args:
        run: The run folder of `headwater fit`.
        prompt: Prompts; repeat or list several.
        completion: Completions, one a prompt; generated when left out.
        span: Ask about a part of each completion: its words, as they stand there, or first..last, the numbers of its
            first character and of the one after its last; repeat or list several.
        queries: A file of prompts and completions, in place of --prompt.
        source: Metadata column to total scores by.
        max_new_tokens: Longest generated completion.
        chat: Put prompts into the model's chat template.
        measurement: What is asked of a completion.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    completion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    span: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    queries: Path | None = None
    source: str | None = None
    max_new_tokens: int = 24
    chat: bool = False
    measurement: Literal["log_prob", "loss"] = "log_prob"
    json: bool = False

    def check(self) -> None:
        """Refuse what is no question."""
        if not self.prompt and self.queries is None:
            raise ValueError('Expected --prompt "…" or --queries FILE; got neither.')
        if self.prompt and self.queries is not None:
            raise ValueError("Expected --prompt or --queries; got both.")
        if self.completion and len(self.completion) != len(self.prompt):
            raise ValueError(
                f"Expected one completion a prompt; got {len(self.prompt)} prompts and {len(self.completion)} "
                "completions. Leave --completion out to let the model complete the prompts."
            )
        if self.span and len(self.span) != len(self.prompt):
            raise ValueError(
                f"Expected one span a prompt; got {len(self.prompt)} prompts and {len(self.span)} spans."
            )


def check_name(name: str, what: str) -> None:
    """Refuse a name that is no plain name of a folder."""
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"Expected a plain name for the {what}; got {name!r}.")


def asked_queries(
    question: Question, session: Session, rather_than: Sequence[str] = ()
) -> "TextExamples":
    """The queries; alternatives, where there are any, follow the completions."""
    from headwater.data.tokens import completion_examples
    from headwater.models.language import generate

    if question.queries is not None:
        columns = DataFlags(prompt="prompt", completion="completion")
        return read_examples(question.queries, columns, session.language)
    language, prompts = session.language, question.prompt
    completions = question.completion or tuple(
        generate(language, p, max_new_tokens=question.max_new_tokens, chat=question.chat)
        for p in prompts
    )
    spans: list[tuple[int, int] | None] | None = None
    if question.span:
        spans = [_found(s, c) for s, c in zip(question.span, completions, strict=True)]
        spans += [None] * len(rather_than)
    if rather_than:
        prompts, completions = prompts + prompts, (*completions, *rather_than)
    examples = completion_examples(
        language.tokenizer,
        prompts,
        completions,
        chat=question.chat,
        spans=spans,
        max_length=language.context_length,
    )
    for message in examples.report.messages:
        say(f"  queries: {message}")
    return examples


def _found(span: str, completion: str) -> tuple[int, int]:
    """Where a span stands in a completion; words are taken where they first do."""
    if numbers := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", span):
        return int(numbers[1]), int(numbers[2])
    start = completion.find(span)
    if not span or start < 0:
        raise ValueError(f"Expected a --span of words of {completion!r}; got {span!r}.")
    return start, start + len(span)


def as_asked(question: Question, more: Sequence[Any] = ()) -> tuple[dict[str, Any], str]:
    """The question as the run's record keeps it, and a digest of it and of all that its answer depends on."""
    from headwater.core.fingerprint import fingerprint_json

    if not (question.run / RUN).is_file():
        run_session(question.run)  # says what is missing
    asked = {k: v for k, v in to_json(question).items() if k not in ("json", "run")}
    return asked, fingerprint_json([asked, [*_inputs(question), *more]])


def _inputs(question: Question) -> list[Any]:
    """What an answer depends on beside the question: the fit, and name, size and time of every file read."""
    from headwater.core.files import read_json
    from headwater.core.store import Artifact

    record = read_json(question.run / RUN)["fit"]
    manifest = Artifact.open(question.run / "fit", kind="fit").manifest
    named = [record["model"], record["data"], record["heldout"], question.queries]
    paths = [Path(p) for p in named if p is not None]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    stamps = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return [record["heldout"], record["columns"], manifest["files"], stamps]


def record_answer(run: Path, group: str, name: str, asked: dict[str, Any]) -> None:
    """Note in the run's record how an answer was asked for."""

    def noted(record: dict[str, Any]) -> dict[str, Any]:
        return record | {group: record.get(group, {}) | {name: asked}}

    update_record(run, noted)
