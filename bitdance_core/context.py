"""What a network has read of all rows, and how it reads on: the one interface of both kinds of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .parts import LANGUAGE_MODEL
from .graphs import Graphs
from .kv_cache import KVCache, PlacedCache
from .patches import Grid
from .transformer import Rope, all_rows, rope_tables

if TYPE_CHECKING:  # the models make these
    from .imagenet import ImageNetModel
    from .model import BitDance


class Context(ABC):
    """Rows (guidance branches x images) of one length, and the network's memory of them.

    A row ends in the opening of its picture, a block of P tokens whose hidden states condition patch 0; each patch
    that was drawn is the next block.
    """

    def __init__(self, embeddings: Tensor, positions: Tensor, cache: KVCache, padding: Tensor | None = None) -> None:
        """embeddings [rows, T, D] with the opening last; `padding` counts each row's meaningless first [rows, 1].

        `positions` [patches, P, D] is what conditions the head beside the hidden states.
        """
        self.embeddings = embeddings
        self.positions = positions
        self.cache = cache
        self.padding = padding
        self.block = positions.shape[1]

    @abstractmethod
    def embed(self, patches: Tensor, first: int) -> Tensor:
        """Embeddings [n, k * P, D] of patches [n, k, P, C], the grid's from `first` on."""

    @abstractmethod
    def places(self, count: int, first: int | None) -> tuple[Tensor, ...]:
        """Where the next `count` tokens are, as the network takes it; `first` as in `embed`, None: in no patch."""

    @abstractmethod
    def network(self, embeddings: Tensor, mask: Tensor | None, cache: KVCache | PlacedCache, *places: Tensor) -> Tensor:
        """Hidden states of embeddings, which join the cache."""

    def prefill(self) -> Tensor:
        """Read everything but the opening causally, then that; hidden states [rows, P, D]."""
        prefix = self.embeddings[:, : -self.block]
        if prefix.shape[1]:
            steps = torch.arange(prefix.shape[1], device=prefix.device)
            mask = steps[:, None] >= steps
            if self.padding is not None:
                # padding looks at itself alone: nobody reads it, but a row of attention without any key would be NaN
                itself = torch.eye(len(steps), dtype=torch.bool, device=steps.device)
                mask = (mask & (steps >= self.padding)[:, None] | itself)[:, None]
            self.network(prefix, mask, self.cache, *self.places(len(steps), None))
        return self._read(self.embeddings[:, -self.block :], None)

    def read(self, patches: Tensor, first: int, graphs: Graphs | None = None) -> Tensor:
        """Read patches [n, k, P, C], the grid's from `first` on, in one pass; hidden states of the last [rows, P, D].

        n is the count of rows, or of images where all branches read the same. With `graphs` the reading of one patch is
        a CUDA graph, and its result is good until the next patch is read.
        """
        embeddings = self.embed(patches, first)
        embeddings = embeddings.repeat(len(self.embeddings) // len(embeddings), 1, 1)
        if graphs is None or LANGUAGE_MODEL in graphs.reasons or embeddings.shape[1] > self.block:
            return self._read(embeddings, first)
        inputs = embeddings, *self._whole_memory(), *self.places(self.block, first)
        hidden = graphs.run(LANGUAGE_MODEL, self._read_placed, inputs)
        self.cache.advance(self.block)
        return hidden

    def _read(self, embeddings: Tensor, first: int | None) -> Tensor:
        """Each block sees the past, the blocks before it and, in both directions, itself."""
        past, count = self.cache.length, embeddings.shape[1]
        mask = None
        if self.padding is not None or count > self.block:
            keys = torch.arange(past + count, device=embeddings.device)
            ends = past + (keys[:count] // self.block + 1) * self.block
            mask = (keys < ends[:, None])[None] if count > self.block else torch.ones_like(keys[None, None], dtype=bool)
            if self.padding is not None:
                mask = mask & (keys >= self.padding)[:, None]
            mask = mask[:, None]
        return self.network(embeddings, mask, self.cache, *self.places(count, first))[:, -self.block :]

    def _whole_memory(self) -> tuple[Tensor, Tensor]:
        """What the next block sees of all that the cache can hold [rows or 1, 1, 1, capacity], and where in it the
        block is [P].
        """
        past, keys = self.cache.length, torch.arange(self.cache.capacity, device=self.embeddings.device)
        mask = (keys < past + self.block)[None]
        if self.padding is not None:
            mask = mask & (keys >= self.padding)
        return mask[:, None, None], keys[past : past + self.block]

    def _read_placed(self, embeddings: Tensor, mask: Tensor, at: Tensor, *places: Tensor) -> Tensor:
        return self.network(embeddings, mask, self.cache.at(at), *places)


class TextContext(Context):
    """Token ids, left-padded to one length.

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
        # looked up where the table lies, which may be system memory
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

    def places(self, count: int, first: int | None) -> tuple[Tensor]:
        steps = torch.arange(self.cache.length, self.cache.length + count, device=self.embeddings.device)
        return (steps[None] if self.padding is None else (steps - self.padding).clamp_min(0),)

    def network(self, embeddings: Tensor, mask: Tensor | None, cache: KVCache | PlacedCache, *places: Tensor) -> Tensor:
        return self.model.backbone(embeddings, *places, mask, cache)


class ClassContext(Context):
    """A class for each row: its tokens, then the queries."""

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

    def places(self, count: int, first: int | None) -> Rope:
        if first is None:  # what is not in the picture is not turned
            nowhere = torch.zeros(count, 2, device=self.embeddings.device)
            return rope_tables(nowhere, self.model.config.head_dim, self.embeddings.dtype)
        start = first * self.block
        return tuple(table[start : start + count] for table in self.rope)

    def network(self, embeddings: Tensor, mask: Tensor | None, cache: KVCache | PlacedCache, *places: Tensor) -> Tensor:
        return self.model(embeddings, places, mask, cache)
