"""
Builds and runs a small detector with TensorRT's real bindings over `stand_in.sh`. A child process of test_bindings.py.

    PYTHONPATH=FOLDER:. python -m tests.tensorrt_api.real_bindings WORK_FOLDER

The bindings check names and arguments but do nothing; tests/stand_ins does what is needed but checks little. A `Twin`
is one object of each: every call and every setting goes to both, and the answer is that of the stand-in. What the two
do not both have, or do not both take, ends the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.stand_ins.cuda import cuda_modules, cuda_python_stand_in
from tests.stand_ins.detector import CONTRACT, mini_detector
from tests.stand_ins.tensorrt import tensorrt_stand_in


class Twin:
    """A real object that does nothing, and a stand-in that answers."""

    def __init__(self, real: Any, fake: Any) -> None:
        vars(self).update(real=real, fake=fake)

    def __getattr__(self, name: str) -> Any:
        kind = type(self.real)
        here = f"{kind.__name__}.{name}"
        assert hasattr(kind, name) == hasattr(self.fake, name), f"only one of bindings and stand-in has {here}"
        if isinstance(getattr(kind, name), property):  # AttributeError if neither has it
            answer = getattr(self.fake, name)
            return twin(getattr(self.real, name), answer) if is_fake(answer) else answer
        return twin_function(getattr(self.real, name), getattr(self.fake, name))

    def __setattr__(self, name: str, value: Any) -> None:
        assert hasattr(self.fake, name), f"the stand-in has no {type(self.real).__name__}.{name}"
        setattr(self.real, name, real_of(value))
        setattr(self.fake, name, fake_of(value))


def twin(real: Any, fake: Any) -> Any:
    return Twin(real, fake) if is_fake(fake) else fake


def twin_function(real: Any, fake: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        result = None
        with contextlib.suppress(UnicodeDecodeError, SystemError, RuntimeError):  # nonsense for a text, size or shape
            result = real(*map(real_of, arguments), **{name: real_of(value) for name, value in named.items()})
        answer = fake(*map(fake_of, arguments), **{name: fake_of(value) for name, value in named.items()})
        return twin(result, answer)

    return call


def is_fake(value: Any) -> bool:
    return type(value).__qualname__.startswith("tensorrt_stand_in.<locals>.") and not isinstance(value, enum.Enum)


def fake_of(value: Any) -> Any:
    return value.fake if isinstance(value, Twin) else value


def real_of(value: Any) -> Any:
    if isinstance(value, Twin):
        return value.real
    if isinstance(value, enum.Enum):
        return getattr(getattr(BINDINGS, type(value).__name__), value.name)
    return value


class TwinClass:
    """A class of the bindings: makes twins, and knows what objects of it have."""

    def __init__(self, real: Any, fake: Any) -> None:
        self.real, self.fake = real, fake

    def __call__(self, *arguments: Any) -> Twin:
        return Twin(self.real(*map(real_of, arguments)), self.fake(*map(fake_of, arguments)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class TwinModule(ModuleType):
    """The module tensorrt."""

    def __init__(self, real: ModuleType, fake: ModuleType) -> None:
        super().__init__("tensorrt")
        self.real, self.fake, self.__version__ = real, fake, real.__version__

    def __getattr__(self, name: str) -> Any:
        assert hasattr(self.real, name) == hasattr(self.fake, name), f"only one of bindings and stand-in has {name}"
        real, fake = getattr(self.real, name), getattr(self.fake, name)
        if isinstance(fake, type) and issubclass(fake, enum.Enum):
            return fake
        if name in ("ILogger", "IProgressMonitor", "IOutputAllocator", "IInt8EntropyCalibrator2"):
            setattr(self, name, base_class(real, fake))
            return vars(self)[name]
        return TwinClass(real, fake) if isinstance(fake, type) else twin_function(real, fake)


def base_class(real: Any, fake: Any) -> type:
    """What our own loggers, monitors, allocators and calibrators derive from."""

    class Base(fake, real):
        def __init__(self) -> None:
            real.__init__(self)
            fake.__init__(self)

    return Base


NMS = """<ir_version: 8, opset_import: ["" : 17]>
nms (float[N, 3, 4, 4] images) => (float[D, 4] boxes, float[D] scores, int64[D] labels, int64[D] images_of)
<float least = {0.5}, int64 zero = {0}, int64 one = {1}>
{
    high = Greater (images, least)
    numbers = Cast <to = 1> (high)
    where = NonZero (numbers)
    places = Transpose <perm = [1, 0]> (where)
    boxes = Cast <to = 1> (places)
    scores = GatherND (images, places)
    labels = Gather <axis = 0> (where, one)
    images_of = Gather <axis = 0> (where, zero)
}"""
"""Any number of images, in which it finds all values above a half."""


def models(folder: Path) -> None:
    """Writes float.onnx and int8.onnx, of one image, and nms.onnx, of any number, which ends in detections."""
    import onnx

    from deploy.contract import write_sidecar

    nms = onnx.parser.parse_model(NMS)
    for name, model, changes in (
        ("float", mini_detector(), {}),
        ("int8", mini_detector(np.int8), {}),
        (
            "nms",
            nms,
            {
                "input_shape": (-1, 3, 4, 4),
                "outputs": "nms",
                "output_names": tuple(value.name for value in nms.graph.output),
            },
        ),
    ):
        onnx.save(model, str(folder / f"{name}.onnx"))
        write_sidecar(folder / f"{name}.onnx", {}, dataclasses.replace(CONTRACT, **changes))


INSPECTOR = {"Layers": [{"Name": "c", "LayerType": "Conv", "Inputs": [{"Format/Datatype": "Int8"}], "Outputs": []}]}
BUILDS = (
    ("float",),
    ("float", "--fp16", "--workspace-mib", "64"),
    ("int8", "--int8", "--opt-level", "1"),
    ("nms", "--shapes", "1", "2", "4", "--version-compatible", "--hardware-compatible"),
    ("int8", "--int8", "--dla-core", "0", "--gpu-fallback"),
)
"""Model and options, of all that changes which calls are made."""


def main(folder: Path) -> None:
    from deploy.build_trt import main as build
    from deploy.tensorrt.session import TrtSession

    models(folder)
    for number, (name, *options) in enumerate(BUILDS):
        engine = folder / f"{number}.engine"
        assert build([str(folder / f"{name}.onnx"), *options, "-o", str(engine)]) == 0, f"{name} {' '.join(options)}"
        with TrtSession(engine) as session:
            for batch in range(*session.batch_limits) or (1,):
                shape = (batch, *session.contract.input_shape[1:])
                outputs = session.infer({"images": np.random.default_rng(0).random(shape, np.float32)})
                assert all(np.isfinite(values).all() for values in outputs.values())
    print(f"TensorRT {BINDINGS.__version__}: {len(BUILDS)} built and run")


if __name__ == "__main__":
    import tensorrt as BINDINGS

    stand_in = tensorrt_stand_in(BINDINGS.__version__)
    stand_in.test.cuda, stand_in.test.dla_cores = cuda_python_stand_in(), 1
    stand_in.test.inspector = json.dumps(INSPECTOR)  # else none of the DLA's layers would be INT8
    sys.modules.update({"tensorrt": TwinModule(BINDINGS, stand_in), **cuda_modules(stand_in.test.cuda)})
    main(Path(sys.argv[1]))
