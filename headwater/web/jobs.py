"""Jobs: what the page asked to be computed, as JSON files that outlive the server.

A job file is written whole whenever its job changes state. At a start, jobs that were waiting or running wait again, in
the order in which they were asked.
"""

import re
import sys
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from headwater.core.evidence import plain
from headwater.core.files import ArtifactError, OutOfDisk, read_json, write_json
from headwater.report.text import visible
from headwater.web.asks import Ask

MOST_WAITING, MOST_KEPT, MOST_SHOWN = 8, 50, 100
State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
ASKS: TypeAdapter[Ask] = TypeAdapter(Ask)
_NAME = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{6}")


class QueueFull(ValueError):
    """So many jobs wait that no other is taken."""


class Ended(ValueError):
    """The job is over."""


@dataclass(kw_only=True)
class Live:
    """What a running job has given so far, for those who look on.

    Attributes:
        text: What the model said.
        partial: The answers so far, as the page shows them.
        n_partial: How often they came.
        stopping: Whether the job was told to stop.
    """

    text: str = ""
    partial: list[dict[str, Any]] = field(default_factory=list)
    n_partial: int = 0
    stopping: bool = False


@dataclass(kw_only=True)
class Job:
    """One job.

    Attributes:
        id: Its name; names sort by the time of asking.
        kind: What is to be done.
        title: The same in words, for people.
        asked: The request's body.
        created: When it was asked, in UTC.
        state: Where it stands.
        progress: Steps done and in all, and what is being done.
        stages: What was done, and how long it took.
        result: Names of what was saved.
        error: Why it failed.
        attempts: How often it was begun.
        deaths: How often the process that computes went down under it.
        live: What it has given so far; not kept.
    """

    id: str
    kind: str
    title: str
    asked: dict[str, Any]
    created: str
    state: State = "queued"
    progress: dict[str, Any] | None = None
    stages: list[dict[str, str]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: str | None = None
    attempts: int = 0
    deaths: int = 0
    live: Live = field(default_factory=Live, repr=False)

    def to_json(self) -> dict[str, Any]:
        """What is kept of it."""
        kept = (f.name for f in fields(self) if f.name != "live")
        return plain({name: getattr(self, name) for name in kept})

    @cached_property
    def briefly_asked(self) -> dict[str, Any]:
        """The request without a long list of changes, of which every message of the job would be full."""
        changes = self.asked.get("changes")
        if not isinstance(changes, dict) or len(changes["changes"]) <= MOST_SHOWN:
            return self.asked
        told = {"name": changes["name"], "n_changes": len(changes["changes"])}
        return self.asked | {"changes": told}


_JOB: TypeAdapter[Job] = TypeAdapter(Job)


class Jobs:
    """The jobs of a run folder.

    Args:
        folder: Where their files lie.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._jobs = {job.id: job for job in map(_read, sorted(folder.glob("*.json"))) if job}
        for job in self._jobs.values():
            if job.state == "running":
                self.requeue(job)

    def __contains__(self, name: object) -> bool:
        return name in self._jobs

    def __getitem__(self, name: str) -> Job:
        return self._jobs[name]

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        return [self._jobs[name] for name in sorted(self._jobs, reverse=True)]

    def waiting(self) -> list[Job]:
        """Those that wait, in their order."""
        return [j for _, j in sorted(self._jobs.items()) if j.state == "queued"]

    def add(self, ask: Ask) -> Job:
        """Put a request into the queue.

        Raises:
            QueueFull: Too many wait already.
        """
        if len(self.waiting()) >= MOST_WAITING:
            raise QueueFull(
                f"{MOST_WAITING} jobs wait already; cancel one, or ask again when one has ended."
            )
        now = datetime.now(UTC)
        job = Job(
            id=f"{now:%Y%m%d-%H%M%S-%f}-{token_hex(3)}",
            kind=ask.kind,
            title=ask.title,
            asked=ask.model_dump(),
            created=now.isoformat(timespec="seconds"),
        )
        self.save(job)
        self._jobs[job.id] = job
        self._prune()
        return job

    def save(self, job: Job) -> None:
        """Write a job's file."""
        write_json(self.folder / f"{job.id}.json", job.to_json())

    def requeue(self, job: Job) -> None:
        """Let a job wait for another attempt, in its old place."""
        job.state, job.progress, job.live = "queued", None, Live()
        self._keep(job)

    def end(self, job: Job, state: State, **told: Any) -> None:
        """Note how a job ended.

        Args:
            job: The job.
            state: How it ended.
            told: Its result, or its error.
        """
        job.state, job.progress = state, None
        for name, value in told.items():
            setattr(job, name, value)
        job.live.partial = []  # what is shown from now on is the saved result
        self._keep(job)

    def _keep(self, job: Job) -> None:
        """Write a job's file, on a full disk into the room of its old one: that would have it done again.

        Where there is still no room, the server goes on with what it knows, and says so.
        """
        try:
            self.save(job)
        except OutOfDisk:
            (self.folder / f"{job.id}.json").unlink(missing_ok=True)
            try:
                self.save(job)
            except OutOfDisk as error:
                told = f"job {job.id} is {job.state}, which could not be noted"
                print(f"headwater: {told}: {error}", file=sys.stderr)

    def shown(self, job: Job) -> dict[str, Any]:
        """A job as the page shows it, with its place in the queue, from 1."""
        hidden = ("asked", "deaths", "live")
        names = (f.name for f in fields(job) if f.name not in hidden)
        told = {n: getattr(job, n) for n in names} | {"asked": job.briefly_asked}
        waiting = [j.id for j in self.waiting()] if job.state == "queued" else []
        return plain(told) | {"position": waiting.index(job.id) + 1 if waiting else 0}

    def _prune(self) -> None:
        """Forget the oldest jobs that have ended."""
        for job in [j for j in self.all() if j.state in ENDED][MOST_KEPT:]:
            del self._jobs[job.id]
            (self.folder / f"{job.id}.json").unlink(missing_ok=True)


def _read(path: Path) -> Job | None:
    """The job of a file; None, with a word on standard error, where it holds none."""
    try:
        if path.is_symlink() or not _NAME.fullmatch(path.stem):
            raise ValueError("its name is not that of a job")
        content = read_json(path)
        Job(**content)  # refuses fields that are unknown
        job = _JOB.validate_python(content)
        ask = ASKS.validate_python(job.asked)
        if job.id != path.stem or job.kind != ask.kind or "live" in content:
            raise ValueError("its fields are not those of a job")
        job.title, job.error = ask.title, job.error and visible(job.error)
        return job
    except (ArtifactError, OSError, TypeError, ValueError) as error:  # pydantic's are ValueErrors
        problem = "it holds no job" if isinstance(error, ValidationError) else error
        print(f"headwater: {path} is left alone: {problem}.", file=sys.stderr)
        return None
