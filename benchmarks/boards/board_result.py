"""What every result that a board makes says of the model, the machine and the clock there."""

from __future__ import annotations

import time
from typing import Any, Dict, Optional

from benchmarks.measuring.environment import read_environment, read_now
from deploy.board.commands import BoardModel

CLOCK_JUMP_S = 1.0
"""Of the clock of the day while something runs: more is said. What is timed goes by a clock that does not jump."""


def model_of_result(model: BoardModel) -> Dict[str, Any]:
    """The `model` of a result file (`benchmarks.measuring.result`)."""
    return {
        "file": str(model.path),
        "format": model.path.suffix[1:],
        "runtime": model.target.name,
        "sha256": model.sidecar["artefact"]["sha256"],
        "bytes": model.sidecar["artefact"]["bytes"],
        "parameters": model.parameters,
        "inputs": model.sidecar["inputs"],
        "command": model.sidecar["command"],
    }


class BoardWatch:
    """The machine before, while and after something is measured on it."""

    def __init__(self, board: Optional[str]) -> None:
        self._environment = {**read_environment(), "board": board}
        self._start = time.time(), time.monotonic()

    def environment(self) -> Dict[str, Any]:
        """
        The `environment` of a result file: as it was at first, and of the end `after`, as `now` is of the start, and
        `clock_jump_s`, by how much the clock of the day was set meanwhile.
        """
        day_s, steady_s = (end - start for end, start in zip((time.time(), time.monotonic()), self._start))
        jump_s = round(day_s - steady_s, 1)
        return {
            **self._environment,
            "after": read_now(),
            "clock_jump_s": jump_s if abs(jump_s) > CLOCK_JUMP_S else 0.0,
        }
