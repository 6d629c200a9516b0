"""The methods of distillation, a class each, and which of them a config asks for."""

from __future__ import annotations

from typing import Any

from crosskd.models.heads import FAMILIES, DenseHead, HeadFamily
from crosskd.models.methods.crosskd import CrossKD
from crosskd.models.methods.ld import LocalisationDistillation
from crosskd.models.methods.method import DistillationMethod, TapPlaces
from crosskd.models.methods.mimic import Mimic
from crosskd.models.methods.pkd import PKD
from deploy.errors import ConfigError

DISTILLATION_METHODS: dict[str, tuple[type[DistillationMethod], ...]] = {
    "none": (),
    "crosskd": (CrossKD,),
    "pkd": (PKD,),
    "crosskd+pkd": (CrossKD, PKD),
    "mimic": (Mimic,),
    "ld": (LocalisationDistillation,),
}
"""`model.distill.method` -> its parts, whose losses are added up."""
SETTINGS = ("method", "split", "tap", "weights", "allow_missing_classes")
"""The keys that `model.distill` may have."""
TAPS = ("after_activation", "before_activation")

__all__ = ["DISTILLATION_METHODS", "DistillationMethod", "TapPlaces", "loss_weights", "methods_of_settings"]


def methods_of_settings(settings: dict[str, Any]) -> tuple[type[DistillationMethod], ...]:
    """
    The methods that `model.distill` asks for; none for plain training.

    Raises:
        ConfigError: it has missing, unknown or wrong entries.
    """
    if "method" not in settings or not set(settings) <= set(SETTINGS):
        raise ConfigError(
            f"model.distill has the keys {sorted(settings)}; expected method and, as wanted, some of "
            f"{sorted(set(SETTINGS) - {'method'})}"
        )
    if settings["method"] not in DISTILLATION_METHODS:
        raise ConfigError(
            f"model.distill.method is {settings['method']!r}; expected one of {', '.join(DISTILLATION_METHODS)}"
        )
    methods = DISTILLATION_METHODS[settings["method"]]
    for method in methods:
        method.check_settings(settings)
    if settings.get("tap", TAPS[0]) not in TAPS:
        raise ConfigError(f"model.distill.tap is {settings['tap']!r}; expected one of {', '.join(TAPS)}")
    return methods


def loss_weights(settings: dict[str, Any], student_head: DenseHead) -> dict[str, float]:
    """
    Loss key -> weight: those of `model.distill.weights`, else those published for the family of the head.

    PKD, which works with any head, has the weight 1 where the head is of no family.

    Raises:
        ConfigError: `weights` names other losses, or has no numbers.
    """
    defaults = FAMILIES.get(type(student_head).__name__, HeadFamily()).default_weights
    weights = settings.get("weights", {})
    has_numbers = isinstance(weights, dict) and all(isinstance(value, (int, float)) for value in weights.values())
    if not has_numbers or not set(weights) <= set(defaults):
        raise ConfigError(f"model.distill.weights is {weights!r}; expected numbers for some of {sorted(defaults)}")
    return {**defaults, **weights}
