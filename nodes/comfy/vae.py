"""Make a ComfyUI VAE of the binary tokenizer: its latents are bits, +-1."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...bitdance_core.checkpoints.tokenizer_files import TokenizerCheckpoint
from ...bitdance_core.errors import BitDanceError, format_bytes
from ...bitdance_core.model.binarize import binarize
from ...bitdance_core.model.text_config import AutoencoderConfig
from ...bitdance_core.model.tokenizer_network import BinaryAutoencoder, bit_statistics
from ...bitdance_core.sampling.memory import (
    decoding_bytes,
    encoding_bytes,
    refuse,
    tiled_decoding_bytes,
    tiled_encoding_bytes,
)
from .tiles import TokenizerOperations, tiled
from .weights import SUPPORTED, make_patcher, read_weights

# pixels of a tile's side and of the overlap where a picture as a whole does not fit, as ComfyUI takes them
TILE, OVERLAP = 256, 64


class TiledAutoencoder(BinaryAutoencoder):
    """The core's network in the form that comfy.sd.VAE calls; it takes the signs of latents that nodes have mixed."""

    # a ComfyUI that knows it goes to tiles at once where the whole does not fit, as `decoding_bytes` counts tensors
    comfy_decode_estimate_is_reliable = True

    def __init__(self, config: AutoencoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, TokenizerOperations, device, dtype)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(*self._inputs(latent))

    def decode_tiled(self, latent: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> Tensor:
        """Decode in tiles; all tiles of a picture use the bit statistics and the normalisation of the whole picture."""
        bits, noise = self._inputs(latent)
        stacked = bits if noise is None else torch.cat((bits, noise), dim=1)

        def decoder(picture: Tensor) -> Callable[[Tensor], Tensor]:
            statistics = bit_statistics(picture[:, : self.config.bits])
            return lambda tile: self.decoder(*tile.split(self.config.bits, dim=1), statistics=statistics)

        return tiled(self.decoder, decoder, stacked, (tile_x, tile_y), overlap, self.config.downscale, 3)

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(self._rgb(pixels))

    def encode_tiled(self, pixels: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64) -> Tensor:
        """Encode in tiles as `decode_tiled` decodes; the signs are taken after tiles are blended."""
        scale, tile, pixels = 1 / self.config.downscale, (tile_x, tile_y), self._rgb(pixels)
        return binarize(tiled(self.encoder, lambda _: self.encoder, pixels, tile, overlap, scale, self.config.bits))

    def _rgb(self, pixels: Tensor) -> Tensor:
        """Give grey images three equal channels. Raises BitDanceError for other channels, and for less than a token."""
        step = self.config.downscale
        if pixels.shape[1] not in (1, 3) or min(pixels.shape[2:]) < step:
            raise BitDanceError(
                f"a binary tokenizer encodes RGB images of at least {step}x{step} pixels (one token), found "
                f"{pixels.shape[1]} channels and {pixels.shape[3]}x{pixels.shape[2]} pixels"
            )
        return pixels.expand(-1, 3, -1, -1)

    def _inputs(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return bits, and noise for a GAN decoder, which is the same for all pictures and batch sizes.

        Raises BitDanceError for a latent of another model.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.bits:
            raise BitDanceError(
                f"this binary tokenizer decodes {self.config.bits} bits a token, found a latent of shape "
                f"{list(latent.shape)}; connect a latent that it encoded or that its model drew"
            )
        bits = binarize(latent)
        if not self.config.gan_decoder:
            return bits, None
        noise = torch.randn((1, *bits.shape[1:]), generator=torch.Generator().manual_seed(0))
        return bits, noise.to(bits).expand_as(bits)


class BinaryVAE(comfy.sd.VAE):
    """ComfyUI's VAE class around our network: encoding, decoding, tiles and memory are ComfyUI's."""

    def __init__(self, checkpoint: TokenizerCheckpoint, disable_dynamic: bool = False) -> None:
        """Load a recognised tokenizer. Raises BitDanceError before any weight is read."""
        config = checkpoint.config
        weights = read_weights(checkpoint.build(), checkpoint.component, quantized=False)
        with _without_warning("No VAE weights detected"):
            super().__init__(sd={})  # sets the attributes of every VAE, and warns; ours replace them below
        self.device, self.output_device = mm.vae_device(), mm.intermediate_device()
        self.vae_dtype = mm.vae_dtype(self.device, SUPPORTED)
        self.working_dtypes = SUPPORTED
        self.latent_channels = config.bits
        self.downscale_ratio = self.upscale_ratio = config.downscale
        self.handles_tiling = True
        step = config.downscale
        self.memory_used_encode = lambda shape, dtype: encoding_bytes(config, *shape[-2:], mm.dtype_size(dtype))
        self.memory_used_decode = lambda shape, dtype: decoding_bytes(
            config, shape[-2] * step, shape[-1] * step, mm.dtype_size(dtype)
        )
        offload_device = mm.vae_offload_device()
        network = TiledAutoencoder(config, offload_device, self.vae_dtype)
        self.patcher = make_patcher(network, network, weights, self.device, offload_device, disable_dynamic)
        self.patcher.cached_patcher_init = (_load_patcher, (checkpoint,))
        self.first_stage_model = network

    def encode_tiled_(self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64) -> Tensor:
        # ComfyUI 0.30 calls a network's own tiling for decoding only
        pixels = self.process_input(pixel_samples).to(self.device, self.vae_dtype)
        bits = self.first_stage_model.encode_tiled(pixels, tile_x, tile_y, overlap)
        return bits.to(self.output_device, mm.intermediate_dtype())

    def decode(self, samples_in: Tensor, *args, **kwargs) -> Tensor:
        """Decode as ComfyUI does, but in tiles at once where a whole picture exceeds the device.

        Raises BitDanceError, before anything is computed, where tiles or their results exceed it too.
        """
        step = self.config.downscale
        whole = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        if whole > self._room():
            self._say_tiles("decoding", whole)
            return self.decode_tiled(samples_in, TILE // step, TILE // step, OVERLAP // step)
        pictures = len(samples_in) * 3 * samples_in.shape[-2] * samples_in.shape[-1] * step**2 * 4
        working = whole if self.output_device == self.device else 0
        self._check_room("decoding this", working + pictures, "the number of pictures", self.output_device)
        return super().decode(samples_in, *args, **kwargs)

    def decode_tiled(self, samples: Tensor, tile_x=None, tile_y=None, *args, **kwargs) -> Tensor:
        step, config = self.config.downscale, self.config
        size = samples.shape[-2] * step, samples.shape[-1] * step
        tile = (tile_y or 64) * step, (tile_x or 64) * step
        needed = tiled_decoding_bytes(config, len(samples), size, tile, mm.dtype_size(self.vae_dtype))
        self._check_room("decoding this in tiles", needed, "the number or the size of the pictures, or tile_size")
        return super().decode_tiled(samples, tile_x, tile_y, *args, **kwargs)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Encode as ComfyUI does, in tiles where a whole picture exceeds the device; see `decode`."""
        whole = self.memory_used_encode(pixel_samples.movedim(-1, 1).shape, self.vae_dtype)
        if whole > self._room():
            self._say_tiles("encoding", whole)
            return self.encode_tiled(pixel_samples, TILE, TILE, OVERLAP)
        return super().encode(pixel_samples)

    def encode_tiled(self, pixel_samples: Tensor, tile_x=None, tile_y=None, *args, **kwargs) -> Tensor:
        size, tile = tuple(pixel_samples.shape[1:3]), (tile_y or 512, tile_x or 512)
        needed = tiled_encoding_bytes(self.config, len(pixel_samples), size, tile, mm.dtype_size(self.vae_dtype))
        self._check_room("encoding this in tiles", needed, "the number or the size of the pictures, or tile_size")
        return super().encode_tiled(pixel_samples, tile_x, tile_y, *args, **kwargs)

    def _room(self, device: torch.device | None = None) -> int:
        """Return the bytes that a device has, ours beside the weights; other models can make way."""
        device = device or self.device
        return mm.get_total_memory(device) - (self.patcher.model_size() if device == self.device else 0)

    def _check_room(self, action: str, needed: int, setting: str, device: torch.device | None = None) -> None:
        if needed > (room := self._room(device)):
            refuse(needed, room, action, f"the device {device or self.device}", setting)

    def _say_tiles(self, action: str, whole: int) -> None:
        logging.warning(
            f"[BitDance] {action} a picture as a whole takes {format_bytes(whole)} of memory, the device {self.device} "
            f"has {format_bytes(max(0, self._room()))}: {action} it in tiles"
        )

    @property
    def config(self) -> AutoencoderConfig:
        return self.first_stage_model.config


def _load_patcher(checkpoint: TokenizerCheckpoint, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load a tokenizer again for ComfyUI: for another GPU, or without dynamic memory."""
    return BinaryVAE(checkpoint, disable_dynamic).patcher


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
    """Return a VAE that is a binary tokenizer. Raises BitDanceError for any other."""
    if not isinstance(getattr(vae, "first_stage_model", None), TiledAutoencoder):
        raise BitDanceError(
            "this VAE is not a binary tokenizer; connect the VAE of Load BitDance Model or of Load Binary Tokenizer"
        )
    return vae
