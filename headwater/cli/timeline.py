"""`headwater timeline`: when in a fine-tuning a completion was learnt, and from which examples."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.common import (
    Opened,
    emit_json,
    finetuning,
    progress_bar,
    require_trained_on,
    run_session,
    save_plot,
    say,
)
from headwater.cli.flags import RUN, parse, require
from headwater.cli.question import Question, as_asked, asked_queries, check_name, record_answer

if TYPE_CHECKING:
    from headwater.core.capture import Progress
    from headwater.trace.timeline import Timeline as Result


@dataclass(frozen=True, kw_only=True)
class Timeline(Question):
    """Follow completions through the fine-tuning: what each stretch of it added, and from which examples.

    The model of the run was made by `headwater finetune` with checkpoints. SOURCE is asked, with the curvature of the
    fit. The table is printed; it and a plot are kept in the run folder.

    Example: headwater timeline runs/mine --prompt "The river rises in" --segments 3

    Args:
        name: Name of the timeline in the run folder.
        segments: Stretches of training that are told apart; at most as many as checkpoints.
        top: How many of the strongest examples to show for each.
    """

    name: str = "timeline"
    segments: int = 3
    top: int = 5

    def check(self) -> None:
        super().check()
        require("--segments", self.segments, "at least 1", self.segments >= 1)
        require("--top", self.top, "at least 1", self.top >= 1)
        check_name(self.name, "timeline")


def run(words: list[str]) -> int:
    command = parse(Timeline, words, prog="timeline")
    found, folder = timeline(command, quiet=command.json)
    if command.json:
        emit_json(_told(found, command))
        return 0
    from headwater.report.timeline import show

    show(found, top=command.top, column=command.source)
    say(f"Kept in {folder}.")
    return 0


def timeline(
    command: Timeline,
    *,
    quiet: bool = False,
    opened: Opened | None = None,
    progress: "Progress | None" = None,
) -> tuple["Result", Path]:
    """The timeline and its folder; a finished one of the same question is read.

    Args:
        command: The question.
        quiet: Show no progress.
        opened: The run's model and data with its record, where they are open already.
        progress: Called with (done, total, note), in place of a progress bar.
    """
    from headwater.core.files import ArtifactDamaged
    from headwater.trace.timeline import Timeline as Result

    folder = command.run / "timelines" / command.name
    asked, digest = as_asked(command)
    kept, plot = folder / "data", folder / "timeline.png"
    try:
        found = Result.load(kept) if kept.is_dir() else None
    except ArtifactDamaged as error:
        say(f"  {error} The timeline is made again.")
        found = None
    if found is None or found.facts.get("question") != digest:
        plot.unlink(missing_ok=True)
        with progress_bar(quiet=quiet, to=progress) as bar:
            made = _timeline(command, opened, bar)
        found = replace(made, facts=made.facts | {"question": digest})
        found.save(kept)
    if not plot.is_file():
        save_plot(plot, found.plot)
    record_answer(command.run, "timelines", command.name, asked)
    return found, folder


def _timeline(command: Timeline, opened: Opened | None, progress: "Progress | None") -> "Result":
    from headwater.core.files import read_json
    from headwater.core.fit import load
    from headwater.core.task import CausalLM
    from headwater.trace.source import Source
    from headwater.trace.timeline import timeline as follow

    model = Path(read_json(command.run / RUN)["fit"]["model"])
    tuning, trajectory = finetuning(model, "followed", "headwater.trace.timeline.timeline")
    if not trajectory.checkpoints:
        raise ValueError(
            f"The run that made {model} kept no checkpoints; fine-tune again with --checkpoints 6 into a new folder, "
            "and fit the model there."
        )
    trajectory.segments(command.segments)  # refuses more than there are checkpoints
    session, _ = opened or run_session(command.run)
    require_trained_on(session, tuning, trajectory.made_from["data"])
    if command.source is not None and command.source not in session.train.metadata:
        columns = ", ".join(session.train.metadata) or "none"
        raise ValueError(f"There is no metadata column {command.source!r}; there are: {columns}.")
    fitted = load(command.run / "fit", session.language.model, session.train, CausalLM())
    queries = asked_queries(command, session)
    return follow(
        fitted,
        queries,
        trajectory=trajectory,
        source=Source(segments=command.segments),
        measurement=command.measurement,
        top=command.top,
        progress=progress,
    )


def _told(found: "Result", command: Timeline) -> dict[str, Any]:
    """The timeline as JSON: each query's segments, and the facts."""
    answers = [
        {
            "query": name,
            "text": text,
            "segments": found.rows(q, top=command.top, column=command.source),
        }
        for q, (name, text) in enumerate(zip(found.query_ids, found.queries, strict=True))
    ]
    shown = {name for a in answers for s in a["segments"] for name, _ in s["strongest"]}
    return {
        "measurement": found.measurement,
        "queries": answers,
        "texts": {name: text for name, text in found.texts.items() if name in shown},
        "facts": found.facts,
    }
