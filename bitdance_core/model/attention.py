"""Attention as one function, which chooses the kernel; models only pass tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # optional: `pip install bitdance[flash-attn]`
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax attention with scale head_dim^-0.5 and grouped key/value heads.

    q [B, H, T, D], k and v [B, H_kv, S, D] with H a multiple of H_kv; mask bool, broadcastable to [B, H_kv, T, S],
    True = attend, None = no mask. Returns [B, H, T, D].
    """
    if flash_attention_fits(q, mask):
        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # fold the heads that share keys into more queries of one head: every kernel accepts that, with and without a mask
    groups = q.shape[1] // k.shape[1]
    if mask is not None and mask.shape[-2] > 1:
        mask = torch.cat([mask] * groups, dim=-2)
    queries = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, H_kv, groups * T, D]
    return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask).reshape(q.shape)


def flash_attention_fits(q: Tensor, mask: Tensor | None) -> bool:
    """Return whether FlashAttention is installed and supports q: unmasked half precision on an Ampere GPU or newer."""
    return (
        flash_attn_func is not None
        and mask is None
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
