"""The length of a training: all that counts in epochs is stretched with it."""

from __future__ import annotations

import itertools
from typing import Any

from crosskd.settings import schedulers_of
from deploy.errors import ConfigError

PERIODS = ("step_size", "step_size_up", "step_size_down", "total_steps", "patience", "cooldown")
"""Keys of a scheduler that are a number of epochs, not a point in the training."""
HOOK_EPOCHS = {
    "PipelineSwitchHook": ("switch_epoch",),
    "EMAHook": ("begin_epoch",),
    "StudentEMAHook": ("begin_epoch",),
    "YOLOXModeSwitchHook": ("num_last_epochs",),
    "CheckpointHook": ("save_begin",),
    "AtomicCheckpointHook": ("save_begin",),
}
"""Type of a hook -> its settings that count epochs."""


def set_epochs(config: Any, epochs: int) -> None:
    """
    Sets the number of epochs and stretches all that counts in epochs: schedulers with their warm-ups, hooks that switch
    something, the intervals of the loop, and the first epochs of a head (TOOD's `initial_epoch`).

    How often is validated and saved stays (`val_interval`, `interval`): that is how often one wants to look.

    Raises:
        ConfigError: not a number, fewer than one, or the config does not count in epochs.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"max_epochs is {epochs!r}; expected a number, at least 1")
    loop = config.get("train_cfg", {})
    if "max_epochs" not in loop:
        raise ConfigError(
            f"max_epochs is {epochs}, but train_cfg has no max_epochs to be set; expected a config of epochs"
        )
    before = loop.max_epochs
    loop.max_epochs = epochs
    if before == epochs:
        return

    def stretched(count: Any) -> Any:
        """Never 0 where it was not; never the whole training where it was a part, if there are two epochs or more."""
        if isinstance(count, bool) or not isinstance(count, (int, float)) or count <= 0:
            return count
        last = epochs - 1 if count < before and epochs > 1 else max(epochs, round(count * epochs / before))
        return min(max(1, round(count * epochs / before)), last)

    if "val_begin" in loop:
        loop.val_begin = stretched(loop.val_begin)
    if loop.get("dynamic_intervals"):
        loop.dynamic_intervals = [(stretched(epoch), interval) for epoch, interval in loop.dynamic_intervals]
    _stretch_schedulers(config, before, epochs, stretched)
    hooks = [*(config.get("default_hooks") or {}).values(), *(config.get("custom_hooks") or [])]
    for hook in hooks:
        if isinstance(hook, dict):
            _stretch_hook(hook, stretched)
    _stretch_first_epochs(config.get("model"), stretched)


def _stretch_hook(hook: Any, stretched: Any) -> None:
    kind = hook.get("type")
    if kind == "YOLOXModeSwitchHook":
        hook.setdefault("num_last_epochs", 15)  # mmdet's
    known = HOOK_EPOCHS.get(kind, ())
    for key in known:
        if key in hook:
            hook[key] = stretched(hook[key])
    for key, value in hook.items():
        if "epoch" in key and key not in known and isinstance(value, int) and not isinstance(value, bool):
            print(f"{kind}.{key} stays {value}: whether it is to be stretched with the training is not known")


def _stretch_first_epochs(node: Any, stretched: Any) -> None:
    """TOOD's heads begin with another assigner, for `initial_epoch` epochs."""
    if isinstance(node, dict):
        if "initial_epoch" in node:
            node["initial_epoch"] = stretched(node["initial_epoch"])
        for value in node.values():
            _stretch_first_epochs(value, stretched)


def _stretch_schedulers(config: Any, before: int, epochs: int, stretched: Any) -> None:
    """
    Keeps phases apart: a warm-up that would end before it begins takes one epoch, and what follows begins after it.
    Where the training has fewer epochs than phases, the shortest are left out, with a line.
    """
    counting = [one for one in schedulers_of(config) if one.get("by_epoch", True)]
    if not counting:
        return
    points = {0, *(one[key] for one in counting for key in ("begin", "end") if isinstance(one.get(key), int))}
    places = _stretched_points(sorted(points), epochs / before)
    gone = []
    for one in counting:
        length = one.get("end", before) - one.get("begin", 0)
        if "T_max" in one:  # the length of its phase, or counted from the beginning of the training
            one["T_max"] = length if one["T_max"] is None else one["T_max"]
            whole = one["T_max"] == one.get("end")
            kept = one["T_max"] == length
        for key in ("begin", "end"):
            if isinstance(one.get(key), int):
                one[key] = places[one[key]]
        new_length = one.get("end", epochs) - one.get("begin", 0)
        if new_length < 1:
            gone.append(one)
            continue
        if "Linear" in one["type"] and length > new_length == 1:
            one["convert_to_iter_based"] = True  # within the one epoch: by epochs it would only have its first factor
        if "T_max" in one:
            one["T_max"] = new_length if kept else one["end"] if whole else stretched(one["T_max"])
        if "milestones" in one:
            one["milestones"] = [max(1, round(epoch * epochs / before)) for epoch in one["milestones"]]
        if "periods" in one:
            ends = _stretched_points([0, *itertools.accumulate(one["periods"])], epochs / before)
            one["periods"] = [max(1, last - first) for first, last in itertools.pairwise(ends.values())]
        for key in PERIODS:
            if key in one:
                one[key] = stretched(one[key])
        if one["type"].endswith(("ExponentialLR", "ExponentialMomentum")):
            one["gamma"] **= before / epochs
    for one in gone:
        print(f"param_scheduler: {one['type']} has no whole epoch in a training of {epochs} and is left out")
    given = config.param_scheduler
    if gone and isinstance(given, dict) and "type" not in given:
        config.param_scheduler = {name: [one for one in part if one not in gone] for name, part in given.items()}
    elif gone:
        config.param_scheduler = [one for one in schedulers_of(config) if one not in gone]


def _stretched_points(points: list[int], factor: float) -> dict[int, int]:
    """Each of some sorted points -> where it is then: different ones stay different, if there is room for that."""
    last = round(points[-1] * factor)
    places: list[int] = []
    for number, point in enumerate(points):
        at_least = places[-1] + 1 if places else 0
        at_most = last - (len(points) - 1 - number)  # room for those that follow
        places.append(max(0, min(max(at_least, round(point * factor)), at_most)))
    return dict(zip(points, places, strict=True))


def say_long_warm_ups(config: Any, iterations: int) -> None:
    """Says which warm-ups by iteration take longer than the whole training, whose learning rate stays low then."""
    for number, one in enumerate(schedulers_of(config)):
        end = one.get("end")
        if not one.get("by_epoch", True) and isinstance(end, int) and end > iterations:
            print(
                f"warning: param_scheduler.{number} ({one['type']}) takes {end} steps, the whole training has "
                f"{iterations}: the learning rate is never that of the config. Train longer, or --set "
                f"param_scheduler.{number}.end={max(1, iterations // 10)}"
            )
