"""Draw the noise of patches: one stream for an ordinary batch, or one for each image that has an index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .flow import plan_noise


def indexed_seed(seed: int, index: int) -> int:
    """Return the seed of the image with that index: `seed` for 0, another one for each other index, below 2^64."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big")


class NoiseSource:
    """Draw each patch's noise in turn.

    Without indices all images share `generator`, so the noise of an image depends on the size of its batch. With
    `indices`, one for each image, it depends on the generator's seed and on the image's own index alone: it is the same
    in any batch, equal indices give equal noise, and index 0 gives that of an image drawn alone.
    """

    def __init__(self, generator: torch.Generator, indices: Sequence[int] | None = None) -> None:
        self.generator = generator
        self.indices = indices
        seed = generator.initial_seed()
        self._own = {
            index: torch.Generator(generator.device).manual_seed(indexed_seed(seed, index)) for index in indices or ()
        }

    def draw(self, shape: tuple[int, int, int], draws: int, pin_memory: bool = False) -> Tensor:
        """Draw a patch's noise, float32 [draws, rows, P, C] for a shape (rows, P, C), on the generator's device.

        Rows are the images, or the images of one guidance branch after those of the other.
        """
        if self.indices is None:
            return plan_noise(shape, draws, self.generator, pin_memory)
        own_shape = shape[0] // len(self.indices), *shape[1:]
        own = {index: plan_noise(own_shape, draws, generator) for index, generator in self._own.items()}
        # [draws, branches, images, P, C]
        noise = torch.stack([own[index] for index in self.indices], dim=2).flatten(1, 2)
        return noise.pin_memory() if pin_memory else noise
