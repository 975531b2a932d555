"""Run a stack of layers whose weights stay in system memory: each is copied to the device just before its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

ALIGNMENT = 64  # bytes, of tensors in a buffer
SLOTS = 2  # one layer is computed while the next is copied


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def pack(tensors: Sequence[Tensor], allocate: Callable[[int], Tensor]) -> None:
    """Move tensors into few buffers of bytes, each a power of two: PyTorch rounds pinned memory up to one, so that
    tensors on their own would take up to twice their size. One tensor after another: no second copy of all exists.
    """
    rest = sum(map(_aligned, tensors))
    buffer, used = allocate(0), 0
    for tensor in tensors:
        size = _aligned(tensor)
        if used + size > len(buffer):
            below = 1 << (rest.bit_length() - 1)
            buffer, used = allocate(max(below, 1 << (size - 1).bit_length())), 0
        place = buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor)
        used, rest = used + size, rest - size


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class LayerStream:
    """Copies of layers on a device, `SLOTS` at a time; the layers themselves stay in system memory.

    The layers must be alike. For a CUDA device they are pinned, and copied on a stream of its own while the one before
    is computed; on others a copy ends before the call returns. After the last layer comes the first.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copies is not None:
            pack(list(_tensors(layers).values()), partial(torch.empty, dtype=torch.uint8, pin_memory=True))
        self._weights = [_tensors(layer) for layer in layers]
        like = self._weights[0]
        self._slots = [{name: torch.empty_like(t, device=device) for name, t in like.items()} for _ in range(SLOTS)]
        self._held: list[int | None] = [None] * SLOTS  # the layer that each slot has

    def fetch(self, index: int) -> dict[str, Tensor]:
        """Return layer `index`'s tensors on the device, valid until the next call but one; begin to copy the next."""
        if index not in self._held:  # the first layer of all, or a run that was stopped in the middle
            self._copy(index, 0)
        slot, following = self._held.index(index), (index + 1) % len(self._weights)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        if following not in self._held:
            self._copy(following, 1 - slot)
        return self._slots[slot]

    def _copy(self, index: int, slot: int) -> None:
        self._held[slot] = index
        if self._copies is not None:  # the slot's last layer is computed on the current stream
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            for name, tensor in self._weights[index].items():
                self._slots[slot][name].copy_(tensor, non_blocking=True)


class StreamedLayers(nn.ModuleList):
    """Layers of a backbone, which iterates over them and calls each; calls run on the device of the stream."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        super().__init__(layers)
        self.stream = LayerStream(nn.ModuleList(layers), device)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter([partial(self._run, index) for index in range(len(self))])

    def _run(self, index: int, *inputs: Any) -> Tensor:
        return functional_call(self[index], self.stream.fetch(index), inputs)
