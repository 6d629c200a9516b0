"""
What we call TensorRT by, against its real bindings: their recorded API here always, they themselves in the slow tests.

The recorded API and how it is compared are in tests/tensorrt_api.
"""

from __future__ import annotations

import enum
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from deploy.tensorrt.bindings import logger
from tests.tensorrt_api import check_usage

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests" / "tensorrt_api"
APIS = {version: check_usage.Api(version, api) for version, api in check_usage.load_versions().items()}
WHEELS = {
    "8.6.1": "tensorrt-bindings",
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu13-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
Install = Callable[[str], Any]


def test_the_logger_keeps_errors(fake_tensorrt: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    trt = fake_tensorrt("10.3.0")
    log = logger(trt)
    assert logger(trt) is log
    log.log(trt.ILogger.Severity.WARNING, "slow")
    log.log(trt.ILogger.Severity.ERROR, "broken")
    assert log.reasons() == "broken"
    assert capsys.readouterr().err == ""
    log.verbose = True
    log.log(trt.ILogger.Severity.VERBOSE, "tactic")
    assert capsys.readouterr().err == "tensorrt verbose: tactic\n"


# What we use ----------------------------------------------------------------------------------------------------------


def test_nothing_is_used_that_some_version_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    found = check_usage.main([str(ROOT / "deploy"), str(ROOT / "benchmarks"), "--min", "8.5"])
    printed = capsys.readouterr()
    assert found == 0, printed.out
    uses = re.match(r"(\d+) uses, 0 missing somewhere in 8\.5\.3 \.\. 11\.4\.0\.106", printed.err)
    assert uses
    assert int(uses[1]) > 10


@pytest.mark.parametrize(
    ("text", "missing_in"),
    [
        ("import tensorrt as trt\ntrt.BuilderFlag.FP16", "11.0.0.114, 11.1.0.106, 11.2.1.2, 11.3.0.99, 11.4.0.106"),
        ("self._trt.IProgressMonitor", "8.5.3, 8.6.1"),
        ("getattr(trt.NetworkDefinitionCreationFlag, 'STRONGLY_TYPED')", "8.5.3, 8.6.1"),
        ("from tensorrt import IInt8MinMaxCalibrator", "11.0.0.114, 11.1.0.106, 11.2.1.2, 11.3.0.99, 11.4.0.106"),
        ("trt.Runtime.engine_host_code_allowed", "8.5.3"),
        ("trt.IInt8EntropyCalibrator2.get_batch_size  # trt-ok", ""),
        ("getattr(trt.BuilderFlag, 'FP16', None)", ""),
        ("hasattr(trt.BuilderFlag, 'FP16')", ""),
        ("trt.ILogger.Severity.ERROR", ""),
        ("trt.ILogger.Severity.NONE", ", ".join(APIS)),
        ("trt.IInt8EntropyCalibrator2", "11.0.0.114, 11.1.0.106, 11.2.1.2, 11.3.0.99, 11.4.0.106"),
        ("trt.DimsHW.numel", ", ".join(APIS)),
        ("other.BuilderFlag.NONE", ""),
    ],
)
def test_the_check_finds_what_is_missing(
    text: str, missing_in: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used.py").write_text(text)
    assert check_usage.main([str(tmp_path)]) == bool(missing_in)
    assert capsys.readouterr().out.rpartition(" is missing in ")[2].strip() == missing_in


# The stand-in against the recorded API --------------------------------------------------------------------------------


def objects(trt: Any, plan: bytes) -> Iterator[Any]:
    """An object of each class of the stand-in that can be had by calling what makes it, without arguments."""

    class Log(trt.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            """Nothing is printed."""

    log = Log()
    network = trt.Builder(log).create_network(0)
    runtime = trt.Runtime(log)
    todo = [trt.Builder(log), trt.OnnxParser(network, log), runtime, runtime.deserialize_cuda_engine(plan)]
    while todo:
        found = todo.pop()
        yield found
        for name in dir(found):
            if name.startswith("create_") and not required(getattr(found, name)):
                todo.append(getattr(found, name)())


def required(function: Any) -> List[str]:
    """Names of the parameters that have no default."""
    return [name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty]


def public(names: Any) -> List[str]:
    return [name for name in names if not name.startswith("_")]


def overloads(signature: str) -> List[List[Tuple[str, bool]]]:
    """(name, whether it has a default) of the parameters of each overload of a recorded signature."""
    text = re.sub(r"<[^<>]*>", "", signature)
    name = text.split("(")[0]
    found = []
    for overload in re.split(rf" \| (?={name}\()", text):
        inside, depth, parts = "", 0, []
        for letter in overload.partition("(")[2]:
            depth += (letter in "([") - (letter in ")]")
            if depth < 0:
                break
            if letter == "," and depth == 0:
                parts.append(inside)
                inside = ""
            else:
                inside += letter
        parts += [inside] if inside.strip() else []
        found.append([(re.match(r"\s*(\w+)", part)[1], "=" in part) for part in parts])  # type: ignore[index]
    return found


def check_signature(name: str, function: Any, signature: str) -> None:
    """That some overload of the real function can be called in each way that the stand-in's can."""
    own = [(p.name, p.default is not p.empty) for p in inspect.signature(function).parameters.values()]
    for real in overloads(signature):
        same = [found for found, _ in own] == [wanted for wanted, _ in real[: len(own)]]
        optional = all(has_default for _, has_default in real[len(own) :])
        if same and optional and all(theirs or not ours for (_, ours), (_, theirs) in zip(own, real, strict=False)):
            return
    raise AssertionError(f"{name} takes {own} in the stand-in, and in the bindings: {signature}")


def check_class(name: str, kind: type, api: Any) -> None:
    assert name in api.classes, f"the bindings have no class {name}"
    for member in public(vars(kind)):
        value = vars(kind)[member]
        signature = api.member(name, member)
        assert signature, f"the bindings have no {name}.{member}"
        if inspect.isfunction(value):
            check_signature(f"{name}.{member}", value, signature)
        elif isinstance(value, property):
            assert signature.startswith("property"), f"{name}.{member} is {signature} in the bindings"
            assert value.fset is None or signature.startswith("property rw"), f"{name}.{member} is read-only"


def check_enum(name: str, kind: Any, api: Any) -> None:
    assert name in api.enums, f"the bindings have no enum {name}"
    for member in kind:
        assert member.name in api.enums[name], f"the bindings have no {name}.{member.name}"


@pytest.mark.parametrize("version", APIS)
def test_the_stand_in_offers_nothing_that_the_bindings_lack(
    version: str, fake_tensorrt: Install, detector_model: Callable[[], Any]
) -> None:
    api, trt = APIS[version], fake_tensorrt(version)
    seen = set()
    for name in public(vars(trt)):
        value = getattr(trt, name)
        if name == "test":  # how tests steer the stand-in
            continue
        seen.add(name)
        if isinstance(value, type) and issubclass(value, enum.Enum):
            check_enum(name, value, api)
        elif isinstance(value, type):
            check_class(name, value, api)
            for inner in (inner for inner in public(vars(value)) if isinstance(vars(value)[inner], enum.EnumMeta)):
                check_enum(f"{name}.{inner}", vars(value)[inner], api)
        elif inspect.isfunction(value):
            check_signature(name, value, api.functions[name])
        else:
            assert name in api.top, name
    assert len(seen) > 15
    kinds = set()
    for found in objects(trt, detector_model().SerializeToString()):
        kind = type(found).__name__
        kinds.add(kind)
        check_class(kind, type(found), api)
        for member in public(vars(found)):
            assert (api.member(kind, member) or "").startswith("property"), f"the bindings have no {kind}.{member}"
    assert kinds >= {
        "Builder",
        "IBuilderConfig",
        "INetworkDefinition",
        "OnnxParser",
        "Runtime",
        "ICudaEngine",
        "IExecutionContext",
    }


@pytest.mark.parametrize("version", APIS)
def test_creation_flags_have_the_numbers_of_the_bindings(version: str, fake_tensorrt: Install) -> None:
    """They are shifted into bits, and moved in TensorRT 11."""
    real = APIS[version].enum_values["NetworkDefinitionCreationFlag"]
    for member in fake_tensorrt(version).NetworkDefinitionCreationFlag:
        assert int(member) == real[member.name], member.name


def test_every_enum_member_that_decides_is_there_or_not_as_in_the_bindings(fake_tensorrt: Install) -> None:
    """What the builder asks with hasattr must be missing in the stand-in where it is in the bindings."""
    for version, api in APIS.items():
        trt = fake_tensorrt(version)
        for name in ("NetworkDefinitionCreationFlag", "BuilderFlag"):
            for member in ("EXPLICIT_BATCH", "STRONGLY_TYPED", "FP16", "INT8", "VERSION_COMPATIBLE", "TF32"):
                assert hasattr(getattr(trt, name), member) == (member in api.enums[name]), (version, name, member)
        for name in ("IProgressMonitor", "IInt8EntropyCalibrator2", "HardwareCompatibilityLevel"):
            assert hasattr(trt, name) == (name in api.top), (version, name)
        for member in (
            "builder_optimization_level",
            "hardware_compatibility_level",
            "int8_calibrator",
            "progress_monitor",
        ):
            assert hasattr(trt.IBuilderConfig, member) == bool(api.member("IBuilderConfig", member)), (version, member)


# The bindings themselves ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bindings(version)` -> a folder with the module tensorrt of that version over stand-in libraries."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crosskd" / "tensorrt-bindings"

    def make(version: str) -> Path:
        wheels = cache / version
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        if not list(wheels.glob(f"*-{tag}-*.whl")):
            words = ["-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels), f"{WHEELS[version]}=={version}"]
            _run_or_skip([sys.executable, "-m", "pip", "download", *words], f"no bindings of TensorRT {version}")
        folder = tmp_path_factory.mktemp(f"tensorrt-{version}")
        wheel = next(wheels.glob(f"*-{tag}-*.whl"))
        _run_or_skip(["sh", str(FOLDER / "stand_in.sh"), str(wheel), str(folder)], "g++ and binutils are needed")
        return folder

    return make


def _run_or_skip(words: List[str], reason: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(f"{reason}: {done.stderr.strip().splitlines()[-1:]}")


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_builds_and_runs_with_the_real_bindings(version: str, bindings: Callable[[str], Path], tmp_path: Path) -> None:
    """All that the builder and the runtime call, with the arguments that they give, as far as bindings can tell."""
    environment: Dict[str, str] = {
        **os.environ,
        "PYTHONPATH": f"{bindings(version)}{os.pathsep}{ROOT}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    words = [sys.executable, "-m", "tests.tensorrt_api.real_bindings", str(tmp_path)]
    found = subprocess.run(
        words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith(f"TensorRT {version}: ")
