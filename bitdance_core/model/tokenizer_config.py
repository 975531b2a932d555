"""Configurations of binary tokenizers: plain, GAN and UniWeTok."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import BitDanceError
from .fields import MAX_LAYERS, Shapes, count_modules, read_dimensions, read_field


@dataclass(frozen=True)
class HalfConfig:
    """The encoder or the decoder of a UniWeTok: width and residual blocks of each level, finest first."""

    widths: tuple[int, ...]
    res_blocks: tuple[int, ...]
    mid_res_blocks: int
    attention_blocks: int
    intermediate_size: int  # of an attention block's SwiGLU
    registers: int  # learned tokens before those of the grid


@dataclass(frozen=True)
class UniWeTokConfig:
    """The parts of a UniWeTok that a plain tokenizer lacks: attention in the middle, separate levels of both halves."""

    num_heads: int
    encoder: HalfConfig
    decoder: HalfConfig


@dataclass(frozen=True)
class AutoencoderConfig:
    """Binary tokenizer: one token of `bits` bits per `downscale` x `downscale` pixels.

    For a UniWeTok, `attention` describes both halves; channels and blocks here are the encoder's.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    bits: int
    gan_decoder: bool
    attention: UniWeTokConfig | None = None

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> AutoencoderConfig:
        """Read an `ae_config.json`; `source` is the file named in errors."""
        levels = read_field(config, "ddconfig", dict, source)
        multipliers = read_field(levels, "ch_mult", list, source)
        if not 1 <= len(multipliers) <= 8 or any(type(m) is not int or not 1 <= m <= 64 for m in multipliers):
            raise BitDanceError(f"{source}: 'ch_mult' must be 1 to 8 whole numbers up to 64, found {multipliers}")
        channels = read_field(levels, "ch", int, source)
        if channels % 32:
            raise BitDanceError(f"{source}: 'ch' must be a multiple of 32 (groups of a norm), found {channels}")
        return cls(
            channels=channels,
            channel_multipliers=tuple(multipliers),
            num_res_blocks=read_field(levels, "num_res_blocks", int, source, most=MAX_LAYERS),
            bits=read_field(levels, "z_channels", int, source),
            gan_decoder=bool(config.get("gan_decoder", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return an `ae_config.json`; the rest of a UniWeTok's configuration follows from the shapes of its tensors."""
        levels = {
            "double_z": False,
            "z_channels": self.bits,
            "in_channels": 3,
            "out_ch": 3,
            "ch": self.channels,
            "ch_mult": list(self.channel_multipliers),
            "num_res_blocks": self.num_res_blocks,
        }
        if self.attention is not None:
            levels |= {"attn_blocks": self.attention.encoder.attention_blocks, "n_heads": self.attention.num_heads}
        return {"gan_decoder": self.gan_decoder, "ddconfig": levels}

    @classmethod
    def from_shapes(cls, shapes: Shapes, source: str, heads: int | None = None) -> AutoencoderConfig:
        """Derive from the shapes of a plain, GAN or UniWeTok tokenizer; `source` is the file named in errors.

        `heads` is the number of attention heads of a UniWeTok, which no shape gives.
        """
        needed = [f"{name}.weight" for name in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in")]
        if any(len(shapes.get(name, ())) != 4 for name in needed):
            raise BitDanceError(
                f"{source} holds no binary tokenizer; found {len(shapes)} tensors: {', '.join([*shapes][:3])}, …"
            )
        channels, bits, bits_in = (read_dimensions(shapes, name, 4, source) for name in needed)
        attention = None
        if any(".mid_attn_blocks." in name for name in shapes):
            halves = _half(shapes, "encoder.", "down", source), _half(shapes, "decoder.", "up", source)
            if heads is None:
                raise BitDanceError(
                    f"{source}: no tensor gives a UniWeTok's number of attention heads ('n_heads'); put its "
                    "configuration beside the file, as NAME_config.json"
                )
            # rotary positions: pairs of features for each of two coordinates
            if type(heads) is not int or heads < 1 or any(half.widths[-1] % (4 * heads) for half in halves):
                widths = " and ".join(str(half.widths[-1]) for half in halves)
                raise BitDanceError(
                    f"{source}: 'n_heads' is {heads!r}; widths of {widths} must give each head a multiple of 4 features"
                )
            if len(halves[0].widths) != len(halves[1].widths):
                raise BitDanceError(
                    f"{source}: encoder and decoder must have the same number of levels, found {len(halves[0].widths)} "
                    f"and {len(halves[1].widths)}"
                )
            attention = UniWeTokConfig(heads, *halves)
            widths, base = halves[0].widths, math.gcd(*halves[0].widths)
        else:
            widths, base = _widths(shapes, "encoder.down.", "conv2", source), channels[0]
        if any(width % base for width in widths):
            raise BitDanceError(f"{source}: levels of {list(widths)} channels; expected multiples of conv_in's {base}")
        levels = {
            "ch": base,
            "ch_mult": [width // base for width in widths],
            "num_res_blocks": count_modules(shapes, "encoder.down.0.block."),
            "z_channels": bits[0],
        }
        config = cls.from_dict({"ddconfig": levels, "gan_decoder": bits_in[1] == 2 * bits[0]}, source)
        return dataclasses.replace(config, attention=attention)


def _half(shapes: Shapes, prefix: str, levels: str, source: str) -> HalfConfig:
    widths = _widths(shapes, f"{prefix}{levels}.", "norm1", source)
    blocks = count_modules(shapes, f"{prefix}mid_attn_blocks.")
    hidden = registers = 0
    if blocks:
        hidden = read_dimensions(shapes, f"{prefix}mid_attn_blocks.0.feed_forward.w2.weight", 2, source)[1]
        registers = read_dimensions(shapes, f"{prefix}register_token.weight", 2, source)[0]
    half = HalfConfig(
        widths=widths,
        res_blocks=tuple(count_modules(shapes, f"{prefix}{levels}.{i}.block.") for i in range(len(widths))),
        mid_res_blocks=count_modules(shapes, f"{prefix}mid_block."),
        attention_blocks=blocks,
        intermediate_size=hidden,
        registers=registers,
    )
    if any(width % 32 for width in widths) or max(*half.res_blocks, half.mid_res_blocks, blocks) > MAX_LAYERS:
        raise BitDanceError(
            f"{source}: {half}: widths must be multiples of 32 (groups of a norm), blocks at most {MAX_LAYERS}"
        )
    return half


def _widths(shapes: Shapes, prefix: str, layer: str, source: str) -> tuple[int, ...]:
    """Read the width of each level from a layer of its first residual block."""
    dimensions = 1 if layer.startswith("norm") else 4
    count = count_modules(shapes, prefix)
    if not 1 <= count <= 8:
        raise BitDanceError(f"{source}: a tokenizer must have 1 to 8 levels ({prefix}N), found {count}")
    return tuple(
        read_dimensions(shapes, f"{prefix}{i}.block.0.{layer}.weight", dimensions, source)[0] for i in range(count)
    )
