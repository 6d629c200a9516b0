"""The limits as JUnit XML, which continuous integration systems show: one test case per limit."""

from __future__ import annotations

from typing import Any, Mapping, Sequence
from xml.etree import ElementTree

from benchmarks.reporting.verdict import words_of_limit
from deploy.errors import one_line


def junit_from_limits(ship: str, limits: Sequence[Mapping[str, Any]]) -> str:
    """The XML document. A limit that cannot be told is a failure, of the type `cannot tell`."""
    ship = one_line(ship, most=None)
    failures = sum(limit["outcome"] != "pass" for limit in limits)
    counts = {"tests": str(len(limits)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"limits on {ship}", **counts})
    for limit in limits:
        case = ElementTree.SubElement(suite, "testcase", {"classname": ship, "name": limit["flag"][2:]})
        words = one_line(words_of_limit(limit), most=None)  # XML has no way to write a control character
        if limit["outcome"] != "pass":
            failure = ElementTree.SubElement(case, "failure", {"type": limit["outcome"], "message": words})
            failure.text = words
        ElementTree.SubElement(case, "system-out").text = words
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
