"""`python -m bitdance_core generate | reconstruct | info`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .checkpoint import locate
from .errors import BitDanceError, MissingFileError
from .flow import SAMPLERS
from .info import describe
from .pipeline import BitDancePipeline
from .tokenizer import BinaryTokenizer, to_images, to_pixels

PICTURE_FORMATS = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tiff")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Bad input ends in one line on standard error and status 1."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except BitDanceError as error:
        print(f"bitdance: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"bitdance: not enough memory on {args.device or 'the GPU'}; try --device cpu", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bitdance: stopped", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bitdance_core", description="Draw pictures with BitDance.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    draw = commands.add_parser("generate", help="draw a prompt")
    draw.add_argument("prompt")
    draw.add_argument(
        "-o", "--out", type=Path, default=Path("bitdance.png"), help="picture to write (default: %(default)s)"
    )
    draw.add_argument("--model", default="builtin", help="a folder, a hub id or a built-in name (default: %(default)s)")
    draw.add_argument("--negative-prompt", help="what the guidance leads away from")
    draw.add_argument("--height", type=int, help="pixels (default: the model's own)")
    draw.add_argument("--width", type=int, help="pixels (default: the model's own)")
    draw.add_argument("--steps", type=int, help="head steps a patch (default: the model's own)")
    draw.add_argument("--guidance", type=float, help="1 or less draws without guidance (default: the model's own)")
    draw.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="default: %(default)s")
    draw.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    draw.add_argument("--num-images", type=int, default=1, help="drawn together, written as OUT_1, OUT_2, …")
    draw.add_argument("--allow-untrained-size", action="store_true", help="try a size the model was not trained for")
    add_device(draw)
    draw.set_defaults(run=generate)

    again = commands.add_parser("reconstruct", help="encode a picture to bits and decode it again")
    again.add_argument("image", type=Path)
    again.add_argument("-o", "--out", type=Path, default=Path("reconstructed.png"), help="default: %(default)s")
    again.add_argument(
        "--model", default="builtin", help="a tokenizer file, a model folder, a hub id or a built-in name"
    )
    add_device(again)
    again.set_defaults(run=reconstruct)

    what = commands.add_parser("info", help="say what a model file or folder is")
    what.add_argument("path", help="a path, or a built-in name")
    what.set_defaults(run=info)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, … (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")


def generate(args: argparse.Namespace) -> None:
    check_output(args.out)
    pipe = BitDancePipeline.from_pretrained(args.model, args.device, DTYPES.get(args.dtype))
    bar = None

    def show(done: int, total: int, bits: Tensor) -> None:
        nonlocal bar
        if bar is None:  # only now is it sure that the settings are good
            bar = tqdm(total=total, unit="patch", desc="drawing")
        bar.update()

    output = pipe.generate(
        args.prompt,
        height=args.height,
        width=args.width,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        num_images=args.num_images,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        allow_untrained_size=args.allow_untrained_size,
        callback=show,
    )
    bar.close()
    for number, image in enumerate(output.images, start=1):
        path = args.out if len(output.images) == 1 else args.out.with_stem(f"{args.out.stem}_{number}")
        save(image, path)
        print(path)


def reconstruct(args: argparse.Namespace) -> None:
    check_output(args.out)
    try:
        image = Image.open(args.image).convert("RGB")
    except FileNotFoundError as error:
        raise MissingFileError(f"{args.image} is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # by format and damage
        raise BitDanceError(f"{args.image} is not a picture that can be read ({error})") from error
    tokenizer = BinaryTokenizer.from_pretrained(args.model, args.device, DTYPES.get(args.dtype))
    step = tokenizer.downscale
    if image.width < step or image.height < step:
        raise BitDanceError(f"{args.image} is {image.width}x{image.height}, it must be at least {step}x{step} pixels")
    image = image.crop((0, 0, image.width // step * step, image.height // step * step))
    pixels = to_pixels(image)
    bits = tokenizer.encode(pixels)
    (result,) = to_images(tokenizer.decode(bits))
    error = ((to_pixels(result) - pixels) ** 2).mean().item()
    save(result, args.out)
    psnr = 10 * math.log10(4 / error) if error else math.inf
    print(f"{args.out}: {image.width}x{image.height}, {bits.numel()} bits, PSNR {psnr:.2f} dB")


def info(args: argparse.Namespace) -> None:
    print(describe(locate(args.path, local_files_only=True)))


def check_output(path: Path) -> None:
    """Refuse, before any work, a name that no picture can be written under."""
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise BitDanceError(f"'{path}' has no picture format; end the name in one of {', '.join(PICTURE_FORMATS)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise MissingFileError(f"the folder {folder} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise BitDanceError(f"{path} cannot be written")


def save(image: Image.Image, path: Path) -> None:
    try:
        image.save(path)
    except OSError as error:  # a full disk, say
        raise BitDanceError(f"{path} cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
