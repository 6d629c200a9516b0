"""Tables of types, and what a message says of a value that does not fit."""

from __future__ import annotations

import pytest

from deploy.errors import ContractError
from deploy.schema import (
    Choice,
    FileName,
    Items,
    Maybe,
    Number,
    Whole,
    check_content,
    fault_of,
    read_checked,
    short,
)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "kind", "name", "expected"),
    [
        ({}, {"a": str}, "a", "a string"),
        ({"a": [1, "x"]}, {"a": [int]}, "a[1]", "a whole number"),
        ({"a": [True]}, {"a": [int]}, "a[0]", "a whole number"),
        ({"a": [True]}, {"a": ([int], None)}, "a[0]", "a whole number"),
        ({"a": 1}, {"a": ([int], None)}, "a", "a list, each a whole number or null"),
        ({"a": float("nan")}, {"a": float}, "a", "a number"),
        ({"a": 10**400}, {"a": float}, "a", "a number"),
        ({"a": 10**400}, {"a": int}, "a", "a whole number"),
        ({"a": -1}, {"a": Whole(0, 9)}, "a", "a whole number at least 0 and at most 9"),
        ({"a": 2.0}, {"a": Number(0, 1)}, "a", "a number at least 0 and at most 1"),
        ({"a": {"b": [1]}}, {"a": {str: Items(float, 2, 2)}}, "a.b", "a list of 2, each a number"),
        ({"a": "c"}, {"a": Choice(("x", "y"))}, "a", "one of x, y"),
        ({"a": "../x"}, {"a": FileName()}, "a", "the name of a file beside it"),
        ({"a": "x\0"}, {"a": FileName()}, "a", "the name of a file beside it"),
        ({"a": "\ud800"}, {"a": str}, "a", "a string"),
        ({"a": {"b": "\ud800"}}, {"a": dict}, "a", "an object"),
        ({"a": deep(60)}, {"a": list}, "a", "a list"),
        ({"a": "x"}, {"a": Maybe(int)}, "a", "a whole number"),
        ({"a": 1, "b": float("-inf")}, {"a": int, str: object}, "b", "a value of few levels and finite numbers"),
        ({"a": "x", "b": None}, {"a": int, str: object}, "a", "a whole number"),
        ({"b": None}, {"a": int, str: object}, "a", "a whole number"),
        ([], {"a": int}, "", "an object with a"),
        ({"a\nb": 1}, {str: str}, r"'a\nb'", "a string"),
    ],
)
def test_what_does_not_fit_is_named(value, kind, name, expected):
    fault = fault_of(value, kind)
    assert fault is not None
    assert (fault.name, fault.expected) == (name, expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"a": 1, "more": deep(900)}, {"a": float}),
        ({}, {"a": Maybe(str)}),
        ({"a": 1, "b": {"c": [None]}}, {"a": int, str: object}),
        ({"a": None, "b": [1, 2.5]}, {"a": ([int], None), "b": Items(float, 2, 2)}),
        ({"x": {"y": ["z", None]}}, {str: dict}),
        ({"f": "weights.pth"}, {"f": FileName()}),
    ],
)
def test_what_fits_passes(value, kind):
    assert fault_of(value, kind) is None


def test_a_message_names_file_key_value_and_what_to_do(tmp_path):
    with pytest.raises(ContractError, match=r"^x\.json: a\[0\] is 'b'; expected a number\. Make it again\.$"):
        check_content({"a": ["b"]}, {"a": [float]}, "x.json", ContractError, "Make it again.")
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ContractError, match="nested too deeply to be read; expected a sidecar"):
        read_checked(path, {}, ContractError, "a sidecar")
    path.write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(ContractError, match=r"is not JSON|a is "):
        read_checked(path, {"a": int}, ContractError, "a sidecar")
    with pytest.raises(ContractError, match="a device or a pipe"):
        read_checked("/dev/zero", {}, ContractError, "a sidecar")


def test_a_value_in_a_message_is_short():
    assert len(short(["x" * 1000] * 1000)) <= 80
    assert len(short(deep(900))) <= 80
