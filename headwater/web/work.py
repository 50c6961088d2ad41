"""What each kind of job does: it calls what the command line calls, with a model that stays open between jobs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.common import Opened, run_session
from headwater.cli.flags import RUN
from headwater.core.files import read_json
from headwater.core.fingerprint import fingerprint_json
from headwater.web import asks
from headwater.web.jobs import ASKS

if TYPE_CHECKING:
    from headwater.core.evidence import Evidence
    from headwater.web.worker import Report


class Work:
    """The jobs of a run folder, done one at a time.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path):
        self.run = run
        self._opened: Opened | None = None
        self._made_from = ""

    def do(self, kind: str, asked: dict[str, Any], report: "Report") -> dict[str, Any]:
        """Do a job; returns the names of what was saved."""
        doing: dict[str, Callable[[Any, Report], dict[str, Any]]] = {
            "complete": self.complete,
            "trace": self.trace,
            "survey": self.survey,
            "verify": self.verify,
            "timeline": self.timeline,
        }
        return doing[kind](ASKS.validate_python(asked), report)

    def opened(self, report: "Report") -> Opened:
        """The run's model and data, opened once, and again when the fit or a file changed."""
        from headwater.cli.question import Question, as_asked

        _, digest = as_asked(Question(run=self.run))
        if self._opened is None or self._made_from != digest:
            self._opened = None  # two models need not fit
            report.progress(0, 1, "opening the model and its data")
            self._opened, self._made_from = run_session(self.run), digest
        return self._opened[0], read_json(self.run / RUN)  # which files were added since

    def complete(self, ask: asks.Complete, report: "Report") -> dict[str, Any]:
        """Continue a prompt."""
        from headwater.models.language import generate

        session, _ = self.opened(report)
        report.progress(0, ask.max_new_tokens, "completing")
        said = generate(
            session.language,
            ask.prompt,
            max_new_tokens=ask.max_new_tokens,
            chat=ask.chat,
            on_text=report.text,
        )
        return {"completion": said}

    def trace(self, ask: asks.Trace, report: "Report") -> dict[str, Any]:
        """Trace a completion, by the index where there is one."""
        from headwater.cli.trace import Trace, trace
        from headwater.report.views import corpus
        from headwater.report.views.answer import trace_view

        name = f"ask-{fingerprint_json(ask.model_dump())[:12]}"
        indexed = (self.run / "index").is_dir() and not ask.thorough
        if ask.where and not indexed:
            raise ValueError(
                "Only an index can be asked about some of the examples; make one with `headwater index build "
                f"{self.run}`, or ask about all of them."
            )

        numbers = corpus.numbers(self.run)

        def partial(_: str, evidence: "Evidence") -> None:
            report.partial(trace_view(evidence, name, numbers)["answers"])

        command = Trace(
            run=self.run,
            prompt=(ask.prompt,),
            completion=(ask.completion,),
            span=_span(ask.span),
            rather_than=() if ask.rather_than is None else (ask.rather_than,),
            compare=ask.compare,
            chat=ask.chat,
            source=ask.source,
            top=ask.top,
            index=indexed,
            where=tuple(ask.where),
            name=name,
        )
        command.check()
        trace(
            command,
            quiet=True,
            opened=self.opened(report),
            progress=report.progress,
            partial=partial,
        )
        return {"trace": name}

    def survey(self, ask: asks.Survey, report: "Report") -> dict[str, Any]:
        """Look at every training example."""
        from headwater.cli.survey import survey

        survey(self.run, opened=self.opened(report), progress=report.progress)
        return {}

    def verify(self, ask: asks.Verify, report: "Report") -> dict[str, Any]:
        """Repeat the fine-tuning with changes of the data."""
        from headwater.cli.verify import Verify, verify
        from headwater.cli.verify_audit import verify_changes
        from headwater.report.views.run import trace_folders, verification_id

        changes = None if ask.changes is None else ask.changes.to_set()
        traced = trace_folders(self.run).get(ask.trace or "")
        name = ask.trace if traced is None else traced.name
        command = Verify(run=self.run, name=name, top=ask.top or 10, seeds=ask.seeds)
        command.check()
        shared: dict[str, Any] = {
            "quiet": True,
            "opened": self.opened(report),
            "progress": report.progress,
        }
        if changes is not None and ask.trace is None:
            _, place = verify_changes(command, changes, **shared)
        else:
            _, place = verify(command, changes, **shared)
        return {"verification": verification_id(place)}

    def timeline(self, ask: asks.Timeline, report: "Report") -> dict[str, Any]:
        """Follow a completion through the fine-tuning."""
        from headwater.cli.timeline import Timeline, timeline

        name = f"ask-{fingerprint_json(ask.model_dump())[:12]}"
        command = Timeline(
            run=self.run,
            prompt=(ask.prompt,),
            completion=(ask.completion,),
            span=_span(ask.span),
            chat=ask.chat,
            segments=ask.segments,
            name=name,
        )
        command.check()
        timeline(command, quiet=True, opened=self.opened(report), progress=report.progress)
        return {"timeline": name}


def _span(span: list[int] | None) -> tuple[str, ...]:
    """A part of the completion as the command line takes it."""
    return () if span is None else ("{}..{}".format(*span),)
