"""
Command: what was seen of a model's activations, and what share of the values each range method would clip.

    python -m calibration.statistics student.statistics.npz

Prints a file of `calibration.quantize --statistics`, which `calibration.activation_statistics` describes.
"""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional

from calibration.activation_statistics import Collected, read_statistics
from calibration.placement import DEFAULT_TARGET, PLACEMENTS, has_signed_activations
from calibration.ranges import RANGE_METHODS, range_from_statistics
from deploy.errors import command


def table_from_statistics(collected: Collected, target: str) -> str:
    """
    The statistics as text, for people, and what share of the values each method of `calibration.ranges` would clip.

    Args:
        target: runtime, by which the ranges are symmetric about 0 (tensorrt) or not.
    """
    methods = [method for method in RANGE_METHODS if method != "max"]
    width = max((len(name) for name in collected.statistics), default=0)
    columns = ["smallest", "largest", "mean", "deviation", "zeros", *methods]
    lines = [
        f"{len(collected.image_ids)} images; clipped, for {target}, by {', '.join(methods)}:",
        f"{'tensor':{width}}{''.join(f'{column:>12}' for column in columns)}",
    ]
    for name, seen in collected.statistics.items():
        line = f"{name:{width}}{seen.minimum:12.4g}{seen.maximum:12.4g}"
        if seen.has_histogram:
            ranges = [range_from_statistics(seen, method, has_signed_activations(target)) for method in methods]
            shares = [seen.zero_share, *(seen.share_outside(*limits) for limits in ranges)]
            line += f"{seen.mean:12.4g}{seen.std:12.4g}{''.join(f'{share:12.3%}' for share in shares)}"
        lines.append(line)
    return "\n".join(lines)


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Prints one file; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.statistics", description="What was seen of a model's activations."
    )
    parser.add_argument("file", help="file of calibration.quantize --statistics")
    parser.add_argument(
        "--target", choices=sorted(PLACEMENTS), default=DEFAULT_TARGET,
        help="runtime that the ranges are for (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    print(table_from_statistics(read_statistics(arguments.file), arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
