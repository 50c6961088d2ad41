"""The process that computes: reads jobs from its standard input and tells of them on its standard output.

Each line is a JSON object. In: `{"run": id, "kind": …, "asked": …}` and `{"cancel": id}`. Out: an `event` of a job:
progress, stage, token, partial, and at last done, failed or cancelled. When the input ends, the server is gone and so
is this process.
"""

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY = 0.1  # seconds between two reports of progress
LOCK_SECONDS = 20.0  # for a worker whose server was killed to notice it


class Cancelled(BaseException):
    """The job was told to stop. No `except Exception` on the way holds it up."""


class Report:
    """Tells the server how a job goes, and stops it where it was told to.

    Args:
        job: The job's id.
        send: Sends a message.
        cancelled: Ids of jobs to be stopped.
    """

    def __init__(self, job: str, send: Callable[[dict[str, Any]], None], cancelled: set[str]):
        self._job, self._send, self._cancelled = job, send, cancelled
        self._told, self._stage, self._since = 0.0, "", time.monotonic()

    def progress(self, done: int, total: int, note: str) -> None:
        """Steps done and in all; the note begins with the stage's name."""
        self._stop()
        now, stage = time.monotonic(), note.partition(":")[0]
        if stage != self._stage:
            self._end_stage(now)
            self._stage, self._since = stage, now
        elif now - self._told < EVERY:
            return
        self._told = now
        self.tell("progress", done=int(done), total=int(total), note=str(note))

    def text(self, piece: str) -> None:
        """What the model said next."""
        self._stop()
        if piece:
            self.tell("token", text=piece)

    def partial(self, answers: list[dict[str, Any]]) -> None:
        """The answers so far, as the page shows them."""
        self._stop()
        self.tell("partial", answers=answers)

    def finish(self) -> None:
        """The last stage is over."""
        self._end_stage(time.monotonic())

    def tell(self, event: str, **more: Any) -> None:
        self._send({"id": self._job, "event": event, **more})

    def _stop(self) -> None:
        if self._job in self._cancelled:
            raise Cancelled

    def _end_stage(self, now: float) -> None:
        from headwater.report.text import duration

        if self._stage:
            self.tell("stage", name=self._stage, told=duration(now - self._since))
            self._stage = ""


def run(
    message: dict[str, Any], work: Any, send: Callable[[dict[str, Any]], None], stopped: set[str]
) -> None:
    """Do one job, and tell how it ended."""
    from headwater.cli.common import one_line

    report = Report(message["run"], send, stopped)
    try:
        result = work.do(message["kind"], message["asked"], report)
    except Cancelled:
        report.tell("cancelled")
    except Exception as error:
        traceback.print_exc()
        report.tell("failed", error=one_line(error))
    else:
        report.finish()
        report.tell("done", result=result)
    stopped.discard(message["run"])


def main(folder: str) -> None:
    """Work until the input ends."""
    import json

    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print goes to the server's log
    if hasattr(os, "nice"):
        os.nice(5)  # the page comes first
    sys.stdout = sys.stderr
    taken: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stopped: set[str] = set()

    def listen() -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "cancel" in message:
                stopped.add(message["cancel"])
            else:
                taken.put(message)
        os._exit(0)  # the server is gone; all that is saved is whole

    def send(message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[out.write(line) :]

    threading.Thread(target=listen, daemon=True).start()
    from headwater.core.locks import waiting
    from headwater.web.work import Work

    jobs = Path(folder) / "jobs"
    with waiting(jobs / ".worker.lock", jobs, LOCK_SECONDS):  # until the last worker is gone
        work = Work(Path(folder))
        while True:
            run(taken.get(), work, send, stopped)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(sys.argv[1])
