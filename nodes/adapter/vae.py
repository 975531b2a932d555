"""The binary tokenizer as a ComfyUI VAE: bits are its latents, +-1."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...bitdance_core.autoencoder import BinaryAutoencoder, bit_statistics
from ...bitdance_core.bits import binarize
from ...bitdance_core.checkpoint import read_autoencoder
from ...bitdance_core.errors import BitDanceError
from .weights import SUPPORTED, make_patcher, read_weights


class BinaryTokenizer(BinaryAutoencoder):
    """The core's network as comfy.sd.VAE calls it. Latents that stock nodes blended or scaled are bits again first."""

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(*self._inputs(latent))

    def decode_tiled(self, latent: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> Tensor:
        """Tiles of one picture agree, since each is decoded with the bit statistics of the whole."""
        return torch.cat([self._decode_tiled(row, tile_x, tile_y, overlap) for row in latent.split(1)])

    def _decode_tiled(self, latent: Tensor, tile_x: int, tile_y: int, overlap: int) -> Tensor:
        bits, noise = self._inputs(latent)
        statistics = bit_statistics(bits)
        stacked = bits if noise is None else torch.cat((bits, noise), dim=1)

        def decode(tile: Tensor) -> Tensor:
            return self.decoder(*tile.split(self.config.bits, dim=1), statistics=statistics).float()

        # three shapes of tiles, averaged, as ComfyUI's own VAEs do it: their seams lie in different places
        shapes = ((tile_x, tile_y), (max(1, tile_x // 2), tile_y * 2), (tile_x * 2, max(1, tile_y // 2)))
        steps = [comfy.utils.get_tiled_scale_steps(bits.shape[3], bits.shape[2], x, y, overlap) for x, y in shapes]
        progress = comfy.utils.ProgressBar(sum(steps))
        return (
            sum(
                comfy.utils.tiled_scale(
                    stacked, decode, x, y, overlap, self.config.downscale, output_device=bits.device, pbar=progress
                )
                for x, y in shapes
            )
            / 3
        )

    def _inputs(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bits, and for a GAN decoder its noise: the same for every picture, whatever the batch."""
        if latent.ndim != 4 or latent.shape[1] != self.config.bits:
            raise BitDanceError(
                f"this binary tokenizer decodes {self.config.bits} bits a token, found a latent of shape "
                f"{list(latent.shape)}; connect what it encoded or what its model drew"
            )
        bits = binarize(latent)
        if not self.config.gan_decoder:
            return bits, None
        noise = torch.randn((1, *bits.shape[1:]), generator=torch.Generator().manual_seed(0))
        return bits, noise.to(bits).expand_as(bits)


class BinaryVAE(comfy.sd.VAE):
    """A VAE in ComfyUI's sense, made of our network by ComfyUI's own class: encode, decode, tiles, memory."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """`path`: what `read_autoencoder` takes. Raises BitDanceError before any weight is read."""
        config, component = read_autoencoder(path)
        weights = read_weights(BinaryAutoencoder(config, device="meta"), component)
        with _without_warning("No VAE weights detected"):
            super().__init__(sd={})  # sets what every VAE has, and warns; our own follows
        self.device, self.output_device = mm.vae_device(), mm.intermediate_device()
        self.vae_dtype = dtype or mm.vae_dtype(self.device, SUPPORTED)
        self.working_dtypes = SUPPORTED
        self.latent_channels = config.bits
        self.downscale_ratio = self.upscale_ratio = config.downscale
        self.handles_tiling = True
        self.format_encoded = binarize  # tiles that overlap vote on each bit
        # at the finest level five feature maps are alive at once
        finest = 5 * config.channels
        self.memory_used_encode = lambda shape, dtype: finest * shape[-1] * shape[-2] * mm.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: (
            finest * shape[-1] * shape[-2] * config.downscale**2 * mm.dtype_size(dtype)
        )
        offload_device = mm.vae_offload_device()
        self.first_stage_model = BinaryTokenizer(
            config, comfy.ops.disable_weight_init, device=offload_device, dtype=self.vae_dtype
        )
        self.patcher = make_patcher(
            self.first_stage_model, self.first_stage_model, weights, self.device, offload_device
        )

    @property
    def config(self):
        return self.first_stage_model.config


@contextmanager
def _without_warning(text: str) -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logging.getLogger().addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(keep)


def check_vae(vae) -> BinaryVAE:
    """A binary tokenizer, or BitDanceError."""
    if not isinstance(getattr(vae, "first_stage_model", None), BinaryTokenizer):
        raise BitDanceError(
            "this VAE is not a binary tokenizer; connect the VAE of Load BitDance Model or of Load Binary Tokenizer"
        )
    return vae
