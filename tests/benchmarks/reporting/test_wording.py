from __future__ import annotations

import pytest

from benchmarks.reporting import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "+1.2"),
        (-0.0123, "\N{MINUS SIGN}1.2"),
        (0.0004, "0.0"),
        (-0.0004, "0.0"),
        (0.0, "0.0"),
        (None, "\N{EN DASH}"),
    ],
)
def test_signed_points(value, text):
    assert wording.signed_points(value) == text


def test_units():
    assert wording.points(0.4712) == "47.1"
    assert wording.ms(9.876) == "9.88"
    assert wording.ms(98.76) == "98.8"
    assert wording.mib(3 << 20) == "3.00"
    assert wording.millions(1_234_567) == "1.23"
    assert wording.amount(1.004, "points") == "1.00 points"
    assert wording.part(0.987) == "99 %"
    assert wording.decimals(-0.125, 1) == "\N{MINUS SIGN}0.1"
    assert wording.signed_score(-0.056) == "\N{MINUS SIGN}0.06"
    assert wording.signed_score(0.0) == "+0.00"
    assert wording.count(12) == "12"


def test_bounds_are_shown_where_they_are_known():
    assert wording.amount_between({"low": -1.0, "high": 2.0}) == " (\N{MINUS SIGN}1.00 to 2.00)"
    assert wording.amount_between({"low": 2.0, "high": 2.0}) == ""
    assert wording.between_points(-0.01, 0.02) == "\N{MINUS SIGN}1.0 to +2.0"
    assert wording.between_points(None, None) == ""


HOSTILE = "a|b\n# c `d` <script>*e*</script> [f](javascript:g) _h_ i_j \x1b[31m"


def test_markdown_shows_a_name_and_obeys_none():
    assert wording.markdown(HOSTILE) == (
        r"a\|b # c \`d\` \<script\>\*e\*\</script\> \[f\](javascript:g) \_h\_ i_j  \[31m"
    )
    assert wording.code("a`b``c\n") == "``` a`b``c  ```"
    assert wording.code("a_b.onnx") == "`a_b.onnx`"
    assert wording.verbatim("python -m x '`*'\n```") == "python -m x '`*' ```"


@pytest.mark.parametrize("word", [wording.part, wording.decimals, wording.signed_score, wording.count])
def test_what_is_unknown_is_a_dash(word):
    assert word(None) == "\N{EN DASH}"
