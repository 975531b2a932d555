"""Stream layers from pinned memory while others compute: the least that a card too small for the model has to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu_sections.setting import Setting
from benchmarks.random_models import Model, fill_randomly

ALIGNED = 256  # bytes, where a kernel may expect a tensor to begin
LAYERS = "backbone.layers."


class Streamed:
    """Layers of a language model that share two places on the device.

    Each is copied from pinned memory while the layer before computes. All of them have the same random weights, which
    are in system memory once: the times are those of a whole model, and the pictures mean nothing.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, dtype: torch.dtype, make: Callable) -> None:
        is_cuda = device.type == "cuda"
        self.layers = layers
        self.side = torch.cuda.Stream(device) if is_cuda else None
        named = layers[0].named_parameters()
        one = [(name, make(f"{LAYERS}0.{name}", weight, device, dtype)) for name, weight in named]
        self.size = sum(-(-weight.nbytes // ALIGNED) * ALIGNED for _, weight in one)
        self.source = torch.empty(self.size, dtype=torch.uint8, pin_memory=is_cuda)
        self.places = [torch.empty(self.size, dtype=torch.uint8, device=device) for _ in range(2)]
        for _, weight, view in self._views(one, self.source):
            view.copy_(weight)
        for number, layer in enumerate(layers):
            for name, _, view in self._views(one, self.places[number % 2]):
                owner, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))
            layer.register_forward_pre_hook(partial(self._begin, number))
            layer.register_forward_hook(partial(self._end, number))
        self.copied = [torch.cuda.Event() if is_cuda else None for _ in range(2)]
        self.used = [torch.cuda.Event() if is_cuda else None for _ in range(2)]

    def _views(self, named: list[tuple[str, Tensor]], place: Tensor):
        start = 0
        for name, weight in named:
            yield name, weight, place[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            start += -(-weight.nbytes // ALIGNED) * ALIGNED

    def _begin(self, number: int, *_: object) -> None:
        if number == 0:
            if self.side is not None:  # a pass is timed alone: none of it overlaps with what came before
                self.side.wait_stream(torch.cuda.current_stream())
            self._copy(0)
        if number + 1 < len(self.layers):
            self._copy(number + 1)
        if self.side is not None:
            torch.cuda.current_stream().wait_event(self.copied[number % 2])

    def _end(self, number: int, *_: object) -> None:
        if self.side is not None:
            self.used[number % 2].record()

    def _copy(self, number: int) -> None:
        """Copy a layer once the one before it in the same place has computed."""
        if self.side is not None:
            self.side.wait_event(self.used[number % 2])
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            self.places[number % 2].copy_(self.source, non_blocking=True)
            if self.side is not None:
                self.copied[number % 2].record()


def fill_and_stream(setting: Setting, model: Model, resident: int, make: Callable) -> int:
    """Fill a text model; its layers after the first `resident` ones are streamed. Return the bytes of a pass."""
    layers = list(model.backbone.layers)[resident:]
    left_out = tuple(f"{LAYERS}{resident + number}." for number in range(len(layers)))

    def of_resident(name: str, *arguments) -> Tensor | None:
        return None if name.startswith(left_out) else make(name, *arguments)

    streamed = Streamed(layers, setting.device, setting.dtype, make) if layers else None
    fill_randomly(model, setting.device, setting.dtype, of_resident)
    return streamed.size * len(layers) if streamed else 0
