"""A page's server for tests: run folders, clients that hold the token, and a worker that computes nothing."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from headwater.web.app import make_app
from headwater.web.engine import Engine
from headwater.web.jobs import Jobs

TOKEN, PORT = "a token of tests", 8765
OWN = {"X-Headwater-Token": TOKEN, "Host": f"127.0.0.1:{PORT}"}
ENDED = ("done", "failed", "cancelled")
# A worker that obeys its job's prompt: counts to a number, waits to be cancelled, is deaf, dies, or fails.
OBEYS = """
import json, os, sys, threading, time
stopped = set()
waiting = []
ready = threading.Condition()
def listen():
    for line in sys.stdin:
        message = json.loads(line)
        with ready:
            if "cancel" in message:
                stopped.add(message["cancel"])
            else:
                waiting.append(message)
            ready.notify_all()
    os._exit(0)
threading.Thread(target=listen, daemon=True).start()
def tell(event, **more):
    print(json.dumps({"id": message["run"], "event": event, **more}), flush=True)
while True:
    with ready:
        while not waiting:
            ready.wait()
        message = waiting.pop(0)
    what = message["asked"].get("prompt", "")
    tell("progress", done=0, total=3, note="counting")
    if what == "die":
        os.kill(os.getpid(), 9)
    if what.startswith("die once"):
        place = what.removeprefix("die once ")
        if not os.path.exists(place):
            open(place, "w").close()
            os.kill(os.getpid(), 9)
    if what == "fail":
        tell("failed", error="It failed, as it was told to.")
        continue
    if what in ("wait", "deaf"):
        with ready:
            while what == "deaf" or message["run"] not in stopped:
                ready.wait()
        tell("cancelled")
        continue
    if what == "noise":
        print("no JSON", flush=True)
    for i in range(3):
        tell("token", text=f"{i} ")
        tell("partial", answers=[{"query_id": str(i)}])
    tell("stage", name="counting", told="0 s")
    tell("done", result={"completion": "0 1 2 "})
"""


def run_folder(folder: Path) -> Path:
    """A folder that passes for a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"fit": {}}), encoding="utf-8")
    return folder


def tuned_run(folder: Path) -> Path:
    """A run folder of a tiny model that was fine-tuned here, with checkpoints, held-out examples and a trace."""
    from headwater.cli import main
    from tests.language_cases import WORDS, saved

    saved(folder / "model")
    for name, n, shift in (("train", 12, 0), ("heldout", 5, 3)):
        lines = [
            {
                "id": f"{name[0]}{i}",
                "text": " ".join(WORDS[(shift + i * k) % len(WORDS)] for k in range(1, 5 + i % 4)),
                "topic": ["rivers", "hills"][i % 2],
            }
            for i in range(n)
        ]
        text = "\n".join(map(json.dumps, lines))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    train, run = str(folder / "train.jsonl"), str(folder / "run")
    words = ["--lora-rank", "2", "--epochs", "6", "--lr", "0.02", "--batch-tokens", "16"]
    adapted = str(folder / "adapted")
    assert main(["finetune", str(folder / "model"), train, "--out", adapted, *words]) == 0
    held = ["--heldout", str(folder / "heldout.jsonl")]
    assert main(["fit", adapted, train, "--out", run, "--curvature", "ekfac", *held]) == 0
    assert main(["trace", run, "--prompt", "a lake", "--completion", " by the", "--top", "12"]) == 0
    return folder / "run"


@contextlib.asynccontextmanager
async def served(
    run: Path, *, static: Path | None = None, patience: float = 15.0, command: Any = None
) -> AsyncIterator[tuple[httpx.AsyncClient, Engine]]:
    """A client of the application over a run folder, with its engine started; "the real one" does compute."""
    command = command or (sys.executable, "-c", OBEYS)
    command = None if command == "the real one" else command
    engine = Engine(run, Jobs(run / "jobs"), command=command, patience=patience)
    options = {} if static is None else {"static": static}
    app = make_app(run, engine, token=TOKEN, port=PORT, **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    engine.start()
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url=f"http://127.0.0.1:{PORT}", headers=OWN
        ) as client:
            yield client, engine
    finally:
        await engine.stop()


async def with_client(app: Any, steps: Callable[[httpx.AsyncClient], Any]) -> Any:
    """What some steps give with a client of an application that does not compute."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    place = f"http://127.0.0.1:{PORT}"
    async with httpx.AsyncClient(transport=transport, base_url=place, headers=OWN) as client:
        return await steps(client)


def over_http(
    run: Path, steps: Callable[..., Any], *, seconds: float = 60.0, **options: Any
) -> Any:
    """Take some asynchronous steps with a client and an engine, and give up after so many seconds."""

    async def whole() -> Any:
        async with served(run, **options) as (client, engine):
            return await steps(client, engine)

    return asyncio.run(asyncio.wait_for(whole(), seconds))


async def until(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until something holds, and return it."""
    async with asyncio.timeout(seconds):
        while not (found := holds()):
            await asyncio.sleep(0.01)
    return found


def completing(prompt: str) -> dict[str, Any]:
    """The body that asks for a completion."""
    return {"kind": "complete", "prompt": prompt}


def events_of(text: str) -> list[tuple[str, Any]]:
    """Events of a stream, by name and content."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found
