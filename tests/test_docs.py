"""What the documentation shows, runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_and_prints_scores(path):
    if "digits" in path.read_text(encoding="utf-8"):
        pytest.importorskip("sklearn")
    assert "Scores(" in run(path.read_text(encoding="utf-8"))


def test_the_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    assert blocks
    assert run("\n".join(blocks)).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_commands_in_the_documentation_exist():
    from headwater.cli import COMMANDS

    text = "\n".join(p.read_text(encoding="utf-8") for p in PAGES)
    named = set(re.findall(r"^headwater ([a-z]+)", text, re.M))
    assert named and named <= set(COMMANDS)


def test_snippets_are_marked_as_the_documentation_tool_reads_them():
    text = "\n".join(p.read_text(encoding="utf-8") for p in PAGES)
    lines = [line for line in text.splitlines() if "--8" in line]
    found = [re.fullmatch(r'--8<-- "([^"]+)"', line) for line in lines]
    assert found and all(m and (ROOT / m.group(1)).is_file() for m in found)
