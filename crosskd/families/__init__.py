"""The families of heads that can be distilled, a module each; to be imported for their registration."""

from crosskd.families import atss, fcos, gfl, retina

__all__ = ["atss", "fcos", "gfl", "retina"]
