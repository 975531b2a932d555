"""Bits in three forms: signs (+-1 floats), booleans (True = +1) and packed bytes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def binarize(x: Tensor) -> Tensor:
    """Quantize to +1 where x > 0, else -1 (an exact 0 is -1). Keeps shape and dtype. There is no other quantizer."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def pack(bits: Tensor) -> Tensor:
    """Pack bool (n, C, h, w) into uint8 (n, ceil(C*h*w / 8)) on the CPU, the first bit as the most significant."""
    return torch.from_numpy(np.packbits(bits.cpu().flatten(1).numpy(), axis=1))


def unpack(packed: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Unpack uint8 (n, ceil(C*h*w / 8)) to bool (n, C, h, w); `shape` is (C, h, w)."""
    flat = np.unpackbits(packed.cpu().numpy(), axis=1, count=math.prod(shape))
    return torch.from_numpy(flat).bool().unflatten(1, shape)
