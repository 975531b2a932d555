"""What a growing picture looks like: bits to RGB by factors fitted from the tokenizer itself."""

from __future__ import annotations

import comfy.latent_formats
import torch
import torch.nn.functional as F
from torch import Tensor

from ...bitdance_core.model.text_config import AutoencoderConfig

SIDE = 8  # tokens on a side of each picture that is fitted to
RIDGE = 1e-2  # keeps factors of bits that hardly vary small


class BitsFormat(comfy.latent_formats.LatentFormat):
    """A LATENT of bits, +-1: what ComfyUI's previews and empty latents ask about it."""

    def __init__(self, config: AutoencoderConfig, factors: Tensor) -> None:
        """`factors` (C + 1, 3): RGB in [-1, 1] is bits @ factors[:-1] + factors[-1]."""
        self.scale_factor = 1.0
        self.latent_channels = config.bits
        self.spacial_downscale_ratio = config.downscale
        self.latent_rgb_factors = factors[:-1].tolist()
        self.latent_rgb_factors_bias = factors[-1].tolist()


def fit_rgb_factors(vae) -> Tensor:
    """Least squares from the bits of a few plain pictures, as this VAE encodes them, to each token's mean colour."""
    step, channels = vae.downscale_ratio, vae.latent_channels
    images = example_images(count=max(8, channels // 8), side=SIDE * step)
    bits = vae.encode(images.movedim(1, -1)).float().cpu()
    colours = F.avg_pool2d(images, step) * 2 - 1
    x = bits.movedim(1, -1).flatten(0, 2)
    x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
    y = colours.movedim(1, -1).flatten(0, 2)
    return torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(channels + 1), x.T @ y)


def example_images(count: int, side: int) -> Tensor:
    """(count, 3, side, side) in [0, 1]: random colours in squares and in gradients, from one to every token its own."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        coarse = torch.rand(1, 3, 2 ** (i // 2 % 4), 2 ** (i // 2 % 4), generator=generator)
        mode = {"mode": "nearest"} if i % 2 else {"mode": "bilinear", "align_corners": False}
        images.append(F.interpolate(coarse, size=(side, side), **mode))
    return torch.cat(images)
