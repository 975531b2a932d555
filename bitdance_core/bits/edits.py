"""Edit bit grids without a model: pad, vary, blend, compare, show. All bits are bool [n, C, h, w]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BitDanceError


def pad(bits: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
    """Add tokens on each side, which repeat the token at the border."""
    return F.pad(bits.float(), (left, right, top, bottom), mode="replicate") > 0.5


def vary(bits: Tensor, share: float, generator: torch.Generator, indices: Sequence[int] | None = None) -> Tensor:
    """Flip a random `share` (0 to 1) of each picture's bits; `generator` is on the CPU.

    `indices` are the pictures' numbers in the batch that they were taken from (default: 0, 1, …): in any batch, the
    picture of one number has the same bits flipped.
    """
    if not 0 <= share <= 1:
        raise BitDanceError(f"the share of bits to flip must be from 0 to 1, found {share!r}")
    flat = bits.flatten(1).clone()
    count, indices = round(share * flat.shape[1]), range(len(flat)) if indices is None else indices
    for number in range(max(indices) + 1):
        chosen = torch.randperm(flat.shape[1], generator=generator)[:count]
        for row, index in zip(flat, indices):
            if index == number:
                row[chosen] = ~row[chosen]
    return flat.view_as(bits)


def blend(below: Tensor, above: Tensor, mask: Tensor) -> Tensor:
    """Take tokens from `above` where the bool mask (n or 1, h, w) is set, from `below` elsewhere."""
    if below.shape[1:] != above.shape[1:] or len({len(below), len(above)} - {1}) > 1:
        raise BitDanceError(
            f"only bits of one grid can be blended, found {list(below.shape)} and {list(above.shape)} "
            "(pictures, bits, rows, columns)"
        )
    return torch.where(mask[:, None], above, below)


def differing(first: Tensor, second: Tensor) -> Tensor:
    """Return the share of differing bits of each token (normalised Hamming distance), float32 [n, h, w]."""
    if first.shape[1:] != second.shape[1:] or len({len(first), len(second)} - {1}) > 1:
        raise BitDanceError(
            f"only bits of one grid can be compared, found {list(first.shape)} and {list(second.shape)}"
        )
    return (first ^ second).float().mean(1)


def planes(bits: Tensor, scale: int, gap: int = 2) -> Tensor:
    """Show each bit's plane in black and white, side by side in reading order, float32 [n, H, W] in [0, 1]."""
    n, channels, height, width = bits.shape
    columns = math.ceil(math.sqrt(channels * height / width))
    rows = math.ceil(channels / columns)
    enlarged = bits.float().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    framed = F.pad(enlarged, (0, gap, 0, gap), value=0.5)
    missing = framed.new_full((n, rows * columns - channels, *framed.shape[2:]), 0.5)
    sheet = torch.cat((framed, missing), dim=1).unflatten(1, (rows, columns))
    return sheet.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)


def bars(shares: Tensor, width: int, height: int) -> Tensor:
    """Show `shares` [C] in [0, 1] as white bars on grey, from left to right, float32 [height, width]."""
    columns = (torch.arange(width) * len(shares) // width).clamp_max(len(shares) - 1)
    levels = (torch.arange(height, 0, -1) - 0.5) / height
    return torch.where(levels[:, None] < shares[columns], 1.0, 0.5)
