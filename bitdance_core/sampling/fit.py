"""Scale pictures into a size: cropped, or padded with a mask of what is new."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.fields import Size

# where the picture stays, or which part of it is kept: shares of the room above it and left of it
POSITIONS = {
    "center": (0.5, 0.5), "left": (0.5, 0.0), "right": (0.5, 1.0), "top": (0.0, 0.5), "bottom": (1.0, 0.5),
    "top left": (0.0, 0.0), "top right": (0.0, 1.0), "bottom left": (1.0, 0.0), "bottom right": (1.0, 1.0),
}  # fmt: skip


def crop_to(images: Tensor, size: Size, position: str = "center") -> Tensor:
    """Scale images [n, H, W, 3] until they cover (height, width), and cut off what is outside."""
    height, width = images.shape[1:3]
    scale = max(size[0] / height, size[1] / width)
    # before scaling: the largest part of the picture with the new aspect
    part = tuple(max(1, min(full, round(side / scale))) for full, side in zip((height, width), size))
    top, left = (round((full - kept) * share) for full, kept, share in zip((height, width), part, POSITIONS[position]))
    return _resize(images[:, top : top + part[0], left : left + part[1]], size)


def pad_to(
    images: Tensor, size: Size, step: int, position: str = "center", scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Put images [n, H, W, 3] as a whole on a canvas of (height, width), `scale` times as large as fits.

    Returns [n, height, width, 3], in which the border's pixels go on into the new area, and a mask [n, height, width]
    that is 1 there. The picture covers whole tokens of `step` pixels; each side is stretched by at most half of one for
    that (a side that would be shorter than a token gets one), and nothing is cut off.
    """
    height, width = images.shape[1:3]
    fits = scale * min(size[0] / height, size[1] / width)
    inner = tuple(min(full, max(step, round(side * fits / step) * step)) for full, side in zip(size, (height, width)))
    room = size[0] - inner[0], size[1] - inner[1]
    top, left = (round(space * share / step) * step for space, share in zip(room, POSITIONS[position]))
    picture = _resize(images, inner).movedim(-1, 1)
    around = (left, room[1] - left, top, room[0] - top)
    padded = F.pad(picture, around, mode="replicate").movedim(1, -1)
    mask = F.pad(torch.zeros(len(images), *inner, device=images.device), around, value=1.0)
    return padded, mask


def _resize(images: Tensor, size: Size) -> Tensor:
    if images.shape[1:3] == size:
        return images
    channels_first = images.movedim(-1, 1).float()
    return F.interpolate(channels_first, size, mode="bicubic", antialias=True).clamp(0, 1).movedim(1, -1)
