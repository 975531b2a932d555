"""CUDA graphs in ComfyUI: only of weights that it leaves where they are and as they are."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_patcher

from ...bitdance_core.checkpoints.tensor_names import HEAD, LANGUAGE_MODEL
from ...bitdance_core.model.graphs import Graphs
from .model import BitDanceHead


def graphs_of(patchers: Iterable[comfy.model_patcher.ModelPatcher]) -> Graphs:
    """For the loaded parts of a MODEL. Of a part whose weights may move, the log says why it has no graph."""
    graphs = Graphs()
    for patcher in patchers:
        if (reason := why_not(patcher)) is not None:
            graphs.refuse(HEAD if isinstance(patcher.model, BitDanceHead) else LANGUAGE_MODEL, reason)
    return graphs


def why_not(patcher: comfy.model_patcher.ModelPatcher) -> str | None:
    """What keeps a loaded part's weights from being recorded by their addresses; None: nothing."""
    device, precision = patcher.load_device, patcher.model.precision
    if device.type != "cuda":
        return f"it runs on {device}"
    if patcher.is_dynamic():
        return "ComfyUI's dynamic memory may move its weights; --highvram or --disable-dynamic-vram would leave them"
    if precision.cast is not None:
        return f"its weights are cast to {precision.cast} at each use; another weight_dtype would not be"
    if patcher.model.model_lowvram:
        return "not all of it is on the GPU"
    return None
