"""The text-to-image model: backbone, projector and head."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, attention
from .backbone import Backbone
from .config import BitDanceConfig
from .context import TextContext
from .head import DiffusionHead
from .patches import Grid


class Projector(nn.Module):
    """Token bits [..., C] in {-1, +1} -> embeddings of the backbone's width [..., D]."""

    def __init__(self, bits: int, width: int, operations, device, dtype) -> None:
        super().__init__()
        self.fc1 = operations.Linear(bits, width, device=device, dtype=dtype)
        self.fc2 = operations.Linear(width, width, device=device, dtype=dtype)

    def forward(self, bits: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(bits), approximate="tanh"))


class BitDance(nn.Module):
    """Three parts that `generate` drives. It places nothing: the embedding table may lie in system memory."""

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

    def context(
        self,
        branches: Sequence[Sequence[int]],
        num_images: int,
        grid: Grid,
        patches: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> TextContext:
        """To draw the first `patches` of a grid; each branch is token ids, the same for every image, that end in the
        width token and the queries.
        """
        rows = [ids for ids in branches for _ in range(num_images)]
        return TextContext(self, rows, grid, patches, device, dtype)
