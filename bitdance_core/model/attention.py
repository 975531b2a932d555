"""Attention as one function, which models are built with: PyTorch's, or flash-attn's where a caller asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BitDanceError, is_out_of_memory

log = logging.getLogger(__name__)

AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# entries; CUDA's kernels want the rows of a mask that far apart, and else copy the mask at every call
MASK_ALIGNMENT = 16


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax attention with scale head_dim^-0.5 and grouped key/value heads, by PyTorch's kernels.

    q [B, H, T, D], k and v [B, H_kv, S, D] with H a multiple G of H_kv; mask None = no mask, or broadcastable to
    [B, H_kv, T, S] or [B, H_kv, G * T, S] (the same T rows G times), bool (True = attend) or numbers to add to the
    scores. Returns [B, H, T, D].
    """
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # fold the heads that share keys into more queries of one head: every kernel accepts that, with and without a mask
    groups = q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, H_kv, G * T, D]
    if mask is not None and mask.shape[-2] not in (1, queries.shape[2]):
        mask = torch.cat([mask] * groups, dim=-2)
    return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask).reshape(q.shape)


def additive_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask [..., T, S], True = attend, into numbers to add to scores [..., T or groups * T, S], for all
    layers of a pass. Done by every layer for itself it would take some five kernels and two more copies.
    """
    *batch, rows, keys = mask.shape
    groups = groups if rows > 1 else 1
    room = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
    numbers = torch.zeros(*batch, groups * rows, room, dtype=dtype, device=mask.device)[..., :keys]
    numbers.unflatten(-2, (groups, rows)).masked_fill_(~mask[..., None, :, :], -torch.inf)
    return numbers


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep PyTorch from choosing cuDNN's attention, as it does first on some cards.

    cuDNN makes a plan for each number of keys, in milliseconds to tenths of a second, and a picture has as many numbers
    as patches. PyTorch has one switch for the process; it is put back at the end.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


class FlashAttention:
    """An `AttentionFn` that calls flash-attn where that takes the tensors, else `attention`.

    After flash-attn's first failure, as of a build without kernels for the card, `attention` takes all calls.
    """

    def __init__(self, kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        """Take a kernel of q, k and v [B, T, H, D], by default flash-attn's.

        Raises BitDanceError if the package is not installed.
        """
        if kernel is None:
            try:
                from flash_attn import flash_attn_func as kernel
            except ImportError as error:
                raise BitDanceError(
                    "flash-attn is not installed; run pip install flash-attn, or leave attention to PyTorch"
                ) from error
        self.kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        fits = mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
        if self.kernel is not None and fits:
            try:
                return self.kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.kernel = None
                log.warning("flash-attn fails, so PyTorch computes attention: %s", str(error).partition("\n")[0])
        return attention(q, k, v, mask)
