"""Convert bits to images and latents and back, and make empty canvases."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management as mm
import torch

from ...bitdance_core.bit_grid import BitGrid
from ...bitdance_core.errors import BitDanceError
from .vae import check_vae

STOCK_STEP = 8  # pixels of a token's side in an empty latent without `downscale_ratio_spacial`


def empty(width: int, height: int, batch_size: int) -> BitGrid:
    """Make an empty canvas of a size in pixels; the sampler checks that the model's patches fit.

    Raises BitDanceError if only one of the sides is 0.
    """
    if bool(width) != bool(height):
        raise BitDanceError(
            f"width is {width} and height {height}; set both, or set both to 0 for the model's own size"
        )
    return BitGrid(batch_size, height, width)


def encode(vae, image: torch.Tensor) -> BitGrid:
    """Encode an IMAGE [B, H, W, C] in [0, 1] as bits; sides are cropped to whole tokens.

    Raises BitDanceError if the VAE is not a binary tokenizer, or the image is smaller than a token.
    """
    return BitGrid.from_bits(check_vae(vae).encode(image[..., :3]), vae.downscale_ratio)


def decode(vae, bits: BitGrid) -> torch.Tensor:
    """Decode bits as an IMAGE [B, H, W, 3] in [0, 1].

    Raises BitDanceError if the VAE is not the binary tokenizer of these bits, or the canvas is empty.
    """
    config = check_vae(vae).config
    check_drawn(bits)
    bits.check(config.downscale, config.bits, "this binary tokenizer")
    return vae.decode(bits.signs().to(mm.intermediate_device()))


def to_latent(bits: BitGrid) -> dict:
    """Make a LATENT [B, C, h, w] of +-1, with the pixels of a token's side if the bits have it.

    Raises BitDanceError for an empty canvas.
    """
    check_drawn(bits)
    latent = {"samples": bits.signs().to(mm.intermediate_device(), mm.intermediate_dtype())}
    if bits.mask is not None:
        latent["noise_mask"] = bits.mask[:, None]
    if bits.step is not None:
        latent["downscale_ratio_spacial"] = bits.step
    return latent


def from_latent(latent: dict) -> BitGrid:
    """Take a LATENT's signs as bits; one of zeros alone becomes an empty canvas of its size in pixels.

    Raises BitDanceError if the latent is not of pictures.
    """
    samples, step = latent["samples"], latent.get("downscale_ratio_spacial")
    if samples.ndim != 4:
        raise BitDanceError(f"'latent' must be of pictures, [B, C, h, w], found {list(samples.shape)}")
    if not samples.any():
        step = step or STOCK_STEP
        return BitGrid(samples.shape[0], samples.shape[2] * step, samples.shape[3] * step)
    bits = BitGrid.from_bits(samples, step)
    mask = latent.get("noise_mask")
    # [B, H, W] or [B, 1, H, W], in pixels or in tokens
    return bits if mask is None else replace(bits, mask=mask.reshape(-1, *mask.shape[-2:]))


def check_drawn(bits: BitGrid, name: str = "bits") -> None:
    """Raise BitDanceError if the input `name` is an empty canvas."""
    if bits.packed is None:
        raise BitDanceError(f"'{name}' is an empty canvas; draw on it with the Next-Patch Sampler first")
