"""Cache the keys and values of past tokens, in memory allocated once per call."""

from __future__ import annotations

import torch
from torch import Tensor

from .class_config import ImageNetConfig
from .text_config import BackboneConfig


class KVCache:
    """A preallocated cache for `batch` sequences of `capacity` tokens, which lives as long as one call.

    In a pass, every layer writes its block after the first `length` entries; `advance` then adds the block to `length`.
    Unwritten entries are zero, because a masked NaN would still poison the softmax.
    """

    def __init__(
        self,
        config: BackboneConfig | ImageNetConfig,
        batch: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)
        self._memory = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, H_kv, T, D] of one layer; return views of all its keys and values, the new ones last."""
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"KV cache holds {self.capacity} tokens, block ends at {end}"
        keys, values = self._memory[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def at(self, places: Tensor) -> PlacedCache:
        """Return a view of the cache for one pass over tokens at the entries `places` [T]."""
        return PlacedCache(self._memory, places)


class PlacedCache:
    """A view of a KVCache for a pass that is captured as a graph: entries are a tensor, shapes never change.

    Attention sees the whole memory, so the caller masks unwritten entries. The caller of the replayed pass advances the
    KVCache.
    """

    def __init__(self, memory: Tensor, places: Tensor) -> None:
        self._memory = memory
        self._places = places

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v like KVCache.write; return the whole memory of the layer."""
        keys, values = self._memory[layer]
        keys.index_copy_(2, self._places, k)
        values.index_copy_(2, self._places, v)
        return keys, values

    def advance(self, count: int) -> None:
        pass
