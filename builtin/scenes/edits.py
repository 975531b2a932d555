"""Do edits of drawn scenes mean what they say? Start from drawings, edit them, and read the pictures back.

R=runs/scenes
python -m builtin.scenes.edits $R/drawings.npz --edits 40 --sheet docs/scenes_edits.jpg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitdance_core import BitDancePipeline
from bitdance_core.bits.edits import vary
from bitdance_core.tokenizer import to_images
from builtin.scenes.batches import to_signed
from builtin.scenes.captions import Meaning, Part, read_caption, write_caption
from builtin.scenes.compose import Composer, Scene, place, random_meaning, sheet
from builtin.scenes.drawings import load_art
from builtin.scenes.read_back import Reader
from builtin.scenes.things import HIDDEN_ON, THINGS

TOKENS = 8  # of a side of a square picture
SIDES = 2  # tokens that an outpainted picture has more on the left, and on the right


@dataclass(frozen=True)
class Edit:
    """What is drawn again: `start` bits (1, C, h, w), where mask (1, h, w) is 1; and what is then to be seen."""

    prompt: str
    start: Tensor
    mask: Tensor
    expected: dict[str, int]
    options: dict


@dataclass(frozen=True)
class Result:
    before: np.ndarray
    after: np.ndarray
    kept: bool  # every token outside the mask is bit-identical
    follows: bool  # the picture shows what was asked for, on its ground


class Editor:
    """Draws scenes, edits them, and reads the results."""

    def __init__(self, pipe: BitDancePipeline, composer: Composer, reader: Reader) -> None:
        self.pipe, self.composer, self.reader = pipe, composer, reader

    def encode(self, meaning: Meaning, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """A drawing as bits, and what these show."""
        pixels = self.composer.paint(Scene("", meaning, place(meaning, rng))).copy()
        bits = self.pipe.tokenizer.encode(to_signed(torch.from_numpy(pixels).permute(2, 0, 1)[None])) > 0
        (shown,) = to_images(self.pipe.tokenizer.decode(bits))
        return np.asarray(shown), bits

    def run(self, kind: str, seed: int) -> Result:
        rng = np.random.default_rng((seed, list(KINDS).index(kind)))
        before, edit, meaning = KINDS[kind](self, rng)
        output = self.pipe.generate(edit.prompt, init_bits=edit.start, mask=edit.mask, seed=seed, **edit.options)
        after = np.asarray(output.images[0])
        kept = not ((output.bits ^ edit.start).any(1) & (edit.mask == 0)).any()
        reading = self.reader.read(after)
        seen = {name: reading.count(name) for name in {thing.name for thing in reading.found}}
        return Result(before, after, bool(kept), seen == edit.expected and reading.ground == meaning.ground)


def another(meaning: Meaning, rng: np.random.Generator) -> str:
    """A thing that is not in a scene and can be seen on its ground."""
    hidden = set().union(*(HIDDEN_ON.get(ground, ()) for ground in (meaning.ground.top, meaning.ground.bottom)))
    free = [t.name for t in THINGS if t.name not in hidden and all(t.name != part.name for part in meaning.parts)]
    return free[rng.integers(len(free))]


def caption(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words for a meaning that name its ground."""
    while True:
        words = write_caption(meaning, rng)
        if read_caption(words).ground is not None:
            return words


def whole() -> Tensor:
    return torch.ones(1, TOKENS, TOKENS)


def half() -> Tensor:
    """The right one."""
    mask = whole()
    mask[:, :, : TOKENS // 2] = 0
    return mask


def one_thing(rng: np.random.Generator) -> Meaning:
    while True:
        meaning = random_meaning(rng, "one")
        if meaning.parts[0].size == "large":
            return meaning


def swap(editor: Editor, rng: np.random.Generator):
    """Of two things side by side, the right one becomes another: its half is masked."""
    meaning = replace(random_meaning(rng, "two"), relation="left of")
    before, bits = editor.encode(meaning, rng)
    first, other = meaning.parts[0], another(meaning, rng)
    meaning = replace(meaning, parts=(first, Part(other)))
    return before, Edit(caption(meaning, rng), bits, half(), {first.name: 1, other: 1}, {}), meaning


def outpaint(editor: Editor, rng: np.random.Generator):
    """A square picture becomes 3:2; the ground goes on at both sides."""
    meaning = one_thing(rng)
    before, bits = editor.encode(meaning, rng)
    wide = torch.zeros(*bits.shape[:3], TOKENS + 2 * SIDES, dtype=torch.bool)
    wide[..., SIDES:-SIDES] = bits
    mask = torch.ones(1, TOKENS, TOKENS + 2 * SIDES)
    mask[..., SIDES:-SIDES] = 0
    return before, Edit(caption(meaning, rng), wide, mask, {meaning.parts[0].name: 1}, {}), meaning


def image_to_image(editor: Editor, rng: np.random.Generator):
    """A large thing becomes another one on the same ground, from 80 % noise."""
    meaning = one_thing(rng)
    before, bits = editor.encode(meaning, rng)
    other = another(meaning, rng)
    meaning = replace(meaning, parts=(Part(other, 1, "large"),))
    return before, Edit(caption(meaning, rng), bits, whole(), {other: 1}, {"denoise": 0.8}), meaning


def variation(editor: Editor, rng: np.random.Generator):
    """A tenth of the bits are flipped, and the picture drawn again from half noise under its own prompt."""
    meaning = one_thing(rng)
    before, bits = editor.encode(meaning, rng)
    bits = vary(bits, 0.1, torch.Generator().manual_seed(int(rng.integers(2**31))))
    return before, Edit(caption(meaning, rng), bits, whole(), {meaning.parts[0].name: 1}, {"denoise": 0.5}), meaning


def regions(editor: Editor, rng: np.random.Generator):
    """Two of a kind are asked for, and two of another kind in the right half: one of each is to be there."""
    meaning = random_meaning(rng, "one")
    name, other = meaning.parts[0].name, another(meaning, rng)
    before, bits = editor.encode(replace(meaning, parts=(Part(name, 2),)), rng)
    prompts = [caption(replace(meaning, parts=(Part(kind, 2),)), rng) for kind in (name, other)]
    return before, Edit(prompts[0], bits, whole(), {name: 1, other: 1}, {"regions": [(prompts[1], half())]}), meaning


KINDS: dict[str, Callable] = {f.__name__: f for f in (swap, outpaint, image_to_image, variation, regions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("--model", default="scenes", help="a model folder or a built-in name")
    parser.add_argument("--edits", type=int, default=40, help="edits of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sheet", type=Path, help="write the first four edits of each kind, before and after")
    args = parser.parse_args()
    art = load_art(args.drawings)
    pipe = BitDancePipeline.from_pretrained(args.model, device="cpu", dtype=torch.float32)
    editor, shown = Editor(pipe, Composer(art), Reader(art)), []
    for kind in args.kinds:
        begun = time.perf_counter()
        results = [editor.run(kind, seed) for seed in range(args.edits)]
        kept, follows = (sum(getattr(result, name) for result in results) for name in ("kept", "follows"))
        seconds = (time.perf_counter() - begun) / args.edits
        print(f"{kind:<15} kept {kept}/{args.edits}, follows {follows}/{args.edits} ({seconds:.2f} s each)", flush=True)
        shown += [pixels for result in results[:4] for pixels in (result.before, result.after)]
    if args.sheet:
        wide = max(pixels.shape[1] for pixels in shown)
        centred = [np.pad(p, ((0, 0), ((wide - p.shape[1]) // 2,) * 2, (0, 0)), constant_values=128) for p in shown]
        sheet(centred, 8).save(args.sheet)


if __name__ == "__main__":
    main()
