"""The options of `generate` that start from a picture: read and checked before weights are, encoded after."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..bits.edits import pad
from ..bits.grid import load_bits
from ..errors import BitDanceError, shorten
from ..model.grid import Grid
from ..pipeline import Pipeline
from ..sampling.editing import token_mask
from ..sampling.sizes import MAX_SIDE, make_grid
from ..tokenizer import opened, to_pixels, to_rgb


def add_editing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that start from a picture, and that give parts of it prompts of their own."""
    group = parser.add_argument_group("editing", "Start from a picture instead of noise (docs/editing.md).")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, metavar="IMAGE", help="the picture to redraw, of a size the model draws")
    start.add_argument("--bits", type=Path, metavar="FILE", help="bits to redraw, from --save-bits or Save Bits")
    group.add_argument(
        "--denoise", type=float, metavar="X", help="how much to redraw: 0 keeps all, 1 nothing (default: 1)"
    )
    group.add_argument(
        "--mask", type=Path, metavar="IMAGE", help="white where to redraw, black where to keep; darker than half keeps"
    )
    group.add_argument(
        "--outpaint",
        type=int,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="pixels to add on each side, rounded up to whole patches",
    )
    group.add_argument(
        "--region",
        nargs=2,
        action="append",
        metavar=("PROMPT", "MASK"),
        help="a prompt for the white part of a mask; may be repeated, the last one that covers a token counts",
    )


@dataclass(frozen=True)
class Start:
    """What an edit starts from: bits (n, C, h, w), or a picture that becomes bits once the tokenizer is loaded."""

    bits: Tensor | None
    image: Image.Image | None
    grid: tuple[int, int, int]  # pictures, and rows and columns of tokens, before sides are added
    sides: tuple[int, int, int, int]  # tokens to add at the left, top, right and bottom

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of tokens with the added sides."""
        left, top, right, bottom = self.sides
        return self.grid[1] + top + bottom, self.grid[2] + left + right

    def stand_in(self, channels: int) -> Tensor:
        """Return bits of the final shape, for checks before the tokenizer is loaded."""
        return torch.zeros(self.grid[0], channels, *self.size, dtype=torch.bool)

    def encode(self, pipe: Pipeline) -> Tensor:
        """Return the bits to start from, the added sides filled with the border's tokens."""
        return pad(self.bits if self.image is None else pipe.encode(self.image), *self.sides)


def read_start(args: argparse.Namespace, plain: Pipeline) -> Start | None:
    """Read what the options start from; None draws afresh.

    Raises BitDanceError for options that need a picture, for a picture that would be ignored, and for bits of another
    tokenizer.
    """
    given = [name for name in ("denoise", "mask", "outpaint") if getattr(args, name) is not None]
    if args.init is None and args.bits is None:
        if given:
            raise BitDanceError(f"--{given[0]} needs a picture to start from; give it with --init or --bits")
        return None
    option = "--bits" if args.init is None else "--init"
    if args.denoise in (None, 1) and args.mask is None and args.outpaint is None:
        raise BitDanceError(
            f"{option} alone would be redrawn completely; add --denoise below 1, --mask or --outpaint, or leave it out"
        )
    step, channels = plain.tokenizer.downscale, plain.tokenizer.channels
    bits = image = None
    if args.init is None:
        found = load_bits(args.bits)
        found.check(step, channels, plain.config.family)
        bits = found.bits()
        shape = len(bits), *bits.shape[2:]
    else:
        with opened(args.init) as file:
            image = to_rgb(file)
        shape = 1, image.height // step, image.width // step
        if not all(shape):
            raise BitDanceError(
                f"--init: {args.init} is {image.width}x{image.height} (width x height), expected at least {step}x{step}"
            )
    start = Start(bits, image, shape, _sides(args.outpaint, plain))
    _check_size(start, option, args.allow_untrained_size, plain)
    return start


def _check_size(start: Start, option: str, allow_untrained_size: bool, plain: Pipeline) -> None:
    """Raise BitDanceError, in the words of the options, for a size that the model does not draw."""
    height, width = (tokens * plain.tokenizer.downscale for tokens in start.size)
    if any(start.sides):
        option += " with --outpaint"
    try:
        if plain.prompts is not None:
            make_grid(plain.config, plain.prompts, height, width, allow_untrained_size)
        elif (height, width) != plain.default_size:
            side = plain.default_size[0]
            raise BitDanceError(f"{width}x{height} (width x height) is not the one size that it draws, {side}x{side}")
    except BitDanceError as error:
        raise BitDanceError(f"{option}: {error}") from error


def _sides(outpaint: list[int] | None, plain: Pipeline) -> tuple[int, int, int, int]:
    """Return tokens for pixels to add on each side, rounded up to whole patches."""
    patch = plain.config.patch_size
    is_sides = outpaint is None or (len(outpaint) == 4 and all(type(n) is int and 0 <= n <= MAX_SIDE for n in outpaint))
    if not is_sides or (outpaint is not None and not any(outpaint)):
        raise BitDanceError(f"--outpaint takes pixels to add, on one side or more, found {shorten(outpaint)}")
    return tuple(math.ceil(side / (patch * plain.tokenizer.downscale)) * patch for side in outpaint or (0, 0, 0, 0))


def edit_arguments(args: argparse.Namespace, start: Start | None, plain: Pipeline) -> dict[str, Any]:
    """Return the arguments of `generate` for the options, `init_bits` apart."""
    found = {}
    if args.region:
        found["regions"] = [(prompt, read_mask(Path(mask))) for prompt, mask in args.region]
    if start is None:
        return found
    mask = None if args.mask is None else read_mask(args.mask)
    if any(start.sides):
        _, height, width = start.grid
        left, top, right, bottom = start.sides
        inner = torch.zeros(1, height, width)
        if mask is not None:
            inner = token_mask(mask, Grid(height, width, 1), 1, plain.tokenizer.downscale)
        mask = F.pad(inner, (left, right, top, bottom), value=1.0)
    return found | {"denoise": 1.0 if args.denoise is None else args.denoise, "mask": mask}


def read_mask(path: Path) -> Tensor:
    """Read a picture's brightness as a mask (1, H, W) in [0, 1]; transparent pixels count as white."""
    with opened(path) as file:
        return to_pixels(to_rgb(file).convert("L"))[:, 0] / 2 + 0.5
