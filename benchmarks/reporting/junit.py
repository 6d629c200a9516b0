"""The limits as JUnit XML, which continuous integration systems show: one test case per limit."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence
from xml.etree import ElementTree

from benchmarks.reporting.verdict import words_of_limit
from deploy.errors import one_line


def junit_from_limits(limits_by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """
    The XML document, a test suite for each name. A limit that cannot be told is a failure, of the type `cannot tell`.

    Args:
        limits_by_name: of what the limits are ("onnx-int8", "onnx-int8 on orin-1") -> as `verdict.judge` gives them.
    """
    every = [limit for limits in limits_by_name.values() for limit in limits]
    root = ElementTree.Element("testsuites", _counts(every))
    for name, limits in limits_by_name.items():
        _add_suite(root, one_line(name, most=None), limits)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(limits: Sequence[Mapping[str, Any]]) -> Dict[str, str]:
    failures = sum(limit["outcome"] != "pass" for limit in limits)
    return {"tests": str(len(limits)), "failures": str(failures), "errors": "0"}


def _add_suite(root: ElementTree.Element, ship: str, limits: Sequence[Mapping[str, Any]]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"limits on {ship}", **_counts(limits)})
    for limit in limits:
        case = ElementTree.SubElement(suite, "testcase", {"classname": ship, "name": limit["flag"][2:]})
        words = one_line(words_of_limit(limit), most=None)  # XML has no way to write a control character
        if limit["outcome"] != "pass":
            failure = ElementTree.SubElement(case, "failure", {"type": limit["outcome"], "message": words})
            failure.text = words
        ElementTree.SubElement(case, "system-out").text = words
