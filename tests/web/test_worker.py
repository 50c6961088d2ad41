"""How the process that computes tells of a job, and stops it."""

import pytest

pytest.importorskip("fastapi")

from headwater.web import worker
from headwater.web.worker import Cancelled, Report, run


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(worker.time, "monotonic", lambda: self.now)


def reporting(monkeypatch, stopped=()):
    sent, clock = [], Clock(monkeypatch)
    return Report("j", sent.append, set(stopped)), sent, clock


def test_progress_is_told_ten_times_a_second_at_most_and_every_stage_once(monkeypatch):
    report, sent, clock = reporting(monkeypatch)
    for i in range(1000):
        clock.now += 0.001
        report.progress(i, 1000, "scoring: a detail")
    clock.now += 1
    report.progress(1, 2, "reading")
    clock.now += 2
    report.finish()
    told = [m for m in sent if m["event"] == "progress"]
    assert 9 <= len(told) <= 12 and told[-1]["note"] == "reading"
    stages = [(m["name"], m["told"]) for m in sent if m["event"] == "stage"]
    assert stages == [("scoring", "2 s"), ("reading", "2 s")]


def test_a_cancelled_job_stops_at_the_next_word_of_progress_text_or_results(monkeypatch):
    report, sent, _ = reporting(monkeypatch, ["j"])
    for tell in (
        lambda: report.progress(0, 1, "x"),
        lambda: report.text("x"),
        lambda: report.partial([]),
    ):
        with pytest.raises(Cancelled):
            tell()
    assert not sent


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        ({"trace": "x"}, {"event": "done", "result": {"trace": "x"}}),
        (ValueError("No\n such column."), {"event": "failed", "error": "No such column."}),
        (RuntimeError("odd"), {"event": "failed", "error": "odd"}),
        (AssertionError(), {"event": "failed", "error": "AssertionError"}),
        (Cancelled(), {"event": "cancelled"}),
    ],
)
def test_a_job_ends_in_one_message_whatever_happens(outcome, told, capsys):
    class Doing:
        def do(self, kind, asked, report):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

    sent, stopped = [], {"j", "other"}
    run({"run": "j", "kind": "trace", "asked": {}}, Doing(), sent.append, stopped)
    assert sent == [{"id": "j", **told}] and stopped == {"other"}
    assert ("Traceback" in capsys.readouterr().err) == (told["event"] == "failed")
