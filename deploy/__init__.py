"""
From a checkpoint to a running engine. Imports neither torch nor mmdet.

    from deploy import Detector

`Detector` is fetched when it is first asked for: a board may have no OpenCV, which it needs and other modules do not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.detector import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    if name == "Detector":
        from deploy.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
