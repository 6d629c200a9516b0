"""
What `benchmarks.fleet` does with one board: the steps, one after the other, and what came of them.

Nothing that a board sends is believed: its documents are checked, and compared with the model and the images that they
have to be of.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, List, Optional, Sequence, TypeVar

from benchmarks.boards.board_result import CLOCK_JUMP_S
from benchmarks.boards.list import Board, build_options
from benchmarks.boards.received import (
    COMPARED,
    Predictions,
    header_from_line,
    input_differences,
    is_current,
    preparation_of,
    read_predictions,
    write_accuracy,
)
from benchmarks.boards.sending import IMAGES_FOLDER, TestImages, inputs_here
from benchmarks.boards.ssh import BoardError, CommandError, Remote, connected
from benchmarks.measuring.detections import detections_path
from benchmarks.measuring.result import check_written_result, read_result
from deploy.board.commands import Bundle
from deploy.board.run import MANIFEST
from deploy.errors import MeasurementError, PipelineError, one_line
from deploy.files import replacing
from deploy.tensorrt.options import BuildOptions

MOST_JSON = 16 << 20
"""Bytes of a JSON file from a board; an ordinary result has some 20 KiB."""
MOST_HEADER = 1 << 20
"""Bytes of the first line of a file of detections."""
MOST_FETCHED = 1 << 30
"""Bytes of a file of detections, or of prepared images."""
CLOCK_OFF_S = 60.0
"""By which a board's clock of the day may be off before it is said: the dates in its results are wrong by as much."""
EARLIER = ".earlier"
"""Folder for the results of an earlier run, from which those that still hold are taken back."""

T = TypeVar("T")


@dataclasses.dataclass
class Outcome:
    """What came of one precision on one board; None where it did not get so far."""

    board: str
    host: str
    precision: str
    state: str = "failed"
    """"ok" or "failed"."""
    steps: Dict[str, str] = dataclasses.field(default_factory=dict)
    """Step -> "done", "done before" or "failed"."""
    reason: Optional[str] = None
    """Why it failed."""
    notes: List[str] = dataclasses.field(default_factory=list)
    """What is to be known of its results."""
    device: Optional[str] = None
    runtime: Optional[str] = None
    """What ran the model there, with its version."""
    AP: Optional[float] = None
    """A fraction."""
    median_ms: Optional[float] = None
    p99_ms: Optional[float] = None
    energy_mj: Optional[float] = None
    """Per inference."""
    stable: Optional[bool] = None
    results: List[str] = dataclasses.field(default_factory=list)
    """The result files, in the output folder."""
    verdict: Optional[str] = None
    """The label of its report's verdict; None where none was asked for."""
    roll_out: Optional[bool] = None
    """What it says; None where none was asked for."""
    current: bool = False
    """Whether it was made the board's current model."""

    @property
    def is_well(self) -> bool:
        """Whether all was done that was asked for, and where a verdict was, there is one, whatever it says."""
        return self.state == "ok" and (self.roll_out is None or self.verdict is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is done with every board, and where its results go."""

    bundle: Bundle
    """Unpacked here, and compared with its manifest."""
    name: str
    """Of its folder on the boards: that of the bundle, and its hash."""
    output: Path
    runs: int
    images: Optional[TestImages] = None
    """What boards detect in; None: the network alone is measured."""
    fps: Optional[float] = None
    """At which it is also measured, as a camera gives images."""

    def model_file(self, board: Board, precision: str) -> str:
        """What runs on the board, in the bundle's folder: the engine that is built there, or an ONNX file."""
        if board.runtime == "tensorrt":
            return f"{self.bundle.folder.name}.{precision}.engine"
        return str(self.bundle.source(precision, board.runtime)["file"])


async def visit(board: Board, job: Job, outcomes: Sequence[Outcome]) -> None:
    """Notes in `outcomes`, one for each precision, what came of it. Does not raise for what a board does."""
    folder = job.output / board.name
    _put_aside(folder)
    try:
        async with connected(board) as remote, remote.held((2 + 6 * len(outcomes)) * board.timeout_s):
            if abs(remote.clock_off_s) > CLOCK_OFF_S:
                for outcome in outcomes:
                    outcome.notes.append(f"its clock is {_duration(remote.clock_off_s)}, and so are its results' dates")
            sent = await _upload(remote, job)
            for outcome in outcomes:
                outcome.steps["upload"] = sent
            images = await _send_images(remote, job)
            for outcome in outcomes:
                if images is not None:
                    outcome.steps["images"] = images
                try:
                    await Visit(remote, job, outcome).run()
                except CommandError as error:
                    outcome.reason = str(error)
    except BoardError as error:
        _tell(board, f"failed: {error}")
        for outcome in outcomes:
            if outcome.state != "ok" and outcome.reason is None:
                outcome.reason = str(error)
    if all(outcome.state == "ok" for outcome in outcomes):
        shutil.rmtree(folder / EARLIER, ignore_errors=True)


def _put_aside(folder: Path) -> None:
    """Results of an earlier run into EARLIER: what is in the folder afterwards is of this run."""
    for pattern in ("*.result.json", "*.detections.json"):
        for path in folder.glob(pattern):
            (folder / EARLIER).mkdir(exist_ok=True)
            path.replace(folder / EARLIER / path.name)
    for path in folder.glob("*.log"):
        path.unlink()


async def _upload(remote: Remote, job: Job) -> str:
    folder = f"{remote.path(remote.board.folder)}/{job.name}"
    sent = await _timed(remote.board, "upload", remote.upload(job.bundle.folder, folder))
    for name in ("run.py", MANIFEST):  # all else run.py compares with the manifest
        content = (job.bundle.folder / name).read_bytes()
        if await remote.read(f"{folder}/{name}", len(content) + 1) != content:
            raise BoardError(
                f"{folder}/{name} is not that of the bundle: it was changed on the board. Remove {folder} there, and "
                "run this command again"
            )
    return sent


async def _send_images(remote: Remote, job: Job) -> Optional[str]:
    if job.images is None:
        return None
    folder = f"{remote.path(remote.board.folder)}/{IMAGES_FOLDER}"
    try:
        await remote.run(f"{remote.path(remote.board.folder)}/{job.name}", ["images"], bytearray())
    except CommandError as error:
        raise CommandError(f"images: {error}") from error
    await remote.write(_set_path(remote, job), job.images.content)
    return await _timed(remote.board, "images", remote.send_files(job.images.files, folder, "images"))


async def _timed(board: Board, label: str, work: Awaitable[Any]) -> str:
    """ "done", or "done before" where `work` gives nothing."""
    start = time.monotonic()
    _tell(board, f"{label} ...")
    done = await work
    _tell(board, f"{label}: {_seconds(start)}" if done else f"{label}: done before")
    return "done" if done else "done before"


def _set_path(remote: Remote, job: Job) -> str:
    return f"{remote.path(remote.board.folder)}/{job.name}/images.json"


class Visit:
    """The steps for one precision on one board; `outcome` tells how far they came."""

    def __init__(self, remote: Remote, job: Job, outcome: Outcome) -> None:
        self._remote, self._job, self._outcome = remote, job, outcome
        self._folder = f"{remote.path(remote.board.folder)}/{job.name}"
        self._model = job.model_file(remote.board, outcome.precision)
        self._local = job.output / remote.board.name

    async def run(self) -> None:
        """
        Builds, checks, detects and measures, as far as the board has not done so before.

        Raises:
            CommandError: a step failed.
            BoardError: the board answers no more, or not as run.py does.
        """
        if self._remote.board.runtime == "tensorrt":
            await self._build()
            sha256 = await self._read_engine()
        else:
            await self._run_step("check", "--engine", self._model)
            sha256 = self._job.bundle.manifest["files"][self._model]["sha256"]
        if self._job.images is not None:
            await self._detect(sha256, self._job.images)
        numbers = await self._measure("bench", "latency", sha256)
        summary = numbers["summary_ms"]["total"]
        self._outcome.median_ms, self._outcome.p99_ms = summary["median"], summary["p99"]
        self._outcome.stable = numbers["stable"]
        self._outcome.energy_mj = (numbers["power"] or {}).get("energy_mj_per_inference")
        if self._job.images is not None and self._job.fps is not None:
            numbers = await self._measure("paced", "paced", sha256, "--fps", f"{self._job.fps:g}")
            if numbers["late_frames"]:
                self._outcome.notes.append(
                    f"{numbers['late_frames']} of {len(numbers['samples_ms']['total'])} frames late at "
                    f"{self._job.fps:g} frames/s"
                )
        self._outcome.state = "ok"

    def _done_before(self, step: str) -> None:
        self._outcome.steps[step] = "done before"
        _tell(self._remote.board, f"{step} {self._outcome.precision}: done before")

    async def _run_step(self, step: str, *words: str, command: str = "") -> None:
        """Runs a command of run.py, by default that of the step's name; keeps its output as STEP.PRECISION.log."""
        board, label = self._remote.board, f"{step} {self._outcome.precision}"
        _tell(board, f"{label} ...")
        start, log = time.monotonic(), bytearray()
        self._outcome.steps[step] = "failed"
        try:
            await self._remote.run(self._folder, [command or step, *words], log)
        except CommandError as error:
            _tell(board, f"{label}: failed after {_seconds(start)}: {error}")
            raise CommandError(f"{step}: {error}") from error
        except BoardError as error:
            raise BoardError(f"{label}: {error}") from error
        finally:
            with replacing(self._local / f"{step}.{self._outcome.precision}.log") as temporary:
                temporary.write_bytes(log)
        self._outcome.steps[step] = "done"
        _tell(board, f"{label}: {_seconds(start)}")

    # Building

    async def _build(self) -> None:
        """Builds and checks an engine; only checks the one that is there, if it is still good."""
        if await self._has_good_engine():
            self._done_before("build")
        else:
            words = self._remote.board.build.get(self._outcome.precision, ())
            await self._run_step("build", f"--{self._outcome.precision}", *words, "-o", self._model)
            await self._run_step("check", "--engine", self._model)

    async def _has_good_engine(self) -> bool:
        path = f"{self._folder}/{self._model}.json"
        content = await self._remote.read(path, MOST_JSON + 1)
        if content is None:
            return False
        try:
            if not self._is_built_as_asked(_document(content, path).get("details")):
                return False
            await self._run_step("check", "--engine", self._model)
        except CommandError:  # of another TensorRT, say, than there is now
            return False
        return True

    def _is_built_as_asked(self, details: Any) -> bool:
        """Whether an engine was built with the options of boards.toml, of which a sidecar may lack newer ones."""
        asked = dataclasses.asdict(build_options(self._remote.board, self._outcome.precision))
        default = dataclasses.asdict(BuildOptions(self._outcome.precision))
        built = {**default, **details} if isinstance(details, dict) else {}
        shapes = built.get("shapes")
        built["shapes"] = tuple(shapes) if isinstance(shapes, list) else shapes
        return all(built.get(name) == value for name, value in asked.items())

    async def _read_engine(self) -> str:
        """The engine's SHA-256, by its sidecar, which `check` has just compared; device and TensorRT are kept."""
        path = f"{self._folder}/{self._model}.json"
        sidecar = _document(await self._remote.read(path, MOST_JSON + 1) or b"", path)
        try:
            details = sidecar["details"]
            self._outcome.device = one_line(details["device"])
            self._outcome.runtime = f"TensorRT {one_line(details['tensorrt'])}"
            return str(sidecar["artefact"]["sha256"])
        except (KeyError, TypeError) as error:
            raise CommandError(f"{path} is not the sidecar of an engine: it has no {error}") from error

    # Detecting

    async def _detect(self, sha256: str, images: TestImages) -> None:
        """Detects on the board, computes AP here, and keeps the accuracy result."""
        name = f"{self._outcome.precision}.predictions.jsonl"
        result = self._local / f"{self._outcome.precision}.accuracy.result.json"
        header = await self._read_header(name, sha256, images)
        if header is not None and is_current(self._earlier(result), header, images):
            self._done_before("predict")
            for path in (result, detections_path(result)):
                self._earlier(path).replace(path)
        else:
            predictions = None if header is None else await self._fetch_predictions(name, images)
            if predictions is not None:
                self._done_before("predict")
            else:
                await self._run_step("predict", "--engine", self._model, *self._image_words(), "-o", name)
                predictions = await self._fetch_predictions(name, images)
                if predictions is None or await self._read_header(name, sha256, images) is None:
                    raise CommandError(
                        f"{name} has no detections of {self._model}, though predict said that all was well"
                    )
            await self._compute_accuracy(result, predictions, images)
        document = read_result(result)
        self._outcome.AP = document["numbers"]["AP"]
        self._note_preparation(document["preparation"])
        self._note_result(result, document)

    async def _read_header(self, name: str, sha256: str, images: TestImages) -> Optional[Dict[str, Any]]:
        """The first line of the board's predictions, if they are of this model and these images; else None."""
        content = await self._remote.read(f"{self._folder}/{name}", MOST_HEADER)
        if content is None:
            return None
        try:
            header = header_from_line(content.partition(b"\n")[0], name)
        except MeasurementError as error:
            _tell(self._remote.board, f"not used: {one_line(error)}")
            return None
        same = header["model"]["sha256"] == sha256 and header["images_sha256"] == images.image_set.images_sha256
        return header if same else None

    async def _fetch_predictions(self, name: str, images: TestImages) -> Optional[Predictions]:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            await self._remote.fetch(f"{self._folder}/{name}", local, MOST_FETCHED)
            try:
                return await _in_thread(lambda: read_predictions(local, images))
            except MeasurementError as error:
                _tell(self._remote.board, f"not used: {one_line(error).replace(folder, '')}")
                return None

    async def _compute_accuracy(self, result: Path, predictions: Predictions, images: TestImages) -> None:
        try:
            here = await _in_thread(lambda: inputs_here(images, self._job.bundle.contract))
            differing = [image_id for image_id, crc32 in predictions.crc32.items() if crc32 != here[image_id]]
            preparation = preparation_of(
                predictions, differing, await self._compare_inputs(differing[:COMPARED], images)
            )
            await _in_thread(lambda: write_accuracy(result, predictions, images, preparation))
        except (BoardError, OSError):
            raise
        except PipelineError as error:
            raise CommandError(f"AP: {one_line(error)}") from error

    async def _compare_inputs(self, image_ids: Sequence[int], images: TestImages) -> Any:
        """(largest, mean) difference of what these images become on the board and here."""
        if not image_ids:
            return 0.0, 0.0
        name = f"{self._outcome.precision}.inputs.npz"
        await self._run_step("prepare", *self._image_words(), "-o", name, "--ids", *map(str, image_ids))
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            await self._remote.fetch(f"{self._folder}/{name}", local, MOST_FETCHED)
            return await _in_thread(lambda: input_differences(local, images, self._job.bundle.contract))

    def _note_preparation(self, preparation: Dict[str, Any]) -> None:
        if preparation["differing"]:
            self._outcome.notes.append(
                f"{preparation['differing']} of {preparation['images']} images are prepared otherwise by its "
                f"{one_line(preparation['library'])} than by {preparation['library_here']} here: by up to "
                f"{preparation['largest_difference']:g} of 255, {preparation['mean_difference']:g} in the mean"
            )

    # Measuring

    async def _measure(self, step: str, kind: str, sha256: str, *words: str) -> Dict[str, Any]:
        """Measures, unless the board has; keeps the latency result and returns its numbers."""
        name = f"{self._outcome.precision}.{kind}.result.json"
        content = await self._read_latency(name, sha256, words)
        if content is not None:
            self._done_before(step)
        else:
            words = (*self._image_words(), "--runs", str(self._job.runs), *words)
            await self._run_step(step, "--engine", self._model, *words, "-o", name, command="bench")
            content = await self._read_latency(name, sha256, words)
        if content is None:
            raise CommandError(f"{name} is no result of {self._model}, though bench said that all was well")
        with replacing(self._local / name) as temporary:
            temporary.write_bytes(content)
        document = json.loads(content)
        self._note_result(self._local / name, document)
        return document["numbers"]

    async def _read_latency(self, name: str, sha256: str, words: Sequence[str]) -> Optional[bytes]:
        """The result file, if it is one, of the model with that hash, on the images and in the way of this run."""
        path = f"{self._folder}/{name}"
        content = await self._remote.read(path, MOST_JSON + 1)
        if content is None:
            return None
        try:
            document = _document(content, path)
            check_written_result(document, path)
        except MeasurementError as error:
            _tell(self._remote.board, f"not used: {one_line(error)}")
            return None
        if document["kind"] != "latency" or document["model"]["sha256"] != sha256:
            return None
        return content if self._is_as_asked(document, "--fps" in words) else None

    def _is_as_asked(self, document: Dict[str, Any], paced: bool) -> bool:
        """Whether a latency result is of the images, the pace and the runs of this job."""
        numbers, data = document["numbers"], document["data"]
        if self._job.images is None:
            return numbers["summary_ms"]["preprocess"] is None and len(numbers["samples_ms"]["total"]) == self._job.runs
        wanted = {**self._job.images.image_set.data, "images": data["images"]}
        return (
            data == wanted
            and numbers["fps"] == (self._job.fps if paced else None)
            and len(numbers["samples_ms"]["total"]) == self._job.runs
        )

    def _image_words(self) -> List[str]:
        board = ["--board", self._remote.board.name]
        if self._job.images is None:
            return board
        folder = f"{self._remote.path(self._remote.board.folder)}/{IMAGES_FOLDER}"
        return ["--set", _set_path(self._remote, self._job), "--images-dir", folder, *board]

    # Keeping

    def _earlier(self, path: Path) -> Path:
        return path.parent / EARLIER / path.name

    def _note_result(self, path: Path, document: Dict[str, Any]) -> None:
        environment = document["environment"]
        device = environment.get("machine") or environment["cpu"]
        self._outcome.device = self._outcome.device or (None if device is None else one_line(device))
        if self._outcome.runtime is None and document["kind"] == "latency":
            self._outcome.runtime = one_line(document["numbers"]["description"].split(",")[0])
        self._outcome.results.append(f"{self._outcome.board}/{path.name}")
        jump_s = environment.get("clock_jump_s")
        if isinstance(jump_s, (int, float)) and abs(jump_s) > CLOCK_JUMP_S:
            self._outcome.notes.append(
                f"its clock was set by {jump_s:+g} s during {path.name.split('.')[1]}; what is timed goes by another"
            )


async def _in_thread(work: Callable[[], T]) -> T:
    """What takes long here, while the other boards go on."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def _document(content: bytes, path: str) -> Dict[str, Any]:
    """The JSON object that a board sent. Raises CommandError if it is none, or too large."""
    if len(content) > MOST_JSON:
        raise CommandError(f"{path} has over {MOST_JSON >> 20} MiB; expected a small file")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CommandError(f"{path} is not a JSON object")
    return document


def _tell(board: Board, words: str) -> None:
    print(f"{board.name}: {words}", file=sys.stderr, flush=True)


def _seconds(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"


def _duration(seconds: float) -> str:
    size = abs(seconds)
    number, unit = (size / 86400, "days") if size >= 2 * 86400 else (size / 60, "minutes")
    return f"{number:.0f} {unit} {'ahead' if seconds > 0 else 'behind'}"
