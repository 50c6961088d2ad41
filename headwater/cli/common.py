"""What all commands share: flags for models and data, progress, errors, the run folder."""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from headwater.core.capture import Progress
    from headwater.data.tokens import TextExamples
    from headwater.models.language import LanguageModel

Command = TypeVar("Command")
RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model.

    Args:
        base: Folder of the base model, where an adapter does not name it.
        dtype: Number format of the weights.
    """

    base: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The training data.

    Args:
        text: Column of plain text, all of it scored.
        prompt: Column of prompts, not scored; with --completion.
        completion: Column of completions, scored.
        messages: Column of chats; the assistant's turns are scored.
        max_length: Longest example in tokens; the model's context when left out.
        limit: Read only so many examples.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    max_length: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class FollowFlags:
    """Which parameters are followed.

    Args:
        layers: Patterns of names; adapters only where there are any, else everything, when left out.
        skip: Patterns of names to leave out.
        batch_tokens: Most tokens in a batch.
    """

    layers: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    batch_tokens: int = 1024


def parse(command: type[Command], words: Sequence[str], *, prog: str) -> Command:
    """Flags from a command's dataclass, by tyro."""
    try:
        return tyro.cli(command, args=list(words), prog=f"headwater {prog}")
    except SystemExit as stop:  # tyro has printed its message
        raise _Parsed(int(stop.code or 0)) from None


class _Parsed(Exception):
    """The parser printed help or an error, and the command is over."""


def guarded(call: Callable[[], int]) -> int:
    """Run a command; the user's mistakes become one clear line and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"headwater: {message}", file=sys.stderr)
    try:
        return call()
    except _Parsed as stop:
        return stop.args[0]
    except KeyboardInterrupt:
        print(
            "\nheadwater: interrupted; what was finished is kept, and the same command goes on.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if os.environ.get("HEADWATER_TRACEBACK"):
            raise
        print(f"headwater: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (
        text
        if not isinstance(error, MemoryError)
        else f"out of memory ({text}); lower --batch-tokens."
    )


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator["Progress | None"]:
    """A progress bar with time left on standard error; plain lines where that is no terminal."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, note: str) -> None:
            stage, _, detail = note.partition(":")
            if stage not in tasks or bars.tasks[tasks[stage]].finished:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(
                tasks[stage],
                completed=done,
                total=total,
                description=stage + (f":{detail}" if detail else ""),
            )

        yield report


class _Lines:
    """Progress as a line every few seconds, with the time left."""

    def __init__(self, every: float = 10.0):
        self.every, self.stage, self.started, self.printed, self.first = every, "", 0.0, 0.0, 0

    def __call__(self, done: int, total: int, note: str) -> None:
        now, stage = time.monotonic(), note.partition(":")[0]
        if stage != self.stage:
            self.stage, self.started, self.printed, self.first = stage, now, now, done - 1
            print(f"  {stage} …", file=sys.stderr, flush=True)
        elif now - self.printed > self.every and done < total:
            left = (now - self.started) / max(done - self.first, 1) * (total - done)
            print(
                f"  {note}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True
            )
            self.printed = now


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def emit_json(value: Any) -> None:
    """A result for machines, on standard output."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))


@dataclass(frozen=True, kw_only=True)
class Session:
    """An opened model with its data.

    Attributes:
        language: The model with its tokenizer.
        train: The training examples.
        heldout: Examples that were not trained on, or None.
        layers: Which layers to follow.
        skip: Which to leave out.
        record: What is known of the training run: weight_decay, adaptive, distance.
    """

    language: "LanguageModel"
    train: "TextExamples"
    heldout: "TextExamples | None"
    layers: str | list[str]
    skip: list[str]
    record: dict[str, Any] = field(default_factory=dict)


def open_session(
    model: Path,
    data: Path,
    flags: DataFlags,
    *,
    choose: ModelFlags,
    follow: FollowFlags,
    heldout: Path | None = None,
) -> Session:
    """Load the model and tokenize the data, saying what was done to long examples."""
    import torch

    from headwater.models.language import load_language_model

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_grad_enabled(True)
    language = load_language_model(model, dtype=choose.dtype, base=choose.base)
    train = read_examples(data, flags, language)
    held = None if heldout is None else read_examples(heldout, flags, language, ids=set(train.ids))
    named = [n for n, _ in language.model.named_parameters()]
    adapters = any("lora_" in n for n in named)
    layers: str | list[str] = list(follow.layers) or (["*lora_*"] if adapters else "all")
    return Session(
        language=language,
        train=train,
        heldout=held,
        layers=layers,
        skip=list(follow.skip),
        record=run_record(model),
    )


def read_examples(
    path: Path, flags: DataFlags, language: "LanguageModel", ids: set[str] | None = None
) -> "TextExamples":
    """Examples of a file, with what happened to them said aloud."""
    from headwater.data.text import read_records
    from headwater.data.tokens import tokenize

    records = read_records(
        path,
        text=flags.text,
        prompt=flags.prompt,
        completion=flags.completion,
        messages=flags.messages,
        limit=flags.limit,
    )
    length = flags.max_length or language.context_length
    examples = tokenize(records, language.tokenizer, max_length=length)
    for message in examples.report.messages:
        say(f"  {path.name}: {message}")
    both = set(examples.ids) & (ids or set())
    if both:
        say(
            f"  {path.name}: {len(both)} held-out ids also occur in the training data, such as {min(both)!r}."
        )
    return examples


def run_record(model: Path) -> dict[str, Any]:
    """What the training run recorded about itself, beside the model."""
    path = model / "trajectory.json"
    if not path.is_file():
        return {}
    from headwater.training.trajectory import Trajectory

    trajectory = Trajectory.load(path)
    return {
        "weight_decay": trajectory.weight_decay,
        "adaptive": trajectory.adaptive,
        "distance": trajectory.distance,
        "horizon": trajectory.horizon,
    }


def run_session(run: Path) -> tuple[Session, dict[str, Any]]:
    """The model and data that a run folder was made from, and its record."""
    from headwater.core.files import read_json

    place = run / RUN
    if not place.is_file():
        raise FileNotFoundError(
            f"{run} is no run folder (it has no {RUN}); make one with `headwater fit … --out {run}`."
        )
    record = read_json(place)
    needed = {"model", "data", "columns", "weights", "follow", "heldout"}
    command = record.get("fit") if isinstance(record, dict) else None
    if not isinstance(command, dict) or not needed <= set(command):
        raise ValueError(
            f"{place} does not hold the record of a fit; run `headwater fit … --out {run}` again."
        )
    session = open_session(
        Path(command["model"]),
        Path(command["data"]),
        restore(DataFlags, command["columns"]),
        choose=restore(ModelFlags, command["weights"]),
        follow=restore(FollowFlags, command["follow"]),
        heldout=None if command["heldout"] is None else Path(command["heldout"]),
    )
    return session, record


def restore(cls: type[Command], values: dict[str, Any]) -> Command:
    """A flags dataclass from its JSON form."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(
            f"{RUN} has options this version does not know: {', '.join(sorted(unknown))}."
        )
    made = {}
    for name, value in values.items():
        kind = str(known[name].type)
        if value is not None and "Path" in kind:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)


def to_json(command: Any) -> dict[str, Any]:
    """A flags dataclass as JSON: paths as text, made absolute so that a run can be repeated from anywhere."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.resolve())
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(asdict(command))
