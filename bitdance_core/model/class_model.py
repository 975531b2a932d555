"""The class-conditional model: one transformer over class tokens, queries and patches, the diffusion head, and the
reader of its classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from .attention import AttentionFn, additive_mask, attention
from .blocks import NORM_EPS, Block, Rope, SwiGLU, all_rows, rope_tables
from .class_config import ImageNetConfig
from .grid import Grid
from .head import DiffusionHead
from .kv_cache import KVCache, PlacedCache
from .reader import Reader


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
        if mask is not None:
            mask = additive_mask(mask, 1, embeddings.dtype)
        x = self.emb_norm(embeddings)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def reader(
        self,
        branches: Sequence[Sequence[int]],
        num_images: int,
        grid: Grid,
        patches: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> ClassReader:
        """Make the reader for the first `patches` of the grid; each branch is one class per image."""
        assert grid == self.grid and all(len(branch) == num_images for branch in branches)
        return ClassReader(self, [label for branch in branches for label in branch], patches, device, dtype)


class ClassReader(Reader):
    """Read one class per row: its tokens, then the queries."""

    def __init__(
        self,
        model: ImageNetModel,
        labels: Sequence[int],
        patches: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        config, grid = model.config, model.grid
        classes = model.cls_embedding(torch.tensor(labels, device=device)).to(dtype)
        embeddings = classes.unflatten(1, (config.class_tokens, config.width))
        if grid.tokens_per_patch > 1:
            embeddings = torch.cat(
                (embeddings, all_rows(model.query_token, embeddings).expand(len(labels), -1, -1)), dim=1
            )
        super().__init__(
            embeddings,
            all_rows(model.pos_for_diff, embeddings).unflatten(0, (grid.num_patches, grid.tokens_per_patch)),
            KVCache(config, len(labels), embeddings.shape[1] + (patches - 1) * grid.tokens_per_patch, device, dtype),
        )
        self.model = model
        places = torch.arange(grid.height, device=device) + 1.5
        places = torch.stack((places.expand(grid.height, -1), places[:, None].expand(-1, grid.width)))  # [2, h, w]
        self.rope = rope_tables(grid.patchify(places[None]).flatten(0, 2), config.head_dim, dtype)

    def embed(self, patches: Tensor, first: int) -> Tensor:
        return self.model.proj_in(patches).flatten(1, 2)

    def rotations(self, count: int, first: int | None) -> Rope:
        if first is None:  # tokens outside the grid are not rotated
            nowhere = torch.zeros(count, 2, device=self.embeddings.device)
            return rope_tables(nowhere, self.model.config.head_dim, self.embeddings.dtype)
        start = first * self.block
        return tuple(table[start : start + count] for table in self.rope)

    def network(self, embeddings: Tensor, mask: Tensor | None, cache: KVCache | PlacedCache, *at: Tensor) -> Tensor:
        return self.model(embeddings, at, mask, cache)
