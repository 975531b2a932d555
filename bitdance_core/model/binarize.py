"""Bits as signs (+-1 floats), as booleans (True = +1) and packed into bytes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def binarize(x: Tensor) -> Tensor:
    """The only quantizer: +1 where x > 0, else -1 (an exact 0 is -1). Same shape and dtype."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def pack(bits: Tensor) -> Tensor:
    """bool (n, C, h, w) -> uint8 (n, ceil(C*h*w / 8)) on the CPU, the first bit in the highest place."""
    return torch.from_numpy(np.packbits(bits.cpu().flatten(1).numpy(), axis=1))


def unpack(packed: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 (n, ceil(C*h*w / 8)) and (C, h, w) -> bool (n, C, h, w)."""
    flat = np.unpackbits(packed.cpu().numpy(), axis=1, count=math.prod(shape))
    return torch.from_numpy(flat).bool().unflatten(1, shape)
