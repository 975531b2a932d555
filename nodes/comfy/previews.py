"""Preview a picture while it is drawn: bits become RGB by factors that are fitted to the tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import torch
import torch.nn.functional as F
from torch import Tensor

from ...bitdance_core.model.text_config import AutoencoderConfig

SIDE = 8  # tokens of a side of the example images
INTERVAL = 1 / 3  # seconds between two previews: each makes the host wait for the GPU, and encodes a picture
RIDGE = 1e-2  # regularisation: keeps the factors of bits that hardly vary small


class BitsFormat(comfy.latent_formats.LatentFormat):
    """ComfyUI's description of a LATENT of bits, +-1, which previews and empty latents read."""

    def __init__(self, config: AutoencoderConfig, factors: Tensor) -> None:
        """`factors` (C + 1, 3): RGB in [-1, 1] is bits @ factors[:-1] + factors[-1]."""
        self.scale_factor = 1.0
        self.latent_channels = config.bits
        self.spacial_downscale_ratio = config.downscale
        self.latent_rgb_factors = factors[:-1].tolist()
        self.latent_rgb_factors_bias = factors[-1].tolist()


class Previews:
    """Previews of a picture while it is drawn, no more than one per INTERVAL, and the last patch's in any case."""

    def __init__(self, previewer, patches: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`previewer` is ComfyUI's; `patches` are drawn in all; `clock` counts seconds."""
        self._previewer, self._left, self._clock = previewer, patches, clock
        self._next = clock()

    def show(self, bits: Tensor) -> Any | None:
        """Return the preview of the bits after one more patch, in the form that a ProgressBar takes, if it is time."""
        self._left -= 1
        if self._left and self._clock() < self._next:
            return None
        self._next = self._clock() + INTERVAL
        return self._previewer.decode_latent_to_preview_image("JPEG", bits)


def fit_rgb_factors(vae) -> Tensor:
    """Fit factors (C + 1, 3) by least squares, from the bits of example images to the mean colour of each token."""
    step, channels = vae.downscale_ratio, vae.latent_channels
    images = example_images(count=max(8, channels // 8), side=SIDE * step)
    bits = vae.encode(images.movedim(1, -1)).float().cpu()
    colours = F.avg_pool2d(images, step) * 2 - 1
    x = bits.movedim(1, -1).flatten(0, 2)
    x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
    y = colours.movedim(1, -1).flatten(0, 2)
    return torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(channels + 1), x.T @ y)


def example_images(count: int, side: int) -> Tensor:
    """Make images (count, 3, side, side) in [0, 1]: squares and gradients of 1 to 64 random colours."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        coarse = torch.rand(1, 3, 2 ** (i // 2 % 4), 2 ** (i // 2 % 4), generator=generator)
        mode = {"mode": "nearest"} if i % 2 else {"mode": "bilinear", "align_corners": False}
        images.append(F.interpolate(coarse, size=(side, side), **mode))
    return torch.cat(images)
