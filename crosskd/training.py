"""One training run, from a config to a weights file: what `crosskd.train` and `crosskd.distill` share."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosskd.config import add_override_argument, overrides_from_arguments, published_name
from crosskd.data import TrainingData, add_data_arguments, set_data, write_annotations
from crosskd.loop.distributed import is_first_process, local_rank, process_count, wait_for_all
from crosskd.loop.precision import WRAPPERS, fastest_precision, precision_asked_for, set_precision
from crosskd.run_dir import check_resumed, precision_of_run, save_run, set_run_dir, start_run, training_record
from crosskd.schedule import say_long_warm_ups
from crosskd.settings import EVALUATORS, metrics_of
from deploy.errors import ConfigError, MissingDependencyError

LOG_BACKENDS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend", "mlflow": "MLflowVisBackend"}
"""Package -> mmengine's back-end that writes to it."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """What a user may ask of a training, besides its config file and its data."""

    run_dir: Path
    """Where everything is written."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted key of the config -> value, of --epochs and --set."""
    start: str | None = None
    """The weights to start from, as `crosskd.download.local_weights` takes them; None: the config's load_from."""
    resume: bool = False
    """Whether to go on from the last checkpoint in `run_dir`."""
    seed: int = 0
    """Of the initial weights and the order of the images."""
    precision: str | None = None
    """A key of WRAPPERS; None: the config's, or what is measured the fastest."""
    accumulate: int | None = None
    """Batches to a step of the optimiser; None: the config's."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None: the config's."""
    ema: float | None = None
    """Share of the newest weights in a moving average, which is what is saved; None: what the config asks for."""
    auto_scale_lr: bool = False
    """Whether the learning rate is multiplied by images per step / the config's auto_scale_lr.base_batch_size."""
    patience: int = 10
    """Batches in a row whose loss is not finite that are skipped before the training ends."""
    log_to: tuple[str, ...] = ()
    """Keys of LOG_BACKENDS."""


@dataclasses.dataclass(frozen=True)
class TeacherCheck:
    """The measurement of a teacher before the first step."""

    images: int
    """How many validation images."""
    min_ap: float | None = None
    """The AP that is demanded, in points."""


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a config file, or mmdet::FAMILY/NAME.py for one of mmdet's own"
    )
    parser.add_argument(
        "-o", "--output", metavar="RUN_DIR", help="folder of the run (default: runs/<name of the config>)"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="WEIGHTS",
        help="weights to start from: a file, an address, 'published' for those that mmdet publishes for CONFIG, or "
        "mmdet::FAMILY/NAME.py for those of that config, or, under a teacher, 'teacher' for what fits of its neck and "
        "head; what does not fit starts anew (default: load_from of the config, else what that initialises with)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in RUN_DIR")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and data order (default: 0)")
    parser.add_argument(
        "--precision",
        choices=("auto", *WRAPPERS),
        default="auto",
        help="of the forward pass; auto: the config's, or the one in which a few steps are measured the fastest; fp16 "
        "needs a GPU (default: auto)",
    )
    parser.add_argument(
        "--epochs", type=int, help="length of the training; the schedule is stretched to it (default: the config's)"
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="batches to a step of the optimiser (default: the config's)",
    )
    group.add_argument(
        "--clip-grad", type=float, metavar="MAX_NORM", help="limit the norm of the gradient (default: the config's)"
    )
    group.add_argument(
        "--ema",
        type=float,
        nargs="?",
        const=0.0002,
        metavar="MOMENTUM",
        help="save a moving average of the weights, in which the newest ones have the share MOMENTUM (0.0002 if not "
        "given; at step n at least 100 / (100 + n), so that a short run forgets its beginning)",
    )
    group.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="multiply the learning rate by images per step / the config's auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=10,
        metavar="N",
        help="batches in a row that are skipped, for a loss that is not finite or an image that cannot be read, before "
        "training ends (default: 10)",
    )
    parser.add_argument(
        "--log-to", nargs="+", choices=sorted(LOG_BACKENDS), default=[], help="besides RUN_DIR/log.jsonl"
    )
    add_override_argument(parser)


def training_options_from_arguments(arguments: argparse.Namespace) -> TrainingOptions:
    """
    The options that the arguments of `add_training_arguments` ask for.

    Raises:
        ConfigError: a word of --set without '='.
    """
    epochs = {} if arguments.epochs is None else {"max_epochs": arguments.epochs}
    return TrainingOptions(
        run_dir=Path(arguments.output or f"runs/{Path(arguments.config).stem}"),
        overrides={**epochs, **overrides_from_arguments(arguments)},
        start=arguments.start,
        resume=arguments.resume,
        seed=arguments.seed,
        precision=None if arguments.precision == "auto" else arguments.precision,
        accumulate=arguments.accumulate,
        clip_grad=arguments.clip_grad,
        ema=arguments.ema,
        auto_scale_lr=arguments.auto_scale_lr,
        patience=arguments.patience,
        log_to=tuple(arguments.log_to),
    )


def set_starting_weights(config: Any, config_name: str, options: TrainingOptions) -> None:
    """
    Makes `load_from` of the config the local file of the weights to start from: those of --from, else the config's own.

    Raises:
        ConfigError, CheckpointError: as `crosskd.download.local_weights`.
    """
    from crosskd.download import local_weights

    given = config.get("load_from") or None
    if options.start and given:
        print(f"starting from --from {options.start}, and not from load_from of the config, {given}")
    named = options.start or given
    config.load_from = local_weights(named, published_name(config, config_name)) if named else None


def start_detector(config: Any, detector: Any, data: TrainingData, options: TrainingOptions) -> dict[str, str]:
    """
    Gives a detector, or the student that it owns, the weights of `load_from`, if any; says where each part starts from.
    A run that is resumed has its weights already.

    Returns:
        Name -> file of the weights, for the sidecar.

    Raises:
        CheckpointError: as `start_from_checkpoint` and `pretrained_parts`.
    """
    from crosskd.models.starting_weights import pretrained_inputs, pretrained_parts, start_from_checkpoint

    student = getattr(detector, "student", detector)
    if config.load_from:
        if not options.resume:
            start_from_checkpoint(student, config.load_from, data.class_names)
            detector.has_weights = True
        return {"load_from": config.load_from}
    named = pretrained_parts(student)
    if not options.resume:
        parts = [name for name, part in student.named_children() if any(True for _ in part.parameters())]
        print("starting " + ", ".join(f"{name} from {named.get(name, 'random numbers')}" for name in parts))
    return pretrained_inputs(student)


def run_training(
    config: Any,
    detector: Any,
    data: TrainingData,
    options: TrainingOptions,
    weights_name: str,
    inputs: dict[str, Any],
    teacher_check: TeacherCheck | None = None,
) -> Path:
    """
    Trains `detector` with mmengine's runner, saves the run, and returns the path of its weights,
    `<options.run_dir>/<weights_name>`.

    Args:
        config: the resolved config of `detector`; its data are set here.
        detector: a plain mmdet detector, or one that owns the one to be kept as `.student`.
        inputs: name -> file, for the sidecar: what went into the run besides its data.
        teacher_check: of the `.teacher` of `detector`; None: it has none, or it is not measured.

    Raises:
        ConfigError: the precision cannot be had on this device, or an option does not fit the config.
        CheckpointError: --resume, and there is nothing to go on from.
        MissingDependencyError: --log-to, and its package is not installed.
        TrainingError: the loss was not finite for too many batches in a row, weights are not, or something else ended
            the training.
    """
    import torch

    from crosskd.loop.guard import accept_single_values, check_weights, guard_training
    from crosskd.loop.hooks import FirstStepHook, errors_of_training
    from crosskd.loop.runner import TrainingRunner
    from crosskd.loop.teacher import check_teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = precision_asked_for(config, detector, options.precision, device)
    set_optimisation(config, options)
    set_log_backends(config, options.log_to)
    set_hooks(config, options.ema)
    set_processes(config)
    set_reproducible(config, options.seed)
    set_data(config, data, options.run_dir)
    student = getattr(detector, "student", detector)
    step_times_s: dict[str, float] = {}
    if precision is None and options.resume:  # as it was started, also on another machine
        precision = precision_of_run(options.run_dir)
    if precision is None:
        precision, step_times_s = fastest_precision(config, data, device)
    set_precision(config, detector, precision)
    record = training_record(config, data, inputs)
    if options.resume:
        check_resumed(record, options.run_dir)
    set_run_dir(config, options.run_dir, options.resume)
    new_files = write_annotations(data, options.run_dir) if is_first_process() else []
    wait_for_all()

    accept_single_values(detector)
    names = set(inspect.signature(TrainingRunner.__init__).parameters) - {"self", "model", "cfg"}
    details: dict[str, Any] = {}

    def on_start(runner: Any) -> None:
        say_long_warm_ups(config, runner.max_iters)
        if not options.resume:
            start_run(options.run_dir, record)

    first_step = FirstStepHook(on_start)
    with errors_of_training(first_step, options.run_dir, new_files):
        runner = TrainingRunner(model=detector, cfg=config, **{name: config[name] for name in names if name in config})
        runner.register_hook(first_step)
        if teacher_check is not None:
            details = check_teacher(config, detector, data, teacher_check.images, teacher_check.min_ap)
        guard_training(runner.model, options.patience)
        runner.train()
        check_weights(student)
    config.model = config.model.get("student", config.model)
    details |= {
        "seed": options.seed,
        "epochs": runner.max_epochs,
        "iterations": runner.iter,
        "skipped_batches": runner.message_hub.get_info("skipped_batches", 0),
        "processes": process_count(),
        "precision": config.optim_wrapper.type,
        "step_times_s": step_times_s,
        "device": next(student.parameters()).device.type,
    }
    weights = options.run_dir / weights_name
    if is_first_process():
        save_run(config, student, data, weights, inputs, details)
    return weights


def set_optimisation(config: Any, options: TrainingOptions) -> None:
    """
    Sets --accumulate, --clip-grad and --auto-scale-lr; checks --patience.

    Raises:
        ConfigError: a number is out of its range, or the config has no batch size that its learning rate is meant for.
    """
    if options.accumulate is not None:
        if options.accumulate < 1:
            raise ConfigError(f"--accumulate is {options.accumulate}; expected at least 1")
        config.optim_wrapper.accumulative_counts = options.accumulate
    if options.patience < 0:
        raise ConfigError(f"--patience is {options.patience}; expected 0 or more")
    if options.clip_grad is not None:
        if not options.clip_grad > 0:
            raise ConfigError(f"--clip-grad is {options.clip_grad}; expected a number above 0")
        config.optim_wrapper.pop("clip_grad", None)  # all of it: a limit of another kind may be there
        config.optim_wrapper.clip_grad = dict(max_norm=options.clip_grad)
    if options.auto_scale_lr:
        if "base_batch_size" not in (config.get("auto_scale_lr") or {}):
            raise ConfigError(
                "--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the batch size that its learning "
                "rate is meant for; add it, or set optim_wrapper.optimizer.lr"
            )
        config.auto_scale_lr.enable = True
        # mmengine multiplies by batch size x processes / base_batch_size and does not know of accumulation.
        config.auto_scale_lr.base_batch_size /= config.optim_wrapper.get("accumulative_counts", 1)


def set_log_backends(config: Any, packages: Sequence[str]) -> None:
    """
    Adds mmengine's back-ends for these packages to those of the config.

    Raises:
        MissingDependencyError: one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, f"--log-to {package}", f"pip install {package}")
        visualizer = config.get("visualizer") or dict(type="DetLocalVisualizer", name="visualizer")
        backends = visualizer.get("vis_backends") or [dict(type="LocalVisBackend")]
        config.visualizer = {**visualizer, "vis_backends": [*backends, dict(type=LOG_BACKENDS[package])]}


def set_hooks(config: Any, ema_momentum: float | None) -> None:
    """
    Adds the hooks of `crosskd.loop.hooks`; two take the place of mmengine's own in the config, with its arguments:
    CheckpointHook and EMAHook.

    Raises:
        ConfigError: the momentum is out of its range.
    """
    from crosskd.loop import hooks  # noqa: F401  registers them

    if ema_momentum is not None and not 0 < ema_momentum < 1:
        raise ConfigError(f"--ema is {ema_momentum}; expected a number between 0 and 1")
    config.default_hooks = {
        "checkpoint": dict(type="CheckpointHook", interval=1),
        **(config.get("default_hooks") or {}),
    }
    own = [hook for hook in config.get("custom_hooks") or [] if ema_momentum is None or hook["type"] != "EMAHook"]
    if ema_momentum is not None:
        own.append(dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=ema_momentum, update_buffers=True))
    config.custom_hooks = [
        *own,
        dict(type="EpochSeedHook"),
        dict(type="SameBuffersHook"),
        dict(type="JsonLinesHook", interval=config.default_hooks.get("logger", {}).get("interval", 10)),
    ]
    replaced = {"CheckpointHook": "AtomicCheckpointHook", "EMAHook": "StudentEMAHook"}
    for hook in (config.default_hooks.checkpoint, *config.custom_hooks):
        if hook is not None:  # None switches a default hook off
            hook["type"] = replaced.get(hook["type"], hook["type"])


def set_processes(config: Any) -> None:
    """Sets what mmengine needs to train in the processes that torchrun started, with GPUs or without."""
    import torch

    if process_count() == 1:
        if "launcher" in config:
            config.launcher = "none"
        return
    config.launcher = "pytorch"
    given = config.get("model_wrapper_cfg") or {}
    config.model_wrapper_cfg = dict(
        type="MMDistributedDataParallel",
        device_ids=[local_rank()] if torch.cuda.is_available() else None,
        broadcast_buffers=False,  # SameBuffersHook does, once an epoch
        find_unused_parameters=config.get("find_unused_parameters", given.get("find_unused_parameters", False)),
    )
    for key in EVALUATORS:
        for metric in metrics_of(config.get(key)):
            metric.collect_device = "gpu"  # by messages, as gloo can too; "cpu" means by files in a common folder


def set_reproducible(config: Any, seed: int) -> None:
    """
    Sets what, with EpochSeedHook, makes every epoch draw what it would draw in a run that is not interrupted.

    Raises:
        ConfigError: the config has another seed.
    """
    randomness = dict(config.get("randomness") or {})
    if randomness.get("seed") not in (None, seed):
        raise ConfigError(f"randomness.seed of the config is {randomness['seed']}, --seed is {seed}; give the same")
    config.randomness = {**randomness, "seed": seed}
    loader = config.train_dataloader
    loader.setdefault("worker_init_fn", dict(type="seed_worker"))
    loader.persistent_workers = False  # a worker that lives on has a random state that nothing restores


def seed_everything(seed: int) -> None:
    """
    Seeds Python, numpy and torch: to be called before a detector is built, whose layers draw their first weights then.
    """
    from mmengine.runner import set_random_seed

    set_random_seed(seed)
