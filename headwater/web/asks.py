"""What the page may ask: the shapes of request bodies, with bounds; whatever else they hold is refused."""

from collections import Counter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headwater.training.changes import ChangeSet

MAX_TEXT, MAX_NAME, MAX_CHANGES = 50_000, 300, 200_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Said = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Key = Annotated[str, Field(min_length=1, max_length=3 * MAX_NAME)]  # of a result of the run
Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class Body(BaseModel):
    """A body: known fields only, of the types they should have."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Change(Body):
    """What is to be done with one training example."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    number: Annotated[int, Field(ge=0)] | None = None
    action: Literal["remove", "duplicate", "upweight", "relabel", "keep"]
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    label: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    note: Annotated[str, Field(max_length=4_000)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Change":
        if self.action == "upweight" and self.weight is None:
            raise ValueError(f"the weight of {self.id!r} is missing")
        if self.action == "relabel" and not (self.label or "").isdecimal():
            raise ValueError(f"the new label of {self.id!r} must be the number of a class")
        return self


class Changes(Body):
    """The page's change set."""

    name: Annotated[str, Field(max_length=MAX_NAME)] = "changes"
    changes: Annotated[list[Change], Field(max_length=MAX_CHANGES)]

    def to_set(self) -> ChangeSet:
        """The same as training takes it.

        Raises:
            ValueError: An example is to be treated in two ways.
        """

        def those(*actions: str) -> list[Change]:
            return [c for c in self.changes if c.action in actions]

        times = Counter(c.id for c in self.changes)
        twice = next((i for i, n in times.items() if n > 1), None)
        if twice is not None:
            raise ValueError(f"example {twice!r} is named twice; choose one thing to do with it")
        return ChangeSet(
            name=self.name or "changes",
            remove=tuple(c.id for c in those("remove")),
            relabel={c.id: int(c.label or 0) for c in those("relabel")},
            keep=tuple(c.id for c in those("keep")),
            weights={
                c.id: 2.0 if c.action == "duplicate" or c.weight is None else c.weight
                for c in those("duplicate", "upweight")
            },
        )


class Complete(Body):
    """Let the model continue a prompt."""

    kind: Literal["complete"]
    prompt: Said
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 24
    chat: bool = False

    @property
    def title(self) -> str:
        return f"Complete “{brief(self.prompt, end=True)}”"


class Trace(Body):
    """Trace a completion to training examples."""

    kind: Literal["trace"]
    prompt: Text
    completion: Said
    rather_than: Said | None = None
    span: Span | None = None
    chat: bool = False
    source: Name | None = None
    top: Annotated[int, Field(ge=1, le=100)] = 8
    thorough: bool = False
    compare: bool = True
    where: Annotated[list[Name], Field(max_length=20)] = []

    @model_validator(mode="after")
    def _within(self) -> "Trace":
        check_span(self.span, self.completion)
        return self

    @property
    def title(self) -> str:
        said = self.completion[slice(*self.span)] if self.span else self.completion
        other = f" rather than “{brief(self.rather_than)}”" if self.rather_than else ""
        return f"Trace “{brief(said)}”{other}"


class Survey(Body):
    """Look at every training example."""

    kind: Literal["survey"]

    @property
    def title(self) -> str:
        return "Survey the training data"


class Verify(Body):
    """Repeat the fine-tuning with changes, and see whether the scores were right."""

    kind: Literal["verify"]
    trace: Key | None = None
    changes: Changes | None = None
    top: Annotated[int, Field(ge=1, le=10_000)] | None = None
    seeds: Annotated[int, Field(ge=1, le=20)] = 1

    @model_validator(mode="after")
    def _one(self) -> "Verify":
        if (self.changes is None) == (self.top is None):
            raise ValueError("give changes, or top with a trace: one of the two")
        if self.top is not None and self.trace is None:
            raise ValueError("top needs a trace")
        if self.changes is not None and not len(self.changes.to_set()):
            raise ValueError("the change set changes nothing, so there is nothing to verify")
        return self

    @property
    def title(self) -> str:
        if self.changes is None:
            return f"Verify {self.trace} without its top {self.top}"
        return f"Verify “{brief(self.changes.name)}”" + (f" on {self.trace}" if self.trace else "")


class Timeline(Body):
    """Follow a completion through the fine-tuning."""

    kind: Literal["timeline"]
    prompt: Text
    completion: Said
    span: Span | None = None
    chat: bool = False
    segments: Annotated[int, Field(ge=1, le=100)] = 3

    @model_validator(mode="after")
    def _within(self) -> "Timeline":
        check_span(self.span, self.completion)
        return self

    @property
    def title(self) -> str:
        said = self.completion[slice(*self.span)] if self.span else self.completion
        return f"Timeline of “{brief(said)}”"


def check_span(span: list[int] | None, completion: str) -> None:
    """Refuse a span that does not lie within the completion."""
    if span is not None and not 0 <= span[0] < span[1] <= len(completion):
        raise ValueError(
            f"the span must lie within the {len(completion)} characters of the completion"
        )


Ask = Complete | Trace | Survey | Verify | Timeline


def brief(text: str, width: int = 60, *, end: bool = False) -> str:
    """A short, harmless form of a text, or of its end.

    Example:
        >>> brief("one two three four", 9), brief("one two three four", 9, end=True)
        ('one two …', '…ree four')
    """
    from headwater.report.text import visible

    flat = " ".join(visible(text[-20 * width :] if end else text[: 20 * width]).split())
    if len(flat) <= width:
        return flat
    return f"…{flat[1 - width :]}" if end else f"{flat[: width - 1]}…"
