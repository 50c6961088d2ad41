"""A run folder as one file: all of its data, one script and one style, named by their hashes, and nothing else."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from headwater.cli import main
from headwater.core.files import ArtifactMissing
from headwater.report import page
from headwater.report.views import corpus
from headwater.report.views import run as views
from tests import runs

SCRIPT, STYLE = "document.title = 'shown' && 1 < 2;", "body { color: #123; }"


class Read(HTMLParser):
    """What a browser makes of a page: its tags, and what stands in scripts and styles."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.blocks, self.text = [], [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.blocks.append((tag, dict(attrs), ""))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and self.cdata_elem:
            tag, attrs, content = self.blocks[-1]
            self.blocks[-1] = tag, attrs, content + data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    (folder / "app.js").write_text(SCRIPT)
    (folder / "app.css").write_text(STYLE)
    (folder / "index.html").write_text(
        '<!doctype html>\n<html lang="en"><head>\n<meta charset="utf-8">\n<title>Headwater</title>\n'
        '<link rel="stylesheet" href="/static/app.css">\n</head><body><div id="app"></div>\n'
        '<script src="/static/app.js"></script>\n</body></html>\n'
    )
    return folder


def data(content: str) -> dict:
    found = [b for b in Read(content).blocks if b[1].get("id") == page.DATA]
    assert len(found) == 1 and found[0][1]["type"] == "application/json"
    return json.loads(found[0][2])


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_the_file_holds_what_the_views_say(name, static, request):
    run = request.getfixturevalue(name)
    found = data(page.render_report(run, static=static))
    assert found["run"] == views.overview(run)
    assert found["traces"] == {n: views.trace(run, n) for n in views.trace_folders(run)}
    rows = corpus.rows(run, limit=500)
    assert found["corpus"] == {k: rows[k] for k in ("total", "rows")} | {
        "summary": corpus.summary(run),
        "offset": 0,
    }
    assert found["changes"] == views.changes(run)
    assert {len(v["rows"]) for v in found["verifications"].values()} <= {6, 9}
    numbers = [c["number"] for t in found["traces"].values() for a in t["answers"] for s in a["sides"]
               for c in s["cards"]]  # fmt: skip
    for number in {n for n in numbers if n is not None}:
        assert found["examples"][str(number)] == corpus.example(run, number)


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_only_the_page_s_own_script_runs_and_nothing_is_loaded(name, static, request):
    content = page.render_report(request.getfixturevalue(name), static=static)
    read = Read(content)
    assert [(t, a.get("id"), c) for t, a, c in read.blocks if a.get("id") is None] == [
        ("style", None, STYLE),
        ("script", None, SCRIPT),
    ]
    assert len(read.blocks) == 3
    assert not {k for _, a in read.tags for k in a} & {"src", "onerror", "onmouseover", "style"}
    assert not [a["href"] for _, a in read.tags if "href" in a]
    assert content.lower().count("<script") == 2 and "<!--" not in content
    assert "\u2028" not in content and "\u202e" not in content.split(page.DATA)[0]
    policy = next(a["content"] for t, a in read.tags if a.get("http-equiv"))
    for kind, block in (("script", SCRIPT), ("style", STYLE)):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'") and "base-uri 'none'" in policy
    assert "http://" not in policy and "unsafe" not in policy


def test_the_built_page_goes_into_a_file(plain):
    content = page.render_report(plain)
    assert data(content)["run"]["name"] == "plain"
    assert len(content) < 3_000_000 and content.count("<script") == 2


def test_of_many_examples_the_strongest_are_listed_and_it_is_said(plain, static):
    found = data(page.render_report(plain, examples=5, static=static))["corpus"]
    assert (found["total"], len(found["rows"])) == (48, 5)
    assert "lists the 5 of 48 examples" in found["summary"]["told"]
    own = runs.survey().self_influence
    assert {row["number"] for row in found["rows"]} == set(own.topk(5).indices.tolist())


@pytest.mark.parametrize(
    "text", ["</script>", "<!--", "<SCRIPT>", "]]>", "&lt;", "a\u2028b\u2029c", '"\\', "\ud800"]
)
def test_no_text_leaves_its_block(text):
    block = page.block({text: text})
    assert not re.search("[<>&\u2028\u2029]", block)
    assert json.loads(block) == {text.replace("\ud800", "?"): text.replace("\ud800", "?")}


def test_a_file_is_written_whole_or_not_at_all(plain, static, tmp_path, monkeypatch):
    path = page.write_report(plain, tmp_path / "a" / "x.html", static=static)
    before = path.read_bytes()
    assert before.decode() == page.render_report(plain, static=static)
    monkeypatch.setattr(page, "block", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write_report(plain, path, static=static)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["x.html"]


@pytest.mark.parametrize(
    ("file", "content"),
    [("app.js", "'</script>'"), ("app.css", "a{}</style>"), ("index.html", "<title>x</title>")],
)
def test_files_that_would_break_the_page_are_refused(plain, static, tmp_path, file, content):
    for path in static.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError) as error:
        page.render_report(plain, static=tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_command_names_the_file_and_a_folder_that_is_no_run(plain, tmp_path, capsys):
    assert main(["report", str(plain), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "path": str(tmp_path / "r.html"),
        "bytes": (tmp_path / "r.html").stat().st_size,
    }
    assert main(["report", str(tmp_path)]) == 2
    assert "run.json does not exist" in capsys.readouterr().err
    assert main(["report", str(plain), "--examples", "-1"]) == 2
    with pytest.raises(ArtifactMissing) as error:
        page.write_report(tmp_path)
    assert "run.json" in str(error.value)


def test_one_damaged_result_hides_no_other_from_the_file(static, tmp_path):
    run = runs.plain_run(tmp_path / "run", n=16)
    next((run / "traces" / "lava").glob("*.parquet")).unlink()
    (run / "verify" / "trace" / "reversed\u202e.json").write_text('{"outcomes": []}')
    (run / "changes.json").write_text('{"remove": ["a", "a"]}')
    found = data(page.render_report(run, static=static))
    assert list(found["traces"]) == ["trace"] == [t["id"] for t in found["run"]["traces"]]
    assert found["run"]["facts"][0][0] == "The trace lava cannot be read"
    assert list(found["verifications"]) == ["trace-0000000000000007"]
    assert found["timelines"] and found["changes"] is None


def test_results_whose_names_hold_hidden_characters_are_found_by_the_id_that_is_listed(
    static, tmp_path
):
    run = runs.plain_run(tmp_path / "run", n=16)
    for group, name in (("traces", "lava"), ("timelines", "timeline"), ("verify", "trace")):
        (run / group / name).rename(run / group / "la\u202eva")
    found = data(page.render_report(run, static=static))
    for kind in ("traces", "timelines", "verifications"):
        ids = [each["id"] for each in found["run"][kind]]
        assert set(ids) == set(found[kind]) and [v["id"] for v in found[kind].values()] == [
            *found[kind]
        ]
        assert any(i.startswith("la%E2%80%AEva") for i in ids)
    assert {t["name"] for t in found["traces"].values()} == {"trace", "la⟨RLO⟩va"}


def test_results_with_a_link_that_leads_out_of_the_run_are_left_out_and_it_is_said(
    static, tmp_path
):
    found = data(page.render_report(runs.linked_run(tmp_path), static=static))
    assert list(found["traces"]) == ["trace"] and found["timelines"] == {}
    assert [t["id"] for t in found["run"]["traces"]] == ["trace"]
    told = dict(found["run"]["facts"])
    assert told["The trace lava cannot be read"].startswith("'notes.txt' is a link that leads out")
    assert told["The timeline timeline cannot be read"].startswith("'data' is a link that leads")
    assert "of another folder" not in json.dumps(found)
