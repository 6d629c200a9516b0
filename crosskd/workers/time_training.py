"""
Times one form of a training step: `python -m crosskd.workers.time_training CONFIG --variant distill-fast -o FILE`.

A step is mmengine's own `train_step` with the config's optimiser wrapper: normalisation, forward pass, losses, backward
pass, gradient clipping, optimiser. It runs on one seeded batch of random pixels and boxes.
`benchmarks.studies.training_step` runs this command for each variant. Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

from crosskd.config import load_config
from crosskd.loop.precision import WRAPPERS, now_s, precision_of_wrapper, seconds_of, set_precision
from crosskd.training import seed_everything
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import check_writable, write_json

VARIANTS = {
    "student": "the student without a teacher, in float32",
    "student-fast": "the same as crosskd.train does it in bf16, with channels_last",
    "student-fast-fp32": "the same as crosskd.train does it in float32, with channels_last",
    "distill": "distillation in float32, the teacher as it comes",
    "distill-fast": "the same as crosskd.distill does it in bf16: also with the teacher prepared once",
    "distill-fast-fp32": "the same as crosskd.distill does it in float32",
    "teacher-forward": "the forward pass of the prepared teacher alone, in bf16",
    "teacher-forward-fp32": "the same in float32",
}
SEED = 0
PROFILED_STEPS = 5
YARDSTICK = (4, 256, 40, 40)
"""Images, channels, height, width of a 3x3 convolution to as many channels: among the quickest that libraries have."""
CONVOLUTIONS = 8
PROFILED_ROWS = 25


def prepared_run(config: Any, variant: str, device: str) -> tuple[Any, Any]:
    """
    (detector, optimiser wrapper) of a variant, set up as a training sets them up, with random weights.

    The learning rate is zero: every step does the whole work, and the same work, on weights that stay where they are.

    Args:
        config: of a CrossKDDetector; it is changed. device: "cpu" or "cuda".
    """
    from mmengine.optim import build_optim_wrapper

    from crosskd.loop.layout import use_channels_last
    from crosskd.models.detector import detector_from_config

    if variant.startswith("student"):
        config.model = config.model.student
    config.optim_wrapper.optimizer.lr = 0.0
    seed_everything(SEED)
    detector = detector_from_config(config, load_weights=False).train()
    if variant in ("student", "distill"):
        config.optim_wrapper.type = WRAPPERS["fp32"]
    else:
        set_precision(config, detector, "fp32" if variant.endswith("fp32") else "bf16")
        use_channels_last(detector, device)
    detector.to(device)
    return detector, build_optim_wrapper(detector, config.optim_wrapper)


def synthetic_batch(batch: int, size: tuple[int, int], classes: int) -> dict[str, list[Any]]:
    """
    A batch as a data loader gives it, the same at each call: `inputs`, each (3, H, W) uint8, and `data_samples`, each
    with 4 to 8 boxes.

    Args:
        size: (width, height) in pixels.
    """
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    width, height = size
    random = torch.Generator().manual_seed(SEED)
    inputs, samples = [], []
    for _ in range(batch):
        count = int(torch.randint(4, 9, (1,), generator=random))
        ends = torch.rand(count, 2, 2, generator=random).sort(1).values  # (count, corner, xy), fractions of the image
        boxes_xyxy = (ends * torch.tensor([width - 1, height - 1])).reshape(-1, 4)
        boxes_xyxy[:, 2:] += 1
        shape = (height, width)
        sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
        labels = torch.randint(0, classes, (count,), generator=random)
        sample.gt_instances = InstanceData(bboxes=boxes_xyxy, labels=labels)
        samples.append(sample)
        inputs.append(torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8))
    return {"inputs": inputs, "data_samples": samples}


def step_of(detector: Any, wrapper: Any, data: dict[str, list[Any]], variant: str) -> Callable[[], dict[str, Any]]:
    """What is timed, as a function; it returns the named losses (of `teacher-forward`: nothing)."""
    import torch

    if not variant.startswith("teacher-forward"):
        return lambda: detector.train_step(data, wrapper)
    images = detector.data_preprocessor(data, True)["inputs"]

    def forward() -> dict[str, Any]:
        with torch.no_grad(), wrapper.optim_context(detector):
            detector.teacher.bbox_head(detector.teacher.extract_feat(detector.teacher_inputs_from_student(images)))
        return {}

    return forward


def times_of_training(
    config: Any, variant: str, size: tuple[int, int], batch: int, steps: int, warmup: int, profile: bool
) -> dict[str, Any]:
    """
    `samples_s` (one number per step), `peak_mib` and `ready_mib` (the peak before the first step), and what ran where;
    if they are wanted, `profile`, torch's table of a few more steps, and `bound`, as `bound_of`.

    On a GPU, memory is what tensors took there; on a CPU it is that of this process, torch and all.

    Args:
        config: of a CrossKDDetector; it is changed. size: (width, height) in pixels.

    Raises:
        MeasurementError: the losses are not finite, so that the step may not be a usual one.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    detector, wrapper = prepared_run(config, variant, device)
    classes = getattr(detector, "student", detector).bbox_head.num_classes
    step = step_of(detector, wrapper, synthetic_batch(batch, size, classes), variant)

    def peak_mib() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        import resource  # Unix only

        # In bytes on macOS, in KiB elsewhere.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    ready_mib = peak_mib()
    samples_s = []
    for number in range(warmup + steps):
        start = now_s(device)
        losses = step()
        end = now_s(device)
        if number >= warmup:
            samples_s.append(end - start)
    named = {name: value.item() for name, value in losses.items()}
    if not all(map(math.isfinite, named.values())):
        raise MeasurementError(f"the losses of {variant} are {named}; expected finite ones. Is the size too small?")
    document = {
        "variant": variant,
        "precision": precision_of_wrapper(config.optim_wrapper.type),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "samples_s": samples_s,
        "ready_mib": ready_mib,
        "peak_mib": peak_mib(),
        "losses": named,
    }
    if profile:
        document["profile"] = profile_of(step, device)
        document["bound"] = bound_of(step, device)
    return document


def bound_of(step: Callable[[], Any], device: str) -> dict[str, float]:
    """
    What arithmetic alone takes of a step: `gmac`, its multiplications in convolutions and matrix products, in 10**9;
    `gmac_per_s`, the rate of a large convolution in float32; `step_s`; `least_s`, what they would take at that rate.

    Convolution and step are timed in turn, so that what else the machine does slows both.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    gmac = counter.get_total_flops() / 2 / 1e9
    maps = torch.randn(YARDSTICK, device=device)
    convolution = torch.nn.Conv2d(maps.shape[1], maps.shape[1], 3, padding=1, bias=False, device=device)
    yardstick_gmac = CONVOLUTIONS * maps[:, 0].numel() * convolution.weight.numel() / 1e9

    @torch.no_grad()
    def convolve() -> None:
        for _ in range(CONVOLUTIONS):
            convolution(maps)

    pairs_s = [(seconds_of(step, device), seconds_of(convolve, device)) for _ in range(PROFILED_STEPS)]
    step_s, yardstick_s = (statistics.median(times) for times in zip(*pairs_s, strict=True))
    gmac_per_s = yardstick_gmac / yardstick_s
    return {"gmac": gmac, "gmac_per_s": gmac_per_s, "step_s": step_s, "least_s": gmac / gmac_per_s}


def profile_of(step: Callable[[], Any], device: str) -> str:
    """torch.profiler's table of a few steps: the operators that take most time of their own on the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profiler(activities=activities, acc_events=True) as profiled:
        for _ in range(PROFILED_STEPS):
            step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=key, row_limit=PROFILED_ROWS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.workers.time_training",
        description="Time one form of a training step on random images.",
        epilog="variants: " + "; ".join(f"{name}: {words}" for name, words in VARIANTS.items()),
    )
    parser.add_argument("config", metavar="CONFIG", help="config of a distillation")
    parser.add_argument("--variant", choices=VARIANTS, required=True, metavar="NAME", help="what is timed, see below")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[320, 320], metavar=("WIDTH", "HEIGHT"), help="pixels (default: 320 320)"
    )
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images in a step (default: 4)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before these (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="for torch's operators (default: torch's choice)")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a step goes, by operator, "
                        "and what its multiplications alone would take")  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="JSON: samples_s, memory, what ran")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Measures, writes the file and prints the median."""
    arguments = _parser().parse_args(argv)
    check_writable(arguments.output)
    for flag, least in (("batch", 1), ("steps", 1), ("warmup", 0), ("threads", 1)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag} is {value}; expected at least {least}")
    if min(arguments.size) < 32:
        raise ConfigError(f"--size is {arguments.size}; expected at least 32 pixels each")
    config = load_config(arguments.config)
    if config.model.type != "CrossKDDetector":
        raise ConfigError(f"{arguments.config}: model.type is {config.model.type}; expected CrossKDDetector")
    if config.model.distill.method == "none":
        raise ConfigError(f"{arguments.config}: model.distill.method is none; expected a method that has a teacher")

    import torch
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel("ERROR")  # it names every parameter that the optimiser has or has not
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    times = times_of_training(
        config,
        arguments.variant,
        tuple(arguments.size),
        arguments.batch,
        arguments.steps,
        arguments.warmup,
        arguments.profile,
    )
    write_json(arguments.output, times)
    if arguments.profile:
        print(f"{PROFILED_STEPS} steps of {arguments.variant}, slowed a little by the profiler:\n{times['profile']}")
        bound = times["bound"]
        print(
            f"{bound['gmac']:.1f} * 10**9 multiplications a step; at {bound['gmac_per_s']:.1f} * 10**9 a second, as in "
            f"a large convolution in float32, they alone would take {bound['least_s']:.3f} s of {bound['step_s']:.3f} s"
        )
    median_s = statistics.median(times["samples_s"])
    print(f"{arguments.variant}: median {median_s:.3f} s a step, {times['precision']}, {times['threads']} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
