"""`headwater bench` on a small part of the digits."""

import json

import pytest

from headwater.cli import main

pytestmark = pytest.mark.thorough

SMALL = ["--subsets", "20", "--repeats", "1", "--seeds", "1", "--threads", "1"]


def test_a_small_table_of_the_digits_is_printed_written_and_read_again(tmp_path, capsys):
    pytest.importorskip("sklearn")
    words = ["bench", "digits-logistic", "--folder", str(tmp_path), *SMALL, "--method", "random"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "## digits: logistic regression" in text and "| **random** |" in text
    assert "no noise ceiling: every half was retrained once" in text
    place = tmp_path / "digits-logistic"
    assert (place / "table.md").read_text(encoding="utf-8").strip() == text.strip()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "--fashion-mnist" in found["skipped"]["fashion-mlp"]
    [report] = found["reports"]
    assert report["rows"][0]["name"] == "random" and report["facts"]["subsets"] == 20


def test_workloads_in_processes_of_their_own_leave_what_they_leave_in_this_one(tmp_path, capfd):
    pytest.importorskip("sklearn")
    names = ["digits-logistic"]
    words = ["bench", *names, *SMALL, "--method", "random", "--folder", str(tmp_path), "--json"]
    assert main([*words, "--jobs", "2"]) == 0
    aside = json.loads(capfd.readouterr().out)
    assert [r["name"] for r in aside["reports"]] == names
    assert main(words) == 0  # reads all that the other process finished
    assert json.loads(capfd.readouterr().out) == aside


def test_workloads_are_listed_with_what_is_missing(capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert "digits-mlp" in out and "fashion-mlp      skipped: its data come with no" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "There is no workload 'nonsense' to run: there are: digits-mlp"),
        (["fashion-mlp"], "pass --fashion-mnist FOLDER"),
        (["--subsets", "5"], "--subsets must be at least 20; got 5"),
        (["--jobs", "0"], "--jobs must be at least 1; got 0"),
        (["--left-out", "0.9"], "--left-out must be between 0 and 0.5"),
        (["digits-mlp", "--method", "nonsense"], "No method of this workload is called 'nonsense'"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, tmp_path, capsys):
    assert main(["bench", *words, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
