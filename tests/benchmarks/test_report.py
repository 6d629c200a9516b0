from __future__ import annotations

import html.parser
import json
import subprocess
import sys
from xml.etree import ElementTree

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


def test_a_whole_run_is_one_table_and_a_verdict(data_dir, results, run, tmp_path):
    status, _, document = run(results, "--max-ap-drop", 3, "--max-latency-ms", 20, "--min-speedup", 10)
    assert status == 0
    assert document["verdict"]["outcome"] == "pass"
    assert document["verdict"]["ship"] == "onnx-int8"
    assert [row["role"] for row in document["rows"]] == list(ROLES)
    last = document["rows"][-1]
    assert last["AP_gain"] == pytest.approx(-0.025)
    assert last["speedup"] == pytest.approx(12.5)
    assert [rung.get("change") for rung in document["ladder"]] == [None, pytest.approx(0.0001), pytest.approx(-0.0051)]
    assert document["first_bad_rung"] is None
    assert last["gain_kept"] == pytest.approx((0.495 - 0.47) / (0.50 - 0.47))
    assert (last["lost"], last["gained"], last["score_shift"]) == (1, 0, 0.0)
    for name, value in (("AP", 0.495), ("AP_gain", -0.025), ("median_ms", 16.0), ("speedup", 12.5)):
        estimate = last["estimates"][name]
        assert estimate["value"] == pytest.approx(value)
        assert estimate["low"] < value < estimate["high"]
    assert document["distillation"]["gain"] == pytest.approx(0.03)
    assert document["notes"] == []
    assert [entry["inputs"][0]["role"] for entry in document["lineage"][2:]] == ["teacher", "student", "onnx-fp32"]
    assert len(document["environments"]) == 1
    assert len(document["inputs"]) == 10
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| ONNX INT8 (ships) | 49.5 (" in markdown
    assert "| \N{MINUS SIGN}2.5 (\N{MINUS SIGN}2." in markdown
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


def test_the_page_is_well_formed_and_needs_nothing_from_outside(data_dir, results, run, tmp_path):
    run(results, "--max-ap-drop", 3)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    assert "@import" not in text
    assert "url(" not in text
    assert page.count("script") == 1  # sorts the tables
    assert page.count("circle") == 1 + 2 * len(ROLES)  # the verdict's sign, a point and a p99 per model
    assert page.count("image") == 1  # the one that they disagree on, once,
    assert page.count("use") == 3  # shown for the annotations, the teacher and what ships
    assert text.count(' alone"') == 1  # the box that is lost
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


def test_names_are_only_text_in_markdown_and_junit(result, run, tmp_path):
    name = "<img src=x>|**b** [l](javascript:f) \x1b[2J"
    words = ("--ship", name, "--max-latency-ms", "1", "--junit", str(tmp_path / "gate.xml"))
    run([result(name, ap=0.5), result(name, ms=20.0)], *words)
    text = (tmp_path / "out" / "report.md").read_text()
    assert r"| \<img src=x\>\|\*\*b\*\* \[l\](javascript:f)  \[2J (ships) |" in text
    assert ElementTree.parse(tmp_path / "gate.xml").find("testsuite/testcase").get("name") == "max-latency-ms"


def test_a_failed_limit_is_status_1_and_says_which(results, run):
    status, _, document = run(results, "--max-ap-drop", 2, "--max-p99-ms", 1000)
    assert status == 1
    assert document["verdict"]["roll_out"] is False
    assert [limit["outcome"] for limit in document["limits"]] == ["fail", "pass"]
    assert "2.50 points" in document["verdict"]["sentence"]


def test_a_limit_within_the_bounds_is_status_1_and_cannot_be_told(results, run, tmp_path):
    status, _, document = run(results, "--max-ap-drop", 2.5, "--junit", tmp_path / "gate.xml")
    assert status == 1
    assert document["verdict"]["outcome"] == "cannot tell"
    assert "It cannot be told" in (tmp_path / "out" / "report.html").read_text()
    assert 'type="cannot tell"' in (tmp_path / "gate.xml").read_text()


def test_limits_come_from_a_file_or_from_flags_but_once(results, run, tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text("max_ap_drop = 3.0\nmax_memory_mib = 100\n")
    status, _, document = run(results, "--limits", path, "--max-p99-ms", 99)
    assert status == 1
    outcomes = {limit["flag"]: limit["outcome"] for limit in document["limits"]}
    assert outcomes == {"--max-ap-drop": "pass", "--max-p99-ms": "pass", "--max-memory-mib": "fail"}
    status, error, _ = run(results, "--limits", path, "--max-ap-drop", 1)
    assert status == 2
    assert "--max-ap-drop is also in" in error


def test_junit_without_limits_is_refused(results, run, tmp_path):
    status, error, _ = run(results, "--junit", tmp_path / "gate.xml")
    assert status == 2
    assert "--junit writes limits" in error
    assert not (tmp_path / "gate.xml").exists()


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


def test_a_second_runtime_is_a_rung_and_not_what_ships(data_dir, results, result, run):
    """OpenVINO runs the very file of ONNX INT8: a second opinion on its accuracy."""
    same = json.loads(next(path for path in results if path.name == "onnx-int8.accuracy.result.json").read_text())
    second = result("openvino-int8", ap=0.494, model__sha256=same["model"]["sha256"], model__runtime="openvino")
    engine = result("engine-int8", ap=0.493, made_from="onnx-int8")
    status, _, document = run([*results, second, engine])
    assert status == 0
    assert [rung["role"] for rung in document["ladder"]][-3:] == ["onnx-int8", "openvino-int8", "engine-int8"]
    assert [rung["from"] for rung in document["ladder"]][-2:] == ["ONNX INT8", "ONNX INT8"]
    assert document["ladder"][-2]["change"] == pytest.approx(-0.001)
    assert not [note for note in document["notes"] if "does not come from" in note]
    assert document["lineage"][-1]["inputs"][0]["role"] == "onnx-int8"
    _, _, document = run([*results, second])
    assert document["verdict"]["ship"] == "onnx-int8"
    assert document["int8"]["rows"] == ["onnx-int8", "onnx-fp32"]


def test_one_role_on_two_runtimes_is_refused(result, run):
    paths = [
        result("student-int8", ap=0.5, model__runtime="openvino"),
        result("student-int8", ms=9.0, model__runtime="onnxruntime"),
    ]
    status, error, document = run(paths)
    assert status == 2
    assert "accuracy and latency of different runtimes, openvino and onnxruntime" in error
    assert document is None


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
    assert "Latency not comparable (ONNX INT8): it is unstable." in notes
    assert "different machines" in notes
    assert "different thread counts" in notes
    assert "Teacher: accuracy was not measured." in notes
    assert "ONNX INT8 does not come from the measured ONNX FP32" in notes


def test_the_first_bad_rung_is_named(result, run):
    aps = {"student": 0.5, "onnx-fp32": 0.5, "onnx-int8": 0.45}
    document = run([result(role, ap=ap) for role, ap in aps.items()])[2]
    assert document["first_bad_rung"] == "onnx-int8"
    assert document["ladder"][2]["faults"] == ["AP falls by 5.00 points, more than 1.0"]
    assert document["ladder"][2]["movement"]["worst_px"] == 0.0


@pytest.mark.parametrize(
    ("int8", "float_", "answer"),
    [((0.495, 10.0), (0.5, 20.0), "yes"), ((0.45, 10.0), (0.5, 20.0), "no"), ((0.5, 20.0), (0.5, 10.0), "no"),
     ((0.49, 10.0), (0.5, 20.0), "cannot tell")],
)  # fmt: skip
@pytest.mark.parametrize("pair", [("onnx-int8", "onnx-fp32"), ("engine-int8", "engine-fp16")])
def test_is_int8_worth_it(result, run, pair, int8, float_, answer):
    paths = [result(role, ap=ap) for role, (ap, _) in zip(pair, (int8, float_), strict=True)]
    paths += [result(role, ms=ms) for role, (_, ms) in zip(pair, (int8, float_), strict=True)]
    found = run(paths)[2]["int8"]
    assert found["rows"] == list(pair)
    assert found["answer"] == answer
    assert found["speedup"]["low"] <= found["speedup"]["value"] <= found["speedup"]["high"]
    assert run(paths[:3])[2]["int8"]["answer"] == "cannot tell"


def test_engines_are_asked_first_whether_int8_is_worth_it(result, run):
    paths = [result(role, ap=0.5) for role in ("onnx-fp32", "onnx-int8", "engine-fp16", "engine-int8")]
    assert run(paths)[2]["int8"]["rows"] == ["engine-int8", "engine-fp16"]
    assert run(paths[:1])[2]["int8"] is None


def test_what_changed_since_an_earlier_report(result, run, tmp_path):
    first = [result("student", ap=0.5), result("student", ms=20.0), result("onnx-int8", ap=0.48)]
    run(first)
    old = tmp_path / "old.json"
    (tmp_path / "out" / "report.json").rename(old)
    second = [result("student", ap=0.5, model__sha256="e" * 64), result("student", ms=10.0, model__sha256="e" * 64)]
    changes = run([*second, result("teacher", ap=0.6)], "--against", old)[2]["changes"]
    assert (changes["added"], changes["gone"], changes["machines"]) == (["Teacher"], ["ONNX INT8"], None)
    (row,) = changes["rows"]
    assert (row["title"], row["same_file"]) == ("Distilled student", False)
    assert row["changes"]["AP"] == {"old": 0.5, "new": 0.5, "sure": False}
    assert row["changes"]["median_ms"] == {"old": 20.0, "new": 10.0, "sure": True}
    assert row["changes"]["energy_mj"] is None
    assert "20.0 → 10.0 (changed)" in (tmp_path / "out" / "report.md").read_text()
    assert "What changed since" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda old: old["verdict"].update(sentence="Roll out."), "was edited"),
        (lambda old: old.update(report_version=1), "report_version is 1; expected 2"),
        (lambda old: old.pop("report_version"), "is not a report"),
    ],
)
def test_an_old_report_that_cannot_be_used(result, run, tmp_path, edit, message):
    path = result("student", ap=0.5)
    document = run([path])[2]
    edit(document)
    (tmp_path / "old.json").write_text(json.dumps(document))
    status, error, _ = run([path], "--against", tmp_path / "old.json")
    assert status == 2
    assert message in error


def test_an_old_report_on_other_data_is_refused(result, run, tmp_path):
    run([result("student", ap=0.5, data__images=4)])
    (tmp_path / "out" / "report.json").rename(tmp_path / "old.json")
    status, error, _ = run([result("student", ap=0.5)], "--against", tmp_path / "old.json")
    assert status == 2
    assert "Rollouts on different data do not compare" in error


def test_the_gallery_needs_the_annotations_and_images_measured_with(data_dir, results, run, tmp_path):
    document = run(results)[2]
    assert not [note for note in document["notes"] if "allery" in note]
    (data_dir / "images" / "sub" / "2.png").unlink()
    notes = "\n".join(run(results)[2]["notes"])
    assert "Gallery images not shown: 1. sub/2.png" in notes
    annotations = data_dir / "annotations" / "instances_test.json"
    annotations.rename(tmp_path / "moved.json")
    assert "No gallery: " in "\n".join(run(results)[2]["notes"])
    assert "No gallery: " not in "\n".join(run(results, "--annotations", tmp_path / "moved.json")[2]["notes"])
    annotations.write_text((tmp_path / "moved.json").read_text() + " ")
    status, error, _ = run(results)
    assert status == 2
    assert "is not the annotation file that the models were measured with" in error


def test_edited_and_missing_detections_are_refused(results, run, tmp_path):
    kept = tmp_path / "onnx-int8.accuracy.detections.json"
    text = kept.read_text()
    kept.write_text(text.replace("0.85", "0.95"))
    status, error, document = run(results)
    assert status == 2
    assert "onnx-int8.accuracy.detections.json was changed" in error
    assert document is None
    kept.unlink()
    assert "is missing" in run(results)[1]
    kept.write_text(text)
    assert run(results)[0] == 0


def test_a_table_shows_what_was_measured_and_says_what_was_not(result, run, tmp_path):
    power = {
        "idle_w": 5.0,
        "load_w": 15.0,
        "energy_mj_per_inference": 123.4,
        "energy_above_idle_mj_per_inference": 80.0,
        "source": "NVML",
    }
    sweep = [{"batch": 4, "streams": 2, "images_per_s": 321.5}]
    memory = {"host_peak": 900.0, "device_peak": 222.0}
    changes = {"numbers__power": power, "numbers__sweep": sweep, "numbers__memory_mib": memory}
    reasons = {"numbers__comparable": False, "numbers__comparable_reasons": ["the clocks are not locked"]}
    paths = [result("engine-int8", ms=5.0, **changes, **reasons), result("onnx-int8", ms=9.0)]
    document = run(paths, "--max-energy-mj", 130)[2]
    estimates = {row["role"]: row["estimates"] for row in document["rows"]}
    assert estimates["engine-int8"]["memory_mib"]["value"] == 222.0  # the device's own, where it has one
    assert estimates["onnx-int8"]["memory_mib"]["value"] == 321.0
    assert estimates["onnx-int8"]["energy_mj"] is None
    assert document["limits"][0]["measured"] == 123.4
    assert "Latency not comparable (TensorRT INT8): the clocks are not locked." in document["notes"]
    text = (tmp_path / "out" / "report.html").read_text()
    for shown in ("321.5", "123.4", "222", "not comparable"):
        assert shown in text
    run([result("onnx-int8", ms=9.0)])
    assert "No device told its power" in (tmp_path / "out" / "report.html").read_text()


def test_what_varies_by_itself_makes_no_other_environment(result, run):
    warm = {"environment__now": {"temperatures_c": {"cpu": 71.0}}, "environment__load_average": [2.0, 1.0, 1.0]}
    document = run([result("student", ap=0.5), result("student", ms=9.0, **warm)])[2]
    assert len(document["environments"]) == 1
    assert "now" not in document["environments"][0]["facts"]


def test_what_distillation_gained_may_not_be_certain(result, run):
    notes = run([result("baseline", ap=0.5), result("student", ap=0.5001)])[2]["notes"]
    assert any(note.startswith("What distillation gained is not certain: 0.0 points") for note in notes)
    assert run([result("baseline", ap=0.5), result("student", ap=0.45)])[2]["rows"][1]["gain_kept"] is None


def test_results_of_anybodys_detections_have_no_latency_to_miss(result, run):
    notes = "\n".join(run([result("student", ap=0.5), result("rival", ap=0.4, model__format="detections")])[2]["notes"])
    assert "Distilled student: latency was not measured." in notes
    assert "rival" not in notes


def test_twenty_results_are_rendered(result, run):
    paths = [result(f"own-{index}", ap=0.3 + index / 50) for index in range(10)]
    paths += [result(f"own-{index}", ms=5.0 + index) for index in range(10)]
    document = run(paths)[2]
    assert [row["role"] for row in document["rows"]] == [f"own-{index}" for index in range(10)]


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
    assert "written over an input" in capsys.readouterr().err
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
