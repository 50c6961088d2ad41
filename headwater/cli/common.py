"""What all commands share: progress, errors, models with their data, the run folder."""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.flags import (
    FINETUNE,
    RUN,
    DataFlags,
    FollowFlags,
    Inputs,
    ModelFlags,
    Parsed,
    restore,
)

RECORD_SECONDS = 60.0  # to wait for another process that writes down what it did

if TYPE_CHECKING:
    from headwater.core.capture import Progress
    from headwater.data.tokens import TextExamples
    from headwater.models.language import LanguageModel
    from headwater.training.trajectory import Trajectory


def guarded(call: Callable[[], int]) -> int:
    """Run a command; the user's mistakes become one clear line and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"headwater: {message}", file=sys.stderr)
    try:
        return call()
    except Parsed as stop:
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
    except _MISTAKES as error:
        if os.environ.get("HEADWATER_TRACEBACK"):
            raise
        print(f"headwater: {one_line(error)}", file=sys.stderr)
        return 2


_MISTAKES = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)


def one_voice(run: Callable[[], int], name: str, *, shared: bool) -> int:
    """Run a command as one of the processes that a launcher started, if it did: the first speaks for all.

    Where one fails, it says so itself, once, and the others end without a word.
    """
    size, rank = (int(os.environ.get(k) or d) for k, d in (("WORLD_SIZE", 1), ("RANK", 0)))
    if size == 1:
        return run()
    with contextlib.ExitStack() as stack:
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if not shared:
            say(f"headwater: {name} runs in one process; start it without torchrun.")
            return 2
        from headwater.core.distributed import RankFailed, current, started

        try:
            with started():
                return run()
        except RankFailed as error:
            if error.rank is not None or not current().announce(error):
                return 2  # it has told its error itself
            print(f"headwater: {one_line(error)}", file=sys.__stderr__, flush=True)
            return 2
        except (RuntimeError, *_MISTAKES) as error:
            if os.environ.get("HEADWATER_TRACEBACK"):
                raise
            if current().announce(error):
                who = f"rank {rank} failed: {type(error).__name__}: {one_line(error)}"
                print(f"headwater: {who}", file=sys.__stderr__, flush=True)
            return 2


def one_line(error: BaseException) -> str:
    """What went wrong, for people."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (
        text
        if not isinstance(error, MemoryError)
        else f"out of memory ({text}); lower --batch-tokens."
    )


@contextlib.contextmanager
def progress_bar(
    *, quiet: bool = False, to: "Progress | None" = None
) -> Iterator["Progress | None"]:
    """A progress bar with time left on standard error; plain lines where that is no terminal.

    Args:
        quiet: Show nothing.
        to: What hears of the progress in its place.
    """
    if to is not None or quiet:
        yield to
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


Opened = tuple[Session, dict[str, Any]]  # a run's model and data, and its record


def open_session(inputs: Inputs, *, heldout: Path | None = None) -> Session:
    """Load the model and tokenize the data, saying what was done to long examples."""
    import torch

    from headwater.core.quantized import quantized_layers
    from headwater.models.language import load_language_model

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_grad_enabled(True)
    weights, columns = inputs.weights, inputs.columns
    language = load_language_model(inputs.model, dtype=weights.dtype, base=weights.base)
    train = read_examples(inputs.data, columns, language)
    held = None if heldout is None else read_examples(heldout, columns, language, train=train)
    named = [n for n, _ in language.model.named_parameters()]
    adapters = any("lora_" in n for n in named)
    # quantized weights are no parameters, and are followed when they are named
    every = ["*"] if quantized_layers(language.model) else "all"
    layers: str | list[str] = list(inputs.follow.layers) or (["*lora_*"] if adapters else every)
    return Session(
        language=language,
        train=train,
        heldout=held,
        layers=layers,
        skip=list(inputs.follow.skip),
        record=run_record(inputs.model),
    )


def read_examples(
    path: Path,
    flags: DataFlags,
    language: "LanguageModel",
    *,
    train: "TextExamples | None" = None,
    what: str = "held-out example",
) -> "TextExamples":
    """Examples of a file, with what happened to them said aloud; so is what they share with `train`."""
    from headwater.data.text import read_records
    from headwater.data.tokens import overlap, tokenize

    records = read_records(
        path,
        text=flags.text,
        prompt=flags.prompt,
        completion=flags.completion,
        messages=flags.messages,
        unit=flags.unit,
        limit=flags.limit,
    )
    length = language.context_length if flags.max_length is None else flags.max_length
    examples = tokenize(records, language.tokenizer, max_length=length)
    for message in examples.report.messages:
        say(f"  {path.name}: {message}")
    shared = None if train is None else overlap(examples, train, what)
    if shared:
        say(f"  {path.name}: {shared}")
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


def finetuning(model: Path, done: str, function: str) -> tuple[dict[str, Any], "Trajectory"]:
    """How `headwater finetune` made a model, and the record of that run.

    Args:
        model: The model's folder.
        done: What is to be done with the run, such as "repeated".
        function: What does it from Python.
    """
    from headwater.core.files import read_json
    from headwater.training.trajectory import Trajectory

    if not model.is_dir():
        raise FileNotFoundError(
            f"{model}, the model of this run, is no longer there; move it back, or fit again where it is now."
        )
    if not (model / FINETUNE).is_file():
        raise FileNotFoundError(
            f"{model} has no {FINETUNE}: only runs of `headwater finetune` can be {done} here. Run it again with the "
            f"same options (a finished run is found, not repeated), or use {function} from Python with your own "
            "training."
        )
    return read_json(model / FINETUNE), Trajectory.load(model)


def require_trained_on(session: Session, tuning: dict[str, Any], data: str) -> None:
    """Refuse a fit that was made on other examples than those with this fingerprint, the fine-tuning's."""
    if session.train.fingerprint() != data:
        raise ValueError(
            f"{tuning['model']} was fine-tuned on {tuning['data']}, and the fit was made on other examples; fit on the "
            "data the model was trained on, with the same columns and --max-length."
        )


def trace_name(run: Path, name: str | None) -> str | None:
    """The trace of that name or id in a run folder, or the only one there is; None where there is none."""
    from headwater.report.views.folders import id_of

    if not (run / RUN).is_file():
        raise FileNotFoundError(f"{run} is no run folder (it has no {RUN}).")
    found = (run / "traces").glob("*")
    names = sorted(p.name for p in found if p.is_dir() and not p.name.startswith("."))
    ids = {id_of(name): name for name in names}
    if name is None and len(names) > 1:
        raise ValueError(f"{run} holds several traces: {', '.join(ids)}. Choose one with --name.")
    if name is not None and name not in names:
        if name in ids:
            return ids[name]
        there = ", ".join(ids) or "none"
        raise ValueError(f"There is no trace {name!r} in {run}; there are: {there}.")
    return name or next(iter(names), None)


def run_session(run: Path) -> Opened:
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
    inputs = Inputs(
        model=Path(command["model"]),
        data=Path(command["data"]),
        columns=restore(DataFlags, command["columns"]),
        weights=restore(ModelFlags, command["weights"]),
        follow=restore(FollowFlags, command["follow"]),
    )
    heldout = None if command["heldout"] is None else Path(command["heldout"])
    return open_session(inputs, heldout=heldout), record


def update_record(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the record of a run folder; who else wants to, such as its page, waits the moment that takes.

    Args:
        run: The run folder.
        change: The new record, from the one that is there; it is empty where there is none.
    """
    from headwater.core.files import read_json, sibling, write_json
    from headwater.core.locks import waiting

    place = run / RUN
    with waiting(sibling(place, "lock"), place, RECORD_SECONDS):
        record = read_json(place) if place.is_file() else {}
        changed = change(record)
        if changed != record:
            write_json(place, changed)


def save_plot(path: Path, plot: Callable[[], Any]) -> None:
    """A figure as a picture, whole or not at all, where matplotlib is installed."""
    import io

    from headwater.core.files import write_bytes
    from headwater.extras import require

    try:
        plots: Any = require("matplotlib.pyplot", extra="plots")
    except ImportError as error:
        print(f"headwater: no plot: {error}", file=sys.stderr)
        return
    figure, content = plot(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # texts of any script
        figure.savefig(content, dpi=150, format="png")
    write_bytes(path, content.getvalue())
    plots.close(figure)
