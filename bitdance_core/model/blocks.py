"""Transformer blocks with packed weights and two-dimensional rotary positions.

Used by the class-conditional models and the UniWeTok tokenizer; parameter names are the published files'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn
from .kv_cache import KVCache

NORM_EPS = 1e-6
THETA = 10000.0

Rope = tuple[Tensor, Tensor]  # cos and sin [T, head_dim / 2]


def rope_tables(coordinates: Tensor, head_dim: int, dtype: torch.dtype) -> Rope:
    """Compute cos and sin [T, head_dim / 2] of coordinates (x, y) [T, 2]; the first half is for x, the second for y."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=coordinates.device, dtype=torch.float32) / half
    angles = (coordinates.float()[..., None] * THETA**-exponents).flatten(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Rotate neighbouring pairs of x [B, H, T, head_dim]."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def all_rows(table: nn.Embedding, like: Tensor) -> Tensor:
    """Return every vector of a learned table, [n, D], on the device and in the dtype of `like`.

    Looks the vectors up instead of using `table.weight`: hosts move, cast and patch weights when a layer is called.
    """
    return table(torch.arange(table.num_embeddings, device=like.device)).to(like.dtype)


class SwiGLU(nn.Module):
    """Compute w2(SiLU(a) * b) with [a, b] = w1(x). Unlike `GatedMLP`, one matrix for both."""

    def __init__(self, width: int, hidden: int, width_out: int, bias: bool, operations, device, dtype) -> None:
        super().__init__()
        self.w1 = operations.Linear(width, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.w2 = operations.Linear(hidden, width_out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.wqkv = operations.Linear(width, 3 * width, bias=False, device=device, dtype=dtype)
        self.wo = operations.Linear(width, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, D]
        q, k = rotate_pairs(q, rope), rotate_pairs(k, rope)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        return self.wo(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """RMSNorm and attention, then RMSNorm and SwiGLU. `operations` and `attend` as for `Backbone`."""

    def __init__(self, width: int, num_heads: int, hidden: int, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        norm = {"eps": NORM_EPS, "device": device, "dtype": dtype}
        self.attention = Attention(width, num_heads, attend, operations, device, dtype)
        self.feed_forward = SwiGLU(width, hidden, width, False, operations, device, dtype)
        self.attention_norm = operations.RMSNorm(width, **norm)
        self.ffn_norm = operations.RMSNorm(width, **norm)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """Transform x [B, T, D]; mask and cache as for `Backbone`."""
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))
