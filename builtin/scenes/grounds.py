"""What things stand on: 12 plain colours, two-colour gradients, grass, night and sea."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "white": (250, 250, 250), "black": (30, 30, 36), "grey": (158, 163, 170), "brown": (150, 105, 75),
    "red": (224, 68, 68), "orange": (248, 150, 64), "yellow": (252, 222, 104), "green": (112, 192, 112),
    "teal": (62, 170, 166), "blue": (66, 106, 212), "purple": (150, 104, 202), "pink": (248, 182, 208),
}  # fmt: skip
PLACES = ("grass", "night", "sea")
SKY, GRASS, WATER, NIGHT = (156, 212, 248), (120, 196, 92), (58, 134, 206), (34, 40, 86)
STARS = [(10, 12), (30, 26), (52, 8), (72, 22), (92, 10), (86, 44), (14, 50), (40, 46), (64, 60), (95, 70), (6, 84)]


@dataclass(frozen=True)
class Ground:
    """A colour, two of them from top to bottom, or one of PLACES."""

    top: str
    bottom: str | None = None

    @property
    def is_plain(self) -> bool:
        return self.bottom is None and self.top in COLOURS


PLAIN = tuple(Ground(colour) for colour in COLOURS)
GRADIENTS = tuple(Ground(a, b) for a in COLOURS for b in COLOURS if a != b)
OUTDOORS = tuple(Ground(place) for place in PLACES)
ALL_GROUNDS = (*PLAIN, *GRADIENTS, *OUTDOORS)


@cache
def paint_ground(ground: Ground, height: int, width: int) -> np.ndarray:
    """Pixels uint8 [height, width, 3]; the caller must not change them."""
    if ground.top in COLOURS:
        first, last = (np.array(COLOURS[name], np.float32) for name in (ground.top, ground.bottom or ground.top))
        share = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
        rows = first + (last - first) * share
        return np.repeat(np.round(rows)[:, None], width, axis=1).astype(np.uint8)
    scale = 4  # drawn larger, for smooth edges
    size = (width * scale, height * scale)
    picture = Image.new("RGB", size, NIGHT if ground.top == "night" else SKY)
    pen = ImageDraw.Draw(picture)
    if ground.top == "night":
        radius = min(size) * 0.012
        for x, y in STARS:
            x, y = x / 100 * size[0], y / 100 * size[1]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 240, 190))
    else:
        pen.rectangle((0, size[1] * 0.62, *size), fill=GRASS if ground.top == "grass" else WATER)
    return np.asarray(picture.reduce(scale))
