"""
Command: our calibration beside ONNX Runtime's, ModelOpt's and NNCF's, on the same models and images: time, memory, AP,
and the latency of the INT8 files.

    python -m benchmarks.studies.tools student.onnx --data DIR --num-images 128 \\
        --modelopt-python .venv-modelopt/bin/python --nncf-python .venv-nncf/bin/python \\
        -o benchmarks/results/calibration/tools

To be run from the folder of the checkout. Each row is a tool, a method and a setting, in processes of its own, all of
which leave the number of threads to ONNX Runtime: one per core. They calibrate on images of the training split, evenly
spread; AP is that of the INT8 file on another split, by `benchmarks.accuracy`: of NNCF's on OpenVINO, which they are
made for, else on ONNX Runtime. What became of the convolutions is as `calibration.audit` says. Latency is that of the
float and the INT8 file in turn, on one thread, on either runtime. A row of plain inference is the yardstick.

Each tool runs twice, with a quarter of the images and with all. What an image costs is the difference of the two runs
divided by that of their images, so that starting up and reading the model do not count. Processor time is given beside
the clock's, since other programs do not lengthen it; but it counts threads that wait in a loop, as ONNX Runtime's do by
default. A row says how many processors others kept busy before it. A tool that fails is a row with its error. The files
are written again after each row, and rows that are finished are kept while what they were made from stays the same: cut
it off at any time, and the same line goes on. Linux only. Needs onnx, onnxruntime, openvino and faster-coco-eval.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.environment import busy_cores, read_environment, reset_peak_memory
from benchmarks.measuring.timing import OTHERS_CORES, REST_S, spread
from benchmarks.reporting.wording import UNKNOWN, decimals, ms, times
from benchmarks.studies.jobs import printed_json
from benchmarks.studies.tables import check_tables, disturbed, points, table, write_tables
from deploy.commands import last_message, shell_line
from deploy.contract import load_contract, package_versions, provenance, sidecar_path, write_sidecar
from deploy.dataset import check_image_files, coco_document, load_coco
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import read_json, sha256_of, write_json
from deploy.int8_format import FloatReason
from deploy.layouts import SPLITS, split_paths
from deploy.processes import end, process_words, start

KIND = "calibration_tools"
PLAIN, OURS, ONNX_RUNTIME, MODELOPT, NNCF = "plain inference", "ours", "ONNX Runtime", "ModelOpt", "NNCF"
CHILD_NAMES = {PLAIN: "plain", ONNX_RUNTIME: "onnxruntime", MODELOPT: "modelopt", NNCF: "nncf"}
"""Tool -> what benchmarks.studies.tools_child calls it."""
PACKAGES = {MODELOPT: ("nvidia-modelopt", "onnxruntime"), NNCF: ("nncf", "openvino")}
"""Tool that has a Python of its own -> its package there, and the module that it runs models with."""
IR_SUFFIX = ".xml"
"""Of OpenVINO's own format, which NNCF writes."""
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""What latency is measured on: name as `open_session` takes it -> title."""
CHILD = Path("benchmarks/studies/tools_child.py")
DEFAULTS, AS_OURS = "defaults", "predictions in float"
"""Settings of the others. In the second, what our placement leaves in float as a final prediction is excluded, with all
that reads what comes of it."""
FEWEST_IMAGES = 8
INT8_STATES = ("INT8", "weight-only", "float")


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to calibrate: a row of the table for each model."""

    tool: str
    method: str
    """As the tool calls it."""
    setting: str
    """Of ours the target, else DEFAULTS or AS_OURS; nothing for PLAIN."""


YARDSTICK = Way(PLAIN, "", "")
PREDICTIONS_FROM = Way(OURS, "max", "tensorrt")
"""Its row says what the final predictions are."""
WAYS = (
    YARDSTICK,
    *(Way(OURS, method, "tensorrt") for method in ("max", "percentile", "entropy", "mse")),
    Way(OURS, "max", "onnxruntime"),
    *(Way(ONNX_RUNTIME, method, setting) for setting in (DEFAULTS, AS_OURS)
      for method in ("MinMax", "Percentile", "Entropy")),
    *(Way(MODELOPT, method, setting) for setting in (DEFAULTS, AS_OURS) for method in ("max", "entropy")),
    *(Way(NNCF, method, setting) for setting in (DEFAULTS, AS_OURS) for method in ("performance", "mixed")),
)  # fmt: skip

WayRow = Dict[str, Any]
"""What the result file says of a way and a model; `error` is None where it is finished."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to calibrate on, as a COCO file of their own, and those to evaluate on."""

    count: int
    annotations: Path
    images_dir: Path
    sha256: str
    """Over the contents of the image files."""
    data_dir: str
    split: str
    """To evaluate on."""


@dataclasses.dataclass(frozen=True)
class ToolsOptions:
    """What is compared, on what."""

    models: Sequence[str]
    """Float ONNX files, with their sidecars."""
    data: str
    """Folder with annotations/instances_{train,val,test}.json and images/."""
    output: str
    """Stem of the files to write: STEM.json and STEM.md."""
    modelopt_python: str
    """Python that has nvidia-modelopt."""
    nncf_python: str
    """Python that has nncf."""
    num_images: int = 128
    """Images to calibrate on."""
    split: str = "test"
    """Split to evaluate on."""

    @property
    def pythons(self) -> Dict[str, str]:
        """Tool that has a Python of its own -> that Python."""
        return {MODELOPT: self.modelopt_python, NNCF: self.nncf_python}


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures what is not yet measured, writes the result files after each row, and prints the rows."""
    options = ToolsOptions(**vars(_parser().parse_args(argv)))
    check_tables(options.output)
    _check_options(options)
    environment = read_environment()  # before anything is measured: the load is that which others cause
    versions = tool_versions(options.pythons)
    finished = _finished_rows(Path(f"{options.output}.json"), options.models)
    with tempfile.TemporaryDirectory() as folder:
        few, every = calibration_images(options, Path(folder))
        planned = [(model, way) for model in options.models for way in WAYS]
        rows: Dict[Tuple[str, Way], WayRow] = {}

        def begun(model: str, way: Way) -> WayRow:
            source = rows.get((model, PREDICTIONS_FROM), {}) if way.setting == AS_OURS else {}
            return begin_row(way, model, every, versions, environment, source.get("final_predictions"))

        def keep_finished() -> None:
            for key in planned:
                row = begun(*key)
                rows.update((key, one) for one in finished if key not in rows and row.items() <= one.items())

        keep_finished()
        print(f"{len(rows)} of {len(planned)} rows are done", flush=True)
        for key in planned:
            if key not in rows:
                row = begun(*key)
                rows[key] = {**row, **measure(row, key[1], few, every, options.pythons)}
                if key[1] == PREDICTIONS_FROM:
                    keep_finished()  # those of AS_OURS, too, where the final predictions are still the same
                write_results([rows[one] for one in planned if one in rows], options, environment)
                print(_line(rows[key]), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.tools",
        description="Compare our calibration with ONNX Runtime's, ModelOpt's and NNCF's: time, memory, AP, latency.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL.onnx", help="float ONNX file, with its sidecar")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with annotations/instances_{train,val,test}.json, images/"
    )
    parser.add_argument(
        "--num-images", type=int, default=128, metavar="N", help="images to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS[1:], default="test", help="split to evaluate on (default: test)")
    parser.add_argument(
        "--modelopt-python", metavar="PATH", default=".venv-modelopt/bin/python",
        help="Python that has nvidia-modelopt[onnx] and opencv-python-headless (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--nncf-python", metavar="PATH", default=".venv-nncf/bin/python",
        help="Python that has nncf, onnx, onnxruntime and opencv-python-headless (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="STEM", default="benchmarks/results/calibration/tools",
                        help="of the files to write, STEM.json and STEM.md (default: %(default)s)")  # fmt: skip
    return parser


def _check_options(options: ToolsOptions) -> None:
    if options.num_images < FEWEST_IMAGES:
        raise ConfigError(f"--num-images is {options.num_images}; expected at least {FEWEST_IMAGES}")
    if len(set(options.models)) < len(options.models):
        raise ConfigError(f"the models are {' '.join(options.models)}; expected each of them once")
    for model in options.models:
        load_contract(model)
    if not CHILD.is_file():  # which another Python has to find
        raise ConfigError(f"there is no {CHILD} here; run this command in the folder of the checkout")


def tool_versions(pythons: Mapping[str, str]) -> Dict[str, Optional[str]]:
    """
    Tool -> its version, None where it is not installed. Ours is that of its source.

    Args:
        pythons: of the tools that have one of their own.
    """
    source = importlib.util.find_spec("calibration")
    assert source is not None
    assert source.submodule_search_locations is not None
    files = sorted(Path(source.submodule_search_locations[0]).glob("*.py"))
    ours = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:12]
    packages = package_versions()
    runtime = packages.get("onnxruntime") or packages.get("onnxruntime-gpu")
    return {
        PLAIN: runtime,
        OURS: f"{ours} on ONNX Runtime {runtime}",
        ONNX_RUNTIME: runtime,
        **{tool: _version_in(python, *PACKAGES[tool]) for tool, python in pythons.items()},
    }


def _version_in(python: str, package: str, runtime: str) -> Optional[str]:
    question = (
        f"import importlib.metadata, {runtime}; "
        f"print(importlib.metadata.version('{package}'), 'on {RUNTIMES[runtime]}', {runtime}.__version__.split('-')[0])"
    )
    try:
        done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _finished_rows(path: Path, models: Sequence[str]) -> List[WayRow]:
    if not path.is_file():
        return []
    document = read_json(path, MeasurementError, "what an earlier run left; delete it to start anew")
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ConfigError(f"{path} is there, and is not of this command; choose another --output")
    others = sorted({row["model"] for row in document["rows"]} - set(models))
    if others:
        raise ConfigError(
            f"{path} has rows of {', '.join(others)}, which would be lost; name these models, too, or choose another "
            "--output"
        )
    return [row for row in document["rows"] if row["error"] is None and "latency" in row]


def calibration_images(options: ToolsOptions, folder: Path) -> Tuple[Images, Images]:
    """
    A quarter of the images to calibrate on, and all of them, as COCO files in `folder`.

    Raises:
        ConfigError: the training split has fewer.
        DataError: the data is missing or not COCO, or an image is missing or truncated.
    """
    annotations, images_dir = split_paths(options.data, "train")
    split_paths(options.data, options.split)
    coco = load_coco(annotations, images_dir, check_files=False)
    chosen = spread(coco.images, options.num_images)
    if len(chosen) < options.num_images:
        raise ConfigError(
            f"--num-images is {options.num_images}; expected at most {len(chosen)}, as many as {annotations} has"
        )
    check_image_files(chosen)

    def written(count: int) -> Images:
        images = spread(chosen, count)
        path = folder / f"{count}.json"
        write_json(path, coco_document(dataclasses.replace(coco, images=images), as_annotated=True))
        digest = hashlib.sha256("".join(sha256_of(image.path) for image in images).encode()).hexdigest()
        return Images(len(images), path, images_dir, digest, options.data, options.split)

    return written(len(chosen) // 4), written(len(chosen))


def begin_row(
    way: Way,
    model: str,
    images: Images,
    versions: Mapping[str, Optional[str]],
    environment: Mapping[str, Any],
    float_from: Optional[Sequence[str]],
) -> WayRow:
    """
    What a row says before anything is measured, with all that its numbers depend on; a finished row has the same.

    Args:
        float_from: the final predictions, for AS_OURS, where they are known.
    """
    return {
        "model": model,
        **dataclasses.asdict(way),
        "version": versions[way.tool],
        "inputs": {
            "model_sha256": sha256_of(model),
            "images": images.count,
            "images_sha256": images.sha256,
            "evaluation_sha256": sha256_of(split_paths(images.data_dir, images.split)[0]),
            "float_from": float_from,
        },
        "cpu": environment["cpu"],
        "cores_usable": environment["cores_usable"],
    }


def measure(row: WayRow, way: Way, few: Images, every: Images, pythons: Mapping[str, str]) -> WayRow:
    """
    What is to be added to a row that was begun; where a step fails, its `error`, and None for what was to follow.

    The keys: `others_cores`, processors that other programs kept busy before it; `runs`, with few images and with all;
    `seconds_per_image`, `cpu_seconds_per_image` and `mib_per_image`, from the difference of the runs; `seconds` and
    `peak_mib`, of the run with all; `AP`, `AP50`; `latency`, on each of RUNTIMES, as the child tells it, or its
    `error`; `convolutions`, their number by state; `final_predictions`, the names of those in float.
    """
    found: WayRow = {
        "others_cores": None,
        **dict.fromkeys(("runs", "seconds_per_image", "cpu_seconds_per_image", "mib_per_image", "seconds", "peak_mib")),
        **dict.fromkeys(("AP", "AP50", "latency", "convolutions", "final_predictions")),
        "error": None,
    }
    try:
        if row["version"] is None:
            raise MeasurementError("not installed")
        if way.setting == AS_OURS and not row["inputs"]["float_from"]:
            raise MeasurementError(
                f"what to exclude is not known without the row of {PREDICTIONS_FROM.tool}, {PREDICTIONS_FROM.method}"
            )
        found["others_cores"] = busy_cores(REST_S)
        with tempfile.TemporaryDirectory() as folder:
            # A copy, since ModelOpt writes beside the model.
            int8 = f"int8{IR_SUFFIX if way.tool == NNCF else '.onnx'}"
            model, output, log = (Path(folder) / name for name in ("model.onnx", int8, "log.txt"))
            shutil.copyfile(row["model"], model)
            shutil.copyfile(sidecar_path(row["model"]), sidecar_path(model))
            runs = []
            for images in (few, every):
                words = words_of(way, model, images, row["inputs"]["float_from"] or [], output, pythons)
                runs.append({"images": images.count, **run_child(words, log)})
            found.update(numbers_from_runs(runs))
            if way.tool == PLAIN:
                output = model
            elif not output.is_file():
                raise MeasurementError("it ended well and wrote no file")
            elif way.tool != OURS:  # ours writes its sidecar itself
                write_sidecar(output, {"model": row["model"]}, load_contract(model), dataclasses.asdict(way))
            found.update(_accuracy(output, every, log))
            found["latency"] = _latency(model, output, every, log)
            if way.tool not in (PLAIN, NNCF):
                found.update(_audit(output))
    except MeasurementError as error:
        found["error"] = str(error)
    return found


def words_of(
    way: Way, model: Path, images: Images, float_from: Sequence[str], output: Path, pythons: Mapping[str, str]
) -> List[str]:
    """The command of one run."""
    words = [str(model), "--annotations", str(images.annotations), "--images-dir", str(images.images_dir)]
    words += ["-o", str(output)] if way.tool != PLAIN else []
    if way.tool == OURS:
        evaluation, evaluation_images_dir = split_paths(images.data_dir, images.split)
        words += ["--num-images", str(images.count), "--target", way.setting, "--method", way.method]
        words += ["--evaluation-annotations", str(evaluation), "--evaluation-images-dir", str(evaluation_images_dir)]
        return process_words("calibration.quantize", *words)
    words += ["--method", way.method] if way.method else []
    words += ["--float-from", *float_from] if float_from else []
    python = pythons.get(way.tool, sys.executable)
    return [python, "-m", "benchmarks.studies.tools_child", CHILD_NAMES[way.tool], *words]


def run_child(words: Sequence[str], log: Path) -> Dict[str, float]:
    """
    `seconds` by the clock, `cpu_seconds`, and `peak_mib`, the highest resident memory, of one process.

    For the kernel the peak of a process is no lower than that of the one that started it (Linux fs/exec.c, exec_mmap).
    So this one forgets its own before, and imports no runtime.

    Raises:
        MeasurementError: the process failed, with the last line of its output.
    """
    reset_peak_memory()
    with log.open("wb") as output:
        began = time.perf_counter()
        process = start(words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        with contextlib.suppress(OSError):  # if memory runs out, it is to be ended, not somebody else (man 5 proc)
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C
            end([process])
            raise
        seconds = time.perf_counter() - began
    process.returncode = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    if process.returncode == -signal.SIGKILL:
        raise MeasurementError("killed (signal 9); memory may have run out")
    if process.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise MeasurementError(last_message(text, process.returncode) or f"ended with status {process.returncode}")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),  # Linux counts KiB
    }


def numbers_from_runs(runs: Sequence[Mapping[str, float]]) -> WayRow:
    """What an image costs, from the difference of the runs with few and with all images; and what the last one took."""
    few, every = runs
    images = every["images"] - few["images"]

    def per_image(key: str) -> float:
        return round((every[key] - few[key]) / images, 5)

    return {
        "runs": list(runs),
        "seconds_per_image": per_image("seconds"),
        "cpu_seconds_per_image": per_image("cpu_seconds"),
        "mib_per_image": per_image("peak_mib"),
        "seconds": every["seconds"],
        "peak_mib": every["peak_mib"],
    }


def _accuracy(model: Path, images: Images, log: Path) -> WayRow:
    result = model.with_suffix(".accuracy.result.json")
    words = ["--data", images.data_dir, "--split", images.split, "-o", str(result)]
    if model.suffix == IR_SUFFIX:
        annotations, images_dir = split_paths(images.data_dir, images.split)
        detected = model.with_suffix(".detected.json")
        child = ["detect", str(model), "--annotations", str(annotations), "--images-dir", str(images_dir)]
        run_child(process_words("benchmarks.studies.tools_child", *child, "-o", str(detected)), log)
        model, words = detected, [*words, "--role", "student"]
    run_child(process_words("benchmarks.accuracy", str(model), *words), log)
    numbers = read_json(result, MeasurementError, "a result of benchmarks.accuracy")["numbers"]
    return {"AP": numbers["AP"], "AP50": numbers["AP50"]}


def _latency(model: Path, int8: Path, images: Images, log: Path) -> WayRow:
    """Of the float file and the INT8 file, which may be the same; in a process of its own, since it needs a runtime."""
    found: WayRow = {}
    for runtime in ["openvino"] if int8.suffix == IR_SUFFIX else RUNTIMES:
        output = model.with_name(f"{runtime}.latency.json")
        words = ["latency", str(model), "--int8", str(int8), "--runtime", runtime, "-o", str(output)]
        words += ["--annotations", str(images.annotations), "--images-dir", str(images.images_dir)]
        try:
            run_child(process_words("benchmarks.studies.tools_child", *words), log)
            found[runtime] = read_json(output, MeasurementError, "a latency")
        except MeasurementError as error:
            found[runtime] = {"error": str(error)}
    return found


def _audit(model: Path) -> WayRow:
    convolutions = printed_json(["calibration.audit", str(model), "--json"])["products"]
    counts = collections.Counter(one["state"] for one in convolutions)
    return {
        "convolutions": {state: counts[state] for state in INT8_STATES},
        "final_predictions": [one["name"] for one in convolutions if one["code"] == FloatReason.FINAL_PREDICTION.code],
    }


def write_results(rows: Sequence[WayRow], options: ToolsOptions, environment: Mapping[str, Any]) -> None:
    """Writes the result file, with every row's numbers, and the tables."""
    annotations = {split: split_paths(options.data, split)[0] for split in ("train", options.split)}
    document = {
        **provenance({**dict(zip(options.models, options.models)), **annotations}),
        "kind": KIND,
        "environment": environment,
        "split": options.split,
        "rows_planned": len(options.models) * len(WAYS),
        "rows": list(rows),
    }
    write_tables(options.output, document, markdown_of(document))


COLUMNS = (
    "tool", "method, setting", "s per image (of plain)", "CPU s per image (of plain)", "MiB per image", "peak MiB",
    "s in all", "AP", *(f"ms on {title} (times faster)" for title in RUNTIMES.values()), "INT8 / weight-only / float",
)  # fmt: skip


def markdown_of(document: Mapping[str, Any]) -> str:
    """The table of a result file, for each model."""
    rows, environment = document["rows"], document["environment"]
    versions = {row["tool"]: row["version"] for row in rows if row["tool"] != PLAIN}
    lines = [
        "# Tools for calibration",
        "",
        f"{len(rows)} of {document['rows_planned']} rows, made by `{shell_line(document['command'])}` on "
        f"{environment['cpu']}, {environment['cores_usable']} cores. "
        + "; ".join(f"{tool}: {version or 'not installed'}" for tool, version in versions.items())
        + ".",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        lines += [
            "",
            f"## {model}",
            "",
            f"{of_model[0]['inputs']['images']} images; AP of the {document['split']} split in points.",
            "",
            *table(COLUMNS, [_cells(row, of_model) for row in of_model]),
        ]
        failed = [f"- {_name(row)}: failed: {row['error']}" for row in of_model if row["error"] is not None]
        failed += [
            f"- {_name(row)}: no latency on {title}: {error}"
            for row in of_model
            for runtime, title in RUNTIMES.items()
            for error in [((row["latency"] or {}).get(runtime) or {}).get("error")]
            if error
        ]
        lines += ["", *failed] if failed else []
    lines += [
        "",
        "What an image costs is the difference of two runs, with a quarter of the images and with all, divided by that "
        "of their images; where the runs take but seconds, it is mostly noise. Seconds in all and peak memory are of "
        "the run with all, start-up and imports included. CPU seconds are those of all threads, also of those that "
        "wait for work in a loop: ONNX Runtime's by default, which ours lets sleep. Disturbed: other programs kept "
        f"more than {OTHERS_CORES} processors busy before the row. Milliseconds are processor time of an inference on "
        "one thread, median; the float and the INT8 file take turns, and how many times faster it is than the float "
        "one on the same runtime is of the same run. AP of NNCF's files is on OpenVINO, of all others on ONNX Runtime. "
        "The last column counts convolutions. ONNX Runtime, "
        "ModelOpt and NNCF run with their defaults (ModelOpt on the processor, leaving in FP32 what is not INT8); with "
        "predictions in float, the final predictions that ours leaves in float are excluded, and all that reads what "
        "comes of them.",
        "",
    ]
    return "\n".join(lines)


def _cells(row: WayRow, rows: Sequence[WayRow]) -> List[str]:
    plain = next((one for one in rows if one["tool"] == PLAIN), None)
    counts = row["convolutions"]
    cells = [row["tool"], ", ".join(filter(None, (row["method"], row["setting"])))]
    for key in ("seconds_per_image", "cpu_seconds_per_image"):
        ratio = _ratio(row, plain, key)
        cells.append(decimals(row[key], 4) + (f" ({times(ratio)})" if ratio is not None else ""))
    cells[2] += disturbed(row.get("others_cores"))
    return [
        *cells,
        decimals(row["mib_per_image"], 1),
        decimals(row["peak_mib"], 0),
        decimals(row["seconds"], 1),
        points(row["AP"]),
        *(_latency_cell(row, runtime) for runtime in RUNTIMES),
        UNKNOWN if counts is None else " / ".join(str(counts[state]) for state in INT8_STATES),
    ]


def _latency_cell(row: WayRow, runtime: str) -> str:
    one = (row["latency"] or {}).get(runtime) or {}
    if "int8_ms" not in one:
        return UNKNOWN
    return ms(one["int8_ms"]) + ("" if row["tool"] == PLAIN else f" ({times(one['times']['median'])})")


def _ratio(row: WayRow, plain: Optional[WayRow], key: str) -> Optional[float]:
    """What a row has times that of plain inference; None where either is not known or lost in noise."""
    value, yardstick = row[key], None if plain is None else plain[key]
    return None if value is None or yardstick is None or min(value, yardstick) <= 0 else value / yardstick


def _name(row: WayRow) -> str:
    return " ".join(filter(None, (row["tool"], row["method"], row["setting"])))


def _line(row: WayRow) -> str:
    if row["error"] is not None:
        return f"{row['model']} {_name(row)}: {row['error']}"
    return (
        f"{row['model']} {_name(row)}: {row['seconds_per_image']:.4f} s per image, {row['seconds']:.1f} s in all, "
        f"peak {row['peak_mib']:.0f} MiB, AP {points(row['AP'])}"
    )


if __name__ == "__main__":
    sys.exit(main())
