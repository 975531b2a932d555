"""Teach `scenes` another style by LoRA: write pictures with captions, and read what a LoRA draws.

R=runs/scenes
python -m builtin.scenes.drawings $R/noto.npz --package @iconify-json/noto
python -m builtin.scenes.style write $R/noto.npz $R/noto
python -m bitdance_core finetune $R/noto --model scenes --out $R/noto.safetensors --steps 2400 --rank 32 --keep 0
python -m builtin.scenes.style score $R/noto.npz $R/drawings.npz --lora $R/noto.safetensors --sheet $R/noto.png
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bitdance_core import BitDancePipeline
from builtin.scenes.captions import article
from builtin.scenes.compose import Composer, random_scene, sheet
from builtin.scenes.drawings import Art, load_art
from builtin.scenes.grounds import COLOURS
from builtin.scenes.read_back import Reader
from builtin.scenes.things import HIDDEN_ON, THINGS

WORDS = "noto style"  # in front of every caption


def taught_names() -> set[str]:
    """The things that the pictures show: the first of each five, the third and the fifth."""
    return {thing.name for number, thing in enumerate(THINGS) if number % 5 in (0, 2, 4)}


def write_style(art: Art, folder: Path, words: str, pictures: int, seed: int = 0) -> None:
    """Write PNGs and, beside each, its caption behind `words`; two of three show one thing: fastest learned."""
    folder.mkdir(parents=True, exist_ok=True)
    composer, rng, names, number = Composer(art), np.random.default_rng(seed), taught_names(), 0
    while number < pictures:
        scene = random_scene(rng, None if number % 3 == 2 else "one")
        if not {part.name for part in scene.meaning.parts} <= names:
            continue
        Image.fromarray(composer.paint(scene)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{words} {scene.caption}")
        number += 1


def prompts_of(names: Sequence[str], seed: int = 0) -> list[str]:
    """One large thing each, on a plain ground on which it can be seen."""
    rng, prompts = np.random.default_rng(seed), []
    for name in names:
        grounds = [colour for colour in COLOURS if name not in HIDDEN_ON.get(colour, ())]
        prompts.append(f"a large {name} on {article(grounds[rng.integers(len(grounds))])} background")
    return prompts


def score_style(draw: Callable[[str, int], np.ndarray], styles: dict[str, Art], names: Sequence[str]) -> Counter:
    """Count of which style's drawing of the thing each picture shows, or "none"."""
    reader = Reader({f"{style}/{name}": art[name] for style, art in styles.items() for name in names})
    shown = Counter()
    for number, (name, prompt) in enumerate(zip(names, prompts_of(names), strict=True)):
        found = {thing.name for thing in reader.read(draw(prompt, number)).found}
        right = [style for style in styles if f"{style}/{name}" in found]
        shown[right[0] if len(right) == 1 else "none"] += 1
    return shown


def write(args: argparse.Namespace) -> None:
    write_style(load_art(args.drawings), args.to, args.words, args.pictures)


@torch.inference_mode()
def score(args: argparse.Namespace) -> None:
    styles = {"new": load_art(args.drawings), "old": load_art(args.old)}
    taught = sorted(taught_names())
    groups = {"taught things": taught, "other things": [t.name for t in THINGS if t.name not in taught]}
    rows = []
    runs = {"before": (None, ""), "LoRA without words": (args.lora, ""), "LoRA": (args.lora, args.words)}
    for label, (lora, words) in runs.items():
        pipe = BitDancePipeline.from_pretrained(args.model, device="cpu", dtype=torch.float32)
        if lora:
            pipe.add_lora(lora)
        seen: list[np.ndarray] = []

        def draw(prompt: str, seed: int, words=words, pipe=pipe, seen=seen) -> np.ndarray:
            seen.append(np.asarray(pipe.generate(f"{words} {prompt}".strip(), seed=seed).images[0]))
            return seen[-1]

        for group, names in groups.items():
            print(f"{label:<18} {group:<14} {dict(score_style(draw, styles, names))}", flush=True)
            rows.append(seen[-len(names) :][:12])
    if args.sheet:
        # taught things before and with the words, then the others
        sheet([picture for row in (rows[0], rows[4], rows[1], rows[5]) for picture in row], 12).save(args.sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write", help="write pictures with captions")
    writing.add_argument("drawings", type=Path)
    writing.add_argument("to", type=Path)
    writing.add_argument("--pictures", type=int, default=480)
    writing.set_defaults(run=write)
    scoring = commands.add_parser("score", help="draw each thing once, and say which style it has")
    scoring.add_argument("drawings", type=Path, help="of the new style")
    scoring.add_argument("old", type=Path, help="the drawings that the model was trained on")
    scoring.add_argument("--lora", required=True)
    scoring.add_argument("--model", default="scenes")
    scoring.add_argument("--sheet", type=Path, help="write the first twelve of each group, before and after")
    scoring.set_defaults(run=score)
    for command in (writing, scoring):
        command.add_argument("--words", default=WORDS, help="in front of every caption")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
