"""Make a trained tokenizer larger without losing what it knows: a finer level, wider levels, more bits.

A finer level first halves the picture, so that a tokenizer of 64 x 64 draws 128 x 128, blurred, from the start. Wider
levels and more bits compute exactly what the smaller ones did.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder

Weights = dict[str, Tensor]


def fresh(config: AutoencoderConfig, seed: int) -> Weights:
    """Initial weights of a configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BinaryAutoencoder(config, device="cpu").state_dict()


def finer(weights: Weights, config: AutoencoderConfig, seed: int = 0) -> tuple[Weights, AutoencoderConfig]:
    """One more level at the fine end, as wide as the finest: twice the pixels a token, about the same picture."""
    new = replace(config, channel_multipliers=(1, *config.channel_multipliers))
    own = fresh(new, seed)
    for name, value in weights.items():
        part = name.split(".")
        if part[1] in ("down", "up", "adaptive"):
            part[2] = str(int(part[2]) + 1)
            own[".".join(part)] = value.clone()
        elif name != "encoder.conv_in.weight":
            own[name] = value.clone()
    width = config.channels
    # encoder: 27 of the channels carry the three colours, moved by -1, 0 and 1 pixels each way; the first convolution
    # of old then reads pairs of pixels (the last of its six is out of reach)
    carry = torch.zeros(width, 3, 3, 3)
    for channel in range(27):
        colour, row, column = channel // 9, channel // 3 % 3, channel % 3
        carry[channel, colour, row, column] = 1
    carry[27:] = own["encoder.conv_in.weight"][27:]
    own["encoder.conv_in.weight"] = carry
    down = torch.zeros_like(own["encoder.down.0.downsample.weight"])  # [width, width, 3, 3]
    old = weights["encoder.conv_in.weight"]  # [width, 3, 3, 3]
    for tap_row in range(3):
        for tap_column in range(3):
            pixels = [(r, c) for r in _pixels(tap_row) for c in _pixels(tap_column)]
            for row, column in pixels:
                (kernel_row, shift_row), (kernel_column, shift_column) = _reach(row), _reach(column)
                for colour in range(3):
                    channel = colour * 9 + (shift_row + 1) * 3 + shift_column + 1
                    share = old[:, colour, tap_row, tap_column] / len(pixels)
                    down[:, channel, kernel_row + 1, kernel_column + 1] += share
    own["encoder.down.0.downsample.weight"] = down
    own["encoder.down.0.downsample.bias"].zero_()
    # decoder: each value becomes four, unchanged
    up = torch.zeros_like(own["decoder.up.1.upsample.conv1.weight"])
    for channel in range(width):
        up[channel::width, channel, 1, 1] = 1
    own["decoder.up.1.upsample.conv1.weight"] = up
    own["decoder.up.1.upsample.conv1.bias"].zero_()
    for name in ("gamma.weight", "beta.weight", "beta.bias"):
        own[f"decoder.adaptive.0.{name}"].zero_()
    own["decoder.adaptive.0.gamma.bias"].fill_(1.0)
    for block in range(config.num_res_blocks):  # the new blocks add nothing yet
        own[f"encoder.down.0.block.{block}.conv2.weight"].zero_()
        own[f"decoder.up.0.block.{block}.conv2.weight"].zero_()
    return own, new


def _pixels(tap: int) -> tuple[int, ...]:
    """The fine pixels, from the even one of the middle, that one of three taps read at half the size."""
    return ((-2, -1), (0, 1), (2,))[tap]


def _reach(pixel: int) -> tuple[int, int]:
    """A kernel's place (-1, 0, 1) and a channel's shift (-1, 0, 1) that together read a pixel in -2 .. 2."""
    kernel = max(-1, min(1, pixel))
    return kernel, pixel - kernel


def wider(
    weights: Weights, config: AutoencoderConfig, channels: int, multipliers: tuple[int, ...], seed: int = 0
) -> tuple[Weights, AutoencoderConfig]:
    """Levels of multiples of their widths. A channel becomes several equal ones, which share its outgoing weights in
    random parts, so that training tells them apart; a group of a norm holds the same channels as before.
    """
    new = replace(config, channels=channels, channel_multipliers=multipliers)
    own, generator = fresh(new, seed), torch.Generator().manual_seed(seed)
    for name, target in own.items():
        if name in weights:
            old = weights[name]
        elif name.endswith("nin_shortcut.weight"):  # the same width on both sides until now: nothing changed
            old = torch.eye(weights[name.replace("nin_shortcut.weight", "norm1.weight")].shape[0])[:, :, None, None]
        else:
            raise ValueError(f"{name}: not in the smaller tokenizer")
        value = _widen_rows(old, target.shape[0], "upsample" in name)
        if target.ndim > 1 and target.shape[1] != old.shape[1]:
            value = _split_columns(value, target.shape[1], generator)
        own[name] = value.contiguous()
    return own, new


def _widen_rows(value: Tensor, rows: int, is_depth_to_space: bool) -> Tensor:
    if value.shape[0] == rows:
        return value.clone()
    blocks = 4 if is_depth_to_space else 1  # channel = block * width + c
    return value.unflatten(0, (blocks, -1)).repeat_interleave(rows // value.shape[0], 1).flatten(0, 1)


def _split_columns(value: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    times = columns // value.shape[1]
    parts = 0.5 + torch.rand(value.shape[1], times, generator=generator)
    parts = (parts / parts.sum(1, keepdim=True)).flatten()
    shape = (1, -1, *[1] * (value.ndim - 2))
    return value.repeat_interleave(times, 1) * parts.view(shape)


def more_bits(
    weights: Weights, config: AutoencoderConfig, bits: int, seed: int = 0
) -> tuple[Weights, AutoencoderConfig]:
    """More bits a token, which the decoder does not read yet."""
    new = replace(config, bits=bits)
    own = fresh(new, seed)
    for name, value in weights.items():
        target = own[name]
        if target.shape == value.shape:
            own[name] = value.clone()
        elif name.startswith("encoder.conv_out"):
            target[: config.bits] = value
        else:
            target.zero_()
            target[:, : config.bits] = value
    return own, new
