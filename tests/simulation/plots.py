"""Lines over time as plain SVG: small, readable as text, and the same for the same run."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Line", "chart"]

WIDTH, HEIGHT = 720, 310
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 34, 68
COLOURS = ("#0b6e4f", "#c8553d", "#5b5f97", "#b8860b", "#3d7ea6", "#7a7a7a")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2", "1 3")


@dataclass(frozen=True)
class Line:
    label: str
    values: Sequence[float]
    """One a second."""


def chart(
    title: str, unit: str, lines: Sequence[Line], *, top: float, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """``top``: the end of the upright axis; what is above is drawn there. ``marks``: moments and their names."""
    seconds = max(len(line.values) for line in lines) - 1
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(second: float) -> str:
        return f"{LEFT + across * second / seconds:.1f}"

    def y(value: float) -> str:
        return f"{TOP + up * (1 - min(value, top) / top):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
        '  font-family="sans-serif" font-size="11" fill="#555">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16" font-size="13" fill="#222">{html.escape(title)}</text>',
    ]
    for step in range(5):
        value = top * step / 4
        parts.append(
            f'<path d="M{LEFT} {y(value)}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value)}" dy="4" text-anchor="end">{value:g}{unit}</text>'
        )
    parts += [
        f'<text x="{x(second)}" y="{TOP + up + 15}" text-anchor="middle">{second} s</text>'
        for second in range(0, seconds + 1, 10)
    ]
    for moment, name in marks:
        parts.append(
            f'<path d="M{x(moment)} {TOP}V{TOP + up}" stroke="#999" stroke-dasharray="2 2"/>'
            f'<text x="{x(moment)}" y="{TOP - 4}" text-anchor="middle">{html.escape(name)}</text>'
        )
    for number, line in enumerate(lines):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        points = " ".join(f"{x(second)},{y(value)}" for second, value in enumerate(line.values))
        stroke = f'stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
        row, column = divmod(number, 3)
        at = LEFT + column * across // 3
        height = TOP + up + 36 + 15 * row
        parts.append(
            f'<path d="M{at} {height - 4}h22" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            f'<text x="{at + 27}" y="{height}">{html.escape(line.label)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
