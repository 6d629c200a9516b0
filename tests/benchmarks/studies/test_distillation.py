from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measuring.coco import evaluate
from benchmarks.studies import distillation
from benchmarks.studies.distillation import EXPERIMENTS, complete_run, planned_runs, run_experiment, teacher_run
from benchmarks.studies.jobs import Processes
from deploy.contract import read_sidecar, sidecar_path, write_sidecar
from deploy.errors import ConfigError, MeasurementError
from deploy.files import write_json
from deploy.folder_lock import locked

ROOT = Path(__file__).parents[3]
QUALITY = {"none": 0.16, "mimic": 0.14, "pkd": 0.12, "crosskd": 0.08, "crosskd+pkd": 0.06, "teacher": 0.02}
"""Method -> how far its detections are off, as a share of the box."""


KILLED = """
import os, signal, subprocess, sys
from deploy.folder_lock import locked
from deploy.processes import start
with locked(sys.argv[1]):
    quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    print(start([sys.executable, "-c", "import time; time.sleep(60)"], **quiet).pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


class FakeProcesses:
    """The training side's commands without training: they write what the real ones do."""

    def __init__(self, fails=(), interrupted_at=None):
        self.fails = set(fails)
        """Runs whose training ends with status 1 after its first checkpoint."""
        self.interrupted_at, self.interrupted = interrupted_at, False
        self.words, self.alone, self.stopped = [], [], False
        self._guard = threading.Lock()

    def run(self, words, log, alone=False):
        with self._guard:
            self.words.append(list(words))
            self.alone.append(alone)
            with log.open("a") as file:
                file.write(f"first line of {words[0]}\nlast line of {words[0]}\n")
            return getattr(self, words[0].partition(".")[2])(list(words))

    def stop(self):
        self.stopped = True

    def shapes(self, words):
        draw_data(Path(words[1]))
        return 0

    def train(self, words):
        return self._finish(words, "detector.pth")

    def adopt(self, words):
        return self._finish(words, "detector.pth", trained=False)

    def distill(self, words):
        return self._finish(words, "student.pth")

    def _finish(self, words, weights, trained=True):
        folder = Path(words[words.index("-o") + 1])
        if self.interrupted:
            raise MeasurementError("stopped")
        if folder.name == self.interrupted_at:
            self.interrupted = True
            raise KeyboardInterrupt
        if folder.name in self.fails:
            (folder / "last_checkpoint").write_text("epoch_1.pth")
            return 1
        data = Path(words[words.index("--data") + 1])
        inputs = {"train_annotations": data / "annotations" / "instances_train.json"}
        if "--teacher-checkpoint" in words:
            inputs["teacher_checkpoint"] = words[words.index("--teacher-checkpoint") + 1]
        (folder / weights).write_text(f"weights of {folder.name}")
        details = {"iterations": 10, "epochs": 12} if trained else {}
        write_sidecar(folder / weights, inputs, details={"parameters": 1_000_000, **details})
        sidecar = read_sidecar(folder / weights)
        write_json(sidecar_path(folder / weights), {**sidecar, "command": ["python", "-m", *words]})
        return 0

    def predict(self, words):
        folder = Path(words[1])
        method, _, seed = folder.name.rpartition("-")
        annotations = json.loads(Path(words[words.index("--annotations") + 1]).read_text())
        rng = np.random.default_rng(int(seed) if method else 0)
        noise = QUALITY.get(method, QUALITY["teacher"])
        detections = [
            {
                "image_id": box["image_id"],
                "category_id": box["category_id"],
                "bbox": [*(np.array(box["bbox"][:2]) + rng.normal(0, noise, 2) * box["bbox"][2:]), *box["bbox"][2:]],
                "score": rng.random(),
            }
            for box in annotations["annotations"]
        ]
        Path(words[words.index("-o") + 1]).write_text(json.dumps(detections))
        return 0

    def folders(self, module):
        """Names of the run folders that a command was run for, in order."""
        which = {"crosskd.predict": 1}
        return [
            Path(words[which[module]] if module in which else words[words.index("-o") + 1]).name
            for words in self.words
            if words[0] == module
        ]


def draw_data(folder):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images = [{"id": image, "file_name": f"{image}.jpg", "width": 200, "height": 200} for image in range(12)]
    boxes = [[*rng.uniform(0, 100, 2), *rng.uniform(20, 90, 2)] for _ in range(60)]
    annotations = [
        {"id": n + 1, "image_id": n % 12, "category_id": 1 + n % 2, "bbox": box, "area": box[2] * box[3]}
        for n, box in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "star"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val", "test"):
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench("shapes", fake, "--seeds", "0") runs an experiment and returns its result file, of `bench.out`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(distillation, "RESAMPLES", 50)

    def run(name, processes, *words):
        run_experiment(EXPERIMENTS[name], arguments_of(name, *words), processes)
        return json.loads((run.out / f"{name}.json").read_text())

    def arguments_of(name, *words):
        folders = ["--runs-dir", str(run.runs), "-o", str(run.out), "--jobs", "1"]
        return distillation.DistillationOptions(**vars(distillation._parser().parse_args([name, *folders, *words])))

    run.runs, run.out, run.arguments_of = tmp_path / "runs", tmp_path / "out", arguments_of
    distillation._resampled_ap.cache_clear()
    return run


def test_the_teacher_comes_first_and_a_seed_is_done_before_the_next(bench):
    fake = FakeProcesses()
    bench("shapes", fake)
    modules = [words[0] for words in fake.words]
    assert modules[:3] == ["crosskd.shapes", "crosskd.train", "crosskd.predict"]
    assert modules[3:] == ["crosskd.distill", "crosskd.predict"] * 15
    methods = ("none", "mimic", "pkd", "crosskd", "crosskd+pkd")
    assert fake.folders("crosskd.distill") == [f"{method}-{seed}" for seed in range(3) for method in methods]
    assert fake.alone[:3] == [True] * 3
    assert not any(fake.alone[3:])


def test_the_numbers_are_those_of_the_runs_and_the_differences_those_of_the_same_seed(bench):
    result = bench("shapes", FakeProcesses())
    annotations = json.loads((bench.runs / "shapes_data/annotations/instances_test.json").read_text())
    expected = {}
    for run in result["runs"]:
        detections = json.loads((Path(run["folder"]) / "test.bbox.json").read_text())
        expected[run["method"], run["seed"]] = evaluate(annotations, detections, range(12))
        assert run["numbers"] == expected[run["method"], run["seed"]]
    assert len(expected) == result["runs_planned"] == 15
    assert result["teacher"]["numbers"]["AP"] > expected["crosskd", 0]["AP"]

    row = {row["name"]: row for row in result["methods"]}["crosskd"]
    for metric in ("AP", "AP50", "AP75", "AP_small"):
        values = [expected["crosskd", seed][metric] for seed in range(3)]
        assert row["numbers"][metric]["mean"] == pytest.approx(np.mean(values))
        assert row["numbers"][metric]["std"] == pytest.approx(np.std(values, ddof=1))
    assert row["numbers"]["AP_large"] == {"mean": None, "std": None}  # the set has no large boxes
    by_seed = {str(seed): expected["crosskd", seed]["AP"] - expected["none", seed]["AP"] for seed in range(3)}
    assert row["difference"]["by_seed"] == pytest.approx(by_seed)
    interval = row["difference"]["interval"]
    assert (
        interval["difference"]
        == pytest.approx(row["difference"]["mean"])
        == pytest.approx(np.mean([*by_seed.values()]))
    )
    assert 0 < interval["low"] < interval["difference"] < interval["high"]
    assert result["methods"][0]["difference"] == {"mean": None, "by_seed": {}, "interval": None}


def test_the_table_is_in_percent(bench):
    result = bench("bccd", FakeProcesses(), "--data", str(given_data(bench)), "--seeds", "0", "1")
    lines = (bench.out / "bccd.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| crosskd ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    row = result["methods"][1]
    number, difference = row["numbers"]["AP"], row["difference"]
    assert cells[1] == f"{100 * number['mean']:.1f} ± {100 * number['std']:.1f}"
    seeds = ", ".join(f"{100 * value:+.1f}" for value in difference["by_seed"].values())
    assert cells[7:10] == [
        "none",
        f"{100 * difference['mean']:+.1f} ({seeds})",
        f"{100 * difference['interval']['low']:+.1f} to {100 * difference['interval']['high']:+.1f}",
    ]
    assert cells[6] == ""  # no large boxes
    assert cells[10] == "2"
    header = next(line for line in lines if line.startswith("| method"))
    assert header.count("|") == line.count("|")
    assert any(line.startswith(f"Teacher: AP {100 * result['teacher']['numbers']['AP']:.1f}, AP50") for line in lines)


def given_data(bench):
    draw_data(bench.runs.parent / "data")
    return bench.runs.parent / "data"


def test_what_is_finished_is_not_done_again_and_a_lost_measurement_is_only_measured(bench):
    first = bench("shapes", FakeProcesses(), "--seeds", "0")
    again = FakeProcesses()
    second = bench("shapes", again, "--seeds", "0")
    assert [words[0] for words in again.words] == ["crosskd.shapes"]  # which looks whether its set is there
    assert second["runs"] == first["runs"]
    (bench.runs / "shapes" / "pkd-0" / "test.json").unlink()
    third = FakeProcesses()
    assert bench("shapes", third, "--seeds", "0")["runs"] == first["runs"]
    assert third.folders("crosskd.predict") == ["pkd-0"]
    assert not third.folders("crosskd.distill")


def test_a_teacher_that_is_there_is_taken_as_it_is(bench):
    elsewhere = FakeProcesses()
    folder = bench.runs / "shapes_teacher"
    folder.mkdir(parents=True)
    draw_data(bench.runs / "shapes_data")
    words = ["crosskd.train", "other.py", "--data", str(bench.runs / "shapes_data"), "-o", str(folder)]
    assert elsewhere.train(words) == 0
    fake = FakeProcesses()
    result = bench("shapes", fake, "--seeds", "0", "--only", "none")
    assert not fake.folders("crosskd.train")
    assert result["teacher"]["command"] == ["python", "-m", *words]


def test_a_failed_run_is_told_of_the_others_go_on_and_it_is_resumed(bench, capsys):
    fake = FakeProcesses(fails=["mimic-0"])
    with pytest.raises(MeasurementError, match=r"1 of 5 runs failed: .*mimic-0"):
        bench("shapes", fake, "--seeds", "0")
    error = capsys.readouterr().err
    assert "crosskd.distill ended with status 1" in error
    assert "last line of crosskd.distill" in error
    result = json.loads((bench.out / "shapes.json").read_text())
    assert [run["method"] for run in result["runs"]] == ["none", "pkd", "crosskd", "crosskd+pkd"]
    assert result["methods"][1]["seeds"] == []

    mended = FakeProcesses()
    result = bench("shapes", mended, "--seeds", "0")
    assert [words[-1] for words in mended.words if words[0] == "crosskd.distill"] == ["--resume"]
    assert mended.folders("crosskd.distill") == ["mimic-0"]
    times = {run["method"]: run["train_s"] for run in result["runs"]}
    assert times["mimic"] is None  # half of it was done before
    assert times["none"] is not None


def test_what_was_begun_with_other_flags_starts_anew(bench, capsys):
    with pytest.raises(MeasurementError, match="none-0"):
        bench("shapes", FakeProcesses(fails=["none-0"]), "--seeds", "0", "--only", "none", "--epochs", "2")
    fake = FakeProcesses()
    bench("shapes", fake, "--seeds", "0", "--only", "none", "--epochs", "3")
    (words,) = [words for words in fake.words if words[0] == "crosskd.distill"]
    assert "--resume" not in words
    assert not (bench.runs / "shapes" / "none-0" / "last_checkpoint").exists()
    assert "starts anew" in capsys.readouterr().out


def test_a_teacher_that_fails_ends_it(bench):
    fake = FakeProcesses(fails=["shapes_teacher"])
    with pytest.raises(MeasurementError, match=r"crosskd.train ended with status 1"):
        bench("shapes", fake)
    assert not fake.folders("crosskd.distill")


def test_an_interruption_ends_what_runs_and_keeps_what_is_done(bench):
    fake = FakeProcesses(interrupted_at="pkd-0")
    with pytest.raises(KeyboardInterrupt):
        bench("shapes", fake, "--seeds", "0")
    assert fake.stopped
    result = json.loads((bench.out / "shapes.json").read_text())
    assert [run["method"] for run in result["runs"]] == ["none", "mimic"]
    fake = FakeProcesses()
    assert len(bench("shapes", fake, "--seeds", "0")["runs"]) == 5
    assert fake.folders("crosskd.distill") == ["pkd-0", "crosskd-0", "crosskd+pkd-0"]


def test_finished_runs_of_other_flags_or_files_are_refused(bench):
    bench("shapes", FakeProcesses(), "--seeds", "0", "--only", "none")
    fake = FakeProcesses()
    with pytest.raises(ConfigError, match=r"none-0 was made by .*; expected .*--epochs 3"):
        bench("shapes", fake, "--seeds", "0", "--epochs", "3")
    teacher = bench.runs / "shapes_teacher" / "detector.pth"
    teacher.write_text("another teacher")
    write_sidecar(teacher, {}, details={"iterations": 10, "parameters": 1_000_000, "epochs": 12})
    with pytest.raises(ConfigError, match=r"detector.pth is not what .*none-0 was made from"):
        bench("shapes", fake, "--seeds", "0")
    assert not fake.folders("crosskd.distill")


def test_only_trains_what_it_names_and_the_table_keeps_the_rest(bench):
    bench("shapes", FakeProcesses(), "--seeds", "0", "--only", "none")
    fake = FakeProcesses()
    result = bench("shapes", fake, "--seeds", "0", "--only", "crosskd", "pkd")
    assert fake.folders("crosskd.distill") == ["pkd-0", "crosskd-0"]
    assert [run["method"] for run in result["runs"]] == ["none", "pkd", "crosskd"]


def test_ablations_take_what_the_shapes_have_trained(bench):
    bench("shapes", FakeProcesses(), "--seeds", "0")
    fake = FakeProcesses()
    result = bench("ablations", fake)
    assert fake.folders("crosskd.distill") == [
        "split-0-0", "split-1-0", "split-2-0", "split-4-0", "before-activation-0", "float32-0", "group-norm-none-0",
        "group-norm-crosskd-0",
    ]  # fmt: skip
    assert len(result["runs"]) == 10
    rows = {row["name"]: row for row in result["methods"]}
    assert rows["split-3"]["difference"]["mean"] > 0
    assert rows["group-norm-crosskd"]["baseline"] == "group-norm-none"
    assert rows["split-3"]["numbers"]["AP"]["std"] is None  # of one seed


def test_transfer_compares_where_a_student_starts_and_whether_it_is_distilled(bench):
    fake = FakeProcesses()
    result = bench("transfer-coco", fake, "--data", str(given_data(bench)), "--seeds", "0", "1")
    trained = [words for words in fake.words if words[0] == "crosskd.distill"]
    started = {
        (words[words.index("--from") + 1] if "--from" in words else None, words[words.index("--set") + 1])
        for words in trained
    }
    alone, distilled = "model.distill.method=none", "model.distill.method=crosskd"
    backbone = "../shared/data/weights/shufflenetv2_x0_5.pth"
    assert started == {
        (None, alone), (None, distilled), (backbone, alone), (backbone, distilled), ("teacher", distilled)
    }  # fmt: skip
    assert len(trained) == 10
    rows = {row["name"]: row for row in result["methods"]}
    assert rows["pretrained"]["difference"]["mean"] is not None
    assert {rows[name]["baseline"] for name in ("pretrained", "scratch-crosskd")} == {"scratch"}
    assert rows["pretrained-crosskd"]["baseline"] == "pretrained"
    ap = {name: row["numbers"]["AP"]["mean"] for name, row in rows.items()}
    for one in result["comparisons"]:  # what starts elsewhere, with the same steps
        assert one["baseline"] == "scratch-crosskd"
        assert one["difference"]["mean"] == pytest.approx(ap[one["name"]] - ap["scratch-crosskd"])
    table = (bench.out / "transfer-coco.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("| pretrained-crosskd |")]) == 2
    assert all(run["cpu_s"] is not None for run in result["runs"])


def test_a_teacher_whose_weights_are_there_is_adopted(bench):
    fake = FakeProcesses()
    result = bench("easy", fake, "--seeds", "0")
    assert fake.words[1][:2] == ["crosskd.adopt", "configs/demo/teacher.py"]
    assert result["teacher"]["train_ms_per_step"] is None
    assert "(1.00 M parameters)." in (bench.out / "easy.md").read_text()


def test_each_ablation_differs_in_one_thing_from_the_method(bench):
    data, teacher = Path("data"), Path("teacher/detector.pth")
    runs = planned_runs(EXPERIMENTS["ablations"], bench.arguments_of("ablations"), data, teacher)
    overrides = {run.method: run.words[run.words.index("--set") + 1 : run.words.index("-o")] for run in runs}
    method = "model.distill.method=crosskd"
    assert overrides["split-3"] == (method,)
    for split in (0, 1, 2, 4):
        assert overrides[f"split-{split}"] == (method, f"model.distill.split={split}")
    assert overrides["before-activation"] == (method, "model.distill.tap=before_activation")
    assert overrides["group-norm-crosskd"][1:] == overrides["group-norm-none"][1:]
    assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_planned_run_has_a_config_that_can_be_read(name, bench):
    pytest.importorskip("mmengine")
    from crosskd.config import load_config

    arguments = bench.arguments_of(name, "--seeds", "0")
    teacher = teacher_run(EXPERIMENTS[name], arguments, Path("data"))
    teacher_config = load_config(teacher.words[1])
    for run in planned_runs(EXPERIMENTS[name], arguments, Path("data"), teacher.weights):
        words = run.words[run.words.index("--set") + 1 : run.words.index("-o")]
        config = load_config(run.words[1], {word.partition("=")[0]: word.partition("=")[2] for word in words[:1]})
        assert config.model.distill.method == words[0].partition("=")[2]
        # The same head, so that only the backbone and the schedule are the teacher's advantage.
        assert config.model.teacher.model.bbox_head == teacher_config.model.bbox_head == config.model.student.bbox_head
        assert config.get("input_size") == teacher_config.get("input_size")
        widths = [one.backbone.get("base_channels") for one in (config.model.teacher.model, config.model.student)]
        if None in widths:  # NanoDet
            widths = [one.neck.in_channels[0] for one in (config.model.teacher.model, config.model.student)]
        assert widths[0] > widths[1]
        if name in ("shapes", "bccd", "ablations"):  # whose teacher starts from random numbers, too
            assert teacher_config.train_cfg.max_epochs > config.train_cfg.max_epochs
        assert 0 <= config.model.distill.split <= config.model.student.bbox_head.stacked_convs


def test_a_run_that_another_process_is_at_is_left_alone(bench):
    arguments = bench.arguments_of("shapes", "--seeds", "0")
    draw_data(bench.runs / "data")
    run = teacher_run(EXPERIMENTS["shapes"], arguments, bench.runs / "data")
    run.folder.mkdir()
    fake = FakeProcesses()
    # A study that is killed, and its training, which knows nothing of that and goes on.
    study = subprocess.run([sys.executable, "-c", KILLED, run.folder], capture_output=True, text=True, check=False)
    orphan = int(study.stdout)
    try:
        with pytest.raises(MeasurementError, match=r"was started by .* which has ended, is writing"):
            complete_run(run, bench.runs / "data", fake, jobs=1)
        assert not fake.words
    finally:
        os.kill(orphan, signal.SIGKILL)
    for _ in range(500):
        with contextlib.suppress(MeasurementError), locked(run.folder, MeasurementError):
            break
        time.sleep(0.01)
    complete_run(run, bench.runs / "data", fake, jobs=1)
    assert fake.folders("crosskd.train") == ["shapes_teacher"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bccd", "--only", "pkd"], "--only pkd: no such method in bccd; expected some of ['none', 'crosskd']"),
        (["bccd", "--jobs", "0"], "--jobs is 0; expected at least 1"),
        (["bccd", "--epochs", "0"], "--epochs is 0"),
        (["bccd", "--seeds", "1", "-1"], "--seeds is -1"),
        (["bccd", "--data", "nope"], "no such file or folder: nope"),
    ],
)
def test_wrong_flags_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert distillation.main([*words, "-o", str(tmp_path), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err


def test_it_says_so_outside_the_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distillation.main(["bccd", "-o", "out"]) == 2
    assert "run this command in the folder of the checkout" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_the_real_commands_do_what_is_asked_of_them(bench, monkeypatch):
    """A minute: the tiny detectors of tests/crosskd on a few drawn images, in four processes of the training side."""
    pytest.importorskip("mmengine")
    configs = {"teacher": "gfl_tiny_teacher.py", "crosskd": "crosskd_tiny.py"}
    monkeypatch.setattr(distillation, "config_of", lambda _, what: f"tests/crosskd/configs/{configs[what]}")
    few = ("--images", "24", "--size", "96", "--held-out", "0.25")
    monkeypatch.setattr(distillation, "SHAPES", {"shapes": few})
    processes = Processes(jobs=1)
    result = bench("shapes", processes, "--seeds", "3", "--only", "crosskd")
    (run,) = result["runs"]
    assert (run["method"], run["seed"], run["epochs"]) == ("crosskd", 3, 1)
    assert run["train_s"] > 1
    assert run["train_ms_per_step"] == pytest.approx(1000 * run["train_s"] / run["iterations"], abs=0.1)
    assert 0 <= run["numbers"]["AP"] <= 1
    sidecar = read_sidecar(Path(run["folder"]) / "student.pth")
    assert sidecar["details"]["seed"] == 3
    assert sidecar["inputs"]["teacher_checkpoint"]["sha256"] == result["teacher"]["weights_sha256"]
    assert os.listdir(bench.out)
    monkeypatch.setattr(processes, "run", lambda words, *_, **__: words[0] != "crosskd.shapes")
    assert bench("shapes", processes, "--seeds", "3", "--only", "crosskd")["runs"] == result["runs"]
