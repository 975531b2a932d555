"""The class-conditional model: one transformer over class tokens, queries and patches, and the diffusion head."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from .attention import AttentionFn, attention
from .context import ClassContext
from .head import DiffusionHead
from .imagenet_config import ImageNetConfig
from .kv_cache import KVCache
from .patches import Grid
from .transformer import NORM_EPS, Block, Rope, SwiGLU


def parameter_name(key: str) -> str:
    """Our name of a parameter that is called `key` in a published file."""
    if key == "query_token":
        return "query_token.weight"
    return "head." + key.removeprefix("head.net.") if key.startswith("head.net.") else key


class ImageNetModel(nn.Module):
    """Parts that `generate` drives; `operations` and `attend` as for `Backbone`."""

    def __init__(
        self,
        config: ImageNetConfig,
        operations: ModuleType | type = nn,
        attend: AttentionFn = attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        width, tokens = config.width, config.grid_side**2
        self.config = config
        self.cls_embedding = operations.Embedding(config.num_classes + 1, config.class_tokens * width, **options)
        if config.tokens_per_patch > 1:
            self.query_token = operations.Embedding(config.tokens_per_patch - 1, width, **options)
        self.proj_in = SwiGLU(config.bits, config.projection_size, width, True, operations, device, dtype)
        self.emb_norm = operations.RMSNorm(width, eps=NORM_EPS, **options)
        self.layers = nn.ModuleList(
            Block(width, config.num_heads, config.intermediate_size, attend, operations, device, dtype)
            for _ in range(config.num_layers)
        )
        self.norm = operations.RMSNorm(width, eps=NORM_EPS, **options)
        self.pos_for_diff = operations.Embedding(tokens, width, **options)
        self.head = DiffusionHead(config.head, operations, attend, device, dtype)

    @property
    def grid(self) -> Grid:
        """The only one that it draws."""
        return Grid(self.config.grid_side, self.config.grid_side, self.config.patch_size)

    def forward(self, embeddings: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, D] of embeddings [B, T, D]; rope of their coordinates, mask and cache as for
        `Backbone`.
        """
        x = self.emb_norm(embeddings)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def context(
        self,
        branches: Sequence[Sequence[int]],
        num_images: int,
        grid: Grid,
        patches: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> ClassContext:
        """To draw the first `patches` of a grid; each branch is one class for each image."""
        assert grid == self.grid and all(len(branch) == num_images for branch in branches)
        return ClassContext(self, [label for branch in branches for label in branch], patches, device, dtype)
