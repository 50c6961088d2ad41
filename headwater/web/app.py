"""The HTTP interface of the page: what is saved in a run folder, as JSON, and jobs that add to it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Query, Request
from fastapi import Path as PathName
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from headwater.core.files import ArtifactDamaged, ArtifactError, OutOfDisk
from headwater.report.text import visible
from headwater.report.views.folders import LeadsOut
from headwater.web import drafts
from headwater.web.asks import Ask, Changes, Verify
from headwater.web.engine import Engine
from headwater.web.guard import SMALL, Guard, Refused
from headwater.web.jobs import Ended, Job, QueueFull

STATIC = Path(__file__).parents[1] / "report" / "static"
SERVED = {"app.js": "text/javascript", "app.css": "text/css", "LICENSES.txt": "text/plain"}
LARGE = ("/api/changes", "/api/jobs")  # a change set may be long
Sort = Literal["number", "length", "loss", "self_influence"]


def make_app(run: Path, engine: Engine, *, token: str, port: int, static: Path = STATIC) -> Guard:
    """The whole application, guarded.

    Args:
        run: The run folder.
        engine: What runs its jobs; started and stopped with the application.
        token: What requests must carry.
        port: Where the server listens.
        static: Where the page's files lie.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    _errors(app)
    _shell(app, static)
    _saved(app, run)
    _drafts(app, run)
    _jobs(app, engine)
    return Guard(app, token=token, port=port, large=LARGE)


def _shell(app: FastAPI, static: Path) -> None:
    @app.get("/")
    def index() -> Response:
        return _file(static / "index.html", "text/html")

    @app.get("/static/{name}")
    def file(name: str) -> Response:
        if name not in SERVED:
            raise Refused(404, "There is no such file.")
        return _file(static / name, SERVED[name])


def _file(path: Path, kind: str) -> Response:
    if not path.is_file():
        raise Refused(404, f"{path.name} is missing from this installation.")
    return Response(path.read_bytes(), media_type=f"{kind}; charset=utf-8")


def _saved(app: FastAPI, run: Path) -> None:
    from headwater.report.views import corpus
    from headwater.report.views import run as views

    @app.get("/api/run")
    def overview() -> Any:
        return _json(views.overview(run))

    @app.get("/api/traces/{key}")
    def trace(key: str) -> Any:
        return _json(views.trace(run, key))

    @app.get("/api/corpus")
    def rows(
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        sort: Sort = "number",
        descending: bool = False,
        source: Annotated[str | None, Query(max_length=1000)] = None,
        search: Annotated[str | None, Query(max_length=1000)] = None,
    ) -> Any:
        return _json(corpus.rows(run, offset, limit, sort, descending, source, search))

    @app.get("/api/corpus/summary")
    def summary() -> Any:
        return _json(corpus.summary(run))

    @app.get("/api/examples/{number}")
    def example(number: Annotated[int, PathName(ge=0, lt=2**62)]) -> Any:
        return _json(corpus.example(run, number))

    @app.get("/api/verifications/{key}")
    def verification(key: str) -> Any:
        return _json(views.verification(run, key))

    @app.get("/api/timelines/{key}")
    def timeline(key: str) -> Any:
        return _json(views.timeline(run, key))


def _drafts(app: FastAPI, run: Path) -> None:
    @app.get("/api/changes")
    def draft() -> Any:
        return _json(drafts.load(run))

    @app.put("/api/changes", dependencies=[Depends(_is_json)])
    def keep(changes: Annotated[Changes, Body()]) -> Any:
        return _json(drafts.save(run, changes))

    @app.get("/api/changes/export")
    def export() -> Any:
        text = json.dumps(drafts.exported(run), indent=2) + "\n"
        named = {"Content-Disposition": 'attachment; filename="changes.json"'}
        return Response(text, media_type="application/json", headers=named)


def _jobs(app: FastAPI, engine: Engine) -> None:
    jobs = engine.jobs

    def known(name: str) -> Job:
        if name not in jobs:
            raise Refused(404, "There is no such job; it may have ended long ago.")
        return jobs[name]

    @app.get("/api/jobs")
    async def every() -> Any:
        return _json([jobs.shown(job) for job in jobs.all()])

    @app.post("/api/jobs", dependencies=[Depends(_is_json)])
    async def submit(ask: Annotated[Ask, Body(discriminator="kind")], request: Request) -> Any:
        if len(await request.body()) > SMALL and not isinstance(ask, Verify):
            raise Refused(413, f"The request's body may hold {SMALL:,} bytes; send less.")
        return _json(jobs.shown(engine.submit(ask)), 202)

    @app.get("/api/jobs/{name}")
    async def one(name: str) -> Any:
        return _json(jobs.shown(known(name)))

    @app.delete("/api/jobs/{name}")
    async def cancel(name: str) -> Any:
        return _json(jobs.shown(engine.cancel(known(name))))

    @app.get("/api/jobs/{name}/events")
    async def events(name: str) -> Any:
        job = known(name)

        async def stream() -> AsyncIterator[str]:
            async for event in engine.events(job):
                if event is None:
                    yield ": still there\n\n"
                else:
                    kind, content = event
                    yield f"event: {kind}\ndata: {json.dumps(content, allow_nan=False)}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")


async def _is_json(request: Request) -> None:
    """A form of another page cannot send this type without being asked about by the browser."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(400, "Expected a body of JSON, with Content-Type: application/json.")


def _json(content: Any, status: int = 200) -> Response:
    """Strict JSON."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    body = text.encode("utf-8", "replace")  # half surrogate pairs have no encoding
    return Response(body, status, media_type="application/json")


def _errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered with one sentence."""

    def answer(status: int) -> Any:
        async def respond(_: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"error": _sentence(error)}, status)

        return respond

    async def http(_: Request, error: Any) -> JSONResponse:
        told = {404: "There is nothing here.", 405: "This address takes no such request."}
        sentence = told.get(error.status_code, "The request cannot be read.")
        return JSONResponse({"error": sentence}, error.status_code)

    async def refused(_: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    async def invalid(_: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": _problem(error.errors())}, 400)

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    statuses: list[tuple[type[Exception], int]] = [
        (FileNotFoundError, 404),
        (LeadsOut, 403),
        (OutOfDisk, 507),
        (ArtifactDamaged, 409),
        (ArtifactError, 409),
        (Ended, 409),
        (QueueFull, 429),
        (ValueError, 400),
    ]
    for kind, status in statuses:
        app.add_exception_handler(kind, answer(status))

    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        told = "Something went wrong in the server; what it printed says what."
        return JSONResponse({"error": told}, 500)

    app.add_exception_handler(Exception, unexpected)


def _sentence(error: Exception) -> str:
    text = visible(" ".join(str(error).split()))[:500] or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _problem(errors: list[dict[str, Any]]) -> str:
    """The first of what validation found, as a sentence."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    what = str(first["msg"]).removeprefix("Value error, ")
    where = f"{place}: " if place else ""
    return _sentence(ValueError(f"The request is not as it should be: {where}{what}"))


__all__ = ["make_app"]
