"""The text-to-image model: backbone, projector and head, and the reader of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, attention
from .backbone import Backbone
from .grid import Grid
from .head import DiffusionHead
from .kv_cache import KVCache, PlacedCache
from .reader import Reader
from .text_config import BitDanceConfig


class Projector(nn.Module):
    """Embed token bits [..., C] in {-1, +1} in the backbone's width [..., D]."""

    def __init__(self, bits: int, width: int, operations, device, dtype) -> None:
        super().__init__()
        self.fc1 = operations.Linear(bits, width, device=device, dtype=dtype)
        self.fc2 = operations.Linear(width, width, device=device, dtype=dtype)

    def forward(self, bits: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(bits), approximate="tanh"))


class BitDance(nn.Module):
    """Three parts that `generate` runs. It moves nothing: the embedding table may be in system memory."""

    def __init__(
        self,
        config: BitDanceConfig,
        operations: ModuleType | type = nn,
        attend: AttentionFn = attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, operations, attend, device, dtype)
        self.projector = Projector(config.head.bits, config.backbone.hidden_size, operations, device, dtype)
        self.head = DiffusionHead(config.head, operations, attend, device, dtype)

    def reader(
        self,
        branches: Sequence[Sequence[int]],
        num_images: int,
        grid: Grid,
        patches: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> TextReader:
        """Make the reader for the first `patches` of a grid.

        Each branch is token ids, the same for every image, that end in the width token and the queries.
        """
        rows = [ids for ids in branches for _ in range(num_images)]
        return TextReader(self, rows, grid, patches, device, dtype)


class TextReader(Reader):
    """Read token ids, left-padded to one length.

    Left padding lets rows of different prompts end together, so that every block is one batched call; each row counts
    its own positions from its first real token.
    """

    def __init__(
        self,
        model: BitDance,
        rows: Sequence[Sequence[int]],
        grid: Grid,
        patches: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        config, table = model.config.backbone, model.backbone.embed_tokens
        # looked up on the table's device, which may be the CPU
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(padding, rows)], device=table.weight.device)
        super().__init__(
            table(ids).to(device, dtype),
            grid.positions(config.hidden_size, device).to(dtype),
            KVCache(config, len(rows), length + (patches - 1) * grid.tokens_per_patch, device, dtype),
            torch.tensor(padding, device=device)[:, None] if any(padding) else None,
        )
        self.model = model

    def embed(self, patches: Tensor, first: int) -> Tensor:
        return (self.model.projector(patches) + self.positions[first : first + patches.shape[1]]).flatten(1, 2)

    def rotations(self, count: int, first: int | None) -> tuple[Tensor]:
        steps = torch.arange(self.cache.length, self.cache.length + count, device=self.embeddings.device)
        return (steps[None] if self.padding is None else (steps - self.padding).clamp_min(0),)

    def network(self, embeddings: Tensor, mask: Tensor | None, cache: KVCache | PlacedCache, *at: Tensor) -> Tensor:
        return self.model.backbone(embeddings, *at, mask, cache)
