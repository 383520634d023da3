"""A memory curve as the coordinates of a small picture. The template draws it; nothing here is markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320, 64


@dataclass(frozen=True, slots=True)
class CurvePicture:
    """`line` and `area` are points of SVG in a box of `width` by `height`; the top is the limit."""

    line: str
    area: str
    peak_mib: float
    limit_mib: int
    seconds: int
    width: int = WIDTH
    height: int = HEIGHT


def curve_picture(curve: Sequence[Sequence[float]], *, limit_mib: int) -> CurvePicture | None:
    """None for a curve of less than two points, which shows nothing."""
    if len(curve) < 2:
        return None
    first, last = curve[0][0], curve[-1][0]
    span, top = max(1.0, last - first), max(float(limit_mib), max(mib for _, mib in curve))
    points = [
        (round((at - first) / span * WIDTH, 1), round(HEIGHT - mib / top * HEIGHT, 1)) for at, mib in curve
    ]
    line = " ".join(f"{x},{y}" for x, y in points)
    area = f"0,{HEIGHT} {line} {points[-1][0]},{HEIGHT}"
    return CurvePicture(line, area, max(mib for _, mib in curve), limit_mib, round(last - first))
