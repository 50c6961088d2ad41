"""What is refused over HTTP: other hosts, pages and names, missing tokens, and bodies that are too large or odd."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from headwater.web.app import make_app
from headwater.web.engine import Engine
from headwater.web.guard import HEADERS, SMALL, Guard
from headwater.web.jobs import Jobs
from tests.web_cases import OWN, PORT, TOKEN, completing, run_folder, with_client

BODY = (b"content-length", b"content-type", b"transfer-encoding")
LISTED = ["/api/jobs", "/api/run", "/api/changes", "/api/nothing", "/api"]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    run = run_folder(tmp_path_factory.mktemp("guarded") / "run")
    return make_app(run, Engine(run, Jobs(run / "jobs")), token=TOKEN, port=PORT)


def ask(app, method: str, path: str, *, headers=OWN, **more):
    """One request, with exactly these headers; jobs are put into the queue, but not begun."""

    async def steps(client):
        request = client.build_request(method, path, **more)
        given = {name.lower() for name, _ in _pairs(headers)}
        kept = [
            (k, v) for k, v in request.headers.raw if k.lower() in BODY and k.lower() not in given
        ]
        request.headers = type(request.headers)([*kept, *_pairs(headers)])
        return await client.send(request)

    return asyncio.run(with_client(app, steps))


def _pairs(headers):
    items = headers.items() if isinstance(headers, dict) else headers
    return [(k.encode(), v.encode()) for k, v in items]


@pytest.mark.parametrize("path", LISTED)
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1]])
def test_without_the_token_nothing_is_told(app, path, token):
    headers = {"Host": OWN["Host"]} | ({} if token is None else {"X-Headwater-Token": token})
    answer = ask(app, "GET", path, headers=headers)
    assert answer.status_code == 401 and "token" in answer.json()["error"]


def test_two_tokens_are_none(app):
    answer = ask(app, "GET", "/api/jobs", headers=[*OWN.items(), ("X-Headwater-Token", TOKEN)])
    assert answer.status_code == 401


def test_a_token_in_the_address_is_none(app):
    answer = ask(app, "GET", f"/api/jobs?token={TOKEN}", headers={"Host": OWN["Host"]})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "example.org",
        f"example.org:{PORT}",
        "127.0.0.1",
        f"127.0.0.1:{PORT + 1}",
        f"127.0.0.1.example.org:{PORT}",
        f"127.0.0.2:{PORT}",
        f"0.0.0.0:{PORT}",
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/jobs"])
def test_another_host_is_refused_even_with_the_token(app, host, path):
    headers = {k: v for k, v in OWN.items() if k != "Host"}
    answer = ask(app, "GET", path, headers=headers if host is None else headers | {"Host": host})
    assert answer.status_code == 421 and "own address" in answer.json()["error"]


def test_two_hosts_are_refused(app):
    answer = ask(app, "GET", "/api/jobs", headers=[*OWN.items(), ("Host", OWN["Host"])])
    assert answer.status_code == 400 and "headers host" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://example.org",
        f"https://127.0.0.1:{PORT}",
        f"http://127.0.0.1:{PORT + 1}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{PORT}.example.org",
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/api/jobs")])
def test_another_origin_is_refused_even_with_the_token(app, origin, method, path):
    answer = ask(app, method, path, headers=OWN | {"Origin": origin}, json=completing("count"))
    assert answer.status_code == 403 and "other pages" in answer.json()["error"]
    assert "access-control-allow-origin" not in answer.headers
    assert ask(app, "GET", "/api/jobs").json() == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_request_that_another_site_made_the_browser_send_is_refused(app, site):
    answer = ask(app, "GET", "/api/jobs", headers=OWN | {"Sec-Fetch-Site": site})
    assert answer.status_code == 403


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
def test_its_own_names_are_answered(app, name):
    place = f"{name}:{PORT}"
    headers = {"X-Headwater-Token": TOKEN, "Host": place, "Origin": f"http://{place}"}
    answer = ask(app, "GET", "/api/jobs", headers=headers | {"Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200 and answer.json() == []


@pytest.mark.parametrize("path", ["/", "/api/jobs", "/nothing"])
def test_every_answer_keeps_the_page_to_itself(app, path):
    headers = ask(app, "GET", path).headers
    assert all(headers[name] == value for name, value in HEADERS.items())
    assert headers["cache-control"] == ("no-store" if path.startswith("/api") else "no-cache")
    assert "server" not in headers


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/api/docs"])
def test_there_is_nothing_that_describes_the_interface(app, path):
    assert ask(app, "GET", path).status_code == 404


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("PUT", "/api/jobs"), ("TRACE", "/")])
def test_other_methods_are_refused(app, method, path):
    answer = ask(app, method, path)
    assert answer.status_code == 405 and set(answer.json()) == {"error"}


async def pieces(n: int, size: int):
    for _ in range(n):
        yield b" " * size


def test_a_large_body_is_refused_before_it_is_read(app):
    headers = OWN | {"Content-Length": "999999999999"}
    answer = ask(app, "POST", "/api/jobs", headers=headers, content=b"{}")
    assert answer.status_code == 413 and "bytes" in answer.json()["error"]
    answer = ask(app, "POST", "/api/nothing", content=b" " * (SMALL + 1))
    assert answer.status_code == 413


def test_a_large_body_in_pieces_without_a_length_is_refused(app):
    answer = ask(app, "POST", "/api/nothing", content=pieces(5, SMALL // 4))
    assert answer.status_code == 413
    answer = ask(app, "PUT", "/api/changes", content=pieces(9, 1 << 20))
    assert answer.status_code == 413


def test_reading_stops_once_a_body_is_too_large(app):
    taken = []

    async def endless():
        while len(taken) < 10_000:
            taken.append(None)
            yield b" " * SMALL

    assert ask(app, "POST", "/api/nothing", content=endless()).status_code == 413
    assert len(taken) < 10


def test_only_a_change_set_may_be_long(app):
    long = " " * (2 * SMALL)
    refused = ask(
        app,
        "POST",
        "/api/jobs",
        content=json.dumps(completing("count")) + long,
        headers=OWN | {"Content-Type": "application/json"},
    )
    assert refused.status_code == 413
    changes = {"name": "x", "changes": [{"id": f"{i:0100}", "action": "keep"} for i in range(2000)]}
    taken = ask(app, "PUT", "/api/changes", json=changes)
    assert taken.status_code == 200 and len(taken.json()["changes"]) == 2000


def test_a_body_that_does_not_come_is_not_waited_for():
    async def never():
        await asyncio.sleep(60)

    async def whole():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/api/jobs", "query_string": b""}
        headers = [(k.lower().encode(), v.encode()) for k, v in OWN.items()]
        guard = Guard(None, token=TOKEN, port=PORT, body_seconds=0.05)
        await guard(scope | {"headers": headers}, never, send)
        return sent

    start, body = asyncio.run(whole())
    assert start["status"] == 400 and b"in time" in body["body"]


def test_long_addresses_are_refused(app):
    answer = ask(app, "GET", f"/api/jobs?x={'y' * 9000}")
    assert answer.status_code == 400 and "address" in answer.json()["error"]


def test_websockets_are_refused():
    async def whole():
        sent = []

        async def send(message):
            sent.append(message)

        await Guard(None, token=TOKEN, port=PORT)({"type": "websocket"}, None, send)
        return sent

    assert asyncio.run(whole()) == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{", "JSON"),
        ("[]", "valid dictionary"),
        ('"x"', "valid dictionary"),
        ("{}", "kind"),
        ('{"kind": "other"}', "kind"),
        ('{"kind": "complete"}', "prompt"),
        ('{"kind": "complete", "prompt": ""}', "prompt"),
        ('{"kind": "complete", "prompt": 1}', "prompt"),
        ('{"kind": "complete", "prompt": "x", "more": 1}', "more"),
        ('{"kind": "complete", "prompt": "x", "max_new_tokens": "9"}', "max_new_tokens"),
        ('{"kind": "complete", "prompt": "x", "max_new_tokens": 100000}', "max_new_tokens"),
        ('{"kind": "complete", "prompt": "\\ud800"}', "prompt"),
        ('{"kind": "complete", "prompt": "%s"}' % ("x" * 50_001), "prompt"),
        ('{"kind": "trace", "prompt": "x", "completion": "y", "span": [0, 2]}', "span"),
        ('{"kind": "trace", "prompt": "x", "completion": "y", "span": [0]}', "span"),
        ('{"kind": "timeline", "prompt": "x", "completion": "y", "span": [0, 2]}', "span"),
        ('{"kind": "trace", "prompt": "x", "completion": "y", "top": 0}', "top"),
        ('{"kind": "verify", "trace": "x"}', "one of the two"),
        ('{"kind": "verify", "top": 3}', "needs a trace"),
        ('{"kind": "verify", "changes": {"changes": []}}', "changes nothing"),
        ("[" * 20_000, "read"),
    ],
)
def test_bodies_that_ask_nothing_known_are_refused_in_one_sentence(app, body, problem):
    headers = OWN | {"Content-Type": "application/json"}
    answer = ask(app, "POST", "/api/jobs", headers=headers, content=body)
    assert answer.status_code == 400 and set(answer.json()) == {"error"}
    assert problem in answer.json()["error"] and "\n" not in answer.json()["error"]
    assert len(answer.json()["error"]) < 600
    assert ask(app, "GET", "/api/jobs").json() == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_can_send_is_not_taken_for_json(app, kind):
    headers = OWN | ({"Content-Type": kind} if kind else {})
    answer = ask(app, "POST", "/api/jobs", headers=headers, content=json.dumps(completing("x")))
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]


def test_unknown_jobs_are_not_found(app):
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        answer = ask(app, method, f"/api/jobs/20260101-000000-000000-000000{path}")
        assert answer.status_code == 404 and "no such job" in answer.json()["error"]
