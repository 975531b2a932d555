"""Copy a layer's weights to the GPU while the layer before computes, by ComfyUI's own prefetch queue.

Without it ComfyUI copies one matrix ahead, with it a whole layer. It needs dynamic memory on a GPU: otherwise ComfyUI
makes no queue, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_patcher
import comfy.model_prefetch
from torch import nn


@contextmanager
def prefetching(
    patcher: comfy.model_patcher.ModelPatcher, stack: nn.Module, wanted: Callable[[], bool]
) -> Iterator[None]:
    """Queue the `layers` of `stack` in their order at each of its passes for which `wanted()`, within the context.

    ComfyUI clears the queue of an interrupted pass after the node.
    """
    is_dynamic = patcher.is_dynamic()
    device = patcher.load_device
    queue = None

    def begin(module: nn.Module, inputs: tuple) -> None:
        nonlocal queue
        options = {"prefetch_dynamic_vbars": is_dynamic and wanted()}
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
