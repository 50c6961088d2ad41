import base64
import hashlib
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from headwater.core.evidence import Evidence, Influencer
from headwater.report.html import Scale, heat_class, render, scale_for, write_html

from . import samples

pytest.importorskip("jinja2")

VOID = {"meta", "rect", "line", "circle", "path", "br", "hr", "link", "img", "input"}
# fmt: off
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav",
    "section", "article", "p", "h1", "h2", "h3", "h4", "dl", "dt", "dd", "div", "span", "ol",
    "ul", "li", "a", "b", "blockquote", "mark", "details", "summary", "table", "thead", "tbody",
    "tr", "th", "td", "svg", "rect", "line", "circle", "path",
}
# fmt: on


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def having(self, tag: str, name: str) -> list[dict]:
        return [a for t, a in self.tags if t == tag and name in (a.get("class") or "").split()]


@pytest.fixture(scope="module", params=[samples.evidence, samples.hostile])
def content(request) -> str:
    return render(request.param())


def test_tags_are_the_templates_own_and_balanced(content):
    page = Page(content)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= TAGS


def test_nothing_is_loaded_linked_or_run(content):
    names = {name for _, name, _ in Page(content).attributes}
    assert not {n for n in names if n.startswith("on")}
    assert not names & {"src", "srcset", "style", "action", "background", "data", "xlink:href"}
    links = [value for _, name, value in Page(content).attributes if name == "href"]
    assert all(re.fullmatch(r"#answer-\d+", link) for link in links)
    style = re.search("<style>(.*)</style>", content, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_this_style_sheet_and_nothing_else(content):
    style = re.search("<style>(.*)</style>", content, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (
        a["content"]
        for t, a in Page(content).tags
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_hostile_text_is_shown_as_text():
    page = Page(render(samples.hostile()))
    shown = "".join(page.text)
    assert "<script>alert(1)</script>" in shown
    assert '"><img src=x onerror=alert(2)>' in shown
    assert "{{ 7 * 7 }}" in shown
    assert "null⟨NUL⟩byte" in shown
    assert "left ⟨RLO⟩thgir⟨PDF⟩" in shown


def test_no_control_or_direction_character_reaches_the_file(tmp_path):
    path = write_html(samples.hostile(), tmp_path / "deep" / "report.html")
    written = path.read_bytes().decode("utf-8")
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]", written
    )
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_huge_texts_are_cut():
    text = "word " * 200_000
    influencer = Influencer(example_id="a", score=0.1, tokens=(text,), metadata={"title": text})
    answer = replace(samples.answer(0), raised=(influencer,) * 3, prompt=text, completion=text)
    assert len(render(Evidence(answers=(answer,)))) < 400_000


def test_a_long_text_has_an_excerpt_around_its_strongest_tokens_and_the_whole_below():
    tokens = tuple(f" w{i}" for i in range(600))
    scores = tuple(0.5 if i == 400 else 0.0 for i in range(600))
    influencer = Influencer(example_id="a", score=0.5, tokens=tokens, token_scores=scores)
    content = render(
        Evidence(answers=(replace(samples.answer(0), raised=(influencer,), lowered=()),))
    )
    passage = re.search('<p class="passage".*?</p>', content, re.DOTALL)[0]
    whole = re.search('<div class="full".*?</div>', content, re.DOTALL)[0]
    assert '<mark class="u4" title="+0.5000 nats">w400</mark>' in passage
    assert "w0 " not in passage
    assert all(f"w{i}" in whole for i in (0, 400, 599))


def test_the_scale_puts_zero_in_the_middle_and_keeps_values_inside():
    scale = Scale(0.5)
    assert [scale.at(v) for v in (-0.5, -0.25, 0.0, 0.5, 9.0, -9.0)] == [0, 25, 50, 100, 100, 0]
    assert scale.span(-0.25, 0.25) == {"x": 25, "width": 50}
    assert scale.span(None, 0.1) is None
    assert scale.span(0.1, math.nan) is None


def test_the_scale_fits_its_largest_value_and_never_vanishes():
    assert 96 < scale_for([0.3, -1.0, None, math.nan]).at(1.0) < 100
    assert scale_for([0.0]).at(0.0) == scale_for([]).at(0.0) == 50


def test_bars_lie_where_score_interval_and_noise_are():
    answer = replace(
        samples.answer(0),
        raised=(Influencer(example_id="a", score=0.4, low=0.3, high=0.5),),
        lowered=(Influencer(example_id="b", score=-0.2, low=-0.25, high=-0.1),),
        null_scale=0.05,
    )
    page = Page(render(Evidence(answers=(answer,))))
    limit = 1.04 * 0.5  # the largest end of an interval, with the scale's room

    def percent(value):
        return pytest.approx(50 + 50 * value / limit, abs=1e-3)  # written in thousandths

    def position(text):
        return float(text.removesuffix("%"))

    # The first of each kind belongs to the legend.
    assert [position(c["cx"]) for c in page.having("circle", "point")[1:]] == [
        percent(0.4),
        percent(-0.2),
    ]
    spans = [(position(w["x1"]), position(w["x2"])) for w in page.having("line", "whisker")[1:]]
    assert spans == [(percent(0.3), percent(0.5)), (percent(-0.25), percent(-0.1))]
    band = page.having("rect", "band")[1]
    assert position(band["x"]) == percent(-1.96 * 0.05)
    assert position(band["x"]) + position(band["width"]) == percent(1.96 * 0.05)
    assert {z["x1"] for z in page.having("line", "zero")} == {"50%"}


def test_source_bars_grow_to_either_side_of_zero():
    answer = replace(
        samples.answer(0),
        sources=(samples.SourceTotal(name="s", raised=2.0, lowered=-1.0, net=1.0, n=4),),
    )
    page = Page(render(Evidence(answers=(answer,))))
    (up,), (down,) = page.having("rect", "r-up"), page.having("rect", "r-down")
    assert up["x"] == "50.0%"
    assert float(up["width"][:-1]) == pytest.approx(2 * float(down["width"][:-1]), abs=2e-3)
    assert float(down["x"][:-1]) + float(down["width"][:-1]) == pytest.approx(50)


def test_heat_grows_with_the_score_and_has_two_colours():
    assert [heat_class(s, 1.0) for s in (0.0, 0.05, 0.2, 0.45, 0.7, 5.0)] == [
        "",
        "",
        "u1",
        "u2",
        "u3",
        "u4",
    ]
    assert [heat_class(s, 1.0) for s in (-0.2, -5.0)] == ["d1", "d4"]
    assert heat_class(math.nan, 1.0) == heat_class(1.0, 0.0) == ""


def test_every_number_has_its_sign_and_unit():
    shown = " ".join("".join(Page(render(samples.evidence())).text).split())
    assert "+0.412" in shown
    assert "−0.272" in shown
    assert "[−0.35, −0.20] · p 0.0045" in shown
    assert "log-prob −12.14 nats over 15 tokens" in shown
    assert "0.0031 (12.4 × the mean eigenvalue)" in shown
    assert "How to read this" in shown


def test_missing_numbers_texts_and_examples_are_no_obstacle():
    bare = Influencer(
        example_id="bare", score=math.nan, low=math.nan, high=0.1, significance=math.nan
    )
    answer = replace(
        samples.answer(0),
        value=math.nan,
        raised=(bare,),
        lowered=(),
        completion_log_probs=(),
        sources=(samples.SourceTotal(name="s", raised=math.nan, lowered=0.0, net=math.nan, n=0),),
        layers={"all": math.nan},
        null_scale=math.nan,
        n_distinguishable=None,
        source_column=None,
    )
    content = render(Evidence(answers=(answer,), facts={"seconds": math.nan, "damping": math.inf}))
    page = Page(content)
    assert "nan" not in "".join(page.text).lower()
    assert not [a for a in page.attributes if "nan" in (a[2] or "").lower()]
    assert "No example." in content
    assert Page(render(Evidence(answers=()))).open == []


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(scheme):
    style = re.search("<style>(.*)</style>", render(Evidence(answers=())), re.DOTALL)[1]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    backgrounds = ["paper", "card", "fill"]
    pairs = [(text, under) for text in ("ink", "soft", "up", "down") for under in backgrounds]
    pairs += [("ink", f"{letter}{n}") for letter in "ud" for n in range(1, 5)]
    pairs += [("ink", f"t{n}") for n in range(1, 4)]
    for text, under in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[under])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, under)
    for mark in ("up-bar", "down-bar"):  # graphics need 3 : 1
        for under in ("paper", "card"):
            low, high = sorted((luminance(colours[mark]), luminance(colours[under])))
            assert (high + 0.05) / (low + 0.05) >= 3.0, (mark, under)


def test_a_missing_template_engine_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"headwater\[report\]"):
        render(samples.evidence())
