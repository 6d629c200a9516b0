from __future__ import annotations

from typing import Any, Callable

import pytest

from deploy.contract import ModelContract
from deploy.errors import ConfigError, EngineBuildError
from deploy.graphs.precision import GRAPHS
from deploy.tensorrt.options import (
    BuildOptions,
    Recipe,
    Typing,
    check_options,
    recipe_for,
    typing_of,
    typing_of_version,
)

Install = Callable[[str], Any]
VERSIONS = ("8.5.3", "8.6.1", "10.3.0", "10.16.1.11", "11.4.0.106")
STRONG, FLAGS, BOTH = Typing("11.4", True, False), Typing("8.6", False, True), Typing("10.3", True, True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_known_by_its_bindings_as_by_its_number(version: str, fake_tensorrt: Install) -> None:
    assert typing_of(fake_tensorrt(version)) == typing_of_version(version)
    with pytest.raises(ConfigError, match="'new' is no version"):
        typing_of_version("new")


@pytest.mark.parametrize(
    ("options", "strong", "both", "flags"),
    [
        (BuildOptions("fp32"), Recipe("fp32", True), Recipe("fp32", True), Recipe("fp32", False)),
        (BuildOptions("fp16"), Recipe("fp16", True), Recipe("fp16", True), Recipe("fp32", False, ("FP16",))),
        (
            BuildOptions("int8"),
            Recipe("int8", True),
            Recipe("int8", True),
            Recipe("int8_tensorrt8", False, ("FP16", "INT8")),
        ),
        (BuildOptions("int8", scales="fp16"), Recipe("int8", True), Recipe("int8", True), "expected TensorRT 10.0"),
        (
            BuildOptions("int8", scales="fp32"),
            Recipe("int8_fp32_scales", True),
            Recipe("int8_fp32_scales", False, ("FP16", "INT8")),
            Recipe("int8_tensorrt8", False, ("FP16", "INT8")),
        ),
        (BuildOptions("fp32", dla_core=0), *["a DLA runs FP16 and INT8 only"] * 3),
        (BuildOptions("fp16", dla_core=0), Recipe("fp16", True), *[Recipe("fp32", False, ("FP16",))] * 2),
        (
            BuildOptions("int8", dla_core=0),
            Recipe("int8", True),
            *[Recipe("fp32", False, ("FP16", "INT8"), calibrated=True)] * 2,
        ),
        (
            BuildOptions("int8", dla_core=0, scales="fp32"),
            Recipe("int8_fp32_scales", True),
            *["takes ranges, no Q/DQ"] * 2,
        ),
    ],
)
def test_the_recipe(options: BuildOptions, strong: Any, both: Any, flags: Any) -> None:
    for typing, expected in ((STRONG, strong), (BOTH, both), (FLAGS, flags)):
        if isinstance(expected, str):
            with pytest.raises(EngineBuildError, match=expected):
                recipe_for(options, typing)
            continue
        recipe = recipe_for(options, typing)
        assert recipe == expected
        assert recipe.graph in GRAPHS
        if options.precision == "int8":  # INT8 is in the graph, or allowed and given ranges
            assert "int8" in recipe.graph or ("INT8" in recipe.flags and recipe.calibrated)
        assert not (recipe.strongly_typed and recipe.flags)  # TensorRT refuses both together


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (BuildOptions(opt_level=3), "--opt-level"),
        (BuildOptions(hardware_compatible=True), "--hardware-compatible"),
        (BuildOptions(version_compatible=True), "--version-compatible"),
    ],
)
def test_an_option_that_came_later_is_refused(
    options: BuildOptions, flag: str, fake_tensorrt: Install, detector_contract: ModelContract
) -> None:
    message = f"TensorRT 8.5.3 does not have {flag}; expected TensorRT 8.6 or newer: leave it out"
    with pytest.raises(EngineBuildError, match=message):
        check_options(fake_tensorrt("8.5.3"), options, detector_contract)
    check_options(fake_tensorrt("8.6.1"), options, detector_contract)


def test_shapes_are_for_a_dynamic_batch_and_needed_there(
    fake_tensorrt: Install, detector_contract: ModelContract
) -> None:
    trt = fake_tensorrt("10.3.0")
    dynamic = ModelContract.from_json({**detector_contract.to_json(), "input_shape": [-1, 3, 64, 64]}, "here")
    check_options(trt, BuildOptions(shapes=(1, 2, 4)), dynamic)
    with pytest.raises(ConfigError, match="takes any number of images, --shapes is missing"):
        check_options(trt, BuildOptions(), dynamic)
    with pytest.raises(ConfigError, match=r"takes 1 image\(s\) at a time: leave it out"):
        check_options(trt, BuildOptions(shapes=(1, 2, 4)), detector_contract)
