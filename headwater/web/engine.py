"""The process that computes, as the server sees it: one job after another, told of and stopped through its pipes.

Between server and worker go lines of JSON, never pickles. A worker that dies takes no job with it: the job waits for
another attempt, in which the commands find what was finished, and fails after the third.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from headwater.core.files import OutOfDisk
from headwater.report.text import visible
from headwater.web.asks import Ask
from headwater.web.jobs import ENDED, Ended, Job, Jobs, Live

MOST_DEATHS = 3
PATIENCE = 15.0  # seconds that a cancelled job may take to notice
ALIVE = 15.0  # seconds between signs of life to those who look on
MAX_LINE = 1 << 26
MOST_TOLD = 1_000  # characters of an error, or of a note on progress


class Worker:
    """A child process that takes and gives lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str]) -> "Worker":
        """Start one, in a session of its own: what the terminal sends to the server does not reach it."""
        pipe = asyncio.subprocess.PIPE
        options: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "limit": MAX_LINE}
        return cls(
            await asyncio.create_subprocess_exec(*command, start_new_session=True, **options)
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        return self._process.returncode is not None

    def send(self, message: dict[str, Any]) -> None:
        """Give it a line; one that is gone is noticed by `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """Its next line; None once it has ended."""
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # a line that is too long or no JSON: nothing it says can be relied on
            return None

    def kill(self) -> None:
        """End it at once; what it writes is written whole or not at all."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                # Not `Process.kill`: it looks whether the child has ended, and then asyncio cannot learn how.
                os.kill(self._process.pid, signal.SIGKILL)

    async def ended(self) -> str:
        """How it ended, in words, once it has."""
        self.kill()
        code = await self._process.wait()
        if code >= 0:
            return f"ended with code {code}"
        lack = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{lack}"


class Engine:
    """Runs the jobs of a run folder one after another.

    Args:
        run: The run folder.
        jobs: Its jobs.
        command: What starts a worker; Headwater's own when left out.
        patience: Seconds that a cancelled job may take to notice.
    """

    def __init__(
        self,
        run: Path,
        jobs: Jobs,
        *,
        command: Sequence[str] | None = None,
        patience: float = PATIENCE,
    ):
        self.jobs, self.patience = jobs, patience
        self._command = command or (sys.executable, "-m", "headwater.web.worker", str(run))
        self._worker: Worker | None = None
        self._running: Job | None = None
        self._work, self._news = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.Task | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """Number of the worker's process, while there is one."""
        return None if self._worker is None else self._worker.pid

    def start(self) -> None:
        """Begin with the jobs that wait."""
        self._loop = asyncio.get_running_loop().create_task(self._serve())

    def close(self) -> None:
        """Let those go who look on; called before the server waits for its connections."""
        self._closing = True
        self._tell()

    async def stop(self) -> None:
        """Stop computing; the running job waits for the next start."""
        self.close()
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        if self._worker is not None:
            await self._worker.ended()
            self._worker = None
        if self._running is not None and self._running.state == "running":
            self.jobs.requeue(self._running)

    def submit(self, ask: Ask) -> Job:
        """Put a request into the queue."""
        job = self.jobs.add(ask)
        self._work.set()
        self._tell()
        return job

    def cancel(self, job: Job) -> Job:
        """Stop a job, or take it from the queue.

        Raises:
            Ended: There is nothing to stop.
        """
        if job.state in ENDED:
            raise Ended(f"This job has ended ({job.state}); there is nothing to cancel.")
        if job.state == "queued":
            self.jobs.end(job, "cancelled")
        elif not job.live.stopping:
            job.live.stopping = True
            self._stop(job)
        self._tell()
        return job

    def _stop(self, job: Job) -> None:
        worker = self._worker
        if worker is None:  # not there yet; told when it is
            return
        worker.send({"cancel": job.id})

        def insist() -> None:
            if self._running is job and self._worker is worker:
                worker.kill()

        asyncio.get_running_loop().call_later(self.patience, insist)

    async def events(self, job: Job) -> AsyncIterator[tuple[str, dict[str, Any]] | None]:
        """What happens to a job, from its present state to its end; None as a sign of life.

        Whoever looks on slowly misses steps in between, but nothing of the text and not the end.
        """
        last, said, seen, live = None, 0, 0, job.live
        while True:
            news = self._news
            if job.live is not live:  # another attempt
                live, said, seen = job.live, 0, 0
            if (shown := self.jobs.shown(job)) != last:
                last = shown
                yield "job", shown
            if len(live.text) > said:
                start, said = said, len(live.text)
                yield "token", {"text": live.text[start:said], "at": start}
            if live.n_partial > seen and live.partial:
                seen = live.n_partial
                yield "partial", {"answers": live.partial}
            if job.state in ENDED:
                yield "end", self.jobs.shown(job)
                return
            if self._closing:
                return
            if news.is_set():  # something happened while this was told
                continue
            try:
                await asyncio.wait_for(news.wait(), ALIVE)
            except TimeoutError:
                yield None

    def _tell(self) -> None:
        """Wake everyone who looks on."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _serve(self) -> None:
        while True:
            self._work.clear()
            waiting = self.jobs.waiting()
            if not waiting:
                await self._work.wait()
                continue
            self._running = waiting[0]
            try:
                await self._run(self._running)
            except Exception as error:  # no process can be started, or no file written
                traceback.print_exc()
                told = f"The job could not be begun or kept: {error or type(error).__name__}"
                with contextlib.suppress(OSError):
                    self.jobs.end(self._running, "failed", error=visible(told[:MOST_TOLD]))
                if self._worker is not None:
                    await self._worker.ended()
                    self._worker = None
            self._running = None
            self._tell()

    async def _run(self, job: Job) -> None:
        job.state, job.attempts = "running", job.attempts + 1
        job.live, job.stages, job.error = Live(), [], None
        try:
            self.jobs.save(job)
        except OutOfDisk as error:
            self.jobs.end(job, "failed", error=visible(str(error)[:MOST_TOLD]))
            return
        self._tell()
        if self._worker is None or self._worker.gone:  # between jobs it takes none with it
            self._worker = await Worker.start(self._command)
        worker = self._worker
        worker.send({"run": job.id, "kind": job.kind, "asked": job.asked})
        if job.live.stopping:
            self._stop(job)
        while job.state == "running":
            message = await worker.receive()
            if message is None:
                await self._lost(job, worker)
            elif message.get("id") == job.id:
                self._heard(job, message)
            self._tell()

    def _heard(self, job: Job, message: dict[str, Any]) -> None:
        match message["event"]:
            case "progress":
                told = {name: message[name] for name in ("done", "total")}
                job.progress = told | {"note": visible(message["note"][:MOST_TOLD])}
            case "stage":
                job.stages.append({n: visible(message[n][:MOST_TOLD]) for n in ("name", "told")})
            case "token":
                job.live.text += message["text"]
            case "partial":
                job.live.partial, job.live.n_partial = message["answers"], job.live.n_partial + 1
            case "done":
                self.jobs.end(job, "done", result=message["result"])
            case "failed":
                self.jobs.end(job, "failed", error=visible(message["error"][:MOST_TOLD]))
            case "cancelled":
                self.jobs.end(job, "cancelled")

    async def _lost(self, job: Job, worker: Worker) -> None:
        """The worker is gone: the job is over where it was to be stopped, else it waits for another attempt."""
        self._worker = None
        how = await worker.ended()
        if job.live.stopping:
            self.jobs.end(job, "cancelled")
            return
        job.deaths += 1
        print(f"headwater: the process that computes {how} during job {job.id}.", file=sys.stderr)
        if job.deaths < MOST_DEATHS:
            self.jobs.requeue(job)
            return
        self.jobs.end(
            job,
            "failed",
            error=f"The process that computes went down {job.deaths} times during this job: the last time it {how}. "
            "Ask for less, or see what the server printed.",
        )
