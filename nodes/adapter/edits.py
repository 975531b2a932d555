"""The editing nodes' work: BITS, MASK and IMAGE around the core's functions."""

from __future__ import annotations

import math
from dataclasses import replace

import comfy.model_management as mm
import torch
from torch import Tensor

from ...bitdance_core import bit_edits
from ...bitdance_core.bits.grid import BitGrid
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.grid import Grid
from ...bitdance_core.sampling.editing import THRESHOLD, token_mask
from .latents import check_drawn
from .model import check_model

SHOWN = 512  # pixels: about the size of the pictures that show bits
BARS = 96  # pixels: how high the bars of the bits' means are


def pad(model, bits: BitGrid, left: int, top: int, right: int, bottom: int) -> tuple[BitGrid, Tensor]:
    """The larger canvas, and its MASK [n, H, W] in pixels. Sides are rounded up to the model's patches."""
    host = check_model(model)
    check_drawn(bits)
    config, step = host.config, host.autoencoder.downscale
    bits.check(step, host.autoencoder.bits, config.family)
    patch = config.patch_size * step
    left, top, right, bottom = (math.ceil(side / patch) * config.patch_size for side in (left, top, right, bottom))
    padded = bit_edits.pad(bits.bits(), left, top, right, bottom)
    new = torch.ones(bits.batch, *padded.shape[2:])
    new[:, top : top + bits.height, left : left + bits.width] = 0
    mask = new.repeat_interleave(step, 1).repeat_interleave(step, 2)
    return BitGrid.from_bits(padded, step, bits.prompt), mask.to(mm.intermediate_device())


def vary(bits: BitGrid, share: float, seed: int) -> BitGrid:
    check_drawn(bits)
    varied = bit_edits.vary(bits.bits(), share, torch.Generator().manual_seed(seed))
    return replace(BitGrid.from_bits(varied, bits.step, bits.prompt), mask=bits.mask)


def blend(below: BitGrid, above: BitGrid, mask: Tensor) -> BitGrid:
    check_drawn(below)
    check_drawn(above)
    batch = max(below.batch, above.batch)
    _check_alike(below, above)
    tokens = token_mask(mask, Grid(below.height, below.width, 1), batch) >= THRESHOLD
    mixed = bit_edits.blend(below.bits(), above.bits(), tokens)
    return BitGrid.from_bits(mixed, below.step or above.step, below.prompt)


def inspect(bits: BitGrid, other: BitGrid | None) -> tuple[Tensor, Tensor, str]:
    """Planes and difference as IMAGE [n, H, W, 3], and a report."""
    check_drawn(bits)
    own = bits.bits()
    scale = max(1, SHOWN // max(own.shape[2:]))
    set_share = own.float().mean((0, 2, 3))
    report = [
        f"{bits.batch} x {bits.channels} bits x {bits.height}x{bits.width} tokens ({bits.tokenizer}), "
        f"{own.float().mean():.1%} of them +1",
        "share of +1 by bit: " + " ".join(f"{share:.2f}" for share in set_share.tolist()),
    ]
    difference = torch.zeros(bits.batch, bits.height, bits.width)
    if other is not None:
        check_drawn(other)
        _check_alike(bits, other)
        difference = bit_edits.differing(own, other.bits())
        flipped = difference.sum((1, 2)) * bits.channels
        total = bits.channels * bits.height * bits.width
        report += [
            f"picture {i}: {round(count)} of {total} bits differ ({count / total:.2%})"
            for i, count in enumerate(flipped.tolist(), start=1)
        ]
    # under the planes, a bar for each bit: the share of +1
    small = max(1, scale // math.ceil(math.sqrt(bits.channels)))
    heat = difference.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    sheet = bit_edits.planes(own, small)
    bars = bit_edits.bars(set_share, sheet.shape[2], BARS).expand(bits.batch, -1, -1)
    return _image(torch.cat((sheet, bars), dim=1)), _image(heat), "\n".join(report)


def _check_alike(first: BitGrid, second: BitGrid) -> None:
    if first.channels != second.channels or len({first.step, second.step} - {None}) > 1:
        raise BitDanceError(f"bits of a {first.tokenizer} and of a {second.tokenizer} tokenizer do not go together")


def _image(grey: Tensor) -> Tensor:
    return grey[..., None].expand(-1, -1, -1, 3).to(mm.intermediate_device())
