"""The binary tokenizer for users: encode pixels to bits, decode bits to pixels, and check both inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import devices
from .checkpoints.layouts import TOKENIZER_FILES
from .checkpoints.load import load_weights
from .checkpoints.locate import locate
from .checkpoints.tokenizer_files import read_tokenizer
from .errors import BitDanceError, MissingFileError
from .model.tokenizer_network import BinaryAutoencoder
from .sampling.memory import decoding_bytes, encoding_bytes, refuse


class BinaryTokenizer:
    """Encode `downscale` x `downscale` pixels to one token of `channels` bits, and back; see `from_pretrained`."""

    def __init__(self, autoencoder: BinaryAutoencoder, device: torch.device, dtype: torch.dtype) -> None:
        self.autoencoder = autoencoder
        self.device = device
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        local_files_only: bool = False,
    ) -> BinaryTokenizer:
        """Load from a file (.safetensors or .pt), a model folder, a hub id or a built-in name.

        The configuration is the one beside a file, or derived from the shapes of its tensors. Device and dtype as for
        `BitDancePipeline`. Raises BitDanceError, which names the file and what is wrong.
        """
        device, dtype = devices.choose(device, dtype)
        checkpoint = read_tokenizer(locate(source, TOKENIZER_FILES, local_files_only))
        autoencoder = checkpoint.build()
        load_weights([(autoencoder, checkpoint.component)], device, dtype)
        return cls(autoencoder, device, dtype)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        step = self.downscale
        return f"BinaryTokenizer({self.channels} bits for {step}x{step} pixels, {dtype} on {self.device})"

    @property
    def downscale(self) -> int:
        return self.autoencoder.config.downscale

    @property
    def channels(self) -> int:
        return self.autoencoder.config.bits

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1], sides multiples of `downscale`, to bits (B, C, h, w) in {-1, +1}.

        Raises BitDanceError for other shapes, for whole numbers, for NaN or infinite values, and for more pixels than
        the device has memory for.
        """
        step = self.downscale
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(n % step or not n for n in pixels.shape[2:]):
            raise BitDanceError(
                f"expected pixels (B, 3, H, W) with H and W multiples of {step}, found {tuple(pixels.shape)}"
            )
        if not pixels.is_floating_point():
            raise BitDanceError(f"expected pixels as floats in [-1, 1], found {pixels.dtype}; x / 127.5 - 1 makes them")
        if not pixels.isfinite().all():
            raise BitDanceError("expected pixels in [-1, 1], found NaN or infinite values")
        self._check_memory("encoding this", encoding_bytes, len(pixels), *pixels.shape[2:])
        return self.autoencoder.encode(pixels.to(self.device, self.dtype))

    @torch.no_grad()
    def decode(self, bits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode bits (B, C, h, w), +-1 or bool, to pixels (B, 3, H, W), about in [-1, 1].

        A GAN decoder draws its noise from `generator` (None: torch's global one). Raises BitDanceError for other
        shapes or dtypes, and for more bits than the device has memory for.
        """
        is_grid = bits.ndim == 4 and bits.shape[1] == self.channels and all(bits.shape)
        if not is_grid or not (bits.dtype == torch.bool or bits.is_floating_point()):
            raise BitDanceError(
                f"expected bits (B, {self.channels}, h, w), +-1 or bool, found {tuple(bits.shape)} of {bits.dtype}"
            )
        if not bits.isfinite().all():
            raise BitDanceError("expected bits, +-1 or bool, found NaN or infinite values")
        self._check_memory("decoding this", decoding_bytes, len(bits), *(self.downscale * n for n in bits.shape[2:]))
        if bits.dtype == torch.bool:
            bits = torch.where(bits, 1.0, -1.0)
        return self.autoencoder.decode(bits.to(self.device, self.dtype), generator)

    def _check_memory(self, action: str, bytes_of: Callable[..., int], batch: int, height: int, width: int) -> None:
        memory = devices.memory_of(self.device)
        weights = sum(parameter.nbytes for parameter in self.autoencoder.parameters())
        needed = batch * bytes_of(self.autoencoder.config, height, width, self.dtype.itemsize)
        if memory is not None and weights <= memory < weights + needed:  # a system may still page the weights
            where = f"beside the weights {self.device}"
            refuse(needed, memory - weights, action, where, "the size or the number of the pictures")


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (B, 3, H, W) in [-1, 1] to PIL images, rounded as in the published pipeline."""
    pixels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_pixels(image: Image.Image) -> Tensor:
    """Convert a PIL image to pixels (1, 3, H, W) in [-1, 1]; see `to_rgb`."""
    rgb = to_rgb(image)
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(1, rgb.height, rgb.width, 3)
    return data.permute(0, 3, 1, 2).float() / 127.5 - 1


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture file without reading its pixels. Raises BitDanceError for a file that Pillow cannot read."""
    try:
        with Image.open(path) as file:
            yield file
    except BitDanceError:  # of what the caller found in it; it is a ValueError too
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # the type depends on format and damage
        raise BitDanceError(f"{path} is not a readable picture ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any kind to RGB of 8 bits: turned as its EXIF says, transparency on white.

    16-bit pictures and floats, in 0 to 1 or 0 to 255, are scaled to 8 bits. Raises BitDanceError for other values.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale one channel of 16 bits, or of floats, to grey; Pillow itself would clip it to white."""
    values = np.asarray(image).astype(np.float64)
    is_float = image.mode == "F"
    most = 1.0 if is_float and values.max() <= 1 else 255.0 if is_float else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > most:
        expected = "0 to 1 or 0 to 255" if is_float else "0 to 65535"
        raise BitDanceError(f"a picture has values from {values.min():g} to {values.max():g}; expected {expected}")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8))
