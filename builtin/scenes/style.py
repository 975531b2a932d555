"""Write scenes in another style as a folder of pictures with captions: a style to teach by LoRA.

R=runs/scenes
python -m builtin.scenes.drawings $R/noto.npz --package @iconify-json/noto
python -m builtin.scenes.style $R/noto.npz $R/noto --word noto
python -m bitdance_core finetune $R/noto --model scenes --out $R/noto.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from builtin.scenes.compose import Composer, random_scene
from builtin.scenes.drawings import load_art
from builtin.scenes.things import THINGS


def taught_names() -> set[str]:
    """The things that the pictures show: the first of each five, the third and the fifth."""
    return {thing.name for number, thing in enumerate(THINGS) if number % 5 in (0, 2, 4)}


def write_style(art: dict[str, Image.Image], folder: Path, word: str, pictures: int, seed: int = 0) -> None:
    """Write PNGs and, beside each, its caption behind `word`."""
    folder.mkdir(parents=True, exist_ok=True)
    composer, rng, names, number = Composer(art), np.random.default_rng(seed), taught_names(), 0
    while number < pictures:
        scene = random_scene(rng)
        if not {part.name for part in scene.meaning.parts} <= names:
            continue
        Image.fromarray(composer.paint(scene)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{word} {scene.caption}")
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--word", default="noto", help="in front of every caption")
    parser.add_argument("--pictures", type=int, default=120)
    args = parser.parse_args()
    write_style(load_art(args.drawings), args.to, args.word, args.pictures)


if __name__ == "__main__":
    main()
