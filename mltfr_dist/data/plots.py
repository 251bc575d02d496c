"""Small PNG plots drawn with Pillow: both axes logarithmic, dots joined by a line."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

_SIZE = (720, 440)
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 36, 700, 390
_INK, _GRID, _LINE = (40, 40, 40), (225, 225, 225), (31, 119, 180)


def line_plot(x: np.ndarray, y: np.ndarray, title: str, x_label: str, y_label: str) -> Image.Image:
    """Positive values ``y`` [n] over positive ``x`` [n], on logarithmic axes."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    tops = [max(1, int(np.ceil(np.log10(max(values.max(initial=1), 2))))) for values in (x, y)]
    for axis, top in enumerate(tops):
        for power in range(top + 1):
            text = f"{10**power:,}"
            if axis == 0:
                place = _LEFT + (_RIGHT - _LEFT) * power / top
                draw.line([(place, _TOP), (place, _BOTTOM)], fill=_GRID)
                draw.text((place, _BOTTOM + 6), text, fill=_INK, anchor="ma")
            else:
                place = _BOTTOM - (_BOTTOM - _TOP) * power / top
                draw.line([(_LEFT, place), (_RIGHT, place)], fill=_GRID)
                draw.text((_LEFT - 6, place), text, fill=_INK, anchor="rm")
    across = _LEFT + (_RIGHT - _LEFT) * np.log10(x) / tops[0]
    up = _BOTTOM - (_BOTTOM - _TOP) * np.log10(y) / tops[1]
    points = list(zip(across.tolist(), up.tolist()))
    if len(points) > 1:
        draw.line(points, fill=_LINE, width=2)
    for a, b in points[:2000]:
        draw.ellipse([(a - 2, b - 2), (a + 2, b + 2)], fill=_LINE)
    draw.rectangle([(_LEFT, _TOP), (_RIGHT, _BOTTOM)], outline=_INK)
    draw.text((_SIZE[0] / 2, 16), title, fill=_INK, anchor="mm")
    draw.text(((_LEFT + _RIGHT) / 2, _SIZE[1] - 14), x_label, fill=_INK, anchor="mm")
    draw.text((8, 16), y_label, fill=_INK, anchor="lm")
    return image
