"""Edit bits for the editing nodes: convert BITS, MASK and IMAGE for the core's functions."""

from __future__ import annotations

import math
from dataclasses import replace

import comfy.model_management as mm
import torch
from torch import Tensor

from ...bitdance_core import bit_edits
from ...bitdance_core.bit_grid import BitGrid
from ...bitdance_core.editing import THRESHOLD, token_mask
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.patches import Grid
from .latents import check_drawn
from .model import check_model

SHOWN = 512  # pixels of a side of the images that show bits, approximately
BARS = 96  # pixels of height of the bars below the planes


def pad(model, bits: BitGrid, left: int, top: int, right: int, bottom: int) -> tuple[BitGrid, Tensor]:
    """Enlarge pictures by pixels on each side, rounded up to the model's patches.

    Returns the larger canvas, and a MASK [n, H, W] in pixels that is 1 where it is new. Raises BitDanceError for an
    empty canvas and for bits of another tokenizer than the model's.
    """
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
    """Flip a share [0, 1] of each picture's bits, chosen by a seed. Raises BitDanceError for an empty canvas."""
    check_drawn(bits)
    varied = bit_edits.vary(bits.bits(), share, torch.Generator().manual_seed(seed))
    return replace(BitGrid.from_bits(varied, bits.step, bits.prompt), mask=bits.mask)


def blend(below: BitGrid, above: BitGrid, mask: Tensor) -> BitGrid:
    """Take each token from `above` where the MASK reaches 0.5 at any of its pixels, else from `below`.

    Raises BitDanceError for an empty canvas, and for bits of two tokenizers or two sizes.
    """
    _check_alike("below", below, "above", above)
    batch = max(below.batch, above.batch)
    tokens = token_mask(mask, Grid(below.height, below.width, 1), batch) >= THRESHOLD
    mixed = bit_edits.blend(below.bits(), above.bits(), tokens)
    return BitGrid.from_bits(mixed, below.step or above.step, below.prompt)


def inspect(bits: BitGrid, other: BitGrid | None) -> tuple[Tensor, Tensor, str]:
    """Show planes and difference as IMAGEs [n, H, W, 3], and describe both in a report.

    Raises BitDanceError for an empty canvas, and for bits of two tokenizers or two sizes.
    """
    check_drawn(bits)
    own = bits.bits()
    scale = max(1, SHOWN // max(own.shape[2:]))
    set_share = own.float().mean((0, 2, 3))
    report = [
        f"{bits.batch} x {bits.channels} bits x {bits.width}x{bits.height} tokens ({bits.tokenizer}), "
        f"{own.float().mean():.1%} of them +1",
        "share of +1 by bit: " + " ".join(f"{share:.2f}" for share in set_share.tolist()),
    ]
    difference = torch.zeros(bits.batch, bits.height, bits.width)
    if other is not None:
        _check_alike("bits", bits, "other", other)
        difference = bit_edits.differing(own, other.bits())
        flipped = difference.sum((1, 2)) * bits.channels
        total = bits.channels * bits.height * bits.width
        report += [
            f"picture {i}: {round(count)} of {total} bits differ ({count / total:.2%})"
            for i, count in enumerate(flipped.tolist(), start=1)
        ]
    # below the planes, a bar for each bit shows its share of +1
    small = max(1, scale // math.ceil(math.sqrt(bits.channels)))
    heat = difference.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    sheet = bit_edits.planes(own, small)
    bars = bit_edits.bars(set_share, sheet.shape[2], BARS).expand(bits.batch, -1, -1)
    return _image(torch.cat((sheet, bars), dim=1)), _image(heat), "\n".join(report)


def _check_alike(name: str, bits: BitGrid, other_name: str, other: BitGrid) -> None:
    """Raise BitDanceError unless two inputs hold bits of one tokenizer."""
    check_drawn(bits, name)
    check_drawn(other, other_name)
    if bits.channels != other.channels or len({bits.step, other.step} - {None}) > 1:
        raise BitDanceError(
            f"'{name}' has bits of a {bits.tokenizer} tokenizer, '{other_name}' of a {other.tokenizer} one; connect "
            "bits of one tokenizer"
        )


def _image(grey: Tensor) -> Tensor:
    return grey[..., None].expand(-1, -1, -1, 3).to(mm.intermediate_device())
