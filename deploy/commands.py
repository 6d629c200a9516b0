"""
Our commands: their list, and one of them run as a process of its own.

Packages that do not import each other (`calibration`, `benchmarks`, `crosskd`) are joined in this way alone: a command
of one runs a command of another, and passes its message on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import IO, Any, Dict, Sequence, Tuple, Type

from deploy.errors import MeasurementError, PipelineError
from deploy.processes import process_words, started, status_of
from deploy.targets import TARGETS

TORCH = ("torch", "torchvision", "mmdet", "mmcv", "mmengine")
TRAINING = ("numpy", "opencv", *TORCH)
ENGINE = TARGETS["tensorrt"].needs


def _on_each_runtime(command: str, *needs: str, to_read: Sequence[str] = ()) -> Dict[str, Tuple[str, ...]]:
    """What a command that runs a model needs: `needs`, what runs it, and to read an ONNX file `to_read`."""
    return {
        f"{command} {target.model_arguments}": (*needs, *(to_read if target.suffix == ".onnx" else ()), *target.needs)
        for target in TARGETS.values()
    }


NEEDS: Dict[str, Tuple[str, ...]] = {
    "crosskd.pipeline": (*TRAINING, "onnx", "onnxruntime", "onnxslim", "faster-coco-eval", "jinja2"),
    "crosskd.shapes": ("numpy", "opencv"),
    "crosskd.check_data": ("numpy", "opencv"),
    "crosskd.choose": (*TRAINING, "onnx", "onnxruntime", "onnxslim"),
    "crosskd.choose --train-top": (*TRAINING, "onnx", "onnxruntime", "onnxslim", "faster-coco-eval"),
    "crosskd.choose --ray": (*TRAINING, "onnx", "onnxruntime", "onnxslim", "faster-coco-eval", "ray"),
    "crosskd.train": TRAINING,
    "crosskd.adopt": TRAINING,
    "crosskd.distill": TRAINING,
    "crosskd.export": (*TRAINING, "onnx", "onnxruntime", "onnxslim"),
    "crosskd.predict": TRAINING,
    "crosskd.workers.time_detector": TRAINING,
    "crosskd.workers.time_training": TRAINING,
    "crosskd.workers.export_untrained": (*TRAINING, "onnx", "onnxruntime", "onnxslim"),
    "deploy.export": (*TRAINING, "onnx", "onnxruntime", "onnxslim"),
    "deploy.adopt_onnx": ("numpy", "opencv", "onnx", "onnxruntime"),
    "deploy.build_trt": ("numpy", "onnx", *ENGINE),
    "deploy.build_trt --target VERSION": ("numpy", "onnx"),
    "deploy.build_trt --int8 --data": ("numpy", "opencv", "onnx", "onnxruntime", *ENGINE),
    "deploy.bundle": ("numpy", "onnx", "onnxruntime"),
    "deploy.handover": ("numpy", "onnx"),
    **_on_each_runtime("deploy.detect", "numpy", "opencv"),
    "deploy.doctor": (),
    "calibration.quantize": ("numpy", "opencv", "onnx", "onnxruntime"),
    "calibration.quantize --method auto": ("numpy", "opencv", "onnx", "onnxruntime", "faster-coco-eval"),
    "calibration.quantize --max-ap-drop": ("numpy", "opencv", "onnx", "onnxruntime", "faster-coco-eval"),
    "calibration.choose": ("numpy", "onnx"),
    "calibration.audit": ("numpy", "onnx"),
    "calibration.sensitivity": ("numpy", "opencv", "onnx", "onnxruntime", "faster-coco-eval"),
    "calibration.sensitivity --metric error": ("numpy", "opencv", "onnx", "onnxruntime"),
    "calibration.statistics": ("numpy",),
    **_on_each_runtime("benchmarks.accuracy", "numpy", "opencv", "faster-coco-eval", to_read=("onnx",)),
    **_on_each_runtime("benchmarks.latency", "numpy", "opencv", to_read=("onnx",)),
    "benchmarks.report": ("numpy", "opencv", "jinja2"),
    "benchmarks.fleet": ("numpy", "asyncssh"),
    "benchmarks.fleet --data": ("numpy", "opencv", "asyncssh", "faster-coco-eval"),
    "benchmarks.studies.calibration methods": ("numpy", "opencv", "onnx", "onnxruntime", "faster-coco-eval"),
    "benchmarks.studies.calibration int8-aware": (*TRAINING, "onnx", "onnxruntime", "faster-coco-eval"),
    "benchmarks.studies.distillation": (*TRAINING, "faster-coco-eval"),
    "benchmarks.studies.distillation --ray": (*TRAINING, "faster-coco-eval", "ray"),
    "benchmarks.studies.tools": ("numpy", "opencv", "onnx", "onnxruntime", "openvino", "faster-coco-eval"),
    "benchmarks.studies.tools_child": ("numpy", "opencv", "onnxruntime"),
    "benchmarks.studies.training_step": TRAINING,
    "benchmarks.studies.operators": ("numpy", "opencv", "onnx", "onnxruntime"),
    "benchmarks.studies.recipes": (*TRAINING, "onnx", "onnxruntime", "onnxslim"),
}
"""Every command in the order of use, with what it is given where that matters -> what it needs."""
COMMANDS: Tuple[str, ...] = tuple(dict.fromkeys(label.split()[0] for label in NEEDS))
"""The module of every command, for `python -m`, in the order of use."""
ERROR = "error: "
"""What the message of a command that failed starts with, on stderr; see `deploy.errors.command`."""
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "'": "\\'"}


def shell_line(words: Sequence[object]) -> str:
    """
    `words` as one line that can be pasted into a shell; the shell makes the same words of it.

    Words with control characters or with bytes that are no text are written as $'..', which bash, zsh and ksh read.
    """
    return " ".join(map(_shell_word, map(str, words)))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    letters = (ESCAPES.get(letter) or (letter if letter.isprintable() else _octal(letter)) for letter in word)
    return "$'" + "".join(letters) + "'"


def _octal(letter: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in letter.encode("utf-8", "surrogateescape"))


def command_line(module: str, *words: object) -> str:
    """`python -m MODULE WORDS` as one line that can be pasted into a shell."""
    return shell_line(["python", "-m", module, *words])


def run_status(module: str, *words: object) -> int:
    """The exit status of a command of ours, which prints where this process does; 128 + n where signal n ended it."""
    return status_of(process_words(module, *words))


def run_command(module: str, *words: object, error_type: Type[PipelineError] = PipelineError, tell: Any = None) -> None:
    """
    Runs a command of ours, which prints where this process does; its line is printed first.

    Args:
        error_type: what is raised if it fails. Its own message has been printed by then.
        tell: the stream that gets the line; stdout by default.

    Raises:
        error_type: it failed.
    """
    print(command_line(module, *words), file=tell or sys.stdout, flush=True)
    status = run_status(module, *words)
    if status != 0:
        raise error_type(f"{module} ended with status {status}; its message is above")


def run_relayed(module: str, *words: object, error_type: Type[PipelineError] = MeasurementError) -> None:
    """
    Runs a command of ours; all that it prints goes to stderr but for its error message, which is raised.

    Raises:
        error_type: it failed; the message is the command's own.
    """
    with started(
        process_words(module, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        message = relay(process.stdout)
    if process.returncode:
        raise error_type(message or f"{module} ended with status {process.returncode}: its output is above")


def relay(output: IO[str]) -> str:
    """Copies the lines of a command's output to stderr as they come, but for its error message, which is returned."""
    message = ""
    for line in output:
        if line.startswith(ERROR):
            message = line[len(ERROR) :].strip()
        else:
            print(line, end="", file=sys.stderr, flush=True)
    return message


def run_captured(
    module: str, *words: object, verdict: bool = False, error_type: Type[PipelineError] = MeasurementError
) -> str:
    """
    What a command of ours prints to stdout; of what it prints to stderr only why it failed is shown, if it does.

    Args:
        verdict: status 1 is a verdict, and no failure, if something is printed: a crash has status 1, too.

    Raises:
        error_type: it failed, or prints nothing where a verdict is expected.
    """
    with started(
        process_words(module, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        output, messages = process.communicate()
    if not ((process.returncode in (0, 1) and output) if verdict else process.returncode == 0):
        last = last_message(messages, process.returncode) or "nothing"
        raise error_type(f"{module} ended with status {process.returncode}: {last}")
    return output


def last_message(text: str, status: int) -> str:
    """
    Why a command failed, from what it printed: its error message, or else the last line; "" if there is none.

    Of a fault of the program (status 3) it is the exception, and not the message that asks to report it.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    messages = [line[len(ERROR) :] for line in lines if line.startswith(ERROR)]
    if status == 2 and messages:
        return messages[-1]
    return ([line for line in lines if not line.startswith(ERROR)] or lines or [""])[-1]
