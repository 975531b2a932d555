"""Measure the accuracy of the built-in model against its prompts, and the PSNR of its tokenizer.

python -m builtin.eval --prompts 100 --sheet sheet.png
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bitdance_core import BinaryTokenizer, BitDancePipeline
from bitdance_core.model.text_config import Size
from builtin.pictures import Picture, draw, random_picture, read


@dataclass(frozen=True)
class Score:
    """The picture of the prompt, the picture recognised in the image (None: none), and the image."""

    prompted: Picture
    seen: Picture | None
    image: Image.Image
    seconds: float

    @property
    def all_right(self) -> bool:
        return self.seen == self.prompted

    @property
    def colours_right(self) -> bool:
        return self.seen is not None and self.right("colour") and self.right("background")

    def right(self, word: str) -> bool:
        return getattr(self.seen, word, None) == getattr(self.prompted, word)


def random_pictures(count: int, seed: int) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [random_picture(rng) for _ in range(count)]


def draw_prompts(
    pipe: BitDancePipeline, pictures: Sequence[Picture], size: Size | None = None, **settings
) -> list[Score]:
    """Draw the prompt of each picture, with seeds 0, 1, …, and recognise the results. Defaults are the model's own."""
    height, width = size or pipe.default_size
    scores = []
    for seed, picture in enumerate(pictures):
        start = time.perf_counter()
        (image,) = pipe.generate(picture.prompt, height=height, width=width, seed=seed, **settings).images
        seconds = time.perf_counter() - start
        scores.append(Score(picture, read(image), image, seconds))
    return scores


def tokenizer_psnr(tokenizer: BinaryTokenizer, size: Size, count: int, seed: int) -> float:
    """Compute the tokenizer's peak signal-to-noise ratio in dB, from the mean squared error over `count` drawings."""
    rng = np.random.default_rng(seed)
    drawings = np.stack([draw(random_picture(rng), *size, rng) for _ in range(count)])
    pixels = torch.from_numpy(drawings).permute(0, 3, 1, 2) / 127.5 - 1
    again = tokenizer.decode(tokenizer.encode(pixels)).clamp(-1, 1).cpu()
    return 10 * math.log10(4 / (again - pixels).square().mean().item())


def contact_sheet(images: Sequence[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    width, height = images[0].width * scale, images[0].height * scale
    rows = math.ceil(len(images) / columns)
    gap = 8
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (128, 128, 128))
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="seed of the choice of prompts")
    parser.add_argument("--sheet", type=Path, help="file for a contact sheet of the first 16 pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--sampler", default="euler_maruyama")
    args = parser.parse_args()
    pipe = BitDancePipeline.from_pretrained(args.model, device=args.device, dtype=torch.float32)
    print(
        f"hardware: {args.device}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    )
    pictures = random_pictures(args.prompts, args.seed)
    for size in pipe.config.defaults.trained_sizes:
        psnr = tokenizer_psnr(pipe.tokenizer, size, 64, args.seed)
        scores = draw_prompts(pipe, pictures, size, steps=args.steps, guidance=args.guidance, sampler=args.sampler)
        count = len(scores)
        print(f"\n{size[1]}x{size[0]} (width x height), {count} prompts")
        print(f"  all four words right  {sum(s.all_right for s in scores)}/{count}")
        print(f"  both colours right    {sum(s.colours_right for s in scores)}/{count}")
        for word in ("size", "colour", "shape", "background"):
            print(f"  {word:<21} {sum(s.right(word) for s in scores)}/{count}")
        seconds = [s.seconds for s in scores]
        print(f"  seconds per image     median {np.median(seconds):.2f}, worst {max(seconds):.2f}")
        print(f"  tokenizer PSNR        {psnr:.2f} dB")
        for s in scores:
            if not s.all_right:
                print(f"  wrong: prompt '{s.prompted.prompt}', seen '{s.seen.prompt if s.seen else None}'")
        if args.sheet and size == pipe.default_size:
            contact_sheet([s.image for s in scores[:16]], columns=8).save(args.sheet)


if __name__ == "__main__":
    main()
