"""Measure whether edits keep the masked tokens and follow the prompt, on random pictures of the built-in model.

python -m builtin.eval_editing --edits 40 --sheet edits.png
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bitdance_core import BitDancePipeline
from bitdance_core.bits.edits import pad, vary
from bitdance_core.tokenizer import to_images
from builtin.eval import contact_sheet
from builtin.pictures import COLOURS, SHAPES, Picture, random_picture, read

TOKENS, STEP = 8, 8  # the built-in model's square size: tokens per side, pixels per token side


@dataclass(frozen=True)
class Result:
    before: Image.Image
    after: Image.Image
    kept: bool  # every token outside the mask is bit-identical
    follows: bool  # the picture shows the edit's prompt


def half(pipe, picture, bits, seed, rng, **options):
    """Redraw the lower half with the same prompt."""
    mask = torch.zeros(1, TOKENS, TOKENS)
    mask[:, TOKENS // 2 :] = 1
    return mask, bits, pipe.generate(picture.prompt, init_bits=bits, mask=mask, seed=seed, **options), picture


def swap(pipe, picture, bits, seed, rng, **options):
    """Redraw the middle with another shape; keep the background around it."""
    other = replace(picture, shape=rng.choice([shape for shape in SHAPES if shape != picture.shape]))
    mask = torch.zeros(1, TOKENS, TOKENS)
    mask[:, 1:-1, 1:-1] = 1
    return mask, bits, pipe.generate(other.prompt, init_bits=bits, mask=mask, seed=seed, **options), other


def image_to_image(pipe, picture, bits, seed, rng, **options):
    """Redraw everything in another colour, with denoise 0.6."""
    free = [c for c in COLOURS if c not in (picture.colour, picture.background)]
    other = replace(picture, colour=rng.choice(free))
    mask = torch.ones(1, TOKENS, TOKENS)
    return mask, bits, pipe.generate(other.prompt, init_bits=bits, denoise=0.6, seed=seed, **options), other


def variation(pipe, picture, bits, seed, rng, **options):
    """Flip a tenth of the bits, then redraw with denoise 0.5 and the same prompt."""
    start = vary(bits, 0.1, torch.Generator().manual_seed(seed))
    mask = torch.ones(1, TOKENS, TOKENS)
    return mask, bits, pipe.generate(picture.prompt, init_bits=start, denoise=0.5, seed=seed, **options), picture


def outpaint(pipe, picture, bits, seed, rng, **options):
    """Extend both sides by half the width and draw the background there."""
    wide = pad(bits, TOKENS // 2, 0, TOKENS // 2, 0)
    mask = torch.ones(1, TOKENS, 2 * TOKENS)
    mask[:, :, TOKENS // 2 : -TOKENS // 2] = 0
    return mask, wide, pipe.generate(picture.prompt, init_bits=wide, mask=mask, seed=seed, **options), picture


KINDS = {f.__name__: f for f in (half, swap, image_to_image, variation, outpaint)}


def ground_goes_on(image: Image.Image, picture: Picture) -> bool:
    """Return whether nine in ten of the new pixels are nearest to the background's colour."""
    pixels = np.asarray(image, dtype=float)
    width = TOKENS * STEP // 2
    new = np.concatenate((pixels[:, :width], pixels[:, -width:]), axis=1)
    names = list(COLOURS)
    nearest = ((new[:, :, None] - np.array(list(COLOURS.values()))) ** 2).sum(-1).argmin(-1)
    return bool((nearest == names.index(picture.background)).mean() >= 0.9)


def run(pipe: BitDancePipeline, kind: str, edits: int, seed: int, **options) -> list[Result]:
    """Make `edits` random edits of one kind, each of a new picture. `options` are passed to `generate`."""
    rng = np.random.default_rng(seed)
    results = []
    for number in range(edits):
        picture = random_picture(rng)
        if kind == "swap":
            picture = replace(picture, size="small")
        start = pipe.generate(picture.prompt, seed=1000 + number)
        mask, before, output, prompted = KINDS[kind](pipe, picture, start.bits, number, rng, **options)
        changed = (output.bits ^ before).any(1)
        kept = not (changed & (mask == 0)).any()
        if kind == "outpaint":
            follows = ground_goes_on(output.images[0], picture)
        else:
            follows = read(output.images[0]) == prompted
        (shown,) = to_images(pipe.tokenizer.decode(before))
        results.append(Result(shown, output.images[0], bool(kept), follows))
    return results


def measure_cost(pipe: BitDancePipeline, repeats: int = 11) -> None:
    """Print the cost of redrawing one patch of a 128x64 picture, against drawing all of it.

    Evaluations are counted where every sampler asks the head; seconds are medians of `repeats` runs, in turns.
    """
    picture = random_picture(np.random.default_rng(0))
    height, width = TOKENS * STEP, 2 * TOKENS * STEP
    start = pipe.generate(picture.prompt, height=height, width=width, seed=0).bits
    patches = 2 * (TOKENS // pipe.config.patch_size) ** 2
    one = torch.zeros(1, TOKENS, 2 * TOKENS)
    one[:, -1, -1] = 1  # the last patch: all others are read before it
    runs = {
        "all": {},
        "one": {"init_bits": start, "mask": one},
        "none": {"init_bits": start, "denoise": 0.0},  # decodes the picture, and no more
    }
    counts, seconds = dict.fromkeys(runs, 0), {name: [] for name in runs}
    predict = pipe.model.head.predict
    try:
        for _ in range(repeats):
            for name, changes in runs.items():

                def counted(*arguments, name=name):
                    counts[name] += 1
                    return predict(*arguments)

                pipe.model.head.predict = counted
                before = time.perf_counter()
                pipe.generate(picture.prompt, height=height, width=width, seed=1, **changes)
                seconds[name].append(time.perf_counter() - before)
    finally:
        del pipe.model.head.predict
    whole, part, nothing = (float(np.median(seconds[name])) for name in runs)
    print(
        f"one of {patches} patches: {counts['one'] // repeats} of {counts['all'] // repeats} head evaluations, "
        f"{part:.3f} s against {whole:.3f} s (of which {nothing:.3f} s decode the picture)"
    )


def measure_passes(pipe: BitDancePipeline, edits: int, seed: int) -> None:
    """Print whether repeated redrawing of a region improves the seam to the kept region after it."""
    for name, rows in (("upper half", slice(0, 4)), ("lower half", slice(4, 8)), ("upper 5 rows", slice(0, 5))):
        mask = torch.zeros(1, TOKENS, TOKENS)
        mask[:, rows] = 1
        border = (rows.stop if rows.start == 0 else rows.start) * STEP
        rng = np.random.default_rng(seed)
        steps, right = np.zeros(4), np.zeros(4, dtype=int)
        for number in range(edits):
            picture = random_picture(rng)
            output = pipe.generate(picture.prompt, seed=1000 + number)
            for passes, denoise in enumerate((None, 1.0, 0.7, 0.4)):
                if denoise is not None:
                    options = {"denoise": denoise, "seed": number + 5000 * passes}
                    output = pipe.generate(picture.prompt, init_bits=output.bits, mask=mask, **options)
                pixels = np.asarray(output.images[0], dtype=float)
                steps[passes] += np.abs(pixels[border - 1] - pixels[border]).mean() / edits
                right[passes] += read(output.images[0]) == picture
        print(f"{name}: grey levels across the seam, and right pictures of {edits}, before and after 1, 2, 3 passes:")
        print("  " + ", ".join(f"{step:.2f} ({count})" for step, count in zip(steps, right)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=40, help="edits of each kind")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cost", action="store_true", help="measure the cost of redrawing one patch")
    parser.add_argument("--passes", action="store_true", help="measure whether repeated redrawing improves seams")
    parser.add_argument(
        "--sheet", type=Path, help="file for a contact sheet of four edits of each kind, before and after"
    )
    args = parser.parse_args()
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.float32)
    print(f"hardware: cpu, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}")
    if args.cost:
        measure_cost(pipe)
    if args.passes:
        measure_passes(pipe, args.edits, args.seed)
    shown = []
    for kind in args.kinds:
        start = time.perf_counter()
        results = run(pipe, kind, args.edits, args.seed)
        seconds = time.perf_counter() - start
        kept, follows = (sum(getattr(r, name) for r in results) for name in ("kept", "follows"))
        count = len(results)
        print(f"{kind:<15} kept identical {kept}/{count}, follows the prompt {follows}/{count} ({seconds:.0f} s)")
        shown += [image for result in results[:4] for image in (result.before, result.after)]
    if args.sheet:
        wide = max(image.width for image in shown)
        framed = []
        for image in shown:
            frame = Image.new("RGB", (wide, image.height), (128, 128, 128))
            frame.paste(image, ((wide - image.width) // 2, 0))
            framed.append(frame)
        contact_sheet(framed, columns=8).save(args.sheet)


if __name__ == "__main__":
    main()
