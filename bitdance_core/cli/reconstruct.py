"""`reconstruct`: encode pictures to bits, decode them again, and measure what that changed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ..bits import metrics
from ..devices import COMPUTE_DTYPES
from ..errors import BitDanceError
from ..sampling.editing import crop_to_tokens
from ..tokenizer import BinaryTokenizer, opened, to_images, to_pixels, to_rgb
from .options import add_device_options
from .pictures import PICTURE_FORMATS, check_apart, check_output, make_folder, save


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    reconstructing = commands.add_parser("reconstruct", help="encode pictures to bits and decode them again")
    reconstructing.add_argument("image", nargs="+", type=Path)
    reconstructing.add_argument(
        "-o",
        "--out",
        type=Path,
        help="picture to write, or a folder for several (default: reconstructed.png, reconstructed)",
    )
    reconstructing.add_argument(
        "--model", default="builtin", help="a tokenizer file, a model folder, a hub id or a built-in name"
    )
    add_device_options(reconstructing)
    reconstructing.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    targets = reconstruction_targets(args.image, args.out)
    for path in args.image:
        with opened(path):
            pass  # unreadable pictures are reported before any work
    check_apart(targets, args.image)
    if len(targets) > 1:
        make_folder(targets[0].parent)
    for target in targets:
        check_output(target)
    tokenizer = BinaryTokenizer.from_pretrained(args.model, args.device, COMPUTE_DTYPES.get(args.dtype))
    step = tokenizer.downscale
    least = math.ceil(metrics.SSIM_WINDOW / step) * step
    figures = []
    for path, target in zip(args.image, targets):
        with opened(path) as file:
            image = to_rgb(file)
        if image.width < least or image.height < least:
            raise BitDanceError(
                f"{path} is {image.width}x{image.height} (width x height), expected at least {least}x{least} pixels"
            )
        pixels = crop_to_tokens(to_pixels(image), step)
        bits = tokenizer.encode(pixels)
        (result,) = to_images(tokenizer.decode(bits))
        save(result, target)
        per_pixel = metrics.bits_per_pixel(tokenizer.channels, step)
        figures += metrics.measure((pixels + 1) / 2, (to_pixels(result) + 1) / 2, per_pixel)
        size = f"{result.width}x{result.height} (width x height)"
        count = f"{bits.numel()} bits ({math.ceil(bits.numel() / 8)} bytes)"
        print(f"{target}: {size}, {count}, {figures[-1]}", flush=True)
    if len(figures) > 1:
        print(f"mean of {len(figures)}: {metrics.mean(figures)}")


def reconstruction_targets(images: Sequence[Path], out: Path | None) -> list[Path]:
    """Return the file for each reconstruction: `out` itself for one image, files in the folder `out` for several."""
    if len(images) == 1:
        return [out or Path("reconstructed.png")]
    out = out or Path("reconstructed")
    if out.suffix.lower() in PICTURE_FORMATS:
        raise BitDanceError(f"--out '{out}' is one picture; for {len(images)} pictures give a folder")
    targets = [out / f"{image.stem}.png" for image in images]
    if len({target.name.casefold() for target in targets}) < len(targets):
        raise BitDanceError("two of the pictures have the same name, and would overwrite each other; rename one")
    return targets
