"""`headwater fit` and `headwater trace` under torchrun, as a person would start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from headwater.core.evidence import Evidence
from tests.language_cases import WORDS, saved

pytestmark = pytest.mark.slow

FAILING = """
import os, sys
from headwater.cli import main
from headwater.data.tokens import TextExamples

plain, reads = TextExamples.batch, []

def batch(self, indices):
    reads.append(1)
    if os.environ["RANK"] == "1" and len(reads) == 4:
        raise OSError("the disk of this rank is broken")
    return plain(self, indices)

TextExamples.batch = batch
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and training data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("torchrun")
    saved(folder / "model")
    lines = [
        {"id": f"{i}", "text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 5 + i % 4))}
        for i in range(30)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "more.jsonl").write_text(json.dumps({"id": "more", "text": " ".join(WORDS[:4])}))
    (folder / "failing.py").write_text(FAILING)
    return folder


def call(place: Path, *words: str, ranks: int = 2) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks)]
    if words[0] != "failing.py":
        start += ["-m", "headwater"] if ranks > 1 else ["headwater"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(
        [*start, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=200
    )


def test_two_processes_write_what_one_writes_and_speak_once(place):
    asked = ["--prompt", "the river", "--max-new-tokens", "3", "--top", "3"]
    for ranks, out in ((1, "one"), (2, "two")):
        options = ["--out", out, "--batch-tokens", "32"]
        done = call(place, "fit", "model", "train.jsonl", *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"Saved in {out}") == 1
        done = call(place, "trace", out, *asked, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("The same as a page") == 1
    for ranks, out in ((1, "one"), (2, "two")):
        done = call(place, "index", "build", out, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("headwater trace") == 1
        done = call(place, "index", "add", out, "more.jsonl", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (
        {f.name: f.read_bytes() for f in (place / out / "index").iterdir()}
        for out in ("one", "two")
    )
    assert one == two and "rows-00001.safetensors" in one
    one, two = (sorted((place / out / "fit").glob("*.safetensors")) for out in ("one", "two"))
    assert one and [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    one, two = (Evidence.load(place / out / "traces" / "trace") for out in ("one", "two"))
    assert one.answers == two.answers and one.answers[0].raised


def test_a_failing_process_stops_all_and_is_reported_once(place):
    done = call(
        place, "failing.py", "fit", "model", "train.jsonl", "--out", "bad", "--batch-tokens", "32"
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("headwater:")]
    assert lines == ["headwater: rank 1 failed: OSError: the disk of this rank is broken"]


def test_a_mistake_is_reported_once(place):
    done = call(place, "fit", "nothing", "train.jsonl", "--out", "bad")
    lines = [line for line in done.stderr.splitlines() if line.startswith("headwater:")]
    assert len(lines) == 1 and "no folder 'nothing'" in lines[0]
    for words in (("show",), ("index", "remove")):
        done = call(place, *words, "one")
        lines = [line for line in done.stderr.splitlines() if line.startswith("headwater:")]
        what = f"{' '.join(words)} runs in one process"
        assert lines == [f"headwater: {what}; start it without torchrun."]
