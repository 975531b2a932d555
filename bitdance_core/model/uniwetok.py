"""Attention of a UniWeTok tokenizer (arXiv 2602.14178), which a plain one lacks: among all tokens, in the middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import AttentionFn
from .blocks import Block, all_rows, rope_tables
from .tokenizer_config import HalfConfig


def attention_blocks(
    half: HalfConfig, num_heads: int, attend: AttentionFn, operations, device, dtype
) -> tuple[nn.Embedding, nn.ModuleList]:
    """Build the registers and the attention blocks of the encoder or the decoder."""
    width = half.widths[-1]
    return operations.Embedding(half.registers, width, device=device, dtype=dtype), nn.ModuleList(
        Block(width, num_heads, half.intermediate_size, attend, operations, device, dtype)
        for _ in range(half.attention_blocks)
    )


def encoder_places(count: int, device: torch.device) -> Tensor:
    """Return the encoder's coordinates of `count` tokens along a side: evenly from 1.5 to 8.5."""
    return 1.5 + 7 * torch.arange(count, device=device) / max(1, count - 1)


def decoder_places(count: int, device: torch.device) -> Tensor:
    """Return the decoder's coordinates of `count` tokens along a side: evenly, the last at 8.5."""
    return 1 + (torch.arange(count, device=device) + 0.5) * 7.5 / (count - 0.5)


def attend_over_grid(
    x: Tensor, registers: nn.Embedding, blocks: nn.ModuleList, rows: Tensor, columns: Tensor
) -> Tensor:
    """Apply attention blocks to feature maps [B, D, h, w], among all tokens and the registers.

    `rows` [h] and `columns` [w] are the coordinates of the tokens; registers are at (0, 0).
    """
    height, width = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2)
    extra = all_rows(registers, x).expand(len(x), -1, -1)
    places = torch.stack((columns.expand(height, -1), rows[:, None].expand(-1, width)), dim=-1).flatten(0, 1)
    places = torch.cat((places.new_zeros(extra.shape[1], 2), places))
    tokens = torch.cat((extra, tokens), dim=1)
    rope = rope_tables(places, tokens.shape[2] // blocks[0].attention.num_heads, x.dtype)
    for block in blocks:
        tokens = block(tokens, rope)
    return tokens[:, extra.shape[1] :].transpose(1, 2).unflatten(2, (height, width))
