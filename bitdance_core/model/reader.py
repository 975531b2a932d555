"""Run the backbone over a batch: prefill the prompt, then append drawn patches. Shared by text and class models."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..parts import LANGUAGE_MODEL
from .graphs import Graphs
from .kv_cache import KVCache, PlacedCache


class Reader(ABC):
    """A batch of sequences (guidance branches x images) of equal length, with their KV cache.

    A sequence ends in the image opening, a block of P tokens whose hidden states condition patch 0; each drawn patch is
    the next block.
    """

    def __init__(self, embeddings: Tensor, positions: Tensor, cache: KVCache, padding: Tensor | None = None) -> None:
        """Take embeddings [rows, T, D], opening last, and the number of padding tokens in front of each row [rows, 1].

        `positions` [patches, P, D] is added to the hidden states that condition the head.
        """
        self.embeddings = embeddings
        self.positions = positions
        self.cache = cache
        self.padding = padding
        self.block = positions.shape[1]

    @abstractmethod
    def embed(self, patches: Tensor, first: int) -> Tensor:
        """Embed patches [n, k, P, C], the first of which is patch `first` of the grid, as [n, k * P, D]."""

    @abstractmethod
    def rotations(self, count: int, first: int | None) -> tuple[Tensor, ...]:
        """Positions of the next `count` tokens in the network's own form.

        `first` is the first patch, or None for prompt tokens.
        """

    @abstractmethod
    def network(self, embeddings: Tensor, mask: Tensor | None, cache: KVCache | PlacedCache, *at: Tensor) -> Tensor:
        """Return hidden states of embeddings at positions `at`, whose keys and values join the cache."""

    def prefill(self) -> Tensor:
        """Read the prompt causally, then the opening as one block; return its hidden states [rows, P, D]."""
        prefix = self.embeddings[:, : -self.block]
        if prefix.shape[1]:
            steps = torch.arange(prefix.shape[1], device=prefix.device)
            mask = steps[:, None] >= steps
            if self.padding is not None:
                # a padding token sees itself alone: nothing reads it, but attention without any key would be NaN
                itself = torch.eye(len(steps), dtype=torch.bool, device=steps.device)
                mask = (mask & (steps >= self.padding)[:, None] | itself)[:, None]
            self.network(prefix, mask, self.cache, *self.rotations(len(steps), None))
        return self._read(self.embeddings[:, -self.block :], None)

    def read(self, patches: Tensor, first: int, graphs: Graphs | None = None) -> Tensor:
        """Read patches [n, k, P, C] from patch `first` on in one pass; return hidden states of the last [rows, P, D].

        n is the number of rows, or of images where all branches read the same. With `graphs` the reading of one patch
        is a CUDA graph, whose result is overwritten when the next patch is read.
        """
        embeddings = self.embed(patches, first)
        embeddings = embeddings.repeat(len(self.embeddings) // len(embeddings), 1, 1)
        if graphs is None or LANGUAGE_MODEL in graphs.reasons or embeddings.shape[1] > self.block:
            return self._read(embeddings, first)
        inputs = embeddings, *self._whole_cache(), *self.rotations(self.block, first)
        hidden = graphs.run(LANGUAGE_MODEL, self._read_placed, inputs)
        self.cache.advance(self.block)
        return hidden

    def _read(self, embeddings: Tensor, first: int | None) -> Tensor:
        """Read blocks, each of which sees the past, the blocks before it and, in both directions, itself."""
        past, count = self.cache.length, embeddings.shape[1]
        mask = None
        if self.padding is not None or count > self.block:
            keys = torch.arange(past + count, device=embeddings.device)
            ends = past + (keys[:count] // self.block + 1) * self.block
            mask = (keys < ends[:, None])[None] if count > self.block else torch.ones_like(keys[None, None], dtype=bool)
            if self.padding is not None:
                mask = mask & (keys >= self.padding)[:, None]
            mask = mask[:, None]
        return self.network(embeddings, mask, self.cache, *self.rotations(count, first))[:, -self.block :]

    def _whole_cache(self) -> tuple[Tensor, Tensor]:
        """Return the next block's mask over the whole cache [rows or 1, 1, 1, capacity], and its place in it [P]."""
        past, keys = self.cache.length, torch.arange(self.cache.capacity, device=self.embeddings.device)
        mask = (keys < past + self.block)[None]
        if self.padding is not None:
            mask = mask & (keys >= self.padding)
        return mask[:, None, None], keys[past : past + self.block]

    def _read_placed(self, embeddings: Tensor, mask: Tensor, place: Tensor, *at: Tensor) -> Tensor:
        return self.network(embeddings, mask, self.cache.at(place), *at)
