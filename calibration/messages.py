"""What commands tell people while they work, on stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Prints for people, at once."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints a warning for people."""
    say(f"warning: {text}")
