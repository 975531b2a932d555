"""Keys and values of the past, in memory allocated once per image."""

from __future__ import annotations

import torch
from torch import Tensor

from .class_config import ImageNetConfig
from .text_config import BackboneConfig


class KVCache:
    """A static cache for `batch` sequences of exactly `capacity` tokens. It lives as long as one call.

    Every layer of a pass writes its block behind `length`; `advance` then makes the block part of the past. What has
    not been written is 0: a mask hides it where it is looked at, which would not hide NaN.
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
        """The same memory for one pass over tokens at `places` [T]."""
        return PlacedCache(self._memory, places)


class PlacedCache:
    """A KVCache for one pass whose places are a tensor and whose shapes are the same wherever they are, so that the
    pass can be recorded as a graph: it shows the whole memory, of which the caller's mask chooses. Whoever replays the
    pass advances the KVCache.
    """

    def __init__(self, memory: Tensor, places: Tensor) -> None:
        self._memory = memory
        self._places = places

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache's, but all of the memory comes back."""
        keys, values = self._memory[layer]
        keys.index_copy_(2, self._places, k)
        values.index_copy_(2, self._places, v)
        return keys, values

    def advance(self, count: int) -> None:
        pass
