"""A full disk under the server: jobs fail in a sentence that names disk and file, and the server goes on."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from headwater.core.evidence import Evidence
from headwater.core.files import read_json, write_json
from headwater.web.jobs import Jobs
from tests.web_cases import ENDED, completing, over_http, run_folder, tuned_run, until

pytestmark = pytest.mark.thorough
TRACE = {"kind": "trace", "prompt": "the river", "completion": " runs to the", "compare": False}


def fill(disk: Path, room: int = 0) -> Path:
    """A file that leaves so many bytes of the disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    return filler


def names_disk_and_file(error: str, disk: Path) -> bool:
    told = rf"Writing {disk}/run/[^ ]+ needs [^ ]+ MB, but the disk of {disk}/run[^ ]* has "
    return bool(re.match(told, error)) and error.count("\n") == 0


def whole(run: Path) -> list[dict]:
    """Every job file, none of them cut short and nothing half-written beside them."""
    paths = [p for p in (run / "jobs").iterdir() if not p.name.endswith(".lock")]
    assert all(p.suffix == ".json" and not p.name.startswith(".") for p in paths)
    return [json.loads(p.read_text()) for p in sorted(paths)]


def test_jobs_that_cannot_be_noted_fail_and_the_server_goes_on(small_disk):
    run = run_folder(small_disk / "run")
    draft = {"changes": [{"id": "e1", "action": "remove"}]}

    async def steps(client, engine):
        async def ask(prompt):
            return await client.post("/api/jobs", json=completing(prompt))

        first, second = [(await ask(p)).json()["id"] for p in ("wait", "count")]
        await until(lambda: engine.jobs[first].progress)
        await client.put("/api/changes", json=draft)
        filler = fill(small_disk)
        refused = [await ask("count"), await client.put("/api/changes", json={"changes": []})]
        await client.delete(f"/api/jobs/{first}")
        await until(lambda: engine.jobs[second].state in ENDED)
        kept = (await client.get("/api/changes")).json()
        filler.unlink()
        third = (await ask("count")).json()["id"]
        await until(lambda: engine.jobs[third].state in ENDED)
        return refused, kept, [engine.jobs[name] for name in (first, second, third)]

    refused, kept, jobs = over_http(run, steps)
    assert [job.state for job in jobs] == ["cancelled", "failed", "done"]
    assert names_disk_and_file(jobs[1].error, small_disk)
    assert [answer.status_code for answer in refused] == [507, 507]
    assert all(names_disk_and_file(answer.json()["error"], small_disk) for answer in refused)
    assert [change["id"] for change in kept["changes"]] == ["e1"]
    assert [job["state"] for job in whole(run)] == ["cancelled", "failed", "done"]
    assert not Jobs(run / "jobs").waiting()  # none is done again at the next start


def test_a_result_that_finds_no_room_fails_its_job_and_is_made_when_there_is_some(small_disk):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    run = tuned_run(small_disk)
    before = Evidence.load(run / "traces" / "trace").answers

    async def steps(client, engine):
        async def ask():
            name = (await client.post("/api/jobs", json=TRACE)).json()["id"]
            await until(lambda: engine.jobs[name].state in ENDED, 240)
            return engine.jobs[name]

        failed, opened = [], []
        for room in (20_000, 60_000):  # for the job's own file, and for half of the result
            filler = fill(small_disk, room)
            failed.append(await ask())
            for each in (await client.get("/api/run")).json()["traces"]:
                opened.append((await client.get(f"/api/traces/{each['id']}")).status_code)
            filler.unlink()
        done = await ask()
        record = read_json(run / "run.json")
        noted = record["traces"].pop(done.result["trace"])
        write_json(run / "run.json", record)  # as if that had found no room
        return failed, opened, done, noted, await ask()

    failed, opened, done, noted, again = over_http(run, steps, command="the real one", seconds=600)
    assert [job.state for job in failed] == ["failed"] * 2 and done.state == "done"
    assert all(names_disk_and_file(job.error, small_disk) and not job.deaths for job in failed)
    assert set(opened) == {200}  # whatever is listed is whole
    assert Evidence.load(run / "traces" / "trace").answers == before
    assert Evidence.load(run / "traces" / done.result["trace"]).answers[0].raised
    assert again.result == done.result
    assert read_json(run / "run.json")["traces"][done.result["trace"]] == noted
    assert [job["state"] for job in whole(run)] == ["failed"] * 2 + ["done"] * 2
    assert not [p for p in run.rglob(".*") if not p.name.endswith(".lock")]
