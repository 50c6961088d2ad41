import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.core.evidence import Evidence
from headwater.report import text

from . import samples

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@given(st.text() | st.text(alphabet=BIDI + "\x00\x1b[]m;a"))
def test_no_control_or_direction_character_survives(content):
    for shown in (text.visible(content), text.stripped(content)):
        assert not set(shown) & set(BIDI)
        assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in shown)
    assert "\n" not in text.stripped(content)


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_ordinary_text_is_shown_as_it_is(content):
    assert text.visible(content) == content


def test_emoji_and_scripts_that_join_stay_whole():
    for content in ("👩\u200d💻", "می\u200cخواهم", "הבית", "naïve"):
        assert text.visible(content) == content


def test_escape_sequences_go_with_their_content():
    assert text.stripped("\x1b]0;title\x07a\x1b[1;31mb\x1b[0mc\x9b2Jd\x1b(B") == "abcd"


def test_an_unfinished_escape_sequence_hides_nothing():
    assert "kept" in text.stripped("\x1b]8;;http://x kept")


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), max_size=12), st.integers(1, 30))
def test_the_window_is_the_heaviest_that_fits(pairs, limit):
    scores, widths = [s for s, _ in pairs], [w for _, w in pairs]
    start, stop = text.window(scores, widths, limit)

    def weight(i, j):
        return sum(abs(s) for s in scores[i:j])

    fits = [
        (i, j)
        for i in range(len(pairs))
        for j in range(i + 1, len(pairs) + 1)
        if sum(widths[i:j]) <= limit or j == i + 1
    ]
    assert (start, stop) in fits or not pairs
    # Running sums are off by rounding: a dozen numbers below 5.
    assert weight(start, stop) >= max((weight(i, j) for i, j in fits), default=0) - 1e-12


def test_without_scores_the_window_is_the_beginning():
    assert text.window([], [3] * 10, 7) == (0, 2)
    assert text.window([math.nan] * 3, [3] * 3, 99) == (0, 3)


@pytest.mark.parametrize(
    ("values", "shown"),
    [((0.4123, -0.02), "+0.412"), ((41.23, 1.0), "+41.2"), ((3.456e-5,), "+0.0000346")],
)
def test_the_largest_score_has_three_digits(values, shown):
    assert text.signed(values[0], text.decimals(values)) == shown


def test_tiny_scores_are_in_scientific_notation():
    assert text.signed(-1.234e-9, text.decimals([1e-9])) == "-1.23e-09"


def test_missing_and_infinite_numbers_are_dashes():
    for value in (None, math.nan, math.inf):
        assert text.signed(value, 3) == text.p_value(value) == "–"
        assert text.interval(value, 1.0, 3) == ""
    assert text.quantity(math.nan) == "–"


def test_zero_has_no_minus_sign():
    assert text.signed(-0.0001, 3) == "+0.000"
    assert text.interval(-0.00001, 0.00001, 3) == "[0.0000, 0.0000]"


def test_units_fit_the_size():
    assert [text.size(n) for n in (10, 2048, 3 << 30)] == ["10 bytes", "2 KiB", "3 GiB"]
    assert [text.duration(s) for s in (0.5, 200, 7260)] == ["0.5 s", "3 min 20 s", "2 h 1 min"]


def test_damping_comes_with_its_ratio_and_unknown_facts_are_listed():
    facts = {
        "zeta_k": 3,
        "damping": 0.01,
        "damping_ratio": 2.0,
        "seconds": {"fit": 61.0},
        "model": None,
    }
    assert text.facts(Evidence(answers=(), facts=facts)) == [
        ("Damping", "0.01 (2 × the mean eigenvalue)"),
        ("Time", "fit 1 min 1 s"),
        ("zeta k", "3"),
    ]


def test_the_sentence_on_noise_counts_ranks():
    answer = samples.answer(0)
    assert text.noise(answer, 3) == (
        "The top 4 ranks are told apart from noise; "
        "about 5 % of held-out examples reach ±0.06 nats."
    )
