"""The families of heads that can be distilled, a module each; to be imported for their registration."""

from crosskd.models.families import atss, ddod, fcos, gfl, paa, retina, rtmdet, tood, vfnet

__all__ = ["atss", "ddod", "fcos", "gfl", "paa", "retina", "rtmdet", "tood", "vfnet"]
