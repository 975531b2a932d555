"""Editing is sampling: bits to start from, and for each token how far back towards noise its flow begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BitDanceError
from ..model.grid import Grid
from .flow import Known

THRESHOLD = 0.5  # of a mask: from here on a token is redrawn


@dataclass(frozen=True)
class Edit:
    """`bits` [n, C, h, w], +-1, and the time [n, h, w] at which each token's flow leaves them: 0 is from noise alone,
    1 (or more) never.
    """

    bits: Tensor
    until: Tensor

    def starts(self, grid: Grid) -> list[float]:
        """The time at which each patch's first token leaves its bits, in any picture of the batch; 1: none does."""
        return grid.patchify(self.until[:, None]).amin(dim=(0, 2, 3)).clamp_max(1).tolist()

    def longest_read(self, grid: Grid) -> int:
        """The most patches that are read in one pass, between two that are drawn."""
        drawn = [i for i, start in enumerate(self.starts(grid)) if start < 1]
        return max((after - before for before, after in zip([0, *drawn], drawn)), default=1) or 1

    def to_patches(self, grid: Grid, device: torch.device | str) -> list[Known]:
        bits, until = grid.patchify(self.bits).to(device), grid.patchify(self.until[:, None])[..., 0].to(device)
        return [Known(bits[:, i], until[:, i]) for i in range(grid.num_patches)]


def make_edit(
    init_bits: Tensor | None,
    denoise: float,
    mask: Tensor | None,
    grid: Grid,
    num_images: int,
    channels: int,
    step: int | None = None,
) -> Edit | None:
    """The edit that a user asks for; None where nothing is kept, so that a fresh picture is drawn.

    init_bits is bool (n or 1, C, h, w), or +-1. A mask (n or 1, H, W) of any size lies over the whole picture: a token
    is redrawn where it reaches 0.5 at any of the token's pixels, with `denoise` times the largest value there, so that
    soft masks change less. With `step`, pixels of a token's side, the mask of a picture that was cropped to whole
    tokens is cropped alike (see `token_mask`). Raises BitDanceError for what does not fit.
    """
    if not isinstance(denoise, Real) or not 0 <= denoise <= 1:
        raise BitDanceError(f"denoise must be a number from 0 to 1, found {denoise!r}")
    is_fresh = denoise == 1 and mask is None
    if init_bits is None:
        if is_fresh:
            return None
        raise BitDanceError("denoise below 1 and masks need bits to start from (init_bits)")
    shape = (channels, grid.height, grid.width)
    if init_bits.ndim != 4 or init_bits.shape[1:] != shape or init_bits.shape[0] not in (1, num_images):
        raise BitDanceError(
            f"the bits to start from are {list(init_bits.shape)}, expected {[num_images, *shape]} "
            f"(or one picture for all {num_images})"
        )
    if is_fresh:
        return None
    amount = torch.ones(1, grid.height, grid.width) if mask is None else token_mask(mask, grid, num_images, step)
    until = torch.where(amount >= THRESHOLD, 1 - denoise * amount, 1.0).expand(num_images, -1, -1)
    if not until.any():
        return None
    bits = torch.where(init_bits > 0 if init_bits.dtype != torch.bool else init_bits, 1.0, -1.0)
    return Edit(bits.expand(num_images, -1, -1, -1), until)


def token_mask(mask: Tensor, grid: Grid, num_images: int, step: int | None = None) -> Tensor:
    """A mask (n or 1, H, W) in [0, 1] of any size -> its largest value in each token (n or 1, h, w), float32.

    With `step`, pixels of a token's side: if the mask has the size of a picture that encoding crops to this grid, it is
    cropped as the picture is, so that both agree to the pixel. A mask of any other size is stretched over the grid.
    """
    mask = torch.as_tensor(mask)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or not all(mask.shape) or mask.shape[0] not in (1, num_images):
        count = "1" if num_images == 1 else f"1 or {num_images}"
        raise BitDanceError(f"a mask must be ({count}, H, W), for all pictures or one each, found {list(mask.shape)}")
    mask = mask.float().cpu().nan_to_num(0).clamp(0, 1)
    if step and (mask.shape[1] // step, mask.shape[2] // step) == (grid.height, grid.width):
        mask = crop_to_tokens(mask, step)
    return F.adaptive_max_pool2d(mask[:, None], (grid.height, grid.width))[:, 0]


def crop_to_tokens(pixels: Tensor, step: int) -> Tensor:
    """Crop (…, H, W) to multiples of `step` equally at both ends; an odd pixel more goes at the lower and right end."""
    height, width = (side // step * step for side in pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def region_map(covers: Sequence[Tensor], grid: Grid) -> Tensor:
    """Which prompt each token follows [patches, P]: 0, or k + 1 where covers[k], bool [h, w], is the last one set."""
    tokens = torch.zeros(grid.height, grid.width, dtype=torch.long)
    for index, cover in enumerate(covers, start=1):
        tokens[cover] = index
    return grid.patchify(tokens[None, None])[0, :, :, 0]
