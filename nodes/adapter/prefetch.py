"""Weights on their way while the layer before computes: ComfyUI's own prefetch queue, which its video models use.

Without it ComfyUI fetches each weight when its matrix is due, one ahead; with it, a whole layer ahead. It works with
dynamic memory on a GPU alone: elsewhere ComfyUI makes no queue, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_patcher
import comfy.model_prefetch
from torch import nn


@contextmanager
def prefetching(patcher: comfy.model_patcher.ModelPatcher, stack: nn.Module) -> Iterator[None]:
    """While it is entered, each pass of `stack` tells ComfyUI of its `layers` in their order.

    What a pass that was stopped has left, ComfyUI clears away after the node.
    """
    options = {"prefetch_dynamic_vbars": patcher.is_dynamic()}
    device = patcher.load_device
    queue = None

    def begin(module: nn.Module, inputs: tuple) -> None:
        nonlocal queue
        queue = comfy.model_prefetch.make_prefetch_queue(list(module.layers), device, options)

    def next_layer(layer: nn.Module, inputs: tuple) -> None:
        comfy.model_prefetch.prefetch_queue_pop(queue, device, layer)

    def end(module: nn.Module, inputs: tuple, result: object) -> None:
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)

    hooks = [stack.register_forward_pre_hook(begin), stack.register_forward_hook(end)]
    hooks += [layer.register_forward_pre_hook(next_layer) for layer in stack.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
