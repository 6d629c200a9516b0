"""One report for many boards: which results are of boards, each board's verdict, and which board decides."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from benchmarks.measuring.detections import detections_path
from benchmarks.reporting.fleet import results_by_board, slack

POWER = {
    "idle_w": 5.0, "load_w": 15.0, "energy_mj_per_inference": 123.4, "energy_above_idle_mj_per_inference": 80.0,
    "source": "tegrastats",
}  # fmt: skip


@pytest.fixture
def on_board(result, tmp_path):
    """on_board("orin-1", "engine-int8", ap=0.5): a result file as the fleet leaves it, of that board."""

    def make(board, role, **facts):
        path = result(role, **{"environment__machine": f"{board} kit", "environment__board": board, **facts})
        folder = tmp_path / "fleet" / board
        folder.mkdir(parents=True, exist_ok=True)
        pace = "paced" if facts.get("numbers__mode") == "paced" else path.name.split(".")[-3]
        to = folder / f"{role}.{pace}.result.json"
        if detections_path(path).exists():
            detections_path(path).replace(folder / detections_path(path).name)
        path.replace(to)
        return to

    return make


@pytest.fixture
def fleet(data_dir, on_board):
    """Three boards that measured teacher and student alike, one of them slowly, and one with a meter."""
    paths = []
    for board, ms in (("orin-1", 10.0), ("orin-2", 11.0), ("pi-5", 38.0)):
        power = {"numbers__power": POWER} if board == "orin-1" else {}
        paths += [on_board(board, "teacher-onnx-fp32", ap=0.52), on_board(board, "teacher-onnx-fp32", ms=4 * ms)]
        paths += [on_board(board, "onnx-int8", ap=0.50), on_board(board, "onnx-int8", ms=ms, **power)]
        pace = {"numbers__mode": "paced", "numbers__fps": 30.0, "numbers__late_frames": 3}
        paths.append(on_board(board, "onnx-int8", ms=1.1 * ms, **pace))
    return paths


def test_every_board_has_a_verdict_and_the_fleet_rolls_out_where_all_do(fleet, run_report, tmp_path):
    limits = ("--max-ap-drop", 3, "--max-p99-ms", 40, "--min-speedup", 3)
    status, _, document = run_report(fleet, *limits)
    assert status == 0
    boards = {board["board"]: board for board in document["boards"]}
    assert [board["verdict"]["outcome"] for board in boards.values()] == ["pass"] * 3
    assert boards["pi-5"]["machine"] == "pi-5 kit"
    assert boards["pi-5"]["ship"] == "onnx-int8"
    row = boards["pi-5"]["rows"][-1]
    assert (row["speedup"], row["AP_gain"]) == (pytest.approx(4.0), pytest.approx(-0.02))
    assert row["paced"] == {"fps": 30.0, "p99_ms": pytest.approx(42.2, abs=0.1), "late": 3, "runs": 101}
    assert document["verdict"]["decides"] == "pi-5"
    assert document["verdict"]["sentence"].startswith(
        "Roll out to 3 boards: all limits hold on each. Nearest to a limit is pi-5: p99 latency is 38."
    )
    text = (tmp_path / "out" / "report.html").read_text()
    for shown in ("pi-5 kit", "123.4", "30 frames/s, 3 of 101 late", "against Teacher, ONNX FP32", "✓ roll out"):
        assert shown in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| pi-5 (nearest to a limit) | Roll out |" in markdown
    assert markdown.count("| ONNX INT8 (ships) |") == 3


def test_one_board_that_breaks_a_limit_decides(fleet, run_report, tmp_path):
    status, _, document = run_report(fleet, "--max-p99-ms", 30, "--junit", tmp_path / "gate.xml")
    assert status == 1
    assert [board["verdict"]["outcome"] for board in document["boards"]] == ["pass", "pass", "fail"]
    assert document["verdict"]["sentence"].startswith(
        "Do not roll out: 1 of 3 boards breaks a limit. It is decided by pi-5: p99 latency is 38."
    )
    suites = ElementTree.parse(tmp_path / "gate.xml").findall("testsuite")
    assert [suite.get("name") for suite in suites][-1] == "limits on onnx-int8 on pi-5"
    assert [suite.get("failures") for suite in suites] == ["0", "0", "1"]


def test_what_one_board_cannot_measure_is_not_told_of_it_and_no_error(fleet, run_report):
    status, _, document = run_report(fleet, "--max-energy-mj", 200)
    assert status == 1
    assert [board["verdict"]["outcome"] for board in document["boards"]] == ["pass", "cannot tell", "cannot tell"]
    assert "on a device that tells its power, which was not measured" in document["verdict"]["sentence"]


def test_a_board_that_failed_is_on_the_page_with_its_reason(fleet, run_report, tmp_path):
    outcomes = [{"board": "orin-1", "precision": "int8", "state": "ok", "reason": None}]
    outcomes += [{"board": "nano", "precision": "int8", "state": "failed", "reason": "build: no space left"}]
    (tmp_path / "fleet" / "fleet.json").write_text(json.dumps({"outcomes": outcomes}))
    for path in fleet:
        if path.parent.name != "orin-1":
            path.unlink()
    status, _, document = run_report([tmp_path / "fleet"], "--max-p99-ms", 40)
    assert status == 1
    boards = {board["board"]: board["verdict"] for board in document["boards"]}
    assert boards["nano"]["sentence"] == "int8: build: no space left"
    assert boards["orin-1"]["roll_out"] is True
    assert document["verdict"]["decides"] == "nano"
    assert "build: no space left" in (tmp_path / "out" / "report.html").read_text()


def test_one_boards_results_are_an_ordinary_report_that_names_the_others(fleet, run_report, tmp_path):
    of_one = [path for path in fleet if path.parent.name == "pi-5"]
    outcomes = [{"board": board, "precision": "int8", "state": "ok", "reason": None} for board in ("pi-5", "orin-1")]
    (tmp_path / "fleet" / "fleet.json").write_text(json.dumps({"outcomes": outcomes}))
    document = run_report(of_one)[2]
    assert "boards" not in document
    assert "Its fleet has others, which it does not judge: orin-1." in document["notes"][-1]


def test_boards_are_told_by_their_folders_where_results_do_not_name_them(data_dir, on_board, run_report):
    paths = [on_board(board, "onnx-int8", ap=0.5, environment__board=None) for board in "ab"]
    assert [board["board"] for board in run_report(paths)[2]["boards"]] == ["a", "b"]


def test_the_teachers_accuracy_from_elsewhere_is_taken_for_all_boards(data_dir, on_board, run_report):
    paths = [on_board("a", "onnx-int8", ap=0.50), on_board("b", "onnx-int8", ap=0.45)]
    paths += [on_board("here", "teacher", **{facts: 0.52 if facts == "ap" else 90.0}) for facts in ("ap", "ms")]
    document = run_report(paths, "--max-ap-drop", 3)[2]
    assert [board["board"] for board in document["boards"]] == ["a", "b"]
    assert [board["verdict"]["outcome"] for board in document["boards"]] == ["pass", "fail"]
    assert [row["role"] for row in document["boards"][0]["rows"]] == ["teacher", "onnx-int8"]
    assert document["boards"][0]["rows"][0]["latency_ms"] is None  # which says nothing of a board


def test_another_file_than_on_the_other_boards_is_not_told(on_board, run_report):
    paths = [on_board(board, "onnx-int8", ms=9.0) for board in "abc"]
    paths.append(on_board("d", "onnx-int8", ms=9.0, model__sha256="f" * 64))
    document = run_report(paths, "--max-p99-ms", 40)[2]
    assert [board["verdict"]["outcome"] for board in document["boards"]] == ["pass", "pass", "pass", "cannot tell"]
    assert "its onnx-int8 is another file than that of the other boards" in document["verdict"]["sentence"]


def test_roles_on_one_machine_in_folders_of_their_own_are_no_boards(on_board, run_report):
    paths = [
        on_board("one", "teacher", ms=90.0),
        on_board("two", "student", ms=9.0),
        on_board("two", "student", ap=0.4),
    ]
    assert "boards" not in run_report(paths)[2]


def test_boards_of_different_data_and_comparisons_with_another_rollout_are_refused(on_board, run_report, tmp_path):
    paths = [on_board("a", "onnx-int8", ap=0.5), on_board("b", "onnx-int8", ap=0.5, data__images=4)]
    status, error, document = run_report(paths)
    assert (status, document) == (2, None)
    assert "differ in data.images" in error
    paths = [on_board(board, "onnx-int8", ap=0.5) for board in "ab"]
    status, error, _ = run_report(paths, "--ship", "engine-int8")
    assert (status, "--ship is 'engine-int8', but no board has results of it" in error) == (2, True)


def test_a_board_that_lacks_the_role_that_ships_cannot_be_told(on_board, run_report):
    paths = [on_board("a", "onnx-int8", ms=9.0), on_board("b", "onnx-int8", ms=9.0), on_board("a", "onnx-fp32", ms=9.0)]
    document = run_report(paths, "--ship", "onnx-fp32", "--max-p99-ms", 40)[2]
    assert [board["verdict"]["outcome"] for board in document["boards"]] == ["pass", "cannot tell"]
    assert "onnx-fp32 was not measured" in document["verdict"]["sentence"]


def test_without_limits_a_fleet_has_no_verdict(fleet, run_report):
    status, _, document = run_report(fleet)
    assert (status, document["verdict"]["roll_out"]) == (0, None)


@pytest.mark.parametrize(("bound", "allowed", "expected"), [("at most", 20.0, 0.25), ("at least", 8.0, 0.5)])
def test_how_far_within_a_limit_a_board_is(bound, allowed, expected):
    limit = {"measured": 13.0, "low": 12.0, "high": 15.0, "allowed": allowed, "bound": bound, "why": None}
    assert slack(limit) == pytest.approx(expected)


def test_a_fleets_folder_stands_for_its_results(fleet, run_report, tmp_path):
    assert run_report([tmp_path / "fleet"])[2]["boards"] == run_report(sorted(fleet))[2]["boards"]
    (tmp_path / "empty").mkdir()
    status, error, _ = run_report([tmp_path / "empty"])
    assert (status, error.count("\n")) == (2, 1)
    assert "empty has no */*.result.json; expected a folder that benchmarks.fleet wrote" in error


def test_results_given_as_the_teachers_count_as_its_forms(data_dir, on_board, run_report, tmp_path):
    ours = [on_board(board, "onnx-int8", ms=9.0) for board in "ab"]
    ours += [on_board(board, "onnx-int8", ap=0.5) for board in "ab"]
    for board in "ab":
        for path in (on_board(board, "onnx-fp32", ms=36.0), on_board(board, "onnx-fp32", ap=0.52)):
            to = tmp_path / "teacher" / board / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            path.replace(to)
            if detections_path(path).exists():
                detections_path(path).replace(detections_path(to))
    document = run_report(ours, "--teacher", tmp_path / "teacher", "--min-speedup", 2, "--max-ap-drop", 3)[2]
    assert document["verdict"]["outcome"] == "pass"
    assert [row["role"] for row in document["boards"][0]["rows"]] == ["teacher-onnx-fp32", "onnx-int8"]
    assert document["boards"][1]["rows"][1]["speedup"] == pytest.approx(4.0)
    status, error, _ = run_report(ours, "--teacher", on_board("c", "rival", ms=9.0))
    assert (status, "--teacher has a result of role 'rival'" in error) == (2, True)


def test_results_of_no_board():
    assert results_by_board([], {}) is None
