"""Image sizes that a text-to-image model draws."""

from __future__ import annotations

import math

from ..errors import BitDanceError, whole_number
from ..model.grid import Grid
from ..model.prompt import PromptTokenizer
from ..model.text_config import BitDanceConfig

MAX_SIDE = 2**16  # pixels: no grid is as large


def make_grid(
    config: BitDanceConfig, prompts: PromptTokenizer, height: int, width: int, allow_untrained_size: bool = False
) -> Grid:
    """Make the token grid of an image of height x width pixels. Raises BitDanceError with the nearest valid sizes."""
    height, width = whole_number("height", height, 1, MAX_SIDE), whole_number("width", width, 1, MAX_SIDE)
    trained = config.defaults.trained_sizes
    if trained is not None and (height, width) not in trained and not allow_untrained_size:
        near = sorted(trained, key=lambda s: abs(math.log(s[0] / height)) + abs(math.log(s[1] / width)))
        raise BitDanceError(
            f"{height}x{width} (height x width) is not a size that {config.family} was trained on; "
            f"nearest: {', '.join(f'{h}x{w}' for h, w in near[:3])}"
        )
    downscale, patch_size = config.autoencoder.downscale, config.patch_size
    step = downscale * patch_size
    if height % step or width % step:
        fitting = [max(1, round(side / step)) * step for side in (height, width)]
        raise BitDanceError(
            f"{height}x{width} (height x width) does not fit {config.family}: both sides must be multiples of {step} "
            f"pixels ({patch_size}x{patch_size} tokens of {downscale} pixels); nearest: {fitting[0]}x{fitting[1]}"
        )
    grid = Grid(height // downscale, width // downscale, patch_size)
    for side in (grid.height, grid.width):
        if not prompts.has_side(side):
            longest = max(k for k in range(1, 1025) if prompts.has_side(k)) * downscale
            raise BitDanceError(
                f"{height}x{width} (height x width) is too large for {config.family}: "
                f"no side may exceed {longest} pixels"
            )
    return grid
