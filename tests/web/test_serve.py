"""`headwater serve` as a process: on this machine only, one for each run, stopped cleanly, and killed in the middle."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import httpx

from headwater.cli import main
from headwater.core.files import read_json
from headwater.web.serve import listening
from tests.web_cases import ENDED, run_folder, tuned_run

SECONDS = 240  # on a machine that is busy with other things


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return tuned_run(tmp_path_factory.mktemp("served"))


class Served:
    """A server in a process of its own."""

    def __init__(self, run, *words: str):
        command = [sys.executable, "-m", "headwater", "serve", str(run), "--port", "0", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.address = self.process.stdout.readline().strip()
        found = re.fullmatch(r"http://(127\.0\.0\.1):(\d+)/#token=([\w-]{32})", self.address)
        assert found, self.process.stderr.read()
        self.host, self.port, self.token = found[1], int(found[2]), found[3]
        self.client = httpx.Client(
            base_url=f"http://{self.host}:{self.port}",
            headers={"X-Headwater-Token": self.token},
            timeout=60,
        )

    def until(self, name: str, holds) -> dict:
        """The job, once something holds of it."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            job = self.client.get(f"/api/jobs/{name}").json()
            if holds(job):
                return job
            time.sleep(0.05)
        raise TimeoutError(f"The job stands at {job}.")

    def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes."""
        with socket.create_connection((self.host, self.port), timeout=60) as connection:
            connection.sendall(request)
            parts = []
            with contextlib.suppress(ConnectionResetError):  # it does not read what it refused
                while part := connection.recv(65536):
                    parts.append(part)
        return b"".join(parts)


@contextlib.contextmanager
def serving(run, *words: str):
    served = Served(run, *words)
    try:
        yield served
    finally:
        served.client.close()
        if served.process.poll() is None:
            served.process.kill()
        served.process.communicate()


@pytest.mark.thorough
def test_a_run_is_served_on_this_machine_to_who_has_the_token(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    (tmp_path / "secret.json").write_text('{"secret": "of this machine"}')
    with serving(run) as served:
        assert served.client.get("/api/jobs").json() == []
        assert httpx.get(f"{served.client.base_url}/api/jobs").status_code == 401
        shell = served.client.get("/")
        assert (
            shell.status_code == 200
            and "default-src 'none'" in shell.headers["content-security-policy"]
        )
        head = f"Host: 127.0.0.1:{served.port}\r\nX-Headwater-Token: {served.token}\r\n"
        for path in ("/api/traces/../../secret.json", "/static/..%2f..%2frun.json", "//etc/passwd"):
            answer = served.raw(f"GET {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 404") and b"secret" not in answer
        sized = f"POST /api/jobs HTTP/1.1\r\n{head}Content-Length: 99999999\r\n\r\n"
        assert served.raw(sized.encode() + b"{}").startswith(b"HTTP/1.1 413")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        pieces = f"POST /api/x HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode()
        assert served.raw(pieces + 3 * chunk).startswith(b"HTTP/1.1 413")
        host = f"GET / HTTP/1.1\r\nHost: example.org:{served.port}\r\nConnection: close\r\n\r\n"
        assert served.raw(host.encode()).startswith(b"HTTP/1.1 421")
        capsys.readouterr()
        assert main(["serve", str(run)]) == 2  # a second one
        said = capsys.readouterr().err
        assert f"{run} is served already, by process {served.process.pid}" in said
        asked = {"kind": "complete", "prompt": "the"}  # its worker takes a while to load
        name = served.client.post("/api/jobs", json=asked).json()["id"]
        with served.client.stream("GET", f"/api/jobs/{name}/events") as stream:
            assert next(stream.iter_lines()) == "event: job"
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(60) == 0  # who looks on does not hold it up
        assert "Stopped. 1 job will go on at the next start." in served.process.stderr.read()
    assert not (run / "jobs" / ".lock").exists()
    assert read_json(run / "jobs" / f"{name}.json")["state"] == "queued"


@pytest.mark.thorough
def test_a_server_killed_in_the_middle_of_a_job_goes_on_with_it_at_the_next_start(tuned, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    measured = run / "verify" / "trace" / "measured"
    asked = {"kind": "verify", "trace": "trace", "top": 2, "seeds": 3}
    with serving(run) as served:
        name = served.client.post("/api/jobs", json=asked).json()["id"]
        after = served.client.post("/api/jobs", json={"kind": "complete", "prompt": "the"}).json()
        served.until(name, lambda _: list(measured.rglob("*.json")))
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait(60)
    left = read_json(run / "jobs" / f"{name}.json")
    kept = {p: p.stat().st_mtime_ns for p in measured.rglob("*.json")}
    assert left["state"] == "running" and kept
    with serving(run) as served:
        job = served.until(name, lambda j: j["state"] in ENDED)
        following = served.until(after["id"], lambda j: j["state"] in ENDED)
        shown = served.client.get(f"/api/verifications/{job['result']['verification']}").json()
        with served.client.stream("GET", f"/api/jobs/{name}/events") as stream:
            told = "".join(stream.iter_text())
    assert job["state"] == following["state"] == "done" and job["attempts"] == 2
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())
    assert told.count("event: end") == 1
    whole = shutil.copytree(tuned, tmp_path / "whole")
    assert main(["verify", str(whole), "--top", "2", "--seeds", "3"]) == 0
    expected = read_json(next((whole / "verify" / "trace").glob("*.json")))["outcomes"]
    assert [r["actual_value"] for r in shown["rows"]] == [o["actual"] for o in expected]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_other_machines_cannot_be_served(tmp_path, capsys, host):
    assert main(["serve", str(run_folder(tmp_path)), "--host", host]) == 2
    said = capsys.readouterr().err
    assert "this machine only" in said and "ssh -L" in said


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_named_and_left_out_is_any_free_one(monkeypatch):
    with listening("127.0.0.1", 0) as first:
        taken = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"Port {taken} of 127.0.0.1 is taken; leave --port"):
            listening("127.0.0.1", taken)
        monkeypatch.setattr("headwater.web.serve.PORT", taken)
        with listening("127.0.0.1", None) as second:
            assert second.getsockname()[1] not in (0, taken)


def test_ports_are_numbers_that_there_are(tmp_path, capsys):
    assert main(["serve", str(run_folder(tmp_path)), "--port", "70000"]) == 2
    assert "--port must be 0 to 65535" in capsys.readouterr().err
