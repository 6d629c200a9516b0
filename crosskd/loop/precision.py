"""
The precision that a training computes in: the one that is asked for, or the one whose steps were measured the fastest.

A processor that has instructions for bf16 is not always faster with them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crosskd.data import TrainingData, set_data, write_annotations
from deploy.errors import ConfigError, DataError

WRAPPERS = {"fp32": "OptimWrapper", "bf16": "Bf16OptimWrapper", "fp16": "AmpOptimWrapper"}
"""Precision -> mmengine's optimiser wrapper, from the most exact on."""
WARM_UP_STEPS = 2
TIMED_STEPS = 3
LEAST_GAIN = 0.03
"""The share of a step that a less exact precision has to save."""


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """What the measurement before the first step found."""

    median_s: dict[str, float]
    """Precision -> seconds of a step, on the slowest process; infinite where it does not run."""
    faults: dict[str, str]
    """Precision -> why it does not run."""

    @property
    def fastest(self) -> str:
        """The fastest precision; of those that are about as fast, the most exact."""
        chosen = "fp32"
        for name, step_s in self.median_s.items():
            if step_s < (1 - LEAST_GAIN) * self.median_s[chosen]:
                chosen = name
        return chosen


def precision_asked_for(config: Any, detector: Any, precision: str | None, device: str) -> str | None:
    """
    A key of WRAPPERS, or the type of another optimiser wrapper that the config names; None: the fastest.

    Args:
        precision: of --precision, if given. device: "cpu" or "cuda".

    Raises:
        ConfigError: fp16 without a GPU, or a two-stage detector in another precision than fp32.
    """
    if precision == "fp16" and device != "cuda":
        raise ConfigError("--precision fp16 needs a GPU (its loss scaling does); use bf16 on a CPU")
    student = getattr(detector, "student", detector)
    if not hasattr(student, "bbox_head"):
        if precision not in (None, "fp32"):
            raise ConfigError(f"--precision {precision}: a {type(student).__name__}, of two stages, trains in fp32")
        print(f"precision: fp32, as a {type(student).__name__}, of two stages, trains in no other")
        return "fp32"
    if precision is not None:
        return precision
    named = config.optim_wrapper.get("type", "OptimWrapper")
    return None if named == "OptimWrapper" else precision_of_wrapper(named)  # mmdet's own configs all name it


def precision_of_wrapper(kind: str) -> str:
    """The key of WRAPPERS, or the type itself of a wrapper that is none of them."""
    return {value: key for key, value in WRAPPERS.items()}.get(kind, kind)


def set_precision(config: Any, detector: Any, precision: str) -> None:
    """
    Sets the type of the config's optimiser wrapper, keeps losses and gradients right, and prepares the teacher.

    Args:
        precision: as `precision_asked_for` gives it.
    """
    import torch

    from crosskd.loop.amp import keep_losses_in_float32, widen_single_columns

    config.optim_wrapper.type = WRAPPERS.get(precision, precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is not None:
        keep_losses_in_float32(getattr(detector, "student", detector).bbox_head)
    if precision == "bf16":
        widen_single_columns(getattr(detector, "student", detector))
    if hasattr(detector, "prepare_teacher"):
        detector.prepare_teacher(dtype)


def fastest_precision(config: Any, data: TrainingData, device: str) -> tuple[str, dict[str, float]]:
    """
    (the precision in which a step of this training is fastest, precision -> seconds of a step); tells it in a line.

    Nothing of the training is touched: the steps are those of detectors of their own, with random weights, on a batch
    that goes through the config's pipeline apart, and random states are put back. Several processes measure together
    and come to the same answer.

    Args:
        config: resolved, with its data set. device: "cpu" or "cuda".
    """
    candidates = candidates_of(device)
    if len(candidates) == 1:
        print(f"precision: {candidates[0]}, the only one that this {device} has instructions for")
        return candidates[0], {}
    times = measured_times(config, data, device, candidates)
    chosen = times.fastest
    others = [words_of_time(name, times) for name in candidates if name != chosen]
    print(f"precision: {words_of_time(chosen, times)}; {', '.join(others)}; --precision {' or '.join(candidates)} to "
          "choose")  # fmt: skip
    return chosen, {name: step_s for name, step_s in times.median_s.items() if math.isfinite(step_s)}


def candidates_of(device: str) -> list[str]:
    """The precisions that a device has instructions for, the most exact first."""
    from crosskd.loop.amp import computes_in_bf16

    return ["fp32", *(["bf16"] if computes_in_bf16(device) else []), *(["fp16"] if device == "cuda" else [])]


def words_of_time(precision: str, times: StepTimes) -> str:
    if precision in times.faults:
        return f"{precision} does not run ({times.faults[precision]})"
    return f"{precision} takes {times.median_s[precision]:.3g} s a step"


def measured_times(config: Any, data: TrainingData, device: str, precisions: list[str]) -> StepTimes:
    """The time of a step in each precision, measured in turn, so that what else the machine does slows all of them."""
    import torch
    from mmengine.dist import all_reduce

    from crosskd.loop.aside import quiet_logger, random_states_kept

    faults: dict[str, str] = {}
    samples_s: dict[str, list[float]] = {name: [] for name in precisions}
    steps: dict[str, Callable[[], Any]] = {}
    with random_states_kept(), quiet_logger():
        for number in range(1 + WARM_UP_STEPS + TIMED_STEPS):
            for name in precisions:
                if name in faults:
                    continue
                try:
                    if number == 0:
                        with random_states_kept():  # the same batch for all
                            steps[name] = step_of_twin(config, data, name, device)
                    else:
                        samples_s[name].append(seconds_of(steps[name], device))
                except Exception as error:  # whatever an operator raises that lacks a type, or memory
                    faults[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    steps.pop(name, None)
        medians_s = [statistics.median(samples_s[name][WARM_UP_STEPS:]) if name not in faults else math.inf
                     for name in precisions]  # fmt: skip
    steps.clear()
    if device == "cuda":
        torch.cuda.empty_cache()
    slowest_s = torch.tensor(medians_s, dtype=torch.float64)
    all_reduce(slowest_s, op="max")
    return StepTimes(dict(zip(precisions, slowest_s.tolist(), strict=True)), faults)


def now_s(device: str) -> float:
    """The clock in seconds, once a GPU ("cuda") has done all that was started on it."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """How long one call takes, with all that it starts on a GPU."""
    begin = now_s(device)
    step()
    return now_s(device) - begin


def step_of_twin(config: Any, data: TrainingData, precision: str, device: str) -> Callable[[], Any]:
    """A training step of a detector like the config's, with random weights, set up as a training sets it up."""
    from mmengine.optim import build_optim_wrapper

    from crosskd.loop.guard import accept_single_values
    from crosskd.loop.layout import use_channels_last
    from crosskd.models.detector import detector_from_config

    config = copy.deepcopy(config)
    batch = batch_of_training(config, data)
    twin = detector_from_config(config, load_weights=False).train()
    set_precision(config, twin, precision)
    accept_single_values(twin)
    twin.to(device)
    use_channels_last(twin, device)
    wrapper = build_optim_wrapper(twin, config.optim_wrapper)
    return lambda: twin.train_step(batch, wrapper)


def batch_of_training(config: Any, data: TrainingData) -> Any:
    """
    A batch as the config's training loader gives it, from a data set of its own of a few of the images.

    Args:
        config: its data are set anew.
    """
    from mmdet.registry import DATASETS
    from mmengine.registry import FUNCTIONS

    loader = config.train_dataloader
    size = loader.get("batch_size") or loader.batch_sampler.batch_size
    # Evenly spread, those with boxes first: a config may leave the others out.
    spread = data.train.images[:: max(1, len(data.train.images) // (4 * size))]
    images = sorted(spread, key=lambda image: len(image.labels) == 0)[: 2 * size]
    few = dataclasses.replace(data.train, images=images)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it is told once, later
        set_data(config, TrainingData(few, few), Path(folder))
        write_annotations(TrainingData(few, few), Path(folder))
        dataset = DATASETS.build(loader.dataset)
        samples = list(readable_samples(dataset, size))
    kind = dict(loader.get("collate_fn") or dict(type="pseudo_collate"))
    return FUNCTIONS.get(kind.pop("type"))([samples[number % len(samples)] for number in range(size)], **kind)


def readable_samples(dataset: Any, most: int) -> Iterator[Any]:
    """The first samples of a data set, at most so many, without those whose image cannot be read."""
    for number in range(len(dataset)):
        with contextlib.suppress(DataError):
            yield dataset[number]
            most -= 1
        if most == 0:
            return
