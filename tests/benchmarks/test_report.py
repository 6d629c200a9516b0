from __future__ import annotations

import html.parser
import json
import subprocess
import sys

import pytest

from benchmarks import report

ROLES = ("teacher", "baseline", "student", "onnx-fp32", "onnx-int8")
AP = {"teacher": 0.52, "baseline": 0.47, "student": 0.50, "onnx-fp32": 0.5001, "onnx-int8": 0.495}
MS = {"teacher": 200.0, "baseline": 60.0, "student": 60.0, "onnx-fp32": 40.0, "onnx-int8": 16.0}


@pytest.fixture
def results(result):
    """The ten result files of a whole run."""
    made_from = {"student": "teacher", "onnx-fp32": "student", "onnx-int8": "onnx-fp32"}
    paths = [result(role, ap=AP[role], made_from=made_from.get(role)) for role in ROLES]
    return paths + [result(role, ms=MS[role], made_from=made_from.get(role)) for role in reversed(ROLES)]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command: (status, stderr, report.json or None)."""

    def run(results, *words):
        output = tmp_path / "out" / "report.html"
        status = report.main([*map(str, results), "-o", str(output), *map(str, words)])
        document = output.with_suffix(".json")
        return status, capsys.readouterr().err, json.loads(document.read_text()) if document.exists() else None

    return run


def test_a_whole_run_is_one_table_and_a_verdict(results, run, data_dir, tmp_path):
    status, _, document = run(results, "--max-ap-drop", 3, "--max-latency-ms", 20, "--min-speedup", 10)
    assert status == 0
    assert document["verdict"]["roll_out"] is True
    assert document["verdict"]["ship"] == "onnx-int8"
    assert [row["role"] for row in document["rows"]] == list(ROLES)
    last = document["rows"][-1]
    assert last["AP_gain"] == pytest.approx(-0.025)
    assert last["speedup"] == pytest.approx(12.5)
    assert [rung["change"] for rung in document["ladder"]] == [None, pytest.approx(0.0001), pytest.approx(-0.0051)]
    assert document["notes"] == []
    assert [entry["inputs"][0]["role"] for entry in document["lineage"][2:]] == ["teacher", "student", "onnx-fp32"]
    assert len(document["environments"]) == 1
    assert len(document["inputs"]) == 10
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| ONNX INT8 (ships) | 49.5 | \N{MINUS SIGN}2.5 | 49.5 |" in markdown
    assert markdown.startswith("# Roll out\n")


class Page(html.parser.HTMLParser):
    """Tags that do not balance, references to elsewhere, and counts."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.outside.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_the_page_is_well_formed_and_needs_nothing_from_outside(results, run, data_dir, tmp_path):
    run(results, "--max-ap-drop", 3)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    assert "@import" not in text
    assert "url(" not in text
    assert page.count("script") == 0
    assert page.count("circle") == 1 + len(ROLES)  # the verdict's sign, and a point per model
    assert page.count("image") == 2  # each sample once,
    assert page.count("use") == 2 * (1 + len(ROLES))  # shown for the annotations and each model
    for tag, attributes in page.tags:
        if tag == "svg":
            assert "aria-label" in attributes or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes.get("scope")


def test_what_comes_from_files_is_escaped(result, run, tmp_path):
    run([result("a<b>&c", ap=0.5)])
    text = (tmp_path / "out" / "report.html").read_text()
    assert "a<b>" not in text
    assert "a&lt;b&gt;&amp;c" in text


def test_a_failed_limit_is_status_1_and_says_which(results, run):
    status, _, document = run(results, "--max-ap-drop", 2, "--max-p99-ms", 1000)
    assert status == 1
    assert document["verdict"]["roll_out"] is False
    assert [limit["passed"] for limit in document["limits"]] == [False, True]
    assert "2.50 points" in document["verdict"]["sentence"]


def test_without_limits_there_is_no_verdict(results, run):
    status, _, document = run(results)
    assert status == 0
    assert document["verdict"]["roll_out"] is None
    assert document["verdict"]["label"] == "No limits given"


def test_ship_names_another_model(results, run):
    _, _, document = run(results, "--ship", "baseline")
    assert document["verdict"]["ship"] == "baseline"
    status, error, _ = run(results, "--ship", "engine-int8")
    assert status == 2
    assert "--ship is 'engine-int8'" in error


def test_own_roles_come_after_the_known_ones_and_do_not_ship_unasked(result, run):
    _, _, document = run([result("rival", ap=0.6), result("student", ap=0.5), result("teacher", ap=0.55)])
    assert [row["role"] for row in document["rows"]] == ["teacher", "student", "rival"]
    assert document["verdict"]["ship"] == "student"


def test_notes_tell_what_to_distrust(result, run):
    paths = [
        result("teacher", ms=100.0, environment__cpu="another processor"),
        result("onnx-fp32", ap=0.5),
        result("onnx-int8", ap=0.5, made_from="elsewhere"),
        result("onnx-int8", ms=10.0, made_from="elsewhere", spread=0.5, numbers__threads=4),
    ]
    notes = "\n".join(run(paths)[2]["notes"])
    assert "ONNX INT8: latency was unstable, interquartile range 40 %" in notes
    assert "different machines" in notes
    assert "different thread counts" in notes
    assert "Teacher: accuracy was not measured." in notes
    assert "ONNX INT8 does not come from the measured ONNX FP32" in notes
    assert "Sample images not shown: 2. sub/1.png" in notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__annotations_sha256": "0" * 64}, "differ in data.annotations_sha256"),
        ({"data__class_names": ["disc", "ring"]}, "differ in data.class_names"),
        ({"data__images": 4}, "differ in data.images"),
    ],
)
def test_results_of_different_data_are_refused(result, run, changes, message):
    status, error, document = run([result("teacher", ap=0.5), result("student", ap=0.4, **changes)])
    assert status == 2
    assert message in error
    assert document is None


def test_latency_may_use_fewer_images(result, run):
    assert run([result("student", ap=0.5), result("student", ms=9.0, data__images=8)])[0] == 0


def test_two_results_of_a_role_are_refused(result, run):
    status, error, _ = run([result("student", ap=0.5), result("student", ap=0.6, suffix="2")])
    assert status == 2
    assert "second accuracy result of role 'student'" in error
    status, error, _ = run([result("student", ap=0.5), result("student", ms=9.0, model__sha256="f" * 64)])
    assert status == 2
    assert "accuracy and latency of different files" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-ap", "0.48"), "expected points, 1 to 100: 48 for that fraction"),
        (("--max-p99-ms", "nan"), "--max-p99-ms is nan"),
        (("--min-speedup", "0"), "expected a positive number"),
        (("--max-p99-ms", "5"), "--max-p99-ms cannot be judged: it needs the latency of 'student'"),
        (("--max-ap-drop", "1"), "and of a teacher to compare it with"),
    ],
)
def test_limits_that_cannot_be_judged(result, run, words, message):
    status, error, document = run([result("student", ap=0.5)], *words)
    assert status == 2
    assert message in error
    assert document is None


def test_output_paths(result, tmp_path, capsys):
    path = result("student", ap=0.5)
    assert report.main([str(path), "-o", str(tmp_path / "report.json")]) == 2
    assert "expected a name that ends in .html" in capsys.readouterr().err
    assert report.main([str(path), "-o", str(path.with_suffix(".html"))]) == 2
    assert "written over a result file" in capsys.readouterr().err
    assert json.loads(path.read_text())["kind"] == "accuracy"


@pytest.mark.parametrize("module", ["accuracy", "latency", "report"])
def test_help_needs_no_heavy_package(module):
    program = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('benchmarks.{module}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'onnx', 'onnxruntime', 'faster_coco_eval', 'tensorrt', 'torch', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m benchmarks." in done.stdout
