"""Flags that commands share, their checks, and their way to JSON and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

Command = TypeVar("Command")
Actions = Mapping[
    str, tuple[type, Callable[[Any], int]]
]  # flags and what is done, by the action's name
RUN, FINETUNE = (
    "run.json",
    "finetune.json",
)  # the records of a run folder, and of a fine-tuned model
CHANGES = "changes.json"  # the change set that a model was fine-tuned under, beside it


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
        unit: What one example of a .txt file is: a paragraph (between blank lines), a line, or the whole file.
        max_length: Longest example in tokens; the model's context when left out.
        limit: Read only so many examples.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    unit: Literal["paragraph", "line", "file"] = "paragraph"
    max_length: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuse limits that no example can meet."""
        length, limit = self.max_length, self.limit
        require("--max-length", length, "at least 2 tokens", length is None or length >= 2)
        require("--limit", limit, "at least 1", limit is None or limit >= 1)


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

    def check(self) -> None:
        """Refuse a batch that holds no token."""
        require("--batch-tokens", self.batch_tokens, "at least 1", self.batch_tokens >= 1)


@dataclass(frozen=True, kw_only=True)
class CurvatureFlags:
    """The curvature; what is left out takes the method's own default.

    Args:
        curvature: Which form; auto takes the exact dual form where its rows fit, else EK-FAC.
        fisher: Labels drawn from the model, all labels weighted, or the given ones.
        draws: Draws an example, for labels drawn from the model.
        folds: Folds of the data kept apart for intervals; 1 keeps none.
        tolerance: Stop once the relative standard error of the second moments is below this.
        fisher_seed: Seed of the draws.
    """

    curvature: Literal["auto", "ekfac", "kfac", "dual", "diagonal", "identity"] = "auto"
    fisher: Literal["mc", "exact", "empirical"] | None = None
    draws: int | None = None
    folds: int | None = None
    tolerance: float | None = None
    fisher_seed: int | None = None

    def method(self) -> Any:
        """The method with the given options."""
        from headwater.core.curvature import METHODS

        given = {
            "fisher": self.fisher,
            "draws": self.draws,
            "folds": self.folds,
            "tolerance": self.tolerance,
            "seed": self.fisher_seed,
        }
        given = {k: v for k, v in given.items() if v is not None}
        kind = "ekfac" if self.curvature == "auto" and given else self.curvature
        if kind == "auto":
            return "auto"
        known = {f.name for f in fields(METHODS[kind])}  # type: ignore[arg-type]
        unknown = [k for k in given if k not in known]
        if unknown:
            raise ValueError(
                f"The {kind} curvature has no option {', '.join(unknown)}; leave it out."
            )
        return METHODS[kind](**given)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A model and its training data.

    Args:
        model: Model folder, GGUF file, or adapter folder.
        data: The training data: JSONL, CSV, Parquet or text file, or a folder of them.
        json: Print the result as JSON.
    """

    model: tyro.conf.Positional[Path]
    data: tyro.conf.Positional[Path]
    columns: Annotated[DataFlags, tyro.conf.arg(name="")] = field(default_factory=DataFlags)
    weights: Annotated[ModelFlags, tyro.conf.arg(name="")] = field(default_factory=ModelFlags)
    follow: Annotated[FollowFlags, tyro.conf.arg(name="")] = field(default_factory=FollowFlags)
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class FitInputs(Inputs):
    """A model, its training data, and the curvature to be fitted."""

    kind: Annotated[CurvatureFlags, tyro.conf.arg(name="")] = field(default_factory=CurvatureFlags)


def parse(command: type[Command], words: Sequence[str], *, prog: str) -> Command:
    """Flags from a command's dataclass, by tyro, checked before anything is loaded."""
    try:
        parsed = tyro.cli(command, args=list(words), prog=f"headwater {prog}")
    except SystemExit as stop:  # tyro has printed its message
        raise Parsed(int(stop.code or 0)) from None
    _check(parsed)
    return parsed


def _check(flags: Any) -> None:
    """Ask every part of a command that knows what its values must be."""
    for part in (getattr(flags, f.name) for f in fields(flags)):
        if is_dataclass(part):
            _check(part)
    if hasattr(flags, "check"):
        flags.check()


def require(flag: str, value: Any, expected: str, holds: bool) -> None:
    """Refuse the value of a flag, in one line that says what to do."""
    if not holds:
        raise ValueError(f"{flag} must be {expected}; got {value}. Leave it out for its default.")


class Parsed(Exception):
    """The parser printed help or an error, and the command is over."""


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


def run_action(command: str, words: list[str], actions: Actions, *, example: str) -> int:
    """Run the action that the first word names; without one, or asked for help, tell what there is."""
    if not words or words[0] in ("-h", "--help"):
        wide = max(map(len, actions))
        lines = (f"  {k:{wide}} {(v[0].__doc__ or '').splitlines()[0]}" for k, v in actions.items())
        print(f"usage: headwater {command} ACTION ...\n\nactions:\n" + "\n".join(lines))
        print(f"\nExample: headwater {command} {example}")
        return 0
    if words[0] not in actions:
        raise ValueError(f"Expected one of {', '.join(actions)}; got {words[0]!r}.")
    flags, action = actions[words[0]]
    return action(parse(flags, words[1:], prog=f"{command} {words[0]}"))
