"""Cards in a notebook: the page's own numbers, no script, and a style that stays in its box."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from headwater.core.scores import Scores
from headwater.report.notebook import html
from tests import runs
from tests.audit.test_base import findings
from tests.report import samples

pytest.importorskip("jinja2")

BAD = " ".join(samples.HOSTILE[:9])


def scores(**more) -> Scores:
    given = {
        "values": torch.tensor([[0.5, -0.25, 0.125]]),
        "low": torch.tensor([[0.4, -0.3, float("nan")]]),
        "high": torch.tensor([[0.6, -0.2, float("nan")]]),
        "query_ids": ["q"],
        "train_ids": ["a", "b", "c"],
    }
    return Scores(**given | more)


RESULTS = {
    "evidence": (samples.evidence, samples.hostile),
    "scores": (scores, lambda: scores(query_ids=[BAD], train_ids=[BAD, "b", "<script>"])),
    "verification": (
        lambda: runs._verification(["lava"]),
        lambda: replace(runs._verification([BAD]), measurement=BAD, protocol=BAD),
    ),
    "findings": (findings, lambda: findings(ids=["w", BAD, "y", "z"], texts={1: BAD, 2: BAD})),
    "timeline": (lambda: runs.timeline(["lava"]), lambda: runs.timeline([BAD])),
    "survey": (runs.survey, runs.hostile_survey),
}


class Tags(HTMLParser):
    def __init__(self, content: str):
        super().__init__()
        self.names, self.attributes = [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "hostile"])
def test_no_result_brings_a_script_or_loads_anything(name, kind):
    content = RESULTS[name][kind]()._repr_html_()
    read = Tags(content)
    assert not set(read.names) & {"script", "img", "link", "iframe", "object", "a", "meta"}
    assert not [n for n in read.attributes if n.startswith("on") or n in ("src", "href", "style")]
    body = content.split("</style>")[1]
    assert not [c for c in "\x00\x07\x1b\u202e\u2066\u2028\ufeff" if c in body]
    assert "<b>bold" not in body and read.names[0] == "div"


def test_the_style_touches_nothing_outside_its_box():
    style = re.search("<style>(.*?)</style>", html(scores()), re.DOTALL)[1]
    depth, outside = 0, []
    for part in re.split("([{}])", style):
        if part == "{":
            depth += 1
        elif part == "}":
            depth -= 1
        elif depth == 0:
            outside.append(part.strip())
    assert depth == 0 and [o for o in outside if o] == [".headwater"]
    assert ":root" not in style and not re.search(r"^\s*(html|body) \{", style, re.MULTILINE)
    assert "url(" not in style and "@import" not in style


def test_the_cards_are_those_of_the_page():
    from headwater.report.views.answer import trace_view

    content, found = html(samples.evidence()), trace_view(samples.evidence())
    for answer in found["answers"]:
        for side in answer["sides"]:
            for card in side["cards"][:3]:
                assert card["title"] in content and card["score"] in content
                assert f'cx="{card["at"]}%"' in content
    assert content.count('<li class="card">') == 3 * 2 * 3


def test_scores_are_bars_with_intervals():
    content = html(scores())
    assert "+0.500" in content and "−0.250" in content and "[0.40, 0.60]" in content
    limit = 1.04 * 0.6
    assert f'cx="{round(50 + 50 * 0.5 / limit, 3)}%"' in content
    assert "1 queries × 3 training examples, change of loss in nats." in content


def test_a_verification_shows_its_control_faintly():
    content = html(runs._verification(["lava"]))
    rows = re.findall(r"<tr.*?</tr>", content, re.DOTALL)[1:]
    assert ["soft" in row.split(">")[0] for row in rows] == [False, True, False]
    assert "−0.410" in rows[0] and "−0.380" in rows[0]


def test_without_jinja_the_plain_form_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert samples.evidence()._repr_html_() is None
    assert repr(samples.evidence()).startswith("Evidence: 3 answers")


def test_other_values_have_no_cards():
    with pytest.raises(TypeError, match="Expected a result of Headwater; got a list"):
        html([1])
    assert html(runs.survey()).count("<table") == 1


def test_evidence_is_plotted_with_its_intervals_and_noise():
    pytest.importorskip("matplotlib")
    answer = samples.evidence().answers[0]
    axes = samples.evidence().plot(top=3).axes[0]
    shown = [*answer.raised[:3], *reversed(answer.lowered[:3])]
    bars = [p.get_width() for p in axes.containers[0]]
    assert bars == pytest.approx([i.score for i in shown])
    lines = [line.get_xdata() for line in axes.lines[:6]]
    assert [tuple(x) for x in lines] == [(i.low, i.high) for i in shown]
    band = next(p for p in axes.patches if p.get_label() == "95 % of held-out examples")
    assert band.get_width() == pytest.approx(2 * 1.96 * answer.null_scale)


def test_hostile_evidence_is_plotted_without_formulas():
    pytest.importorskip("matplotlib")
    bad = samples.hostile()
    answer = replace(bad.answers[0], prompt="$\\frac$ \x1b", completion="$x_")
    figure = replace(bad, answers=(answer,)).plot()
    figure.canvas.draw()
    assert "\x1b" not in figure.axes[0].get_title(loc="left")


def test_a_verification_is_plotted_predicted_against_actual():
    pytest.importorskip("matplotlib")
    found = runs._verification(["lava", "leaves"])
    axes = found.plot().axes[0]
    for control, points in zip((True, False), axes.collections, strict=True):
        some = [(o.predicted, o.actual) for o in found.outcomes if o.control == control]
        assert points.get_offsets().tolist() == [list(pair) for pair in some]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["at random", "named"]
