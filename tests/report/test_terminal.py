import io
import math
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from headwater.core.evidence import Evidence, Influencer
from headwater.report.terminal import show

from . import samples

SGR = re.compile(r"\x1b\[[0-9;]*m")  # colour and weight: the only sequences that may be written


def shown(evidence: Evidence, width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    show(evidence, console, width=width)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 132])
@pytest.mark.parametrize("make", [samples.evidence, samples.hostile])
def test_no_line_is_wider_than_the_terminal(width, make):
    lines = shown(make(), width).splitlines()
    assert len(lines) > 20
    assert max(cell_len(line) for line in lines) <= width


def test_scores_come_with_sign_interval_and_p_value():
    output = shown(samples.evidence())
    raised, lowered = output.split("Lowered it")[:2]
    assert re.search(
        r"1\s+\+0\.412 \[0\.32, 0\.50\]\s+0\.0021\s+Basalt · Physical sciences", raised
    )
    assert re.search(r"1\s+-0\.272 \[-0\.35, -0\.20\]\s+0\.0045\s+Great Fire", lowered)
    assert "+0." not in lowered.split("By topic")[0]


def test_prompt_completion_and_facts_are_there():
    output = shown(samples.evidence())
    assert re.search(r"prompt\s+When lava cools quickly", output)
    assert re.search(r"completion\s+a dark rock called basalt", output)
    assert "The top 4 ranks are told apart from noise" in output
    assert "0.0031 (12.4 × the mean eigenvalue)" in output
    assert "fit 2.81 · scores 0.93 passes" in output


def test_strong_tokens_are_marked_where_there_is_no_colour():
    plain = shown(samples.evidence(1))
    assert "‹Basalt›" in plain
    assert "\x1b" not in plain
    coloured = shown(samples.evidence(1), force_terminal=True, color_system="truecolor")
    assert "‹" not in coloured
    assert SGR.search(coloured)
    assert "‹Basalt›" in shown(samples.evidence(1), force_terminal=True, no_color=True)


def test_corpus_text_cannot_steer_the_terminal():
    output = SGR.sub("", shown(samples.hostile(), force_terminal=True, color_system="truecolor"))
    assert all(c.isprintable() or c == "\n" for c in output)
    assert "[red]markup[/red]" in output  # not taken as markup either
    assert "⟨RLO⟩" in output
    assert "owned" not in output  # the title that an escape sequence would have set


def test_bars_have_the_length_of_their_total():
    answer = replace(
        samples.answer(0),
        sources=(
            samples.SourceTotal(name="up", raised=4.0, lowered=0.0, net=4.0, n=1),
            samples.SourceTotal(name="half", raised=2.0, lowered=-4.0, net=-2.0, n=1),
        ),
    )
    output = shown(Evidence(answers=(answer,)))
    row = {
        line.split()[0]: line for line in output.splitlines() if re.match(r"  (up|half)\s", line)
    }
    assert (row["up"].count("█"), row["up"].count("▒")) == (12, 0)
    assert (row["half"].count("█"), row["half"].count("▒")) == (6, 12)
    assert row["half"].rstrip().endswith("-2.00")


def test_missing_numbers_texts_and_examples_are_no_obstacle():
    bare = Influencer(example_id="bare", score=math.nan)
    answer = replace(
        samples.answer(0),
        value=math.nan,
        raised=(bare,),
        lowered=(),
        completion_tokens=(),
        completion_log_probs=(),
        sources=(),
        layers={"all": math.nan},
        null_scale=None,
        n_distinguishable=None,
    )
    output = shown(Evidence(answers=(answer,)))
    assert re.search(r"1\s+–\s+–\s+bare", output)
    assert "no example" in output
    assert "noise is not known" in " ".join(output.split())
    assert "nan" not in output
    show(Evidence(answers=()), Console(file=io.StringIO()))


def test_an_output_that_holds_only_ascii_gets_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    show(samples.evidence(), Console(file=file, width=80))
    file.flush()
    assert b"<Basalt>" in raw.getvalue()
    assert b"+0.412 [0.32, 0.50]" in raw.getvalue()
