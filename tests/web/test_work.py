"""Jobs on a tiny model, done by the process that does them for people, and killed in the middle."""

import asyncio
import os
import shutil
import signal
from contextlib import aclosing

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from headwater.cli import main
from headwater.core.evidence import Evidence
from headwater.core.files import read_json
from tests.language_cases import WORDS
from tests.web_cases import ENDED, over_http, tuned_run, until

pytestmark = pytest.mark.thorough

TRACE = {"kind": "trace", "prompt": "the river", "completion": " runs to the", "compare": False}
CHANGES = {
    "name": "mine",
    "changes": [{"id": "t1", "action": "remove"}, {"id": "t4", "action": "duplicate"}],
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return tuned_run(tmp_path_factory.mktemp("work"))


@pytest.fixture
def run(tuned, tmp_path):
    """A copy, to which a test may do what it likes."""
    return shutil.copytree(tuned, tmp_path / "run")


def done(run, *asked: dict) -> list[dict]:
    """Jobs at their end, one after another by one worker."""

    async def steps(client, engine):
        found = []
        for each in asked:
            name = (await client.post("/api/jobs", json=each)).json()["id"]
            await until(lambda name=name: engine.jobs[name].state in ENDED, 240)
            found.append((await client.get(f"/api/jobs/{name}")).json())
        return found

    return over_http(run, steps, command="the real one", seconds=600)


def test_every_kind_of_job_is_done_with_one_model_and_shown(run):
    asked = [
        {"kind": "complete", "prompt": "the river", "max_new_tokens": 3},
        TRACE,
        TRACE | {"span": [6, 8], "source": "topic", "top": 3},
        TRACE | {"rather_than": " by the sea"},
        {"kind": "survey"},
        {"kind": "timeline", "prompt": "the river", "completion": " runs", "segments": 2},
        {"kind": "complete", "prompt": " ".join(WORDS), "max_new_tokens": 500},
        TRACE | {"source": "nothing"},
    ]
    jobs = done(run, *asked)
    assert [j["state"] for j in jobs] == ["done"] * 6 + ["failed"] * 2
    assert all(j["attempts"] == 1 and j["stages"] for j in jobs[:6])
    opened = [s["name"] for j in jobs for s in j["stages"] if "opening" in s["name"]]
    assert len(opened) == 1
    whole, part, why = (
        Evidence.load(run / "traces" / j["result"]["trace"]).answers[0] for j in jobs[1:4]
    )
    assert whole.completion_tokens and len(part.completion_tokens) == 1
    assert part.sources and "rather than" in why.measurement
    assert (run / "corpus" / "manifest.json").is_file()
    assert "exceed the model's context of 32" in jobs[6]["error"]
    assert "no column 'nothing'" in jobs[7]["error"]


def test_completions_stream_and_a_trace_gives_what_it_knows_early(run):
    async def steps(client, engine):
        found = []
        for asked in ({"kind": "complete", "prompt": "the river", "max_new_tokens": 4}, TRACE):
            name = (await client.post("/api/jobs", json=asked)).json()["id"]
            async with aclosing(engine.events(engine.jobs[name])) as events:
                found.append([event async for event in events if event is not None])
        return found

    said, traced = over_http(run, steps, command="the real one", seconds=600)
    pieces = [content["text"] for kind, content in said if kind == "token"]
    assert "".join(pieces) == said[-1][1]["result"]["completion"]
    assert said[-1][0] == traced[-1][0] == "end" and traced[-1][1]["state"] == "done"
    partial = [content["answers"] for kind, content in traced if kind == "partial"]
    assert partial and partial[0][0]["sides"][0]["cards"]


def test_a_verification_of_a_change_set_from_the_page_is_shown_by_its_id(run):
    verify = {"kind": "verify", "trace": "trace", "changes": CHANGES}

    async def steps(client, engine):
        found = []
        for asked in (
            verify,
            verify | {"trace": None},
            {"kind": "verify", "trace": "trace", "top": 2},
        ):
            name = (await client.post("/api/jobs", json=asked)).json()["id"]
            await until(lambda name=name: engine.jobs[name].state in ENDED, 240)
            job = engine.jobs[name]
            assert job.state == "done", job.error
            found.append(
                (await client.get(f"/api/verifications/{job.result['verification']}")).json()
            )
        return found

    traced, held, top = over_http(run, steps, command="the real one", seconds=600)
    assert [r["change"] for r in traced["rows"]] == [
        "without 1, 1 weighted (mine)",
        "without 1, 1 weighted alike at random",
    ]
    assert {r["query"] for r in held["rows"]} == {"held-out loss"}
    assert [r["control"] for r in traced["rows"]] == [False, True] and len(top["rows"]) == 3
    assert all(r["predicted_value"] and r["actual_value"] for r in traced["rows"])


def test_a_worker_killed_in_the_middle_of_a_verification_loses_no_finished_training(run, tuned):
    asked = {"kind": "verify", "trace": "trace", "top": 2, "seeds": 3}
    measured = run / "verify" / "trace" / "measured"

    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=asked)).json()["id"]
        await until(lambda: list(measured.rglob("*.json")), 240)
        os.kill(engine.pid, signal.SIGKILL)
        kept = {p: p.stat().st_mtime_ns for p in measured.rglob("*.json")}
        await until(lambda: engine.jobs[name].state in ENDED, 240)
        return engine.jobs[name], kept

    job, kept = over_http(run, steps, command="the real one", seconds=600)
    assert job.state == "done" and (job.deaths, job.attempts) == (1, 2)
    assert kept and all(p.stat().st_mtime_ns == when for p, when in kept.items())
    found = read_json(next((run / "verify" / "trace").glob("*.json")))
    whole = shutil.copytree(tuned, run.parent / "whole")
    assert main(["verify", str(whole), "--top", "2", "--seeds", "3"]) == 0
    expected = read_json(next((whole / "verify" / "trace").glob("*.json")))
    assert [o["actual"] for o in found["outcomes"]] == [o["actual"] for o in expected["outcomes"]]


def test_a_job_that_computes_is_cancelled_without_losing_the_model(run):
    async def steps(client, engine):
        asked = {"kind": "verify", "trace": "trace", "top": 2, "seeds": 20}
        name = (await client.post("/api/jobs", json=asked)).json()["id"]
        job = engine.jobs[name]
        await until(lambda: job.progress and "fine-tuning" in job.progress["note"], 240)
        worker = engine.pid
        await client.delete(f"/api/jobs/{name}")
        await until(lambda: job.state in ENDED, 240)
        following = (await client.post("/api/jobs", json=TRACE)).json()["id"]
        await until(lambda: engine.jobs[following].state in ENDED, 240)
        return job.state, worker == engine.pid, engine.jobs[following]

    state, same, following = over_http(run, steps, command="the real one", seconds=600)
    assert state == "cancelled" and same
    assert following.state == "done"
    assert not any("opening" in s["name"] for s in following.stages)


def test_a_worker_ends_when_its_server_is_gone(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=TRACE)).json()["id"]
        await until(lambda: engine.jobs[name].progress, 240)
        worker = engine._worker
        worker._process.stdin.close()  # as when the server dies
        return await asyncio.wait_for(worker._process.wait(), 20)

    assert over_http(run, steps, command="the real one", seconds=600) == 0
