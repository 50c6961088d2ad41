"""What acts on a fit survives kills and full disks: nothing is lost or half-written, and the same command goes on."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from headwater.cli import main
from tests import verb_runs
from tests.forks import forking
from tests.verb_runs import classifier, language_model, prepared, said, words_of

pytestmark = pytest.mark.thorough

PROGRAM = ["--program", "{0}/program.py:parts"]
CLASSIFIER = {
    "audit": ["audit", "{0}/run", *PROGRAM],
    "structure": ["audit", "structure", "{0}/run", *PROGRAM, "--basis", "lib"],
    "drift": ["audit", "drift", "{0}/run", *PROGRAM],
    "claims": ["calibrate", "select", "{0}/scores.csv", "--verified", "{0}/verified.csv", "--eta"],
    "hedged": ["calibrate", "ifcomp", "{0}/run"],
}
CLASSIFIER["claims"] += ["5"]
EDIT = ["--keep-mass", "0.5", "--tried", "0", "--out", "{0}/edit", "--write-model", "{0}/edited"]
LANGUAGE = {
    "edit": ["forget", "curvature-edit", "{0}/run", *EDIT],
    "quantized": ["adapt", "quip", "{0}/run", "--bits", "3", "--out", "{0}/small", "--sample", "0"],
    "by blocks": [
        *["adapt", "quip", "{0}/run", "--bits", "2", "--out", "{0}/small", "--sample", "0"],
        *["--statistics", "blocks", "--calibration", "6", "--rounding", "ldlq"],
    ],
}
ACTIONS = CLASSIFIER | LANGUAGE
# What two runs of one command do not share: clocks, and the checksums of files that hold them.
_CLOCKS = {"seconds", "created", "blake2b", "bytes", "question", "files", "mtime", "when"}


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Folders with all that the commands read."""
    made = classifier(tmp_path_factory.mktemp("classifier"))
    rows = [f"e{i},{(i * 37) % 100}" for i in range(300)]
    (made / "scores.csv").write_text("\n".join(["id,score", *rows]))
    seen = [f"e{i},{'yes' if (i * 37) % 100 > 80 else 'no'}" for i in range(0, 300, 2)]
    (made / "verified.csv").write_text("\n".join(["id,wrong", *seen]))
    language = language_model(tmp_path_factory.mktemp("language"))
    return dict.fromkeys(CLASSIFIER, made) | dict.fromkeys(LANGUAGE, language)


@pytest.fixture(scope="module")
def runs():
    with forking(verb_runs) as made:
        yield made


def plain(value):
    """JSON without what clocks say."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in _CLOCKS}
    return [plain(v) for v in value] if isinstance(value, list) else value


def read(path: Path, folder: Path):
    """What a file says, whatever the clock said; it must be whole."""
    if path.suffix == ".safetensors":
        return {k: v.tolist() for k, v in load_file(path).items()}
    if path.suffix == ".parquet":
        return plain(pyarrow.parquet.read_table(path).to_pydict())
    if path.suffix == ".json":
        return plain(json.loads(path.read_text("utf-8").replace(str(folder), "FOLDER")))
    if path.suffix == ".html":
        assert path.read_text("utf-8").rstrip().endswith("</html>")
        return None
    return None if path.suffix == ".png" else path.read_bytes()


def content(folder: Path) -> dict:
    """Every file of a folder, hidden ones too: of runs that were killed nothing may be left but unlocked locks."""
    ignored = (".lock", "words.json")
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith(ignored)]
    return {str(p.relative_to(folder)): read(p, folder) for p in paths}


@pytest.fixture(scope="module")
def whole(templates, runs, tmp_path_factory):
    """What a command leaves that nothing happened to, and how long it takes; made once for each."""
    known = {}

    def make(action: str) -> tuple[dict, float]:
        if action not in known:
            folder = prepared(templates[action], tmp_path_factory.mktemp("whole"), ACTIONS[action])
            started = time.monotonic()
            assert runs.run(folder) == 0
            known[action] = content(folder), time.monotonic() - started
        return known[action]

    return make


def finished(action: str, runs, folder: Path) -> None:
    """Run the command to its end; one that had ended, and refuses to write over its work, has nothing left to do."""
    code = runs.run(folder)
    over = action == "edit" and code == 2 and (folder / "edited").is_dir()
    assert code == 0 or over, said(folder).read_text()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_killed_command_goes_on_to_what_it_would_have_left(
    action, templates, runs, whole, tmp_path
):
    expected, seconds = whole(action)
    draw, killed, folders = random.Random(action), 0, 0
    while killed < 3 and folders < 12:
        folder = prepared(templates[action], tmp_path / f"killed {folders}", ACTIONS[action])
        folders += 1
        for _ in range(2):
            ended = runs.run(folder, after=draw.uniform(0.05, 0.95) * seconds)
            killed += ended == signal.SIGKILL
        finished(action, runs, folder)
        assert content(folder) == expected
        shutil.rmtree(folder)
    assert killed >= 3


@pytest.mark.parametrize("action", ACTIONS)
def test_a_command_that_ends_between_two_writes_goes_on(action, templates, runs, whole, tmp_path):
    expected, _ = whole(action)
    calls, ended = 1, 0
    while True:
        folder = prepared(templates[action], tmp_path / f"call {calls}", ACTIONS[action])
        code = runs.run(folder, calls=calls)
        if code == 0:
            break
        ended += 1
        assert code == 9, f"ended by {code} at call {calls}"
        finished(action, runs, folder)
        assert content(folder) == expected, f"ended at call {calls}"
        shutil.rmtree(folder)
        calls = 3 * calls + 1  # denser at the beginning
    assert ended >= 2


@pytest.mark.parametrize("action", ACTIONS)
def test_a_full_disk_stops_a_command_with_a_line_and_it_goes_on(
    action, templates, whole, small_disk, capfd
):
    expected, _ = whole(action)
    folder = prepared(templates[action], small_disk / "work", ACTIONS[action])
    before, filler = content(folder), small_disk / "filler"
    refused = 0
    for room in (0, 30_000, 120_000, 300_000):
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(max(free - room, 0)))
        capfd.readouterr()
        code = main(words_of(folder))
        told = capfd.readouterr().err.strip().splitlines()
        filler.unlink()
        if code == 0:
            break
        refused += 1
        assert code == 2 and told[-1].startswith("headwater: "), told
        assert "free" in told[-1] or "No space left" in told[-1], told
        assert not any("Traceback" in line for line in told)
        kept = content(folder)  # every file of it is whole
        assert all(kept[name] == said for name, said in before.items())
    assert refused and (code == 0 or main(words_of(folder)) == 0)
    assert content(folder) == expected
