"""Image sizes that a text-to-image model draws."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import BitDanceError, whole_number
from ..model.class_config import ImageNetConfig
from ..model.fields import Size
from ..model.grid import Grid
from ..model.prompt import PromptTokenizer
from ..model.text_config import BitDanceConfig

MAX_SIDE = 2**16  # pixels: no grid is as large
# widths by heights that a user picks from, and how far a model's nearest size may be from one
ASPECTS = ("1:1", "4:3", "3:2", "16:9", "2:1", "21:9", "4:1", "3:4", "2:3", "9:16", "1:2", "9:21", "1:4")
NEAR = 1.26


def make_grid(
    config: BitDanceConfig, prompts: PromptTokenizer, height: int, width: int, allow_untrained_size: bool = False
) -> Grid:
    """Make the token grid of an image of height x width pixels. Raises BitDanceError with the nearest valid sizes."""
    height, width = whole_number("height", height, 1, MAX_SIDE), whole_number("width", width, 1, MAX_SIDE)
    trained = config.defaults.trained_sizes
    if trained is not None and (height, width) not in trained and not allow_untrained_size:
        near = sorted(trained, key=lambda s: abs(math.log(s[0] / height)) + abs(math.log(s[1] / width)))
        raise BitDanceError(
            f"{width}x{height} (width x height) is not a size that {config.family} was trained on; "
            f"nearest: {names(near[:3])}"
        )
    downscale, patch_size = config.autoencoder.downscale, config.patch_size
    step = downscale * patch_size
    if height % step or width % step:
        fitting = [max(1, round(side / step)) * step for side in (height, width)]
        raise BitDanceError(
            f"{width}x{height} (width x height) does not fit {config.family}: both sides must be multiples of {step} "
            f"pixels ({patch_size}x{patch_size} tokens of {downscale} pixels); nearest: {fitting[1]}x{fitting[0]}"
        )
    grid = Grid(height // downscale, width // downscale, patch_size)
    for side in (grid.height, grid.width):
        if not prompts.has_side(side):
            longest = max(k for k in range(1, 1025) if prompts.has_side(k)) * downscale
            raise BitDanceError(
                f"{width}x{height} (width x height) is too large for {config.family}: "
                f"no side may exceed {longest} pixels"
            )
    return grid


def names(sizes: Iterable[Size]) -> str:
    """List sizes (height, width) as people write them, width first."""
    return ", ".join(f"{width}x{height}" for height, width in sizes)


def nearest_size(config: BitDanceConfig | ImageNetConfig, aspect: float) -> Size:
    """Choose the (height, width) in pixels that a model was trained on whose width / height is nearest to `aspect`.

    Of several with one aspect it is the one whose area is nearest to the default's. A model of any size gets whole
    patches of about the default's area.
    """
    default, trained = config.defaults.default_size, config.defaults.trained_sizes
    area = math.prod(default)
    if trained is None:
        step = config.autoencoder.downscale * config.patch_size
        sides = math.sqrt(area / aspect), math.sqrt(area * aspect)
        return tuple(max(1, round(side / step)) * step for side in sides)

    def distance(size: Size) -> tuple[float, float]:
        return round(_apart(size, aspect), 6), abs(math.log(math.prod(size) / area))

    return min(trained, key=distance)


def size_of_aspect(config: BitDanceConfig | ImageNetConfig, aspect: str) -> Size:
    """Choose the trained (height, width) for one of ASPECTS. Raises BitDanceError if the model has none near it."""
    wanted = ratio(aspect)
    size = nearest_size(config, wanted)
    if _apart(size, wanted) > math.log(NEAR):
        raise BitDanceError(
            f"{config.family} draws no pictures of {aspect}; it was trained on "
            f"{names(config.defaults.trained_sizes)} (width x height)"
        )
    return size


def ratio(aspect: str) -> float:
    """Return the width / height of one of ASPECTS. Raises BitDanceError for another."""
    if aspect not in ASPECTS:
        raise BitDanceError(f"aspect_ratio must be one of {', '.join(ASPECTS)}, found '{aspect}'")
    width, height = map(int, aspect.split(":"))
    return width / height


def _apart(size: Size, aspect: float) -> float:
    return abs(math.log(size[1] / size[0] / aspect))
