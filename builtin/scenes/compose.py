"""Scenes and their pictures: which things stand where on which ground, from one seed.

python -m builtin.scenes.compose runs/scenes/drawings.npz sheet.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from builtin.scenes.captions import Meaning, Part, write_caption
from builtin.scenes.grounds import GRADIENTS, OUTDOORS, PLAIN, paint_ground
from builtin.scenes.things import HIDDEN_ON, THINGS, is_kept_out

SIDE = 128  # pixels of the shorter side that the numbers below are for
SIDES = {"large": (92, 104), "small": (50, 58)}  # of a thing, in pixels of SIDE; two or more are small
JITTER = (-4, 0, 4)  # of a thing's place
LOW, MIDDLE, HIGH = 0.26, 0.5, 0.74  # of a picture's side: where the middle of a thing lies
KINDS = {"one": 0.4, "two": 0.34, "count": 0.16, "counts": 0.1}  # of scenes, and how often
GROUND_KINDS = ((PLAIN, 0.6), (GRADIENTS, 0.2), (OUTDOORS, 0.2))


@dataclass(frozen=True)
class Placed:
    """A thing with its middle (x, y) in shares of the picture's width and height, an offset and a side in pixels."""

    name: str
    x: float
    y: float
    dx: int
    dy: int
    side: int


@dataclass(frozen=True)
class Scene:
    caption: str
    meaning: Meaning
    placed: tuple[Placed, ...]


def random_meaning(rng: np.random.Generator, kind: str | None = None, unseen: bool = False) -> Meaning:
    """What a scene shows: nothing that can hardly be seen on its ground. Pairs that training never shows come only
    where `unseen`, and then nothing else.
    """
    while True:
        meaning = _any_meaning(rng, kind, unseen)
        hidden = [HIDDEN_ON.get(ground, ()) for ground in (meaning.ground.top, meaning.ground.bottom)]
        if not any(part.name in names for part in meaning.parts for names in hidden):
            return meaning


def _any_meaning(rng: np.random.Generator, kind: str | None, unseen: bool) -> Meaning:
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    group = rng.choice(len(GROUND_KINDS), p=[share for _, share in GROUND_KINDS])
    grounds = GROUND_KINDS[group][0]
    ground = grounds[rng.integers(len(grounds))]
    if kind == "one":
        return Meaning((Part(_thing(rng), 1, ("large", "small")[int(rng.random() < 0.4)]),), None, ground)
    if kind == "count":
        return Meaning((Part(_thing(rng), int(rng.integers(2, 5))),), None, ground)
    first = second = _thing(rng)
    while first == second or is_kept_out(first, second) != unseen:
        first, second = _thing(rng), _thing(rng)
    if kind == "two":
        relation = ("left of", "right of", "above", "below", "beside")[rng.integers(5)]
        return Meaning((Part(first), Part(second)), relation, ground)
    one, other = ((1, 2), (2, 1), (2, 2))[rng.integers(3)]
    return Meaning((Part(first, one), Part(second, other)), None, ground)


def _thing(rng: np.random.Generator) -> str:
    return THINGS[rng.integers(len(THINGS))].name


def _row(count: int) -> tuple[float, ...]:
    return (MIDDLE,) if count == 1 else (LOW, HIGH)


def places_of(meaning: Meaning, rng: np.random.Generator) -> list[tuple[str, float, float]]:
    """Each thing's name and middle (x, y)."""
    parts = meaning.parts
    if len(parts) == 1:
        places = {
            1: [(MIDDLE, MIDDLE)],
            2: [(LOW, MIDDLE), (HIGH, MIDDLE)],
            3: [(MIDDLE, LOW), (LOW, HIGH), (HIGH, HIGH)],
            4: [(LOW, LOW), (HIGH, LOW), (LOW, HIGH), (HIGH, HIGH)],
        }[parts[0].count]
        return [(parts[0].name, x, y) for x, y in places]
    if meaning.relation is None:  # two rows, the first kind above
        return [(part.name, x, y) for part, y in zip(parts, (LOW, HIGH)) for x in _row(part.count)]
    names = [part.name for part in parts]
    if meaning.relation in ("right of", "below") or (meaning.relation == "beside" and rng.random() < 0.5):
        names.reverse()
    upright = meaning.relation in ("above", "below")
    return [(name, MIDDLE, at) if upright else (name, at, MIDDLE) for name, at in zip(names, (LOW, HIGH))]


def place(meaning: Meaning, rng: np.random.Generator) -> tuple[Placed, ...]:
    sides = SIDES[meaning.parts[0].size or "small"]
    return tuple(
        Placed(name, x, y, int(rng.choice(JITTER)), int(rng.choice(JITTER)), int(rng.choice(sides)))
        for name, x, y in places_of(meaning, rng)
    )


def random_scene(rng: np.random.Generator, kind: str | None = None, unseen: bool = False) -> Scene:
    meaning = random_meaning(rng, kind, unseen)
    return Scene(write_caption(meaning, rng), meaning, place(meaning, rng))


class Composer:
    """Paints scenes from drawings."""

    def __init__(self, art: dict[str, Image.Image]) -> None:
        self.art = art
        self.resized = lru_cache(maxsize=2048)(self._resized)

    def _resized(self, name: str, side: int) -> Image.Image:
        return self.art[name].resize((side, side), Image.Resampling.LANCZOS)

    def paint(self, scene: Scene, height: int = SIDE, width: int = SIDE) -> np.ndarray:
        """Pixels uint8 [height, width, 3]."""
        scale = min(height, width) / SIDE
        picture = Image.fromarray(paint_ground(scene.meaning.ground, height, width))
        for thing in scene.placed:
            side = round(thing.side * scale)
            drawing = self.resized(thing.name, side)
            x, y = (
                round(at * length + offset * scale - side / 2)
                for at, length, offset in ((thing.x, width, thing.dx), (thing.y, height, thing.dy))
            )
            picture.paste(drawing, (x, y), drawing)
        return np.asarray(picture)


def sheet(pictures: list[np.ndarray], columns: int) -> Image.Image:
    """Pictures of one size in rows."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), (128, 128, 128))
    for i, pixels in enumerate(pictures):
        whole.paste(Image.fromarray(pixels), (i % columns * (width + 4) + 2, i // columns * (height + 4) + 2))
    return whole


def main() -> None:
    from builtin.scenes.drawings import load_art

    composer, rng = Composer(load_art(Path(sys.argv[1]))), np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(32)]
    print(*(scene.caption for scene in scenes), sep="\n")
    sheet([composer.paint(scene) for scene in scenes], 8).save(sys.argv[2])


if __name__ == "__main__":
    main()
