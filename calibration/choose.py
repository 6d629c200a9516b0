"""
Of several INT8 models of one student the first that keeps a budget of AP, by the results of `benchmarks`.

    python -m calibration.choose --max-int8-drop 0.5 --rung max.accuracy.result.json max.latency.result.json \\
        --rung auto.accuracy.result.json auto.latency.result.json -o student.int8.onnx

Rungs are given in the order of what they cost: each a model's accuracy, which `benchmarks.accuracy --against` compared
with the float model on the same images, and its latency. Of an engine the INT8 file is meant that it was built from.
Those after the first that keeps the budget are not read, and need not be there. One whose role is that of predictions
in INT8 keeps it only if the score at the best F1 stays where it was, too.

What is written is a copy of that rung's INT8 file or, where none keeps the budget, of the nearest one. Its sidecar
says, for the report, how it was reached: AP, interval, share of the multiplications in INT8, latency and time of each
rung, and what is to ship if that is not INT8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from calibration.messages import say
from deploy.ap_drop import FEWEST_IMAGES, NUMBERS, Drop, checked_budget, drop_from_record
from deploy.commands import run_captured
from deploy.contract import load_contract, read_sidecar, write_sidecar
from deploy.errors import CalibrationError, ConfigError, MeasurementError, command
from deploy.files import check_writable, replacing
from deploy.freshness import read_record
from deploy.schema import Number, check_content
from deploy.targets import TARGETS

TITLES = {role.name: role.title for target in TARGETS.values() for role in target.roles}
_FILE = {"file": str, "sha256": str}
ACCURACY: Dict[Any, Any] = {
    "role": str,
    "model": _FILE,
    "data": {"annotations": str, "annotations_sha256": str, "images": int},
    "inputs": {"against": _FILE},
    **NUMBERS,
}
"""Table of what an accuracy result must say here."""
LATENCY: Dict[Any, Any] = {
    "model": _FILE,
    "numbers": {"comparable": bool, "summary_ms": {"total": {"median": Number(0)}}},
}
MADE_FROM = ("onnx", "model", "weights")
"""Inputs, as sidecars name them, whose making is a part of a rung's time."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """A way to a model that is smaller than float, and what it came to."""

    title: str
    """The role of its results."""
    drop: Drop
    onnx: Path
    """The ONNX file that was measured, or that the engine measured was built from."""
    int8_share: Optional[float]
    """The part of all multiplications that is in INT8; None where the graph's shapes do not say."""
    median_ms: float
    comparable: bool
    """Whether nothing speaks against comparing that with others."""
    elapsed_s: float
    """Of the commands that made it out of the float model and measured it, each as it ran last."""
    accuracy: Mapping[str, Any]
    """Its accuracy result."""
    accuracy_path: Path
    latency_path: Path
    float_model: Path
    """What its accuracy was compared with."""

    def __str__(self) -> str:
        share = "an unknown part" if self.int8_share is None else f"{100 * self.int8_share:.1f} %"
        return f"{self.title}: {self.drop}, {share} of the multiplications in INT8, {self.median_ms:.2f} ms"

    def to_json(self, budget: float) -> Dict[str, Any]:
        """As the sidecar has it."""
        return {
            "title": self.title,
            "file": str(self.onnx),
            **dataclasses.asdict(self.drop),
            "holds": self.drop.keeps(budget),
            "int8_share": self.int8_share,
            "median_ms": self.median_ms,
            "comparable": self.comparable,
            "elapsed_s": round(self.elapsed_s, 1),
        }


def read_rung(accuracy_path: Path, latency_path: Path) -> Rung:
    """
    What the two results of a model tell.

    Raises:
        MeasurementError: a result cannot be read, was edited, or they are of two models.
        ContractError: the model is not there any more, or was changed since.
    """
    accuracy, latency = read_record(accuracy_path), read_record(latency_path)
    check_content(accuracy, ACCURACY, accuracy_path, MeasurementError, "Measure again, with --against.")
    check_content(latency, LATENCY, latency_path, MeasurementError, "Measure again.")
    model = Path(accuracy["model"]["file"])
    float_model = Path(read_record(accuracy["inputs"]["against"]["file"])["model"]["file"])
    made = read_sidecar(model)["artefact"]["sha256"]
    for path, result in ((accuracy_path, accuracy), (latency_path, latency)):
        if result["model"]["sha256"] != made:
            raise MeasurementError(
                f"{path} is of {result['model']['file']} as it was, or of another model; expected {model} as it is. "
                "Measure again."
            )
    onnx = model if model.suffix == ".onnx" else Path(read_sidecar(model)["inputs"]["onnx"]["file"])
    return Rung(
        title=accuracy["role"],
        drop=drop_from_record(accuracy),
        onnx=onnx,
        int8_share=json.loads(run_captured("calibration.audit", onnx, "--json", verdict=True))["int8_share"],
        comparable=latency["numbers"]["comparable"],
        median_ms=latency["numbers"]["summary_ms"]["total"]["median"],
        elapsed_s=sum(one.get("elapsed_s", 0) for one in (accuracy, latency)) + seconds_to_make(model, float_model),
        accuracy=accuracy,
        accuracy_path=accuracy_path,
        latency_path=latency_path,
        float_model=float_model,
    )


def seconds_to_make(model: Path, float_model: Path) -> float:
    """How long the commands ran, each the last time, that made a model out of the float one."""
    if model == float_model:
        return 0.0
    sidecar = read_sidecar(model)
    further = [Path(sidecar["inputs"][name]["file"]) for name in MADE_FROM if name in sidecar["inputs"]]
    return float(sidecar.get("elapsed_s", 0)) + sum(seconds_to_make(path, float_model) for path in further)


def check_comparable(rungs: Sequence[Rung]) -> None:
    """
    Raises MeasurementError if rungs were measured on other images, or against another float model; CalibrationError if
    this one has no AP that could be lost.
    """
    first = rungs[0]

    def measured_on(rung: Rung) -> List[Any]:
        data, against = rung.accuracy["data"], rung.accuracy["inputs"]["against"]
        return [data["annotations_sha256"], data["images"], against["sha256"]]

    for rung in rungs[1:]:
        if measured_on(rung) != measured_on(first):
            raise MeasurementError(
                f"{rung.accuracy_path} and {first.accuracy_path} are of other images, or compared with other float "
                "models; expected rungs of one student. Measure all against one result, on the same images."
            )
    if abs(first.drop.ap + first.drop.drop) < 1e-9:
        raise CalibrationError(
            f"the float model {first.float_model} has AP 0 on {first.accuracy['data']['annotations']}; expected one "
            "that finds something, to see what INT8 costs. Is it trained, and are these images for it?"
        )


def tried_rungs(pairs: Sequence[Sequence[Path]], budget: float) -> List[Rung]:
    """The rungs as far as the first that keeps the budget; raises as `read_rung` and `check_comparable`."""
    rungs: List[Rung] = []
    for pair in pairs:
        rungs.append(read_rung(*pair))
        check_comparable(rungs)
        if rungs[-1].drop.keeps(budget):
            break
    return rungs


def words_of_choice(rung: Rung, budget: float, ships: Optional[str]) -> str:
    """
    What came of it, for people, and how far it can be relied on.

    Args:
        rung: the one that keeps the budget, or else the nearest.
        ships: the role of what ships in place of INT8; None: INT8 does.
    """
    drop, data = rung.drop, rung.accuracy["data"]
    seen = f"{drop}, on {data['images']} images of {data['annotations']}."
    if ships is None:
        text = f"{rung.title} keeps the budget of {budget:g} points of AP: {seen}"
    else:
        text = f"No way to INT8 keeps the budget of {budget:g} points of AP. The nearest, {rung.title}, has {seen}"
    if data["images"] < FEWEST_IMAGES:
        text += f" So few images leave a wide interval; expected {FEWEST_IMAGES} or more."
    elif ships is None and 100 * drop.high > budget:
        text += " The interval reaches beyond the budget: on other images it may not hold."
    half_width = 50 * (drop.high - drop.low)
    if half_width > budget > 0:
        needed = data["images"] * (half_width / budget) ** 2  # it is as wide as 1 / sqrt(images)
        text += f" For an interval of {budget:g} points to either side about {float(f'{needed:.1g}'):.0f} are needed."
    if ships is not None:
        text += f" What ships is {TITLES.get(ships, ships)}: do not roll out INT8."
    return text


def write_choice(rung: Rung, rungs: Sequence[Rung], output: Path, int8_budget: Mapping[str, Any]) -> None:
    """Writes a copy of a rung's INT8 file, and a sidecar that also says how it was reached."""
    made = read_sidecar(rung.onnx)
    inputs = {name: Path(entry["file"]) for name, entry in made["inputs"].items() if name in MADE_FROM}
    inputs.update({"float": rung.float_model, "chosen": rung.onnx})
    for one in rungs:
        inputs.update({f"{one.title}, accuracy": one.accuracy_path, f"{one.title}, latency": one.latency_path})
    with replacing(output) as temporary:
        shutil.copyfile(rung.onnx, temporary)
    write_sidecar(output, inputs, load_contract(rung.onnx), {**made["details"], "int8_budget": int8_budget})


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.choose", description="Of several INT8 models take the first that keeps a budget."
    )
    results = ("ACCURACY", "LATENCY")
    parser.add_argument(
        "--rung", nargs=2, action="append", required=True, type=Path, metavar=results, dest="rungs",
        help="results of an INT8 model, the cheapest to reach first; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--fp16", nargs=2, type=Path, metavar=results, help="results of the model in FP16, which is next"
    )
    parser.add_argument(
        "--max-int8-drop", type=float, required=True, metavar="POINTS",
        help="how much AP, of 100, may be lost against the float model",
    )  # fmt: skip
    parser.add_argument(
        "--otherwise", default="onnx-fp32", metavar="ROLE",
        help="what ships if none keeps the budget, by its role in the report (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="INT8 ONNX file to write")
    return parser.parse_args(argv)


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Chooses, and writes the file; see the module's docstring."""
    arguments = parse_arguments(argv)
    budget, output = checked_budget(arguments.max_int8_drop, "--max-int8-drop"), arguments.output
    if output.suffix != ".onnx":
        raise ConfigError(f"--output is {output}; expected a file with the suffix .onnx")
    check_writable(output)
    rungs = tried_rungs(arguments.rungs, budget)
    chosen, ships = rungs[-1], None
    if not chosen.drop.keeps(budget):
        chosen, ships = min(rungs, key=lambda rung: rung.drop.drop), arguments.otherwise
        if arguments.fp16:
            rungs.append(read_rung(*arguments.fp16))
            check_comparable(rungs)
            ships = rungs[-1].title if rungs[-1].drop.keeps(budget) else ships
    if output.resolve() in [rung.onnx.resolve() for rung in rungs]:
        raise ConfigError(f"--output is {output}, one of those to choose from; choose another")
    sentence = words_of_choice(chosen, budget, ships)
    int8_budget = {
        "max_int8_drop": budget,
        "ships": ships,
        "sentence": sentence,
        "rungs": [rung.to_json(budget) for rung in rungs],
    }
    write_choice(chosen, rungs, output, int8_budget)
    for rung in rungs:
        say(str(rung))
    print(f"{output}: {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
