"""Batches of scenes, painted ahead in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from builtin.scenes.compose import Composer, Scene, random_scene

T = TypeVar("T")


def sizes_of(side: int) -> tuple[tuple[int, int], ...]:
    """(height, width) that a model of `side` is trained at."""
    return (side, side), (side, side * 3 // 2), (side * 3 // 2, side)


def choose_size(side: int, square: float, rng: np.random.Generator) -> tuple[int, int]:
    """The square with a share of `square`, else one of the oblong sizes."""
    return sizes_of(side)[0 if rng.random() < square else rng.integers(1, 3)]


def paint_batch(composer: Composer, scenes: list[Scene], size: tuple[int, int]) -> Tensor:
    """Pixels uint8 [B, 3, H, W]."""
    pixels = np.stack([composer.paint(scene, *size) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def random_batch(
    composer: Composer, count: int, side: int, square: float, rng: np.random.Generator
) -> tuple[list[Scene], Tensor]:
    """Scenes of one size, fewer where it is oblong, and their pixels uint8 [B, 3, H, W]."""
    size = choose_size(side, square, rng)
    scenes = [random_scene(rng) for _ in range(max(1, count * side**2 // (size[0] * size[1])))]
    return scenes, paint_batch(composer, scenes, size)


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def ahead(make: Callable[[int], T], workers: int = 1, depth: int = 4) -> Callable[[int], T]:
    """`make` of consecutive steps, computed in threads before they are asked for."""
    pool, waiting = ThreadPoolExecutor(workers), {}

    def get(step: int) -> T:
        for later in range(step, step + depth):
            if later not in waiting:
                waiting[later] = pool.submit(make, later)
        return waiting.pop(step).result()

    return get
