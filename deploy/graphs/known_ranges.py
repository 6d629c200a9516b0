"""
What calibration has seen of a float graph's activations, read from the files beside its ONNX file and named ones.

Statistics of `calibration.quantize --statistics` tell it, and the sidecars of INT8 files. They are known by the hash of
the float file, whatever their names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from deploy.arrays import arrays_from_npz
from deploy.contract import read_sidecar, sidecar_path
from deploy.errors import ConfigError, ContractError, PipelineError, one_line
from deploy.files import read_json

if TYPE_CHECKING:
    from deploy.graphs.onnx_file import OnnxFile
    from deploy.graphs.precision import TypedGraph

Ranges = Dict[str, Tuple[float, float]]
SOME = 3
"""Names of many that are told."""


class KnownRanges(NamedTuple):
    """What files tell of the activations of a float ONNX file."""

    ranges: Ranges
    """Tensor -> (smallest, largest) of all that was seen."""
    files: Tuple[Path, ...]
    """That tell it."""


def known_ranges(source: OnnxFile, named: Sequence[Path] = ()) -> KnownRanges:
    """
    What the statistics and INT8 files in the folder of an ONNX file tell of the float graph that it is or was made of.

    What cannot be read there is told on stderr, and left out.

    Args:
        named: such files elsewhere.

    Raises:
        ConfigError: a file of `named` tells nothing of that graph.
        PipelineError: it cannot be read.
    """
    made_of = source.sidecar["inputs"].get("model", {}) if source.is_quantised else source.sidecar["artefact"]
    digest = made_of.get("sha256")
    told: Dict[Path, Ranges] = {}
    for file in sorted(source.path.parent.iterdir()) if digest else ():
        try:
            told[file] = _ranges_of_file(file, digest) or {}
        except (PipelineError, OSError) as error:
            print(f"note: {file} is not asked for ranges: {one_line(error)}", file=sys.stderr)
    for file in named:
        told[file] = (_ranges_of_file(file, digest) if digest else None) or {}
        if not told[file]:
            raise ConfigError(
                f"--ranges-from {file} tells no ranges of the float graph of {source.path}; expected a file of "
                "calibration.quantize that was made of it, or its --statistics"
            )
    files = tuple(file for file in told if told[file] and file != source.path)
    ranges: Ranges = {}
    for file in files:
        for name, (smallest, largest) in told[file].items():
            known = ranges.get(name, (smallest, largest))
            ranges[name] = min(known[0], smallest), max(known[1], largest)
    return KnownRanges(ranges, files)


def _ranges_of_file(file: Path, digest: str) -> Optional[Ranges]:
    """
    What a file tells of the model whose SHA-256 is `digest`; None if it tells nothing of it.

    Raises:
        PipelineError, OSError: it should, and cannot be read.
    """
    if file.suffix == ".npz" and file.is_file():
        return _ranges_of_statistics(file, digest)
    if file.suffix != ".onnx" or not sidecar_path(file).is_file():
        return None
    document = read_json(sidecar_path(file), ContractError, "a sidecar")
    if not _is_made_of(document, digest) or not document["details"].get("ranges"):
        return None
    read_sidecar(file)
    return _checked(file, document["details"]["ranges"])


def _is_made_of(document: Any, digest: str) -> bool:
    try:
        return isinstance(document["details"], dict) and document["inputs"]["model"]["sha256"] == digest
    except (KeyError, TypeError):  # a sidecar of something else
        return False


def _ranges_of_statistics(file: Path, digest: str) -> Optional[Ranges]:
    """As `_ranges_of_file`; the format is that of `calibration.activation_statistics`."""
    try:
        arrays = arrays_from_npz(file, ("header", "minimum", "maximum"))
        header = json.loads(str(arrays["header"]))
        if header["model_sha256"] != digest:
            return None
        tensors: List[str] = header["tensors"]
        extremes = zip(arrays["minimum"].tolist(), arrays["maximum"].tolist())
        return _checked(file, dict(zip(tensors, extremes)))
    except (ValueError, KeyError, TypeError):  # arrays of somebody else
        return None


def _checked(file: Path, ranges: Any) -> Ranges:
    try:
        return {str(name): (float(low), float(high)) for name, (low, high) in ranges.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ContractError(f"its ranges are not tensor -> [smallest, largest] ({error})") from error


def words_of_ranges(typed: TypedGraph, sources: Sequence[str]) -> str:
    """
    One line: of how many tensors that FP16 may not hold the range is known, and what is done about the others.

    Args:
        typed: a graph with FP16.
        sources: names of the files that tell ranges of it.
    """
    known = typed.growing - len(typed.unseen)
    source = ", ".join(sources)
    if not typed.unseen:
        return f"FP16: the ranges of all {typed.growing} tensors that may leave it are known, from {source}"
    first = f"the ranges of {known} of {typed.growing} tensors that may leave it are known, from {source}"
    if not known:
        first = f"no range is known of the {typed.growing} tensors that may leave it"
    more = ", ..." if len(typed.unseen) > SOME else ""
    return (
        f"FP16: {first}; {len(typed.unseen)} run in FP16 unchecked ({', '.join(typed.unseen[:SOME])}{more}). To check "
        "them, leave a file of calibration.quantize --data beside the float file, or its --statistics"
    )
