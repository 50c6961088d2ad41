"""`headwater serve`: a local page over a run folder."""

import errno
import secrets
import socket
import sys
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from headwater.cli.common import say
from headwater.cli.flags import RUN, parse, require
from headwater.core.files import FolderBusy
from headwater.core.locks import FolderLock
from headwater.extras import require as optional

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = 8765
MOST_REQUESTS = 100


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Open a page over a run folder on this machine: ask, look at the evidence, mark examples, verify.

    The page computes in the background, one job after another. A job that is cut off goes on at the next start.

    Example: headwater serve runs/mine --open

    Args:
        run: The run folder of `headwater fit`.
        port: Port to listen at; 8765 when left out, or another if that is taken. 0 takes any.
        host: Address to listen at: this machine's own, and no other.
        open: Open the page in the browser.
    """

    run: tyro.conf.Positional[Path]
    port: int | None = None
    host: str = LOOPBACK[0]
    open: bool = False

    def check(self) -> None:
        """Refuse to be heard by other machines."""
        port = self.port
        require("--port", port, "0 to 65535", port is None or 0 <= port <= 65535)
        if self.host not in LOOPBACK:
            raise ValueError(
                f"The page is for this machine only: --host must be {', '.join(LOOPBACK[:-1])} or {LOOPBACK[-1]}; got "
                f"{self.host!r}. To look from another machine, forward the port: ssh -L {PORT}:127.0.0.1:{PORT} …"
            )


def run(words: list[str]) -> int:
    command = parse(Serve, words, prog="serve")
    for module in ("fastapi", "uvicorn"):
        optional(module, extra="web")
    if not (command.run / RUN).is_file():
        raise FileNotFoundError(
            f"{command.run} is no run folder (it has no {RUN}); make one with `headwater fit … --out {command.run}`."
        )
    folder = command.run / "jobs"
    try:
        with FolderLock(folder), listening(command.host, command.port) as listener:
            return serve(command, listener)
    except FolderBusy as error:
        holder = str(error).partition(" written by ")[2].partition(";")[0]
        raise ValueError(
            f"{command.run} is served already, by {holder or 'another process'}; use its page, or stop it first."
        ) from error


def serve(command: Serve, listener: socket.socket) -> int:
    """Answer until interrupted."""
    import asyncio

    uvicorn: Any = optional("uvicorn", extra="web")
    from headwater.web.app import make_app
    from headwater.web.engine import Engine
    from headwater.web.jobs import Jobs

    port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
    jobs = Jobs(command.run / "jobs")

    async def answering() -> None:
        engine = Engine(command.run, jobs)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                loop.call_soon_threadsafe(engine.close)  # else their streams would hold it up
                super().handle_exit(sig, frame)

        loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            make_app(command.run, engine, token=token, port=port),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=MOST_REQUESTS,
            timeout_graceful_shutdown=3,
        )
        await Server(config).serve(sockets=[listener])

    waiting = len(jobs.waiting())
    address = f"http://{'[::1]' if command.host == '::1' else command.host}:{port}/#token={token}"
    say(
        f"Serving {command.run} on this machine; the address holds the key, so keep it to yourself:"
    )
    print(address, flush=True)
    say("Press ctrl-C to stop." + (f" {_jobs(waiting)} of before go on." if waiting else ""))
    if command.open:
        webbrowser.open(address)
    with suppress(KeyboardInterrupt):
        asyncio.run(answering())
    left = len(jobs.waiting())
    say("\nStopped." + (f" {_jobs(left)} will go on at the next start." if left else ""))
    return 0


def _jobs(n: int) -> str:
    return f"{n} job{'s' * (n != 1)}"


def listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens on this machine.

    Args:
        host: A loopback address.
        port: The port; the usual one when left out, or any if that is taken.

    Raises:
        ValueError: The port is taken, or not allowed.
    """
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    for tried in (PORT, 0) if port is None else (port,):
        listener = socket.socket(family)
        if sys.platform != "win32":  # there it would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1" if host == "localhost" else host, tried))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            if port is None and tried and error.errno == errno.EADDRINUSE:
                continue
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"
            raise ValueError(
                f"Port {tried} of {host} {why}; leave --port out for a free one, or name another."
            ) from error
    raise AssertionError("unreachable")
