"""The binary tokenizer: a convolutional autoencoder whose code is the sign of its encoder's output.

Lookup-free quantization as in MAGVIT-v2 (Yu et al. 2023); parameter names are the published files'.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bits import binarize
from .config import AutoencoderConfig

NORM = {"num_groups": 32, "eps": 1e-6}


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        conv = {"kernel_size": 3, "padding": 1, "bias": False, **options}
        self.norm1 = operations.GroupNorm(num_channels=width_in, **NORM, **options)
        self.norm2 = operations.GroupNorm(num_channels=width_out, **NORM, **options)
        self.conv1 = operations.Conv2d(width_in, width_out, **conv)
        self.conv2 = operations.Conv2d(width_out, width_out, **conv)
        if width_in != width_out:
            self.nin_shortcut = operations.Conv2d(width_in, width_out, 1, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def _blocks(count: int, width_in: int, width_out: int, operations, device, dtype) -> nn.ModuleList:
    widths = [width_in] + [width_out] * count
    return nn.ModuleList(ResidualBlock(a, b, operations, device, dtype) for a, b in zip(widths, widths[1:]))


class EncoderLevel(nn.Module):
    def __init__(self, count, width_in, width_out, downsample: bool, operations, device, dtype) -> None:
        super().__init__()
        self.block = _blocks(count, width_in, width_out, operations, device, dtype)
        if downsample:
            self.downsample = operations.Conv2d(
                width_out, width_out, 3, stride=2, padding=1, device=device, dtype=dtype
            )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> [B, C, H/s, W/s], whose sign is the code."""

    def __init__(self, config: AutoencoderConfig, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        levels = [config.channels * m for m in config.channel_multipliers]
        widths = [config.channels, *levels]
        self.conv_in = operations.Conv2d(3, config.channels, 3, padding=1, bias=False, **options)
        self.down = nn.ModuleList(
            EncoderLevel(config.num_res_blocks, a, b, i + 1 < len(levels), operations, device, dtype)
            for i, (a, b) in enumerate(zip(widths, levels))
        )
        self.mid_block = _blocks(config.num_res_blocks, levels[-1], levels[-1], operations, device, dtype)
        self.norm_out = operations.GroupNorm(num_channels=levels[-1], **NORM, **options)
        self.conv_out = operations.Conv2d(levels[-1], config.bits, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        for block in self.mid_block:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AdaptiveNorm(nn.Module):
    """Group normalisation, scaled and shifted by the spread and the mean of the image's bits."""

    def __init__(self, bits: int, width: int, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.norm = operations.GroupNorm(num_channels=width, affine=False, **NORM)
        self.gamma = operations.Linear(bits, width, **options)
        self.beta = operations.Linear(bits, width, **options)

    def forward(self, x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
        mean, std = statistics
        return self.norm(x) * self.gamma(std)[:, :, None, None] + self.beta(mean)[:, :, None, None]


def bit_statistics(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread over space of bits [B, C, h, w], each [B, C]. They belong to the whole image, not to a tile."""
    # the unbiased variance of a single token does not exist; its spread is 0
    correction = min(1, bits.shape[2] * bits.shape[3] - 1)
    var, mean = torch.var_mean(bits, dim=(2, 3), correction=correction)
    return mean, (var + 1e-6).sqrt()


class Upsample(nn.Module):
    """Twice the size: a convolution to four times the channels, then depth to space."""

    def __init__(self, width: int, operations, device, dtype) -> None:
        super().__init__()
        self.conv1 = operations.Conv2d(width, 4 * width, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).unflatten(1, (2, 2, -1))  # channel = (block row * 2 + block column) * C' + c
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class DecoderLevel(nn.Module):
    def __init__(self, count, width_in, width_out, upsample: bool, operations, device, dtype) -> None:
        super().__init__()
        self.block = _blocks(count, width_in, width_out, operations, device, dtype)
        if upsample:
            self.upsample = Upsample(width_out, operations, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """Bits [B, C, h, w] -> pixels [B, 3, s*h, s*w], about [-1, 1]. A GAN decoder takes noise of the bits' shape too."""

    def __init__(self, config: AutoencoderConfig, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        levels = [config.channels * m for m in config.channel_multipliers]
        widths = [*levels, levels[-1]]  # level i takes the width of the one below it
        bits_in = config.bits * (2 if config.gan_decoder else 1)
        self.conv_in = operations.Conv2d(bits_in, levels[-1], 3, padding=1, **options)
        self.mid_block = _blocks(config.num_res_blocks, levels[-1], levels[-1], operations, device, dtype)
        self.adaptive = nn.ModuleList(AdaptiveNorm(config.bits, a, operations, device, dtype) for a in widths[1:])
        self.up = nn.ModuleList(
            DecoderLevel(config.num_res_blocks, a, b, i > 0, operations, device, dtype)
            for i, (a, b) in enumerate(zip(widths[1:], levels))
        )
        self.norm_out = operations.GroupNorm(num_channels=levels[0], **NORM, **options)
        self.conv_out = operations.Conv2d(levels[0], 3, 3, padding=1, **options)

    def forward(
        self, bits: Tensor, noise: Tensor | None = None, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`statistics`: the `bit_statistics` of the whole image, where `bits` are a tile of it."""
        if statistics is None:
            statistics = bit_statistics(bits)
        x = self.conv_in(bits if noise is None else torch.cat((bits, noise), dim=1))
        for block in self.mid_block:
            x = block(x)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up)):
            x = level(norm(x, statistics))
        return self.conv_out(F.silu(self.norm_out(x)))


class BinaryAutoencoder(nn.Module):
    def __init__(
        self,
        config: AutoencoderConfig,
        operations: ModuleType | type = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations, device, dtype)
        self.decoder = Decoder(config, operations, device, dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> bits [B, C, H/s, W/s] in {-1, +1}."""
        return binarize(self.encoder(pixels))

    def decode(self, bits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bits [B, C, h, w] in {-1, +1} -> pixels [B, 3, s*h, s*w], about [-1, 1].

        A GAN decoder draws its noise from `generator`, on the generator's device (None: torch's global one).
        """
        if not self.config.gan_decoder:
            return self.decoder(bits)
        device = generator.device if generator is not None else bits.device
        noise = torch.randn(bits.shape, generator=generator, device=device, dtype=torch.float32)
        return self.decoder(bits, noise.to(bits))
