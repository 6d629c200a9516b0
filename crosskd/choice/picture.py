"""Latency against multiplications, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crosskd.choice.search import Candidate, Limits, Measured

WIDTH_PX, HEIGHT_PX, MARGIN_PX = 640, 400, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def plot(rows: Sequence[tuple[Candidate, Measured]], limits: Limits, chosen: Candidate) -> str:
    """
    One point for each measured student, a colour for each backbone, both axes logarithmic, a line at the budget.
    """
    times = [found.p99_ms for _, found in rows] + [limits.budget_ms]
    macs = [one.macs for one, _ in rows]

    def place(value: float, values: Sequence[float], start_px: float, end_px: float) -> float:
        low, high = math.log(min(values) * 0.9), math.log(max(values) * 1.1)
        return start_px + (end_px - start_px) * (math.log(value) - low) / (high - low)

    def x(value: float) -> float:
        return place(value, macs, MARGIN_PX, WIDTH_PX - MARGIN_PX)

    def y(value: float) -> float:
        return place(value, times, HEIGHT_PX - MARGIN_PX, MARGIN_PX)

    backbones = list(dict.fromkeys(one.backbone for one, _ in rows))
    budget = y(limits.budget_ms)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{HEIGHT_PX}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<line x1="{MARGIN_PX}" x2="{WIDTH_PX - MARGIN_PX}" y1="{budget:.1f}" y2="{budget:.1f}" stroke="black" '
        'stroke-dasharray="4"/>',
        f'<text x="{MARGIN_PX}" y="{budget - 4:.1f}">budget: {limits.budget_ms:g} ms</text>',
        f'<text x="{WIDTH_PX / 2}" y="{HEIGHT_PX - 8}" text-anchor="middle">multiplications, '
        f"{min(macs) / 1e9:.2f} to {max(macs) / 1e9:.2f} billion (logarithmic)</text>",
        f'<text x="14" y="{HEIGHT_PX / 2}" transform="rotate(-90 14 {HEIGHT_PX / 2})" text-anchor="middle">p99, '
        f"{min(times):.1f} to {max(times):.1f} ms (logarithmic)</text>",
    ]
    for number, backbone in enumerate(backbones):
        parts.append(f'<text x="{MARGIN_PX}" y="{16 + 14 * number}" fill="{COLOURS[number % 4]}">{backbone}</text>')
    for one, found in rows:
        radius = 7 if one == chosen else 4
        colour = COLOURS[backbones.index(one.backbone) % 4]
        title = f"{one.name}: {one.macs / 1e9:.2f} GMAC, {found.p99_ms:.2f} ms"
        parts.append(
            f'<circle cx="{x(one.macs):.1f}" cy="{y(found.p99_ms):.1f}" r="{radius}" fill="{colour}">'
            f"<title>{title}</title></circle>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
