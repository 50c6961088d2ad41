"""Work that can be killed: a program forks it again and again, so that each time it starts at once.

A line `folder calls after` on the program's standard input forks the work in that folder, which ends itself at its
calls-th system call that writes (0: never), or is killed after so many seconds (0: never). The answer is how it ended.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

WRITES = ("pwrite", "fsync", "replace", "ftruncate", "unlink", "open")


class Forks:
    """The program of a module that calls `serve`."""

    def __init__(self, module: ModuleType):
        file = Path(str(module.__file__))
        env = os.environ | {"PYTHONPATH": str(file.parents[1]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def run(self, folder, *, calls: int = 0, after: float = 0.0) -> int:
        """How the work ended: 0, or the signal or code that ended it."""
        self.process.stdin.write(f"{folder} {calls} {after}\n")
        self.process.stdin.flush()
        status = int(self.line())
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def forking(module: ModuleType) -> Iterator[Forks]:
    """The program of a module, for the tests of a file; they are skipped where a system cannot fork."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    made = Forks(module)
    yield made
    made.close()


def _end_at(calls: int) -> None:
    """End this process, as a kill would, at its calls-th system call that writes."""
    left = calls

    def counted(function):
        def run(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return function(*args, **kwargs)

        return run

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))


def serve(work) -> None:
    """Fork `work(folder, wait)` for each line; `wait` is whether it should take its time."""
    print("ready", flush=True)
    for line in sys.stdin:
        folder, calls, after = line.rsplit(maxsplit=2)
        pid = os.fork()
        if pid == 0:
            if int(calls):
                _end_at(int(calls))
            work(folder, not int(calls))
            os._exit(0)
        if float(after):
            time.sleep(float(after))
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the number is its own
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)
