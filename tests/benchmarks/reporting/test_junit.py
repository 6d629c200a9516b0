from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.reporting.junit import junit_from_limits


def limit(flag, outcome):
    return {
        "flag": flag,
        "title": "Median <latency>",
        "unit": "ms",
        "bound": "at most",
        "allowed": 21.0,
        "measured": 20.0,
        "low": 19.0,
        "high": 23.0,
        "outcome": outcome,
        "why": None,
    }


def test_a_case_per_limit_and_a_failure_per_limit_that_does_not_pass():
    limits = [limit("--a", "pass"), limit("--min-ap", "fail"), limit("--max-p99-ms", "cannot tell")]
    suite = ElementTree.fromstring(junit_from_limits({"a<b>": limits})).find("testsuite")
    assert suite.get("name") == "limits on a<b>"
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    failures = {case.get("name"): case.find("failure") for case in suite.findall("testcase")}
    assert failures["a"] is None
    assert failures["min-ap"].get("type") == "fail"
    assert failures["max-p99-ms"].get("type") == "cannot tell"
    words = "Median <latency> is 20.00 ms (19.00 to 23.00), at most 21.00 ms is allowed"
    assert failures["max-p99-ms"].get("message") == words
    assert [case.find("system-out").text for case in suite.findall("testcase")] == [words] * 3
