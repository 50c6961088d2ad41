"""What the page reads over HTTP: saved results by their names, and nothing outside of the run, whatever is asked."""

import asyncio
import json
import shutil
from urllib.parse import quote, unquote

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from headwater.training.changes import ChangeSet
from headwater.web.app import make_app
from headwater.web.engine import Engine
from headwater.web.jobs import Jobs
from tests.runs import hostile_run, linked_run, plain_run
from tests.web_cases import OWN, PORT, TOKEN, with_client

SECRET = "a secret of this machine"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "secret.json").write_text(json.dumps({"secret": SECRET}))
    (folder / "outside").mkdir()
    (folder / "outside" / "manifest.json").write_text(json.dumps({"secret": SECRET}))
    return plain_run(folder / "run")


def asking(run, method: str, path: str, **more):
    app = make_app(run, Engine(run, Jobs(run / "jobs")), token=TOKEN, port=PORT)
    return asyncio.run(with_client(app, lambda client: client.request(method, path, **more)))


def asking_as_it_stands(run, path: str) -> tuple[int, str]:
    """Status and body for a path that no client tidies up, as a server hands it on."""
    app = make_app(run, Engine(run, Jobs(run / "jobs")), token=TOKEN, port=PORT)
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": unquote(path),
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in OWN.items()],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()


def test_every_saved_result_that_the_overview_names_is_found(run):
    overview = asking(run, "GET", "/api/run").json()
    found = [
        *(f"/api/traces/{each['id']}" for each in overview["traces"]),
        *(f"/api/verifications/{each['id']}" for each in overview["verifications"]),
        *(f"/api/timelines/{each['id']}" for each in overview["timelines"]),
    ]
    answers = [asking(run, "GET", path) for path in found]
    assert len(found) >= 4 and all(a.status_code == 200 for a in answers)
    assert answers[0].json()["answers"][0]["sides"][0]["name"] == "raised"


HIDDEN = [
    "la\u202eva",
    "la\u200bva",
    "la\nva",
    "la\x1b[31mva",
    "50% of\u2066 it",
    "la⟨RLO⟩va",
    "ü#?;",
]


def test_results_whose_names_hold_hidden_characters_are_opened_by_the_id_that_is_listed(tmp_path):
    run = plain_run(tmp_path / "run", n=16)
    for name in HIDDEN:
        for group, saved in (("traces", "lava"), ("timelines", "timeline"), ("verify", "trace")):
            shutil.copytree(run / group / saved, run / group / name)
    overview = asking(run, "GET", "/api/run").json()
    for group, view in (
        ("traces", "traces"),
        ("timelines", "timelines"),
        ("verify", "verifications"),
    ):
        ids = [each["id"] for each in overview[view]]
        answers = [asking(run, "GET", f"/api/{view}/{quote(i, safe='')}") for i in ids]
        assert [a.status_code for a in answers] == [200] * len(list((run / group).iterdir()))
        assert [a.json()["id"] for a in answers] == ids and len(set(ids)) == len(ids)
        assert all(i.isprintable() for i in ids)


def test_the_corpus_is_read_in_pages(run):
    path = "/api/corpus?offset=5&limit=3&sort=self_influence&descending=true"
    page = asking(run, "GET", path).json()
    rest = asking(run, "GET", "/api/corpus?limit=500&sort=self_influence&descending=true").json()
    assert [r["id"] for r in page["rows"]] == [r["id"] for r in rest["rows"]][5:8]
    assert (
        page["total"] == len(rest["rows"]) == asking(run, "GET", "/api/corpus/summary").json()["n"]
    )
    first = page["rows"][0]
    assert asking(run, "GET", f"/api/examples/{first['number']}").json()["id"] == first["id"]


@pytest.mark.parametrize("number", ["-1", "3.5", "many", "99", str(10**19), "9" * 300, "%20"])
def test_numbers_of_no_example_are_refused(run, number):
    answer = asking(run, "GET", f"/api/examples/{number}")
    assert answer.status_code in (400, 404) and set(answer.json()) == {"error"}


@pytest.mark.parametrize(
    "query", ["limit=501", "limit=0", "offset=-1", "sort=id", "limit=many", "search=" + "x" * 1001]
)
def test_odd_pages_are_refused_in_one_sentence(run, query):
    answer = asking(run, "GET", f"/api/corpus?{query}")
    assert answer.status_code == 400 and query.partition("=")[0] in answer.json()["error"]


ESCAPES = [
    "..",
    "../run.json",
    "..%2f..%2fsecret",
    "%2e%2e",
    "%2e%2e%2fsecret.json",
    "..%5csecret.json",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "trace%00",
    ".",
    "%20",
    "trace%2f..%2ftrace",
    "%ff",
    ".hidden",
]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("group", ["traces", "timelines", "verifications", "examples", "jobs"])
def test_names_that_lead_elsewhere_are_not_found(run, group, name):
    status, text = asking_as_it_stands(run, f"/api/{group}/{name}")
    assert status in (400, 404) and SECRET not in text
    assert set(json.loads(text)) == {"error"}


@pytest.mark.parametrize("name", [*ESCAPES, "style.css", "app.js%00", "app.js/../../run.json"])
def test_only_the_files_of_the_page_are_served(run, name):
    status, text = asking_as_it_stands(run, f"/static/{name}")
    assert status == 404 and set(json.loads(text)) == {"error"}


@pytest.mark.parametrize("group", ["traces", "timelines"])
def test_a_folder_that_is_a_link_out_of_the_run_is_not_there(run, group):
    link = run / group / "linked"
    link.symlink_to(run.parent / "outside", target_is_directory=True)
    try:
        answer = asking(run, "GET", f"/api/{group}/linked")
    finally:
        link.unlink()
    assert answer.status_code == 404 and SECRET not in answer.text


def test_a_result_with_a_file_that_is_a_link_out_of_the_run_is_refused(tmp_path):
    run = linked_run(tmp_path)
    listed = asking(run, "GET", "/api/run").json()
    for group, place in (("traces", "lava"), ("timelines", "timeline")):
        answer = asking(run, "GET", f"/api/{group}/{place}")
        assert answer.status_code == 403 and "leads out of the run" in answer.json()["error"]
        assert place in [each["id"] for each in listed[group]]
    assert next(t for t in listed["traces"] if t["id"] == "lava")["asked"] == []


def test_a_verification_that_is_a_link_out_of_the_run_is_refused(run):
    group = next((run / "verify").iterdir())
    link = group / "linked.json"
    link.symlink_to(run.parent / "secret.json")
    try:
        answer = asking(run, "GET", f"/api/verifications/{group.name}-linked")
    finally:
        link.unlink()
    assert answer.status_code in (403, 404) and SECRET not in answer.text


def test_a_damaged_result_is_told_and_the_server_goes_on(run):
    manifest = (
        run / "traces" / sorted(p.name for p in (run / "traces").iterdir())[0] / "manifest.json"
    )
    kept = manifest.read_bytes()
    manifest.write_bytes(kept[: len(kept) // 2])
    try:
        answer = asking(run, "GET", f"/api/traces/{manifest.parent.name}")
    finally:
        manifest.write_bytes(kept)
    assert answer.status_code == 409 and "not valid JSON" in answer.json()["error"]
    assert asking(run, "GET", f"/api/traces/{manifest.parent.name}").status_code == 200


def test_what_goes_wrong_unexpectedly_is_one_plain_sentence(run, monkeypatch):
    from headwater.report.views import run as views

    def broken(*_):
        raise RuntimeError(SECRET)

    monkeypatch.setattr(views, "overview", broken)
    answer = asking(run, "GET", "/api/run")
    assert answer.status_code == 500 and SECRET not in answer.text
    assert answer.json() == {
        "error": "Something went wrong in the server; what it printed says what."
    }


def test_hostile_results_are_valid_json_with_the_right_type(tmp_path):
    run = hostile_run(tmp_path / "run", n=20)
    paths = ["/api/run", "/api/corpus?limit=500", "/api/corpus/summary", "/api/examples/3"]
    paths += [f"/api/traces/{t['id']}" for t in asking(run, "GET", "/api/run").json()["traces"]]
    answers = [asking(run, "GET", path) for path in paths]
    assert all(a.status_code == 200 and a.json() for a in answers)
    assert {a.headers["content-type"] for a in answers} == {"application/json"}
    assert {a.headers["x-content-type-options"] for a in answers} == {"nosniff"}


# The draft


CHANGES = {
    "name": "mine",
    "changes": [
        {"id": "e4", "number": 4, "action": "upweight", "weight": 1.5, "note": "<b>good</b>"},
        {"id": "e1", "number": 1, "action": "remove"},
        {"id": "e2", "number": None, "action": "duplicate"},
        {"id": "e3", "number": 3, "action": "keep"},
        {"id": "e5", "number": 5, "action": "relabel", "label": "2"},
    ],
}


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


def test_a_draft_comes_back_as_it_was_and_is_exported_as_training_takes_it(empty):
    assert asking(empty, "GET", "/api/changes").json() == {"name": "changes", "changes": []}
    kept = asking(empty, "PUT", "/api/changes", json=CHANGES).json()
    assert kept == asking(empty, "GET", "/api/changes").json()
    assert [c["id"] for c in kept["changes"]] == ["e4", "e1", "e2", "e3", "e5"]
    assert kept["changes"][0] == CHANGES["changes"][0]
    assert kept["changes"][2] == {"id": "e2", "number": None, "action": "duplicate", "weight": 2.0}
    answer = asking(empty, "GET", "/api/changes/export")
    assert answer.headers["content-disposition"] == 'attachment; filename="changes.json"'
    (empty / "exported.json").write_bytes(answer.content)
    expected = ChangeSet(
        name="mine", remove=("e1",), keep=("e3",), relabel={"e5": 2}, weights={"e4": 1.5, "e2": 2.0}
    )
    assert ChangeSet.load(empty / "exported.json") == expected
    assert ChangeSet.load(empty / "changes.json") == expected  # the draft itself will do, too


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": "e1", "action": "upweight"}, "weight"),
        ({"id": "e1", "action": "upweight", "weight": 0}, "weight"),
        ({"id": "e1", "action": "upweight", "weight": -1.0}, "weight"),
        ({"id": "e1", "action": "relabel"}, "number of a class"),
        ({"id": "e1", "action": "relabel", "label": "cat"}, "number of a class"),
        ({"id": "e1", "action": "destroy"}, "action"),
        ({"id": "", "action": "keep"}, "id"),
        ({"id": "e1", "action": "keep", "script": "x"}, "script"),
        ({"id": "e0", "action": "keep"}, "named twice"),
    ],
)
def test_a_draft_that_cannot_be_made_is_refused_and_the_last_one_stays(empty, change, problem):
    first = {"changes": [{"id": "e0", "action": "remove"}]}
    asking(empty, "PUT", "/api/changes", json=first)
    changes = {"changes": [*first["changes"], change]}
    answer = asking(empty, "PUT", "/api/changes", json=changes)
    assert answer.status_code == 400 and problem in answer.json()["error"]
    assert [c["id"] for c in asking(empty, "GET", "/api/changes").json()["changes"]] == ["e0"]


def test_infinite_weights_are_refused(empty):
    text = '{"changes": [{"id": "e1", "action": "upweight", "weight": %s}]}'
    headers = {"Content-Type": "application/json"}
    for weight in ("Infinity", "NaN", "1e400"):
        answer = asking(empty, "PUT", "/api/changes", content=text % weight, headers=headers)
        assert answer.status_code == 400
    assert not (empty / "changes.json").exists()


def test_a_draft_that_is_a_link_out_of_the_run_is_refused_and_not_written_through(
    empty, tmp_path_factory
):
    outside = tmp_path_factory.mktemp("outside") / "changes.json"
    ChangeSet(name=SECRET).save(outside)
    kept = outside.read_bytes()
    (empty / "changes.json").symlink_to(outside)
    for path in ("/api/changes", "/api/changes/export"):
        answer = asking(empty, "GET", path)
        assert answer.status_code == 403 and SECRET not in answer.text
    assert asking(empty, "PUT", "/api/changes", json=CHANGES).status_code == 200
    assert outside.read_bytes() == kept and not (empty / "changes.json").is_symlink()


def test_a_draft_that_somebody_broke_is_told(empty):
    (empty / "changes.json").write_text('{"remove": 3}')
    answer = asking(empty, "GET", "/api/changes")
    assert answer.status_code == 409 and "no change set" in answer.json()["error"]


def test_a_long_change_set_may_be_verified(empty):
    changes = {"changes": [{"id": f"{i:0100}", "action": "remove"} for i in range(2000)]}
    answer = asking(empty, "POST", "/api/jobs", json={"kind": "verify", "changes": changes})
    assert answer.status_code == 202
    # messages of the job do not carry the list, its file does
    assert answer.json()["asked"]["changes"] == {"name": "changes", "n_changes": 2000}
    kept = json.loads((empty / "jobs" / f"{answer.json()['id']}.json").read_text())
    assert len(kept["asked"]["changes"]["changes"]) == 2000
