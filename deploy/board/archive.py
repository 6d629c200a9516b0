"""
The archive with all that a board needs to build, check, measure and use an engine: made, and unpacked.

In it: the ONNX files, each form of their graphs that a TensorRT from 8.5 to 11.4 may want (`deploy.graphs.precision`),
the contract, fixed inputs with ONNX Runtime's outputs, those of our modules that run there, `run.py`, our licence, and
a manifest with the hash of every file. Nothing of ours has to be installed on the board, nor onnx or ONNX Runtime. The
same files give the same archive, byte for byte, as long as the packages that make it are the same.

Making one needs onnx and onnxruntime, `unpack` neither. The command is `deploy.bundle`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np

from deploy.board.commands import BUNDLE_VERSION, KINDS, golden_path
from deploy.board.run import MANIFEST, fault_of_files
from deploy.board.signature import SIGNATURE
from deploy.contract import OUTPUTS, package_versions, sidecar_path
from deploy.errors import ConfigError, ContractError, PipelineError
from deploy.files import AnyPath, replacing
from deploy.graphs.known_ranges import KnownRanges, known_ranges, words_of_ranges
from deploy.runtime.golden import SEEDS, noise_input, tolerance_of_integer_kernels
from deploy.runtime.session import OrtSession

if TYPE_CHECKING:
    from deploy.graphs.onnx_file import OnnxFile

SUFFIX = ".tar.gz"
ROOT = Path(__file__).parents[2]
MODULES = (
    "benchmarks/__init__.py", "benchmarks/boards/__init__.py", "benchmarks/boards/bench.py",
    "benchmarks/boards/board_result.py", "benchmarks/boards/image_set.py", "benchmarks/boards/predict.py",
    "benchmarks/measuring/__init__.py", "benchmarks/measuring/coco.py", "benchmarks/measuring/detection.py",
    "benchmarks/measuring/environment.py", "benchmarks/measuring/power.py", "benchmarks/measuring/result.py",
    "benchmarks/measuring/timing.py", "deploy/__init__.py", "deploy/arrays.py", "deploy/board/__init__.py",
    "deploy/board/commands.py", "deploy/board/release.py", "deploy/board/run.py", "deploy/board/signature.py",
    "deploy/contract.py", "deploy/detector.py", "deploy/errors.py", "deploy/files.py", "deploy/graphs/__init__.py",
    "deploy/graphs/calibration_cache.py", "deploy/images.py", "deploy/int8_format.py", "deploy/jetpack.py",
    "deploy/limits.py", "deploy/machine.py", "deploy/pixels.py", "deploy/progress.py", "deploy/runtime/__init__.py",
    "deploy/runtime/draw.py", "deploy/runtime/golden.py", "deploy/runtime/lettering.py", "deploy/runtime/mp4_times.py",
    "deploy/runtime/pictures.py", "deploy/runtime/postprocess.py", "deploy/runtime/preprocess.py",
    "deploy/runtime/session.py", "deploy/runtime/sources.py", "deploy/runtime/video.py", "deploy/schema.py",
    "deploy/targets.py", "deploy/tensorrt/__init__.py", "deploy/tensorrt/bindings.py", "deploy/tensorrt/builder.py",
    "deploy/tensorrt/coverage.py", "deploy/tensorrt/cuda.py", "deploy/tensorrt/engine.py", "deploy/tensorrt/options.py",
    "deploy/tensorrt/session.py",
)  # fmt: skip
"""What the commands of run.py import: Python 3.8 and numpy; `detect` needs OpenCV, images OpenCV or Pillow."""
START = "\n\nsys.dont_write_bytecode = True\nsys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))\n"
"""What makes of the module `deploy.board.run`, which others import, the script run.py.

It leaves no bytecode behind: what `verify` finds that Python would run is of the bundle or was put there by others.
"""
FORMS: Dict[str, Tuple[str, ...]] = {
    "float": ("fp32", "fp16"),
    "int8": ("int8", "int8_fp32_scales", "int8_tensorrt8", "fp32"),
    "int8_onnxruntime": (),
}
"""Kind of ONNX file -> the forms of its graph (`deploy.graphs.precision.GRAPHS`) that TensorRT may want of it.

The FP32 form of an INT8 file is for a DLA that takes its ranges from a calibration cache.
"""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,60}")
MOST_FILES = 1000
MOST_BYTES = 16 << 30
"""Of an unpacked bundle; an ordinary one has some hundred MiB."""
LARGEST_READ = 1 << 20
"""What tarfile reads at once of our archives is far smaller; of a forged header it would read what that says."""


def name_of_bundle(output: Path) -> str:
    """The name of the one folder in the archive `output`. Raises ConfigError if it makes none."""
    name = output.name[: -len(SUFFIX)]
    if not output.name.endswith(SUFFIX) or not NAME.fullmatch(name):
        raise ConfigError(
            f"--output is {output}; expected NAME{SUFFIX} with a name of letters, digits, '.', '_' and '-', which "
            "becomes a folder on the board"
        )
    return name


# What is in a bundle


def sources_from_paths(paths: Sequence[Path]) -> Dict[str, OnnxFile]:
    """
    Kind (`deploy.board.commands.KINDS`) -> ONNX file, of one kind or several.

    Raises:
        ConfigError: two files are of one kind, or a quantised one was not made of the float one.
        ContractError, ExportError, EngineBuildError: a file is not whole, or not fit for TensorRT.
    """
    from deploy.graphs.onnx_file import read_onnx_file
    from deploy.graphs.precision import is_symmetric_int8

    sources: Dict[str, OnnxFile] = {}
    for path in paths:
        if path.suffix != ".onnx" or not NAME.fullmatch(path.name):
            raise ConfigError(
                f"{path}: expected a name of letters, digits, '.', '_' and '-' that ends in .onnx: rename the file "
                "and its sidecar"
            )
        source = read_onnx_file(path)
        kind = "float"
        if source.is_quantised:
            kind = "int8" if is_symmetric_int8(source.model) else "int8_onnxruntime"
        if kind in sources:
            raise ConfigError(
                f"{sources[kind].path} and {path} are both {KINDS[kind].replace('graph', 'graphs')}; expected one "
                "float graph and one quantised for each runtime, or some of them"
            )
        sources[kind] = source
    first, *others = sources.values()
    for other in others:
        _check_goes_with(first, other)
    for kind in sorted(set(sources) - {"float"}) if "float" in sources else ():
        _check_made_of(sources["float"], sources[kind])
    return dict(sorted(sources.items()))  # the bundle is the same in whatever order they are named


def _check_goes_with(source: OnnxFile, other: OnnxFile) -> None:
    if source.contract != other.contract:
        raise ConfigError(f"{source.path} and {other.path} have different contracts; quantise again")
    if source.path.name == other.path.name:
        raise ConfigError(f"{source.path} and {other.path} have one name; rename one of them with its sidecar")


def _check_made_of(source: OnnxFile, quantised: OnnxFile) -> None:
    hashes = [entry.get("sha256") for entry in quantised.sidecar["inputs"].values()]
    if source.sidecar["artefact"]["sha256"] not in hashes:
        raise ConfigError(
            f"{quantised.path} was not made of {source.path}: no input in its sidecar has the hash of that file. Give "
            "the file that calibration.quantize was run on, or quantise again"
        )


def files_of_bundle(sources: Mapping[str, OnnxFile]) -> Dict[str, bytes]:
    """Path inside the bundle's folder -> content. The manifest among them holds the hashes of the others."""
    files = {module: (ROOT / module).read_bytes() for module in MODULES}
    files["run.py"] = files["deploy/board/run.py"] + START.encode()
    files["LICENSE"] = _licence()
    described = {}
    # Seen when the INT8 file was calibrated; they say of the float file, too, what FP16 cannot hold.
    int8 = sources.get("int8")
    beside = known_ranges(sources["float" if "float" in sources else next(iter(sources))])
    for kind, source in sources.items():
        files[source.path.name] = source.path.read_bytes()
        files[sidecar_path(source.path).name] = sidecar_path(source.path).read_bytes()  # so that it can be run there
        amax, half = source.dla_ranges if FORMS[kind] else ({}, ())
        described[kind] = {
            "file": source.path.name,
            "parameters": source.parameters,
            "amax": amax,
            "dla_half": list(half),
            "graphs": _add_graphs(kind, source, int8, beside, files),
        }
        if kind == "int8":
            with OrtSession(source.path) as session:
                described[kind]["tolerance"] = dataclasses.asdict(tolerance_of_integer_kernels(session, source.model))
        files.update(golden_files(kind, source))
    manifest = {
        "bundle_version": BUNDLE_VERSION,
        "contract": next(iter(sources.values())).contract.to_json(),
        "golden": len(SEEDS),
        "sources": described,
        "versions": package_versions(),
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(files.items())
        },
    }
    files[MANIFEST] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def _add_graphs(
    kind: str, source: OnnxFile, int8: Optional[OnnxFile], beside: KnownRanges, files: Dict[str, bytes]
) -> Dict[str, Any]:
    """Adds each form that `source` is good for to `files`; form -> its file and what stays FP32 in it."""
    from deploy.graphs.precision import typed_graph

    described = {}
    ranges = {} if int8 is None else {"ranges": int8.sidecar["details"].get("ranges", {})}
    for form in FORMS[kind]:
        typed = typed_graph(source.model, form, ranges, beside.ranges)
        if form == kind or form == "fp16":
            told = ([int8.path] if int8 is not None else []) + [*beside.files]
            print(words_of_ranges(typed, list(dict.fromkeys(file.name for file in told))), file=sys.stderr)
        content = typed.model.SerializeToString()
        same = [name for name in files if files[name] == content]
        name = same[0] if same else f"graphs/{kind}.{form}.onnx"
        files[name] = content
        described[form] = {
            "file": name, "float_tensors": list(typed.float_tensors), "kept": typed.kept,
            "float_convolutions": list(typed.float_convolutions),
        }  # fmt: skip
    return described


def golden_files(kind: str, source: OnnxFile) -> Dict[str, bytes]:
    """Path -> array in numpy's format, of the fixed inputs and ONNX Runtime's outputs for them."""
    contract = source.contract
    files = {}
    with OrtSession(source.path) as session:
        for index, seed in enumerate(SEEDS):
            image = noise_input(contract, seed)
            outputs = session.infer({contract.input_name: image})
            files[golden_path(index, "input")] = _npy(image)
            for part, name in zip(OUTPUTS[contract.outputs], contract.output_names):
                files[golden_path(index, f"{kind}.{part}")] = _npy(outputs[name])
    return files


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


def _licence() -> bytes:
    """The text of our licence, from the checkout or from the installed package."""
    path = ROOT / "LICENSE"
    if not path.is_file():
        path = next(Path(str(file.locate())) for file in metadata.files("crosskd") or [] if file.name == "LICENSE")
    return path.read_bytes()


# The archive


def pack(name: str, files: Mapping[str, bytes], output: AnyPath) -> None:
    """
    Writes the archive `output` with `files` (path -> content) in the folder `name`, atomically.

    Order, times and owners are fixed, so that the same content gives the same bytes.

    Raises:
        PipelineError: it cannot be written, say since the disk is full.
    """
    try:
        _write_archive(name, files, output)
    except OSError as error:
        raise PipelineError(
            f"cannot write {output}: {error}. Nothing was left behind: make room, or write elsewhere."
        ) from error


def _write_archive(name: str, files: Mapping[str, bytes], output: AnyPath) -> None:
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(stack.enter_context(replacing(output)).open("wb"))
        stream = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0))
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT))
        for path in sorted(files):
            member = tarfile.TarInfo(f"{name}/{path}")  # of time 0, and nobody's
            member.size = len(files[path])
            member.mode = 0o755 if path == "run.py" else 0o644
            archive.addfile(member, io.BytesIO(files[path]))


def unpack(archive: AnyPath, folder: AnyPath) -> Path:
    """
    The folder of the bundle, unpacked inside `folder` and compared with its manifest.

    Nothing outside that folder is written, and nothing is left behind if the archive is not what `pack` writes.

    Raises:
        ContractError: a path leaves the folder or comes twice, a member is no plain file, there are too many files or
            bytes, the archive is cut or no archive, or a file is not the one of the manifest.
        PipelineError: `folder` cannot be written, or holds a folder of that name.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unpacking.", dir=folder))
    except OSError as error:
        raise PipelineError(f"cannot write into {folder}: {error}. Give a folder that can be written.") from error
    try:
        name = _extract(Path(archive), temporary)
        fault = _fault_of_folder(temporary / name)
        if fault:
            fault = fault.replace(f"{temporary}{os.sep}", "")
            raise ContractError(f"{archive}: {fault}. Make the bundle again, or fetch it again.")
        if (folder / name).exists():
            raise PipelineError(f"{folder / name} is there already; remove it, or unpack into another folder")
        (temporary / name).rename(folder / name)
    finally:
        shutil.rmtree(temporary)
    return folder / name


def _extract(archive: Path, folder: Path) -> str:
    """Extracts into the empty `folder`; the name of the one folder that is in it then."""
    names: Dict[str, str] = {}
    size = 0
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:  # type: ignore
            for member in tar:
                size += member.size
                _check_member(archive, member, names)
                if len(names) > MOST_FILES or size > MOST_BYTES:
                    raise ContractError(
                        f"{archive} holds over {MOST_FILES} files or {MOST_BYTES >> 30} GiB; expected a bundle of "
                        "deploy.bundle. Do not unpack it."
                    )
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # of a plain file
                with path.open("xb") as file:
                    shutil.copyfileobj(content, file)
                path.chmod(0o755 if path.name == "run.py" else 0o644)
            if len(stream.read(LARGEST_READ)) == LARGEST_READ:  # reads on to the end, where gzip's checksum is
                raise tarfile.ReadError("something follows the last file")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ContractError(
            f"{archive} cannot be read as a .tar.gz ({error}); expected a whole bundle of deploy.bundle. It may be "
            "truncated: fetch it again."
        ) from error
    except OSError as error:
        raise PipelineError(f"cannot unpack {archive}: {error}") from error
    tops = {name.partition("/")[0] for name in names.values()}
    if len(tops) != 1:
        raise ContractError(f"{archive} holds the folders {sorted(tops)[:5]}; expected one, that of a bundle")
    return tops.pop()


class _Bounded:
    """A stream that refuses to read much at once, as tarfile does where a forged header says so."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.tell, self.seek, self._read = stream.tell, stream.seek, stream.read

    def read(self, size: int) -> bytes:
        if size > LARGEST_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _check_member(archive: Path, member: tarfile.TarInfo, names: Dict[str, str]) -> None:
    """
    Raises ContractError unless `member` is a plain file inside one folder, of a name that is new; adds it to `names`.

    Args:
        names: name in small letters, since some file systems take two cases for one name -> name.
    """
    parts = PurePosixPath(member.name).parts
    fault = ""
    if member.type != tarfile.REGTYPE:
        fault = "is no plain file"
    elif len(parts) < 2 or "/".join(parts) != member.name or not all(NAME.fullmatch(part) for part in parts):
        fault = "is no path of a bundle, which stays inside one folder"
    elif member.name.lower() in names:
        fault = "comes twice"
    if fault:
        raise ContractError(f"{archive}: the member {member.name!r:.100} {fault}. Do not unpack it: it is no bundle.")
    names[member.name.lower()] = member.name


def _fault_of_folder(folder: Path) -> str:
    """As `fault_of_files`; also names a file that the manifest does not list."""
    fault = fault_of_files(folder)
    if fault:
        return fault
    listed = {MANIFEST, *json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SIGNATURE}
    return f"{sorted(found ^ listed)[0]} is in one of archive and manifest, not in both" if found != listed else ""
