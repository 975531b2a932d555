"""The language model: a Qwen3 decoder stack over embeddings (parameter names are Hugging Face's)."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, additive_mask, attention
from .kv_cache import KVCache
from .rope import rotate_halves, sequence_rope_tables
from .text_config import BackboneConfig


class SelfAttention(nn.Module):
    def __init__(self, config: BackboneConfig, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        width, dim = config.hidden_size, config.head_dim
        self.head_dim = dim
        self.attend = attend
        self.q_proj = operations.Linear(width, config.num_heads * dim, bias=False, **options)
        self.k_proj = operations.Linear(width, config.num_kv_heads * dim, bias=False, **options)
        self.v_proj = operations.Linear(width, config.num_kv_heads * dim, bias=False, **options)
        self.o_proj = operations.Linear(config.num_heads * dim, width, bias=False, **options)
        self.q_norm = operations.RMSNorm(dim, eps=config.rms_norm_eps, **options)
        self.k_norm = operations.RMSNorm(dim, eps=config.rms_norm_eps, **options)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int):
        def heads(y: Tensor) -> Tensor:  # [B, T, H * D] -> [B, T, H, D]
            return y.unflatten(-1, (-1, self.head_dim))

        q = rotate_halves(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), *rope)
        k = rotate_halves(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), *rope)
        v = heads(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Qwen3's SwiGLU: down(SiLU(gate) * up), with three matrices."""

    def __init__(self, config: BackboneConfig, operations, device, dtype) -> None:
        super().__init__()
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = operations.Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = operations.Linear(config.hidden_size, config.intermediate_size, **options)
        self.down_proj = operations.Linear(config.intermediate_size, config.hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: BackboneConfig, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        norm = {"eps": config.rms_norm_eps, "device": device, "dtype": dtype}
        self.self_attn = SelfAttention(config, attend, operations, device, dtype)
        self.mlp = GatedMLP(config, operations, device, dtype)
        self.input_layernorm = operations.RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = operations.RMSNorm(config.hidden_size, **norm)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Qwen3 without its lm_head, which drawing does not need.

    `operations` is a namespace of layer classes (`torch.nn`, or a host's own); `attend` is an `AttentionFn`.
    """

    def __init__(
        self,
        config: BackboneConfig,
        operations: ModuleType | type = nn,
        attend: AttentionFn = attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.config = config
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **options)
        self.layers = nn.ModuleList(
            DecoderLayer(config, attend, operations, device, dtype) for _ in range(config.num_layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **options)

    def forward(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the final hidden states [B, T, D] of embeddings [B, T, D] at sequence positions [B, T].

        With a cache, tokens attend to the cached past and to this block, which is then appended to the cache. `mask` is
        bool, broadcastable to [B, H, T, past + T], True = attend; None = the whole past and block, in both directions.
        """
        rope = sequence_rope_tables(positions, self.config.head_dim, self.config.rope_theta, embeddings.dtype)
        if mask is not None:
            mask = additive_mask(mask, self.config.num_heads // self.config.num_kv_heads, embeddings.dtype)
        x = embeddings
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)
