"""Measure fine-tuning: does the built-in model learn a shape that it never knew, and keep what it could draw?

    python -m builtin.eval_finetuning --shape diamond --run runs/diamond --sheet diamond.png

It draws pictures of the shape on 30 pairs of colours, trains by `finetune` (further arguments go there), then asks for
the other 26 pairs, and for prompts that the model was made for. Pictures are read back by stencil, of the new shape and
of the old ones: shape, size and both colours must be right.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bitdance_core import BitDancePipeline
from bitdance_core.cli import main as command_line
from bitdance_core.model.fields import Size
from builtin.eval import contact_sheet, random_pictures
from builtin.pictures import COLOURS, HALF_EXTENTS, NEW_SHAPES, SHAPES, Picture, draw, read

TAUGHT_PAIRS = 30


@dataclass(frozen=True)
class Result:
    """How many of the new shape's pictures and of the old ones are right, with the pictures of the new shape."""

    new: int
    new_of: int
    old: int
    old_of: int
    images: list[Image.Image]

    def __str__(self) -> str:
        return f"new shape {self.new}/{self.new_of}, what it drew before {self.old}/{self.old_of}"


def colour_pairs(seed: int = 0) -> list[tuple[str, str]]:
    """Return all ordered pairs of different colours, shuffled."""
    pairs = list(itertools.permutations(COLOURS, 2))
    np.random.default_rng(seed).shuffle(pairs)
    return [tuple(pair) for pair in pairs]


def write_pictures(
    folder: Path, shape: str, pairs: Sequence[tuple[str, str]], each: int = 1, seed: int = 0, size: Size = (64, 64)
) -> None:
    """Write `each` pictures of a shape in each pair of colours and each extent, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number, ((ink, ground), extent, _) in enumerate(itertools.product(pairs, HALF_EXTENTS, range(each))):
        picture = Picture(extent, ink, shape, ground)
        Image.fromarray(draw(picture, *size, rng).round().astype(np.uint8)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(picture.prompt)


def write_waves(folder: Path, count: int, seed: int = 0, side: int = 64) -> None:
    """Write pictures of waves between two colours, which the built-in tokenizer was not trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[0:side, 0:side] / side
    for number in range(count):
        angle, waves, colours = rng.uniform(0, 2 * np.pi), rng.uniform(1, 3), rng.uniform(0, 255, (2, 3))
        share = (np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle))) + 1) / 2
        pixels = colours[0] + share[..., None] * (colours[1] - colours[0])
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{number:03}.png")


def measure(pipe: BitDancePipeline, shape: str, pairs: Sequence[tuple[str, str]], old: int) -> Result:
    """Draw one picture of each pair, and `old` prompts of the model's own, and read them back."""
    shapes = (*SHAPES, shape)
    sizes = itertools.cycle(HALF_EXTENTS)
    new = [Picture(size, ink, shape, ground) for (ink, ground), size in zip(pairs, sizes)]
    before = random_pictures(old, seed=5)
    images = [pipe.generate(picture.prompt, seed=seed).images[0] for seed, picture in enumerate(new)]
    right = sum(read(image, shapes) == picture for image, picture in zip(images, new))
    kept = sum(read(pipe.generate(p.prompt, seed=i).images[0], shapes) == p for i, p in enumerate(before))
    return Result(right, len(new), kept, old, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NEW_SHAPES, default="diamond")
    parser.add_argument("--each", type=int, default=1, help="pictures of each pair of colours in each size")
    parser.add_argument("--old", type=int, default=50, help="prompts of what the model could draw before")
    parser.add_argument("--run", type=Path, default=Path("runs/finetuning"), help="folder for pictures and LoRA")
    parser.add_argument("--sheet", type=Path, help="file for a contact sheet of the new shape, before and after")
    args, options = parser.parse_known_args()
    pairs = colour_pairs()
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    before = measure(pipe, args.shape, pairs[TAUGHT_PAIRS:], args.old)
    print(f"before: {before}", flush=True)
    out = args.run / f"{args.shape}.safetensors"
    if not out.exists():
        write_pictures(args.run / args.shape, args.shape, pairs[:TAUGHT_PAIRS], args.each)
        begun, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
        if command_line(["finetune", str(args.run / args.shape), "--out", str(out), "--device", "cpu", *options]):
            raise SystemExit(1)
        cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu
        print(f"training: {time.monotonic() - begun:.0f} s, of which {cpu:.0f} s of one core", flush=True)
    pipe.add_lora(out)
    after = measure(pipe, args.shape, pairs[TAUGHT_PAIRS:], args.old)
    print(f"after: {after}")
    if args.sheet:
        contact_sheet([*before.images[:13], *after.images[:13]], columns=13).save(args.sheet)


if __name__ == "__main__":
    main()
