"""Draw the built-in model's training pictures (one shape on a plain background), and recognise them in an image."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
HALF_EXTENTS = {"small": 0.20, "large": 0.38}  # of the shorter side
SHAPES = ("circle", "square", "triangle", "star")
# shapes that the built-in model was not trained on, to be learned (builtin/eval_finetuning.py)
NEW_SHAPES = ("diamond", "cross", "arrow", "hourglass", "chevron")
POLYGONS = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "cross": [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1),
              (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)],
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)],
    "hourglass": [(-0.9, -1), (0.9, -1), (0.15, 0), (0.9, 1), (-0.9, 1), (-0.15, 0)],
    "chevron": [(-0.9, -0.9), (0.1, -0.9), (0.9, 0), (0.1, 0.9), (-0.9, 0.9), (-0.1, 0)],
}  # fmt: skip
MAX_OFFSET = 0.08  # of the shorter side: maximum distance of the shape's centre from the middle
SUPERSAMPLING = 8


@dataclass(frozen=True)
class Picture:
    size: str
    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


ALL_PICTURES = tuple(
    Picture(size, colour, shape, background)
    for size, colour, shape, background in itertools.product(HALF_EXTENTS, COLOURS, SHAPES, COLOURS)
    if colour != background
)


def parse(prompt: str) -> Picture:
    """Parse a prompt of the built-in model's form. Raises ValueError for any other."""
    match = re.fullmatch(r"a (\w+) (\w+) (\w+) on a (\w+) background", prompt)
    picture = Picture(*match.groups()) if match else None
    if picture not in ALL_PICTURES:
        raise ValueError(f"not a prompt of the built-in model's form: {prompt!r}")
    return picture


def random_picture(rng: np.random.Generator) -> Picture:
    return ALL_PICTURES[rng.integers(len(ALL_PICTURES))]


def stencil(shape: str, half_extent: float, centre: tuple[float, float], height: int, width: int) -> np.ndarray:
    """Draw a shape's anti-aliased coverage (H, W) in [0, 1]; half extent and centre (y, x) in pixels."""
    s = SUPERSAMPLING
    (cy, cx), e = centre, half_extent
    mask = Image.new("L", (width * s, height * s))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse([(cx - e) * s, (cy - e) * s, (cx + e) * s, (cy + e) * s], fill=255)
    else:
        pen.polygon([((cx + e * x) * s, (cy + e * y) * s) for x, y in corners(shape)], fill=255)
    return np.asarray(mask.reduce(s), dtype=np.float32) / 255


def corners(shape: str) -> list[tuple[float, float]]:
    """Return the corners (x, y) of a shape of half extent 1."""
    if shape == "star":
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate([1, 0.42] * 5)]
    return POLYGONS[shape]


def draw(picture: Picture, height: int, width: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draw a picture as RGB float32 (H, W, 3) in [0, 255], at a random offset, or without `rng` in the middle."""
    side = min(height, width)
    dy, dx = rng.uniform(-MAX_OFFSET, MAX_OFFSET, 2) * side if rng is not None else (0, 0)
    centre = (height / 2 + dy, width / 2 + dx)
    coverage = stencil(picture.shape, HALF_EXTENTS[picture.size] * side, centre, height, width)[..., None]
    ground, ink = (np.array(COLOURS[name], dtype=np.float32) for name in (picture.background, picture.colour))
    return ground + coverage * (ink - ground)


def read(image: Image.Image, shapes: Sequence[str] = SHAPES) -> Picture | None:
    """Recognise the picture in an image, of the given shapes; None if the image has one colour only.

    The background is the most frequent named colour of the border, the ink the most frequent other colour. Shape and
    size are those of the stencil with the best overlap after aligning the centres of mass.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    ground = np.bincount(border).argmax()
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    counts[ground] = 0
    ink = counts.argmax()
    if not counts[ink]:
        return None
    # share of ink in each pixel: its position on the line from background to ink
    line = palette[ink] - palette[ground]
    coverage = np.clip((pixels - palette[ground]) @ line / (line @ line), 0, 1)
    size, shape = max(itertools.product(HALF_EXTENTS, shapes), key=lambda pair: _overlap(coverage, *pair))
    return Picture(size, names[ink], shape, names[ground])


def _overlap(coverage: np.ndarray, size: str, shape: str) -> float:
    """Compute the intersection over union of an ink mask and a stencil moved to its centre of mass."""
    height, width = coverage.shape
    half_extent = HALF_EXTENTS[size] * min(height, width)
    middle = (height / 2, width / 2)
    own, target = _centroid(stencil(shape, half_extent, middle, height, width)), _centroid(coverage)
    centre = (middle[0] + target[0] - own[0], middle[1] + target[1] - own[1])
    other = stencil(shape, half_extent, centre, height, width)
    return float(np.minimum(coverage, other).sum() / np.maximum(coverage, other).sum())


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    ys, xs = np.indices(mask.shape)
    return float((ys * mask).sum() / mask.sum()), float((xs * mask).sum() / mask.sum())
