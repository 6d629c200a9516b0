from __future__ import annotations

import pytest

from benchmarks import wording


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
    assert wording.cell("a|b\nc") == "a\\|b c"
