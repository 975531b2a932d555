"""The binary tokenizer: a convolutional autoencoder; the bits are the signs of the encoder's output.

Lookup-free quantization as in MAGVIT-v2 (Yu et al. 2023); parameter names are the published files'.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, attention
from .binarize import binarize
from .tokenizer_config import AutoencoderConfig
from .uniwetok import attend_over_grid, attention_blocks, decoder_places, encoder_places

NORM = {"num_groups": 32, "eps": 1e-6}


class Level(NamedTuple):
    """Residual blocks from `width_in` to `width_out`, then a resize to `width_next` (None: the last level)."""

    width_in: int
    width_out: int
    width_next: int | None
    blocks: int


def encoder_levels(config: AutoencoderConfig) -> list[Level]:
    """List the encoder's levels, finest first. A UniWeTok changes width with the resize, others before it."""
    if config.attention is not None:
        half = config.attention.encoder
        return [Level(w, w, after, n) for w, after, n in zip(half.widths, (*half.widths[1:], None), half.res_blocks)]
    widths = [config.channels * m for m in config.channel_multipliers]
    levels = [Level(a, b, b, config.num_res_blocks) for a, b in zip([config.channels, *widths], widths)]
    return [*levels[:-1], levels[-1]._replace(width_next=None)]


def decoder_levels(config: AutoencoderConfig) -> list[Level]:
    """List the decoder's levels, finest first, though the decoder runs them coarsest first."""
    if config.attention is not None:
        half = config.attention.decoder
        return [Level(w, w, after, n) for w, after, n in zip(half.widths, (None, *half.widths), half.res_blocks)]
    widths = [config.channels * m for m in config.channel_multipliers]
    levels = [Level(a, b, b, config.num_res_blocks) for a, b in zip([*widths[1:], widths[-1]], widths)]
    return [levels[0]._replace(width_next=None), *levels[1:]]


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
    def __init__(self, level: Level, operations, device, dtype) -> None:
        super().__init__()
        self.block = _blocks(level.blocks, level.width_in, level.width_out, operations, device, dtype)
        if level.width_next is not None:
            self.downsample = operations.Conv2d(
                level.width_out, level.width_next, 3, stride=2, padding=1, device=device, dtype=dtype
            )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class Encoder(nn.Module):
    """Encode pixels [B, 3, H, W] in [-1, 1] as [B, C, H/s, W/s], whose signs are the bits."""

    def __init__(self, config: AutoencoderConfig, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        levels, uniwetok = encoder_levels(config), config.attention
        width = levels[-1].width_out
        count = uniwetok.encoder.mid_res_blocks if uniwetok else config.num_res_blocks
        self.is_uniwetok = uniwetok is not None
        self.conv_in = operations.Conv2d(3, levels[0].width_in, 3, padding=1, bias=False, **options)
        self.down = nn.ModuleList(EncoderLevel(level, operations, device, dtype) for level in levels)
        if uniwetok and uniwetok.encoder.attention_blocks:
            parts = attention_blocks(uniwetok.encoder, uniwetok.num_heads, attend, operations, device, dtype)
            self.register_token, self.mid_attn_blocks = parts
        self.mid_block = _blocks(count, width, width, operations, device, dtype)
        self.norm_out = operations.GroupNorm(num_channels=width, **NORM, **options)
        self.conv_out = operations.Conv2d(width, config.bits, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        if hasattr(self, "mid_attn_blocks"):
            rows, columns = (encoder_places(side, x.device) for side in x.shape[2:])
            x = attend_over_grid(x, self.register_token, self.mid_attn_blocks, rows, columns)
        for block in self.mid_block:
            x = block(x)
        x = self.norm_out(x)
        return 2 * torch.sigmoid(self.conv_out(x)) - 1 if self.is_uniwetok else self.conv_out(F.silu(x))


class AdaptiveNorm(nn.Module):
    """Group normalisation, scaled by the standard deviation and shifted by the mean of the image's bits."""

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
    """Compute mean and standard deviation over space of bits [B, C, h, w], each [B, C].

    Tiles must use the statistics of the whole image.
    """
    # a single token has no unbiased variance: take 0
    correction = min(1, bits.shape[2] * bits.shape[3] - 1)
    var, mean = torch.var_mean(bits, dim=(2, 3), correction=correction)
    return mean, (var + 1e-6).sqrt()


class Upsample(nn.Module):
    """Double height and width: a convolution to four times the channels, then depth to space."""

    def __init__(self, width_in: int, width_out: int, operations, device, dtype) -> None:
        super().__init__()
        self.conv1 = operations.Conv2d(width_in, 4 * width_out, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).unflatten(1, (2, 2, -1))  # channel = (block row * 2 + block column) * C' + c
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class DecoderLevel(nn.Module):
    def __init__(self, level: Level, operations, device, dtype) -> None:
        super().__init__()
        self.block = _blocks(level.blocks, level.width_in, level.width_out, operations, device, dtype)
        if level.width_next is not None:
            self.upsample = Upsample(level.width_out, level.width_next, operations, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """Decode bits [B, C, h, w] to pixels [B, 3, s*h, s*w], about in [-1, 1].

    A GAN decoder also takes noise of the same shape as the bits.
    """

    def __init__(self, config: AutoencoderConfig, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        levels, uniwetok = decoder_levels(config), config.attention
        width = levels[-1].width_in
        count = uniwetok.decoder.mid_res_blocks if uniwetok else config.num_res_blocks
        bits_in = config.bits * (2 if config.gan_decoder else 1)
        self.conv_in = operations.Conv2d(bits_in, width, 3, padding=1, **options)
        if uniwetok and uniwetok.decoder.attention_blocks:
            parts = attention_blocks(uniwetok.decoder, uniwetok.num_heads, attend, operations, device, dtype)
            self.register_token, self.mid_attn_blocks = parts
        self.mid_block = _blocks(count, width, width, operations, device, dtype)
        self.adaptive = nn.ModuleList(
            AdaptiveNorm(config.bits, level.width_in, operations, device, dtype) for level in levels
        )
        self.up = nn.ModuleList(DecoderLevel(level, operations, device, dtype) for level in levels)
        self.norm_out = operations.GroupNorm(num_channels=levels[0].width_out, **NORM, **options)
        self.conv_out = operations.Conv2d(levels[0].width_out, 3, 3, padding=1, **options)

    def forward(
        self, bits: Tensor, noise: Tensor | None = None, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Decode; `statistics` are the `bit_statistics` of the whole image if `bits` are a tile of it."""
        if statistics is None:
            statistics = bit_statistics(bits)
        x = self.conv_in(bits if noise is None else torch.cat((bits, noise), dim=1))
        if hasattr(self, "mid_attn_blocks"):
            rows, columns = (decoder_places(side, x.device) for side in x.shape[2:])
            x = attend_over_grid(x, self.register_token, self.mid_attn_blocks, rows, columns)
        for block in self.mid_block:
            x = block(x)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up)):
            x = level(norm(x, statistics))
        return self.conv_out(F.silu(self.norm_out(x)))


class BinaryAutoencoder(nn.Module):
    """A binary tokenizer: plain, GAN or UniWeTok. `operations` and `attend` as for `Backbone`."""

    def __init__(
        self,
        config: AutoencoderConfig,
        operations: ModuleType | type = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attend: AttentionFn = attention,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, attend, operations, device, dtype)
        self.decoder = Decoder(config, attend, operations, device, dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [-1, 1] to bits [B, C, H/s, W/s] in {-1, +1}."""
        return binarize(self.encoder(pixels))

    def decode(self, bits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode bits [B, C, h, w] in {-1, +1} to pixels [B, 3, s*h, s*w], about in [-1, 1].

        A GAN decoder draws its noise from `generator`, on the generator's device (None: torch's global one).
        """
        if not self.config.gan_decoder:
            return self.decoder(bits)
        device = generator.device if generator is not None else bits.device
        noise = torch.randn(bits.shape, generator=generator, device=device, dtype=torch.float32)
        return self.decoder(bits, noise.to(bits))
