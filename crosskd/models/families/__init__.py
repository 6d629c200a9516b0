"""The families of heads that can be distilled, a module each; to be imported for their registration."""

from __future__ import annotations

from crosskd.models.families import atss, ddod, fcos, gfl, paa, retina, rtmdet, tood, vfnet
from crosskd.models.heads import FAMILIES, HeadFamily, heads_with_decoder
from deploy.errors import ExportError

__all__ = ["atss", "ddod", "family_with_decoder", "fcos", "gfl", "paa", "retina", "rtmdet", "tood", "vfnet"]


def family_with_decoder(head_type: str) -> HeadFamily:
    """
    The family of a type of head whose boxes can be decoded in a graph.

    Raises:
        ExportError: there is none; the heads that have one are named.
    """
    if head_type not in heads_with_decoder():
        raise ExportError(
            f"cannot export the head {head_type}; can export {', '.join(heads_with_decoder())}. docs/add-a-head.md "
            "says how to add one."
        )
    return FAMILIES[head_type]
