"""Whether a picture shows a caption's ground and the colours of its things.

The drawings themselves are not in the repository; `builtin/scenes/score.py` reads things by them.
"""

import numpy as np
from PIL import Image

from builtin.scenes.captions import read_caption
from builtin.scenes.grounds import ALL_GROUNDS
from builtin.scenes.read_back import Reader, shrink

# of each thing that tests ask for, a colour that covers much of it
COLOURS = {
    "apple": (248, 49, 47),
    "fox": (255, 130, 43),
    "mushroom": (248, 49, 47),
    "penguin": (60, 60, 70),
}
NEAR = 90.0  # distance in RGB
LEAST = 0.015  # of a picture


def shows(image: Image.Image, caption: str) -> bool:
    """Whether the ground is right, and every thing's colour is there."""
    meaning, pixels = read_caption(caption), np.asarray(image)
    if ALL_GROUNDS[Reader({}).read_ground(shrink(pixels))] != meaning.ground:
        return False
    shares = {
        part.name: (np.linalg.norm(pixels - np.array(COLOURS[part.name], float), axis=2) < NEAR).mean()
        for part in meaning.parts
    }
    return all(share > LEAST for share in shares.values())
