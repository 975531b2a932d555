"""Bits as images, as latents, and as empty canvases."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management as mm
import torch

from ...bitdance_core.bits.grid import BitGrid
from ...bitdance_core.errors import BitDanceError
from .vae import check_vae

STOCK_STEP = 8  # pixels for each token of an empty latent that does not say


def empty(width: int, height: int, batch_size: int) -> BitGrid:
    """A canvas in pixels; the sampler, which knows the model, checks that its patches fit."""
    if bool(width) != bool(height):
        raise BitDanceError("width and height must both be set, or both be 0 for the model's own size")
    return BitGrid(batch_size, height, width)


def encode(vae, image: torch.Tensor) -> BitGrid:
    """IMAGE [B, H, W, C] in [0, 1] -> bits; sides are cropped to whole tokens."""
    return BitGrid.from_bits(check_vae(vae).encode(image[..., :3]), vae.downscale_ratio)


def decode(vae, bits: BitGrid) -> torch.Tensor:
    """Bits -> IMAGE [B, H, W, 3] in [0, 1]."""
    config = check_vae(vae).config
    check_drawn(bits)
    bits.check(config.downscale, config.bits, "this binary tokenizer")
    return vae.decode(bits.signs().to(mm.intermediate_device()))


def to_latent(bits: BitGrid) -> dict:
    """A LATENT of +-1, which says how many pixels a token has if the bits do."""
    check_drawn(bits)
    latent = {"samples": bits.signs().to(mm.intermediate_device(), mm.intermediate_dtype())}
    if bits.mask is not None:
        latent["noise_mask"] = bits.mask[:, None]
    if bits.step is not None:
        latent["downscale_ratio_spacial"] = bits.step
    return latent


def from_latent(latent: dict) -> BitGrid:
    """A LATENT's signs; one of zeros alone is an empty canvas, of the pixels that it stands for."""
    samples, step = latent["samples"], latent.get("downscale_ratio_spacial")
    if samples.ndim != 4:
        raise BitDanceError(f"bits are of pictures: expected a latent [B, C, h, w], found {list(samples.shape)}")
    if not samples.any():
        step = step or STOCK_STEP
        return BitGrid(samples.shape[0], samples.shape[2] * step, samples.shape[3] * step)
    bits = BitGrid.from_bits(samples, step)
    mask = latent.get("noise_mask")
    # [B, H, W] or [B, 1, H, W], in pixels or in tokens
    return bits if mask is None else replace(bits, mask=mask.reshape(-1, *mask.shape[-2:]))


def check_drawn(bits: BitGrid) -> None:
    if bits.packed is None:
        raise BitDanceError("this is an empty canvas, without bits; draw on it with the Next-Patch Sampler first")
