"""The queue of jobs: bounded, told of as it goes, stopped when asked, and kept through deaths of either process."""

import asyncio
import json
import os
import signal

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from headwater.web.asks import Complete
from headwater.web.jobs import ASKS, MOST_KEPT, MOST_WAITING, Jobs
from headwater.web.work import Work
from headwater.web.worker import Report
from tests.web_cases import ENDED, completing, events_of, over_http, run_folder, until


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run")


async def ended(engine, name: str):
    return await until(lambda: engine.jobs[name].state in ENDED and engine.jobs[name])


async def started(engine, name: str):
    return await until(lambda: engine.jobs[name].progress and engine.jobs[name])


def test_a_job_is_done_and_its_file_says_so(run):
    async def steps(client, engine):
        answer = await client.post("/api/jobs", json=completing("count"))
        await ended(engine, answer.json()["id"])
        return answer, (await client.get(f"/api/jobs/{answer.json()['id']}")).json()

    answer, job = over_http(run, steps)
    assert answer.status_code == 202 and answer.json()["state"] in ("queued", "running")
    assert job["state"] == "done" and job["result"] == {"completion": "0 1 2 "}
    assert job["stages"] == [{"name": "counting", "told": "0 s"}] and job["attempts"] == 1
    kept = json.loads((run / "jobs" / f"{job['id']}.json").read_text())
    assert kept["state"] == "done" and kept["asked"] == job["asked"]


def test_jobs_run_one_after_another_in_their_order_and_no_more_than_so_many_wait(run):
    async def steps(client, engine):
        first = (await client.post("/api/jobs", json=completing("wait"))).json()["id"]
        await started(engine, first)
        taken = [
            (await client.post("/api/jobs", json=completing("count"))).json()
            for _ in range(MOST_WAITING)
        ]
        refused = await client.post("/api/jobs", json=completing("count"))
        places = [(await client.get(f"/api/jobs/{j['id']}")).json()["position"] for j in taken]
        await client.delete(f"/api/jobs/{first}")
        for job in taken:
            await ended(engine, job["id"])
        return refused, places, [engine.jobs[j["id"]].state for j in taken]

    refused, places, states = over_http(run, steps)
    assert refused.status_code == 429 and "jobs wait already" in refused.json()["error"]
    assert places == list(range(1, MOST_WAITING + 1))
    assert states == ["done"] * MOST_WAITING


def test_a_running_job_stops_when_it_is_cancelled_and_a_waiting_one_leaves_the_queue(run):
    async def steps(client, engine):
        running = (await client.post("/api/jobs", json=completing("wait"))).json()["id"]
        waiting = (await client.post("/api/jobs", json=completing("count"))).json()["id"]
        await started(engine, running)
        left = await client.delete(f"/api/jobs/{waiting}")
        worker = engine.pid
        await client.delete(f"/api/jobs/{running}")
        job = await ended(engine, running)
        again = await client.delete(f"/api/jobs/{running}")
        return left.json(), job, again, worker == engine.pid

    left, job, again, alive = over_http(run, steps)
    assert left["state"] == "cancelled" and left["attempts"] == 0
    assert job.state == "cancelled" and job.deaths == 0
    assert alive  # the model stays open for the next job
    assert again.status_code == 409 and "has ended" in again.json()["error"]


def test_a_job_that_does_not_listen_is_stopped_with_its_process_and_the_next_one_runs(run):
    async def steps(client, engine):
        deaf = (await client.post("/api/jobs", json=completing("deaf"))).json()["id"]
        following = (await client.post("/api/jobs", json=completing("count"))).json()["id"]
        await started(engine, deaf)
        await client.delete(f"/api/jobs/{deaf}")
        return (await ended(engine, deaf)).state, (await ended(engine, following)).state

    assert over_http(run, steps, patience=0.2) == ("cancelled", "done")


def test_a_job_whose_worker_dies_is_begun_again(run, tmp_path):
    async def steps(client, engine):
        words = f"die once {tmp_path / 'died'}"
        name = (await client.post("/api/jobs", json=completing(words))).json()["id"]
        return await ended(engine, name)

    job = over_http(run, steps)
    assert job.state == "done" and job.attempts == 2 and job.deaths == 1


def test_a_worker_that_is_killed_from_outside_is_noticed_and_the_job_goes_on(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("wait"))).json()["id"]
        await started(engine, name)
        first = engine.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: engine.jobs[name].attempts == 2 and engine.jobs[name].progress)
        second = engine.pid
        await client.delete(f"/api/jobs/{name}")
        return (await ended(engine, name)).deaths, first != second

    assert over_http(run, steps) == (1, True)


def test_a_worker_that_dies_between_jobs_takes_none_with_it(run):
    async def steps(client, engine):
        first = (await client.post("/api/jobs", json=completing("count"))).json()["id"]
        await ended(engine, first)
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine._worker.gone)
        name = (await client.post("/api/jobs", json=completing("count"))).json()["id"]
        return await ended(engine, name)

    job = over_http(run, steps)
    assert job.state == "done" and (job.attempts, job.deaths) == (1, 0)


def test_a_job_that_takes_its_worker_down_three_times_fails_and_says_so(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("die"))).json()["id"]
        following = (await client.post("/api/jobs", json=completing("count"))).json()["id"]
        return await ended(engine, name), await ended(engine, following)

    job, following = over_http(run, steps)
    assert job.state == "failed" and job.attempts == 3
    assert "went down 3 times" in job.error and "SIGKILL" in job.error
    assert following.state == "done"


def test_a_worker_that_talks_nonsense_is_not_believed(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("noise"))).json()["id"]
        return await ended(engine, name)

    job = over_http(run, steps)
    assert job.state == "failed" and job.deaths == 3


def test_a_failure_is_told_in_the_words_of_the_command(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("fail"))).json()["id"]
        await ended(engine, name)
        return (await client.get(f"/api/jobs/{name}")).json()

    job = over_http(run, steps)
    assert job["state"] == "failed" and job["error"] == "It failed, as it was told to."


def test_a_stream_tells_all_of_a_job_to_whoever_comes_early_and_its_end_to_who_comes_late(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("count"))).json()["id"]
        early = await client.get(f"/api/jobs/{name}/events")
        late = await client.get(f"/api/jobs/{name}/events")
        return early, events_of(early.text), events_of(late.text)

    answer, early, late = over_http(run, steps)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert early[0][0] == "job" and early[-1][0] == "end" and early[-1][1]["state"] == "done"
    said = "".join(content["text"] for name, content in early if name == "token")
    assert said == "0 1 2 "
    assert late[0][0] == "job" and late[-1][0] == "end"
    assert late[-1][1]["result"] == {"completion": "0 1 2 "}


def test_a_stream_that_is_taken_up_again_begins_with_the_present_state(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("wait"))).json()["id"]
        job = await started(engine, name)
        job.live.text, job.live.partial, job.live.n_partial = "so far", [{"query_id": "q"}], 7
        found = []
        async for event in engine.events(job):
            found.append(event)
            if len(found) == 3:
                break
        return found

    (first, job), token, partial = over_http(run, steps)
    assert first == "job" and job["state"] == "running" and job["progress"]["note"] == "counting"
    assert token == ("token", {"text": "so far", "at": 0})
    assert partial == ("partial", {"answers": [{"query_id": "q"}]})


def test_jobs_that_were_waiting_or_running_when_the_server_died_are_done_at_its_next_start(run):
    async def cut_off(client, engine):
        names = [
            (await client.post("/api/jobs", json=completing(words))).json()["id"]
            for words in ("wait", "count", "count")
        ]
        await started(engine, names[0])
        # what a killed server leaves: nothing of the end is written
        return names, {n: (run / "jobs" / f"{n}.json").read_bytes() for n in names}

    names, left = over_http(run, cut_off)
    for name, content in left.items():
        (run / "jobs" / f"{name}.json").write_bytes(content)

    async def next_start(client, engine):
        job = await until(lambda: engine.jobs[names[0]].progress and engine.jobs[names[0]])
        waiting = [j.id for j in engine.jobs.waiting()]
        await client.delete(f"/api/jobs/{names[0]}")
        return job.attempts, waiting, [(await ended(engine, n)).state for n in names]

    attempts, waiting, states = over_http(run, next_start)
    assert attempts == 2 and waiting == names[1:]
    assert states == ["cancelled", "done", "done"]


def test_old_jobs_that_have_ended_are_forgotten(run):
    jobs = Jobs(run / "jobs")
    first = jobs.add(Complete(kind="complete", prompt="x"))
    jobs.end(first, "done", result={})
    for _ in range(MOST_KEPT + 1):
        jobs.end(jobs.add(Complete(kind="complete", prompt="x")), "done", result={})
    jobs.add(Complete(kind="complete", prompt="x"))
    assert first.id not in jobs and len(jobs.all()) == MOST_KEPT + 1
    assert len(list((run / "jobs").glob("*.json"))) == MOST_KEPT + 1


def test_what_a_file_says_of_a_job_is_made_harmless(run):
    kept = Jobs(run / "jobs").add(Complete(kind="complete", prompt="a\u202eb"))
    path = run / "jobs" / f"{kept.id}.json"
    path.write_text(json.dumps(kept.to_json() | {"title": "\x1b[31m", "error": "x\u202ey"}))
    job = Jobs(run / "jobs")[kept.id]
    assert job.title == kept.title == "Complete “a⟨RLO⟩b”" and job.error == "x⟨RLO⟩y"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "20260101-000000-000000-ffffff"},
        {"asked": {"kind": "complete", "prompt": "x", "more": 1}},
        {"state": "lost"},
        {"attempts": "many"},
        {"stages": [1]},
        {"result": "x"},
        {"live": {"text": "x"}},
        {"kind": "trace"},
        {"unknown": 1},
    ],
)
def test_a_file_that_is_no_job_is_left_alone(run, change, capsys):
    jobs = Jobs(run / "jobs")
    kept = jobs.add(Complete(kind="complete", prompt="x"))
    broken = jobs.add(Complete(kind="complete", prompt="x"))
    path = run / "jobs" / f"{broken.id}.json"
    path.write_text(json.dumps(broken.to_json() | change))
    (run / "jobs" / "notes.json").write_text("{")
    found = Jobs(run / "jobs")
    assert [job.id for job in found.all()] == [kept.id] and path.is_file()
    assert capsys.readouterr().err.count("is left alone") == 2


def test_the_server_answers_while_a_job_computes(run):
    async def steps(client, engine):
        name = (await client.post("/api/jobs", json=completing("deaf"))).json()["id"]
        await started(engine, name)
        return await asyncio.wait_for(client.get("/api/jobs"), 1)

    answer = over_http(run, steps)
    assert answer.status_code == 200 and answer.json()[0]["state"] == "running"


def test_a_timeline_asks_about_the_same_span_and_form_of_prompt_as_a_trace(tmp_path, monkeypatch):
    asked = {
        "kind": "timeline",
        "prompt": "x",
        "completion": " one 😀 two",
        "span": [5, 6],
        "chat": True,
    }
    heard = []
    monkeypatch.setattr(
        "headwater.cli.timeline.timeline", lambda command, **_: heard.append(command)
    )
    monkeypatch.setattr(Work, "opened", lambda self, report: None)
    Work(tmp_path).do("timeline", asked, Report("job", lambda _: None, set()))
    assert (heard[0].span, heard[0].chat) == (("5..6",), True)
    assert ASKS.validate_python(asked).title == "Timeline of “😀”"
