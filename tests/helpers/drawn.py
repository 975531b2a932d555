"""Small data sets of pictures that the tests draw themselves."""

import numpy as np
from PIL import Image

from builtin.pictures import COLOURS, HALF_EXTENTS, Picture, draw


def colour_pairs(seed=0):
    """All ordered pairs of different colours, shuffled."""
    pairs = [(ink, ground) for ink in COLOURS for ground in COLOURS if ink != ground]
    np.random.default_rng(seed).shuffle(pairs)
    return [tuple(pair) for pair in pairs]


def write_shapes(folder, shape, pairs, size=(64, 64), seed=0):
    """Write a picture of a shape in each pair of colours and each size, with its caption; return the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, prompts = np.random.default_rng(seed), []
    for number, ((ink, ground), extent) in enumerate((pair, extent) for pair in pairs for extent in HALF_EXTENTS):
        picture = Picture(extent, ink, shape, ground)
        pixels = draw(picture, *size, rng).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(picture.prompt)
        prompts.append(picture.prompt)
    return prompts
